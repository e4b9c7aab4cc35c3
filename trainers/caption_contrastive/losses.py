"""The loss of caption-contrastive tuning (stage 0), as pure functions of embeddings.

Like those of [`trainers.losses`] they are differentiable, compute in at least float32 even under autocast, and return a
scalar `()`. The `global_*` form is for training on several ranks: this rank's queries against the documents of all
ranks, so memory stays linear in the local batch.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from trainers.base.distributed import gather_with_grad, row_counts, world_size
from trainers.compute.precision import unit_length


def caption_contrastive_loss(
    query_embeds: torch.Tensor,
    document_embeds: torch.Tensor,
    negative_embeds: torch.Tensor | None = None,
    *,
    scale: float = 50.0,
    query_keys: torch.Tensor | None = None,
    document_keys: torch.Tensor | None = None,
    negative_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of finding each query's own document among all documents, by cosine: query i belongs to document i; all other documents and
    all hard negatives are wrong (LLM2CLIP, arXiv 2411.04997, run_supervised.py; LLM2Vec's HardNegativeNLLLoss).

    One direction only, as in those: it is drawn which of two captions is the query, so both directions are trained.

    Args:
        query_embeds, document_embeds: `(batch_size, dim)`, of any length; normalised here.
        negative_embeds: `(num_negatives, dim)`, hard negatives of the whole batch, or none.
        scale: Multiplier of the cosines. 50 is the default of LLM2CLIP's run_supervised.py, 20 that of LLM2Vec's loss.
        query_keys: `(batch_size, a)` int64, what a query stands for (its image, its text, its document's text).
        document_keys, negative_keys: `(batch_size, b)` and `(num_negatives, b)` int64. A document that shares a key with a query fits that
            query too, so it is not a negative of it. A query's own document always counts.

    Returns:
        `()`, in nats, the mean over the queries.

    Raises:
        ValueError: If shapes do not match or there is no row.
    """
    _check(query_embeds, document_embeds, negative_embeds, query_keys, document_keys, negative_keys)
    columns, column_keys = _join(document_embeds, negative_embeds), _join(document_keys, negative_keys)
    return _cross_entropy(query_embeds, columns, 0, scale, query_keys, column_keys, "mean")


def global_caption_contrastive_loss(
    query_embeds: torch.Tensor,
    document_embeds: torch.Tensor,
    negative_embeds: torch.Tensor | None = None,
    *,
    scale: float = 50.0,
    query_keys: torch.Tensor | None = None,
    document_keys: torch.Tensor | None = None,
    negative_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """`caption_contrastive_loss` over the joined batch of all ranks, each with its own queries against the gathered documents.

    Args and errors as there, with the local rows. The ranks may have different numbers of rows, but either all or none of them have negatives.

    Returns:
        `()`, whose mean over the ranks is `caption_contrastive_loss` of the joined batch; so are, after DDP's averaging, the gradients.
    """
    ranks = world_size()
    if ranks == 1:
        return caption_contrastive_loss(
            query_embeds,
            document_embeds,
            negative_embeds,
            scale=scale,
            query_keys=query_keys,
            document_keys=document_keys,
            negative_keys=negative_keys,
        )
    _check(query_embeds, document_embeds, negative_embeds, query_keys, document_keys, negative_keys)
    counts = row_counts(document_embeds)
    columns, column_keys = gather_with_grad(document_embeds, counts), document_keys
    if column_keys is not None:
        column_keys = gather_with_grad(column_keys, counts)
    if negative_embeds is not None:
        negative_counts = row_counts(negative_embeds)
        columns = torch.cat([columns, gather_with_grad(negative_embeds, negative_counts)])
        if column_keys is not None:
            column_keys = torch.cat([column_keys, gather_with_grad(negative_keys, negative_counts)])
    first = sum(counts[: dist.get_rank()])
    total = _cross_entropy(query_embeds, columns, first, scale, query_keys, column_keys, "sum")
    # The mean over the ranks divides by their number; ranks with more queries have more weight.
    return total * (ranks / sum(counts))


def _cross_entropy(
    queries: torch.Tensor,
    columns: torch.Tensor,
    first: int,
    scale: float,
    query_keys: torch.Tensor | None,
    column_keys: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    """Query i belongs to column `first + i`."""
    with torch.autocast(queries.device.type, enabled=False):
        logits = scale * (unit_length(queries) @ unit_length(columns).T)
        labels = torch.arange(first, first + len(queries), device=logits.device)
        if query_keys is not None and column_keys is not None:
            fits = torch.zeros_like(logits, dtype=torch.bool)
            for row in query_keys.unbind(1):
                for column in column_keys.unbind(1):
                    fits |= row[:, None] == column
            fits[torch.arange(len(labels)), labels] = False
            logits = logits.masked_fill(fits, float("-inf"))
        return F.cross_entropy(logits, labels, reduction=reduction)


def _join(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    return first if first is None or second is None else torch.cat([first, second])


def _check(queries, documents, negatives, query_keys, document_keys, negative_keys) -> None:
    if queries.dim() != 2 or queries.shape != documents.shape or len(queries) == 0:
        raise ValueError(
            "query_embeds and document_embeds must have one and the same shape (batch_size, dim) with at least one row, but have "
            f"{tuple(queries.shape)} and {tuple(documents.shape)}."
        )
    if negatives is not None and (negatives.dim() != 2 or negatives.shape[1] != queries.shape[1]):
        raise ValueError(
            f"negative_embeds must have shape (num_negatives, {queries.shape[1]}), but has {tuple(negatives.shape)}."
        )
    given = [query_keys, document_keys] + ([] if negatives is None else [negative_keys])
    if any(keys is None for keys in given) != all(keys is None for keys in given):
        raise ValueError("Give the keys of queries, documents and negatives, or none of them.")
    for name, keys, embeds in (
        ("query_keys", query_keys, queries),
        ("document_keys", document_keys, documents),
        ("negative_keys", negative_keys, negatives),
    ):
        if keys is not None and (embeds is None or keys.dim() != 2 or len(keys) != len(embeds)):
            raise ValueError(f"{name} must be whole numbers of shape (rows, keys), one row for each embedding.")
