"""Gathering embeddings from all ranks with exact gradients."""

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of ranks of the default process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_with_grad(x: torch.Tensor) -> torch.Tensor:
    """Concatenates the `x` of all ranks along dim 0, in rank order, with exact gradients to the rank a row came from.

    Backward *sums* over the ranks what each of them sends back to a row. The gradient of `x` on rank r is therefore
    that of the sum of all ranks' losses, and once DDP has averaged the parameters' gradients they are those of the
    *mean* of all ranks' losses. So they equal the gradients of one process with the joined batch in both common forms:

    - each rank takes the mean over its own rows (against gathered columns): these losses average to the global one;
    - each rank computes the same global loss from gathered rows.

    Neither needs a factor of the world size. Every rank has to take part in forward and in backward.

    Args:
        x: `(rows, ...)`, of the same shape and dtype on every rank. The sum of gradients is taken in this dtype.

    Returns:
        `(world_size * rows, ...)`; `x` itself when there is no process group or it has one rank.

    Raises:
        ValueError: the ranks bring different numbers of rows; raised on every rank.
    """
    if world_size() == 1:
        return x
    _check_equal_rows(x)
    return _GatherWithGrad.apply(x)


class _GatherWithGrad(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather is deprecated since torch 2.13, and its successors are private.

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        # All-reduce and not reduce-scatter: every backend has it, and these are embeddings, a few MB. It works in
        # place, and autograd may still need the gradient that it handed us.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def _check_equal_rows(x: torch.Tensor) -> None:
    # NCCL answers unequal shapes with a hang or with rubbish, so the counts travel first.
    rows = torch.tensor([len(x)], device=x.device)
    counts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, rows)
    counts = torch.cat(counts).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"The ranks bring batches of different sizes: {counts}. A loss over the joined batch needs equal ones: "
            "set dataloader_drop_last=True."
        )
