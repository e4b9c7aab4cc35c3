"""A training as one growing table: step, the parts of the loss, speed and time left, in place of the raw logs of `Trainer`."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from .progress import SECONDS_BETWEEN_LINES, Progress, duration


# What is logged besides the parts of the loss, and has no column or another place.
_NO_COLUMN = ("loss", "grad_norm", "learning_rate", "epoch", "samples_per_second")
# All columns of stage 2 fit into 80 characters.
_WIDTH = 8
_SHORT_TITLES = {"logit_scale": "scale", "logit_bias": "bias", "data_wait": "wait"}


@contextmanager
def training_table(trainer: Trainer) -> Iterator[None]:
    """Show what `trainer` does in this block as a table on standard output, a row every ten seconds at most and one at the end, with a bar below it
    on a terminal.
    """
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    table = _Table(shown=trainer.is_world_process_zero())
    trainer.add_callback(table)
    try:
        yield
        table.finish()
    finally:
        table.close()
        trainer.remove_callback(table)


class _Table(TrainerCallback):
    def __init__(self, shown: bool):
        self.shown = shown
        self._columns: list[str] = []  # of the logs
        self._titles: list[str] = []
        self._bars: list[Progress] = []
        self._row = self._held_out = ""  # not yet printed
        self._printed = self._printed_held_out = -SECONDS_BETWEEN_LINES
        self._started, self._first_step = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step
        if state.logging_steps > state.max_steps:  # Transformers' 500 would leave a short training without a row
            state.logging_steps = max(state.max_steps // 10, 1)
        completed = state.global_step
        self._open(Progress("training", state.max_steps, "steps", completed=completed, shown=self.shown, lines=False))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bars[0].advance()

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not self.shown:
            return
        if self._bars[-1].title != "evaluating":
            total = len(eval_dataloader) if has_length(eval_dataloader) else None  # a stream has none
            self._open(Progress("evaluating", total, "batches", shown=self.shown))
        self._bars[-1].advance()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **kwargs: Any) -> None:
        if self._bars[-1].title == "evaluating":
            self._bars.pop().__exit__()
        shown = [
            f"{name.removeprefix('eval_')} {_number(value)}" for name, value in metrics.items() if _is_result(name)
        ]
        self._held_out = f"  held out at step {state.global_step:,}: {', '.join(shown)}"
        if time.monotonic() - self._printed_held_out >= SECONDS_BETWEEN_LINES:
            self._print_held_out()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        if not self._columns:
            self._columns = ["loss", *(name for name in logs if name not in _NO_COLUMN)]
            titles = [_SHORT_TITLES.get(name, name.removesuffix("_loss").replace("_", " ")) for name in self._columns]
            self._titles = ["step", *titles, "rows/s", "left"]
            self._print(self._aligned(self._titles))
        self._bars[0].note = f"loss {_number(logs['loss'])}"
        seconds = (time.monotonic() - self._started) / max(state.global_step - self._first_step, 1)
        rows = args.train_batch_size * args.world_size / seconds
        values = [_number(logs[name], digits=3) if name in logs else "" for name in self._columns]
        left = duration((state.max_steps - state.global_step) * seconds)
        self._row = self._aligned([f"{state.global_step:,}", *values, _number(rows, digits=3), left])
        if time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print_row()

    def finish(self) -> None:
        """Print what came since the last lines."""
        self._print_row()
        self._print_held_out()

    def close(self) -> None:
        while self._bars:
            self._bars.pop().__exit__()

    def _open(self, bar: Progress) -> None:
        self._bars.append(bar.__enter__())

    def _aligned(self, values: list[str]) -> str:
        return "".join(
            f"{value:>{max(_WIDTH, len(title) + 2)}}" for value, title in zip(values, self._titles, strict=True)
        )

    def _print_row(self) -> None:
        if self._row:
            self._print(self._row)
            self._row, self._printed = "", time.monotonic()

    def _print_held_out(self) -> None:
        if self._held_out:
            self._print(self._held_out)
            self._held_out, self._printed_held_out = "", time.monotonic()

    def _print(self, line: str) -> None:
        if self.shown:
            print(line, flush=True)


def _is_result(name: str) -> bool:
    return "r@" in name or name == "eval_loss"


def _number(value: float, digits: int = 4) -> str:
    """Significant digits, by default four: 0.0123, 1.234, 123.4, 12,345."""
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
