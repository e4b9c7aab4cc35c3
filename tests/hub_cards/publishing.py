"""What the tests of `proclip publish` do: call it, and change what it finds."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from trainers.cli import app


def run(*arguments: str | Path) -> Result:
    """`proclip publish` with these arguments."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["publish", *map(str, arguments)])


def edit(file: Path, **values: Any) -> None:
    """Changes values of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
