"""How far a long step is: a bar on a terminal; elsewhere, as in a log file or in continuous integration, a plain line every ten seconds at most.

Bars and lines go to standard error, what a command has to tell goes to standard output.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text


T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """The progress of one step, shown from `__enter__` to `__exit__`.

    Args:
        title: what is being done, such as "embedding texts".
        total: how many units there are; None if nobody knows. May be set later.
        unit: what is counted, in the plural.
        shown: False shows nothing.
        completed: units that were done before, which say nothing about the speed.
        lines: whether a line is written now and then where there is no terminal.

    Attributes:
        note: what to show beside the bar, such as the loss.
    """

    def __init__(
        self,
        title: str,
        total: float | None,
        unit: str,
        *,
        completed: float = 0,
        shown: bool = True,
        lines: bool = True,
    ):
        self.title, self.total, self.unit, self.note = title, total, unit, ""
        self.completed = self._before = completed
        self._shown, self._lines = shown, lines
        self._bar: Any = None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        self._started = self._last_line = time.monotonic()
        if self._shown and on_terminal():
            self._bar = _bars.add(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            _bars.remove(self._bar)
            self._bar = None

    def advance(self, count: float = 1) -> None:
        """`count` more units are done."""
        self.completed += count
        if self._bar is not None:
            _bars.update(self._bar, self)
        elif self._shown and self._lines and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.write(f"{self.title}: {self.described(self._last_line - self._started)}")

    def write(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self._shown:
            print(line, file=sys.stderr, flush=True)

    def described(self, seconds: float) -> str:
        """How far the step is after so many seconds, in words."""
        speed = (self.completed - self._before) / seconds if seconds > 0 else 0.0
        done = f"{self.completed:,.0f} {self.unit}"
        if self.total is not None:
            done = f"{self.completed:,.0f} of {self.total:,.0f} {self.unit}"
        parts = [done, *([f"{speed:,.1f} {self.unit}/s"] if speed else [])]
        if speed and self.total is not None:
            parts.append(f"{duration((self.total - self.completed) / speed)} left")
        return ", ".join([*parts, *([self.note] if self.note else [])])


def track(items: Iterable[T], title: str, unit: str, *, total: int | None = None, shown: bool = True) -> Iterator[T]:
    """The `items` one after the other, with their progress shown."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(title, total, unit, shown=shown) as progress:
        for item in items:
            yield item
            progress.advance()


def on_terminal() -> bool:
    """Whether bars can be shown: standard error is a terminal that can move its cursor."""
    console = Console(stderr=True)
    return console.is_terminal and not console.is_dumb_terminal


def duration(seconds: float) -> str:
    """Such as "0:05" or "1:02:03"."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Described(ProgressColumn):
    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        return Text(task.fields["step"].described(task.elapsed or 0.0))


class _Bars:
    """The bars at hand, one below the other: only one thing at a time can move the terminal's cursor."""

    def __init__(self) -> None:
        self._bars: Bars | None = None

    def add(self, step: Progress) -> Any:
        if self._bars is None:
            # Where standard output is a file, it must stay one while a bar is shown.
            self._bars = Bars(
                "{task.description}",
                BarColumn(bar_width=None, table_column=Column(max_width=24, ratio=1)),  # shrinks on a narrow terminal
                _Described(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._bars.start()
        return self._bars.add_task(step.title, total=step.total, completed=int(step.completed), step=step)

    def update(self, bar: Any, step: Progress) -> None:
        self._bars.update(bar, completed=step.completed, total=step.total)

    def remove(self, bar: Any) -> None:
        self._bars.remove_task(bar)
        if not self._bars.tasks:
            self._bars.stop()
            self._bars = None


_bars = _Bars()
