"""Gradient caching: the exact loss over a whole batch in the memory of one micro-batch (Gao et al., arXiv 2101.06983).

A contrastive loss compares all rows of a batch, so its gradient is not the mean of the micro-batches' gradients. But it reaches the
encoders through the embeddings alone, and those are small:

1. embed all micro-batches without gradient;
2. compute the loss and its gradient on the joined embeddings;
3. embed the micro-batches once more, now with gradient, and send each one the gradient of its own embeddings.

It costs one more forward pass, and is exact: both passes see the same random state, so dropout drops the same.
"""

import contextlib
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from trainers.compute.precision import at_least_float32

from .sharding import rounds_together
from .zero import step_left_out


class MicroBatchSequence(Protocol):
    """A batch in parts: a list of them, or what makes them anew in each iteration."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


def cached_backward(
    embed: Callable[[Any], tuple[torch.Tensor, ...]],
    micro_batches: MicroBatchSequence,
    loss_fn: Callable[..., torch.Tensor],
    *,
    accelerator: Accelerator,
    model: nn.Module,
) -> torch.Tensor:
    """Does what `loss = loss_fn(*embed(whole batch)); accelerator.backward(loss)` does, in the memory of one micro-batch.

    Gradients are added to `.grad` of the parameters and averaged over the processes, as by any backward pass, also those of parameters that
    only `loss_fn` uses, such as a logit scale. Autocast and float16's gradient scaling happen in here: call it outside
    `accelerator.autocast()`.

    Args:
        embed: maps a micro-batch to a tuple of embeddings, each `(rows, dim)`; called twice for every micro-batch, first without and then
            with gradient. It calls `model`, the wrapped one. All of its randomness must come from torch.
        micro_batches: the batch in parts, one after the other, at least one; they are iterated over twice. Processes may have different
            numbers of them. Under FSDP and DeepSpeed, whose processes run them together, those with fewer run their last one again, without effect.
        loss_fn: maps the joined embeddings `(batch_size, dim)`, float32 or float64, to the loss `()`; it may gather them from all
            processes. Called once.
        accelerator: that of the trainer.
        model: what `accelerator.prepare` returned.

    Returns:
        The loss `()`, detached.

    Raises:
        ValueError: If there are no micro-batches.
    """
    if not len(micro_batches):
        raise ValueError("There are no micro-batches to train on.")
    num_rounds = rounds_together(accelerator, len(micro_batches))
    random_states, parts = [], []
    for micro_batch in _in_rounds(micro_batches, num_rounds):
        random_states.append(_RandomState(accelerator.device))
        with torch.no_grad(), accelerator.autocast():
            parts.append(embed(micro_batch))
    del parts[len(micro_batches) :]
    after_first_pass = _RandomState(accelerator.device)

    # At least float32, so that gradients are not rounded on their way.
    joined = [at_least_float32(torch.cat(side)).requires_grad_() for side in zip(*parts, strict=True)]
    rows = [len(part[0]) for part in parts]
    del parts
    loss = loss_fn(*joined)
    # Not loss.backward(): DDP must see the gradient of every parameter, also of those that the loss uses directly, in the last
    # micro-batch's backward pass and only there.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(loss, [*joined, *parameters], allow_unused=True)
    embed_grads = [
        (torch.zeros_like(side) if grad is None else grad).split(rows)
        for side, grad in zip(joined, grads[: len(joined)], strict=True)
    ]
    direct = [(p, g) for p, g in zip(parameters, grads[len(joined) :], strict=True) if g is not None]
    loss = loss.detach()
    del joined, grads

    for i, micro_batch in enumerate(_in_rounds(micro_batches, num_rounds)):
        last = i == num_rounds - 1
        with contextlib.nullcontext() if last else step_left_out(accelerator, model):
            random_states[i].restore()
            with accelerator.autocast():
                embeds = embed(micro_batch)
            # It has the same gradient as the loss: d/dw sum(e(w) g) = g de/dw.
            own = [grad[i] if i < len(rows) else torch.zeros_like(grad[-1]) for grad in embed_grads]
            surrogate = sum((at_least_float32(e) * grad).sum() for e, grad in zip(embeds, own, strict=True))
            if last:
                surrogate = surrogate + sum((parameter * grad).sum() for parameter, grad in direct)
            accelerator.backward(surrogate)
    # As after a single pass, also for what a data worker or a callback draws next.
    after_first_pass.restore()
    return loss


def _in_rounds(micro_batches: MicroBatchSequence, num_rounds: int) -> Iterator[Any]:
    """The micro-batches, and the last one again until there are `num_rounds`."""
    for micro_batch in micro_batches:
        yield micro_batch
    yield from repeat(micro_batch, num_rounds - len(micro_batches))


class _RandomState:
    """Torch's random state now, of the CPU and of the accelerator that is trained on."""

    def __init__(self, device: torch.device):
        self.cpu = torch.get_rng_state()
        # Looks up the device type itself; there is nothing to keep for the CPU.
        self.device_type = device.type
        self.devices, self.states = get_device_states(torch.empty(0, device=device))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=self.device_type)
