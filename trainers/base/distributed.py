"""Gathering embeddings from all ranks with exact gradients."""

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of ranks of the default process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def row_counts(x: torch.Tensor) -> list[int]:
    """The number of rows `len(x)` on each rank, in rank order."""
    if world_size() == 1:
        return [len(x)]
    rows = torch.tensor([len(x)], device=x.device)
    counts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, rows)
    return torch.cat(counts).tolist()


def gather_with_grad(x: torch.Tensor, counts: list[int] | None = None) -> torch.Tensor:
    """Concatenates the `x` of all ranks along dim 0, in rank order, with exact gradients to the rank a row came from.

    Backward *sums* the gradients of a row over the ranks. The gradient of `x` on rank r is therefore that of the sum of
    all ranks' losses, and after DDP has averaged the parameters' gradients, they are those of the *mean* of all ranks'
    losses. They equal the gradients of one process with the joined batch in both common forms:

    - each rank sums over its own rows (against gathered columns) and divides by the mean number of rows of a rank:
      these losses average to the global mean;
    - each rank computes the same global loss from gathered rows.

    Neither needs another factor of the world size. Every rank has to take part in forward and in backward.

    Args:
        x: `(rows, ...)`, of the same dtype and, except for the number of rows, the same shape on every rank; a rank may have no
            rows. Gradients are summed in this dtype.
        counts: the numbers of rows of all ranks, from `row_counts`, if they are known already.

    Returns:
        `(sum(counts), ...)`; `x` itself when there is no process group or it has one rank.
    """
    if world_size() == 1:
        return x
    counts = row_counts(x) if counts is None else counts
    most = max(counts)
    if min(counts) == most:
        return _GatherWithGrad.apply(x)
    # With unequal shapes NCCL hangs or returns garbage, so rows of zeros are sent along and cut off again.
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    parts = _GatherWithGrad.apply(padded).split(most)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherWithGrad(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather is deprecated since torch 2.13, and its successors are private.

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        # All-reduce, not reduce-scatter: every backend has it, and embeddings are a few MB. It works in place, and
        # autograd may still need the gradient that it passed in.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
