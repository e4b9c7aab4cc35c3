"""The direction of imports, as [tool.importlinter] in pyproject.toml has it."""

import sys

import pytest

from tests.environments import REPOSITORY, run


tomllib = pytest.importorskip("tomllib")  # Python 3.11
PYPROJECT = REPOSITORY / "pyproject.toml"


def test_imports_point_down_and_make_no_circle():
    # In a process of its own: import-linter switches off the loggers that are there.
    done = run(
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
        "--no-cache",
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout


def test_every_room_has_its_floor():
    (contract,) = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
    floors = {room for layer in contract["layers"] for room in layer.split(" | ")}
    modules = [
        path.parent if path.name == "__init__.py" else path.with_suffix("")
        for path in (REPOSITORY / "trainers").glob("**/*.py")
    ]
    rooms = {".".join(path.relative_to(REPOSITORY).parts[:2]) for path in modules} - {"trainers"}
    assert rooms <= floors
    assert len(list((REPOSITORY / "trainers").glob("*.py"))) <= 3
