"""MkDocs hook: the page of the command line is written from the commands' own help."""

import re
from typing import Any

import typer.main
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from trainers.cli import app


def on_files(files: Files, config: Any) -> Files:
    """Add `reference/commands.md`, as `typer trainers.cli utils docs` would print it."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="proclip")
    text = get_docs_for_click(obj=command, ctx=context, name="proclip", title="Command line")
    text = re.sub(
        r"\*\*Commands\*\*:.*?(?=\n## )", "", text, flags=re.DOTALL
    )  # their first words; the table of contents has them
    files.append(File.generated(config, "reference/commands.md", content=text))
    return files
