"""Options that several commands have, and the table of what was found or done that two of them print."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer


DEVICE = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1. Default: the GPU if there is one.")]
ATTENTION = Annotated[
    str | None,
    typer.Option(help="Such as sdpa, eager or flash_attention_2. Texts are packed on a GPU with any of them."),
]
TOKEN_BUDGET = Annotated[
    int | None, typer.Option(min=1, help="Padded tokens in a batch. Default: 1,000 on the CPU, 16,384 on a GPU.")
]


def print_facts(title: str, subject: str | Path, facts: Iterable[tuple[str, str]]) -> None:
    """Print names and values as a table; neither is read as markup, as they may come from anybody's files."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(title, Column(Text(str(subject))))
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    Console().print(table)
