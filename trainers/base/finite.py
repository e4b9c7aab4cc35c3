"""Training stops at the first loss or gradient that is NaN or infinite: what happened, in which step, on which rows, in which parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from modeling_proclip.finite_weights import check_finite, is_finite
from trainers.text_store.encoding import shorten

from .sharding import local_part


# float16's loss scale starts at 65,536 and is halved at every overflow. Below this one nothing is left to halve (fairseq stops there too).
MIN_LOSS_SCALE = 1e-4

TEXTS = "row_texts"  # key of a batch: the caption of each row, for messages


class WithTexts:
    """Batches of `collator`, with the captions of their rows under [`TEXTS`], so that an error can name them: the first in `column`."""

    def __init__(self, collator: Any, column: str):
        self.collator, self.column = collator, column

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)  # which says what is wrong with a row
        texts = [row[self.column] for row in rows]
        return {**batch, TEXTS: [text if isinstance(text, str) else text[0] for text in texts]}


def finite_parts(loss: torch.Tensor, gradients: Sequence[torch.Tensor]) -> tuple[bool, bool]:
    """Whether a loss `()` is finite, and whether the norm of all gradients is; waits for the device once."""
    norm = _norm(gradients).to(loss.device, torch.float32) if gradients else loss.new_zeros((), dtype=torch.float32)
    of_loss, of_gradients = torch.isfinite(torch.stack([loss.detach().float(), norm])).tolist()
    return of_loss, of_gradients


def all_finite(loss: torch.Tensor, gradients: Sequence[torch.Tensor]) -> bool:
    """Whether a loss `()` and the norm of all gradients are finite; waits for the device once."""
    return all(finite_parts(loss, gradients))


def check_trained(model: nn.Module, what: str) -> None:
    """Raises ValueError, beginning with `what` is refused because of it, if a trained parameter holds NaN or infinity. All processes have to call it, as each
    holds a part of sharded parameters, and all of them raise.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    error = None
    try:
        check_finite({name: local_part(parameter) for name, parameter in trained.items()}, what)
    except ValueError as found:
        error = found
    if any(isinstance(parameter, DTensor) for parameter in trained.values()):
        error = next((found for found in gather_object([error]) if found is not None), None)
    if error is not None:
        raise error


def rows_not_finite(batch: Mapping[str, Any]) -> dict[str, list[int]]:
    """Name of a tensor of `batch` -> its rows that hold NaN or infinity; of tensors that have such rows only."""
    return {
        name: rows
        for name, values in batch.items()
        if isinstance(values, torch.Tensor) and (rows := [i for i, row in enumerate(values) if not is_finite(row)])
    }


def explain_to_all(explanation: str, batch: Mapping[str, Any]) -> str:
    """The explanation of a process that found what is wrong in the rows of its `batch`, or of the first process if none did. All processes have to call it."""
    found = gather_object([(bool(rows_not_finite(batch)), explanation)])
    return next((text for in_rows, text in found if in_rows), found[0][1])


def explain(
    when: str, loss: torch.Tensor, model: nn.Module, batch: Mapping[str, Any], texts: Sequence[str], process: int
) -> str:
    """Why a batch gave a loss or a gradient that is not finite, as one line. Reads all weights and gradients, so call it only then.

    Args:
        when: what was being done, such as "step 3".
        loss: `()`.
        model: with the gradients of the batch, and the weights that it had.
        batch: what the model read; of its tensors the first dimension is the rows.
        texts: the captions of the rows, if they are known.
        process: process of the batch.
    """
    if torch.isfinite(loss):
        facts = [f"{when}: the gradient is not finite, though the loss is {loss.item():.6g}"]
    else:
        facts = [f"{when}: the loss is {loss.item()}"]
    bad_rows = rows_not_finite(batch)
    for name, rows in bad_rows.items():
        facts.append(f"{name} holds NaN or infinity in {_rows(rows, texts)} of process {process}'s batch")
    if not bad_rows and texts:
        facts.append(f"the batch of process {process} is {_rows(range(len(texts)), texts)}")
    weights = [name for name, parameter in model.named_parameters() if not is_finite(local_part(parameter))]
    if weights:
        facts.append(f"before it, NaN or infinity was in {_names(weights)} already")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad_gradients = [name for name, gradient in gradients.items() if not is_finite(local_part(gradient))]
    if bad_gradients:
        facts.append(f"the gradient is not finite in {_names(bad_gradients)}")
    elif gradients and torch.isfinite(loss):
        facts.append("its norm is larger than float32 holds")
    remedy = (
        "Look at these rows" if bad_rows else "Lower learning_rate, or look at the model that training started from"
    )
    return f"{'; '.join(facts)}. {remedy}."


def _norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return get_total_norm(gradients)
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    return get_total_norm([get_total_norm(sharded).full_tensor(), *whole])


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} other parameters" if len(names) > 3 else "")


def _rows(rows: Sequence[int], texts: Sequence[str]) -> str:
    shown = [f"row {row}" + (f" ({shorten(texts[row])})" if texts else "") for row in rows[:3]]
    return ", ".join(shown) + (f" and {len(rows) - 3} other rows" if len(rows) > 3 else "")
