"""How the `proclip` command reports errors, whichever sub-command they come from."""

import pytest
import typer
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner

from trainers import cli
from trainers.recipe.files import RecipeError


@pytest.fixture
def run(monkeypatch):
    """`run(error, *options)` runs a sub-command that raises `error`, in an application made as `proclip` is."""
    monkeypatch.delenv("PROCLIP_TRACEBACK", raising=False)

    def call(error: BaseException, *options: str, env: dict[str, str] | None = None):
        app = typer.Typer(cls=cli.OneLineErrors)
        app.callback()(cli.main)

        @app.command()
        def fail() -> None:
            raise error

        return CliRunner().invoke(app, [*options, "fail"], env=env)

    return call


@pytest.mark.parametrize("error", [ValueError("captions.txt: line 3 is empty"), FileNotFoundError("no captions.txt")])
def test_refused_input_is_one_line(run, error):
    result = run(error)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"error: {error}\n")


def test_errors_of_libraries_in_several_lines_become_one(run):
    result = run(OSError("We couldn't connect to the Hub.\n  Check your connection.\n"))
    assert result.stderr == "error: We couldn't connect to the Hub. Check your connection.\n"


@pytest.mark.parametrize("message", ["row 3 of pairs.parquet: a broken image", "two\nlines"])
def test_errors_in_data_workers_are_as_short_as_elsewhere(run, message):
    class Refuses(Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, i: int):
            try:
                raise OSError("cannot identify image file")
            except OSError as error:
                raise RecipeError(message) from error

    with pytest.raises(ValueError, match="Original Traceback") as raised:
        list(DataLoader(Refuses(), num_workers=1))
    assert run(raised.value).stderr == f"error: {message.replace(chr(10), ' ')}\n"


@pytest.mark.parametrize(
    ("environment", "waits"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "0"}, False),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "1"}, True),  # the launcher ends it meanwhile if the first failed too
        ({"RANK": "1"}, False),  # which nobody would end
    ],
)
def test_an_error_of_all_launched_processes_is_reported_once(run, monkeypatch, environment, waits):
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    assert run(ValueError("no"), env=environment).stderr == "error: no\n"
    assert bool(waited) == waits


def test_missing_module_names_its_extra(run):
    result = run(ModuleNotFoundError("No module named 'emoji'", name="emoji"))
    assert (
        result.stderr
        == "error: No module named 'emoji'; install it by: pip install \"proclip-transformers[quickstart]\"\n"
    )
    assert run(ModuleNotFoundError("No module named 'x'", name="x")).stderr == "error: No module named 'x'\n"


def test_error_without_message_names_its_type(run):
    assert run(ValueError()).stderr == "error: ValueError\n"


def test_traceback_option_and_variable_let_the_error_through(run):
    error = ValueError("captions.txt: line 3 is empty")
    assert run(error, "--traceback").exception is error
    assert run(error, env={"PROCLIP_TRACEBACK": "1"}).exception is error


def test_defects_keep_their_traceback(run):
    # An AttributeError is a defect of the program, not refused input: one line would hide where.
    error = AttributeError("'NoneType' object has no attribute 'shape'")
    assert run(error).exception is error


def test_control_c_is_one_line(run):
    result = run(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("arguments", [["no-such-command"], ["--no-such-option"]])
def test_unknown_names_are_refused(arguments):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr
