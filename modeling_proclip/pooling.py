"""One embedding a text from an LLM's token states, of a padded batch or of packed texts."""

import torch


def pool_tokens(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    pooling: str = "mean",
) -> torch.Tensor:
    """One embedding a text from the LLM's token states, as LLM2Vec does it (arXiv 2404.05961; ProCLIP uses "mean").

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Last hidden states.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 on tokens, 0 on padding, which may be on either side.
        token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            1 on the tokens to pool (content and end of turn), 0 on BOS, template header and padding: what [`ProCLIPProcessor`] returns.
            All tokens are pooled when it is missing, or in a row where it is 0 throughout.
        pooling (`str`):
            "mean": mean of the pooled tokens. "weighted_mean": the i-th of n pooled tokens weighs i / (1 + ... + n).
            "last_token", "eos_token": the last token (the reference reads both there). "bos_token": the first token.

    Returns:
        `torch.Tensor` of shape `(batch_size, hidden_size)`, in the dtype of `hidden_states`; sums are taken in float32.
    """
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
    attended = attention_mask.to(hidden_states.device).bool()
    if pooling in ("last_token", "eos_token"):
        return hidden_states[rows, torch.where(attended, positions, -1).argmax(dim=1)]
    if pooling == "bos_token":
        return hidden_states[rows, attended.int().argmax(dim=1)]
    pooled = attended if token_type_ids is None else attended & token_type_ids.to(hidden_states.device).bool()
    # The reference averages padding too where a row has nothing to pool; all its real tokens are the sensible reading.
    # By logic, as onnxruntime has no `where` for booleans.
    pooled = (pooled | (attended & ~pooled.any(dim=1, keepdim=True))).float()
    weights = pooled if pooling == "mean" else pooled.cumsum(dim=1) * pooled
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.bmm(weights[:, None], hidden_states.float())[:, 0].to(hidden_states.dtype)


def pool_segments(
    hidden_states: torch.Tensor,
    bounds: torch.Tensor,
    token_type_ids: torch.Tensor | None = None,
    pooling: str = "mean",
) -> torch.Tensor:
    """As [`pool_tokens`], from the states of packed texts.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`): Last hidden states, text after text.
        bounds (`torch.Tensor` of shape `(num_texts + 1,)`, int32 or int64): Where each text begins, and the end. No text is empty.
        token_type_ids (`torch.Tensor` of shape `(num_tokens,)`, *optional*): 1 on the tokens to pool.
        pooling (`str`): As there.

    Returns:
        `torch.Tensor` of shape `(num_texts, hidden_size)`, in the dtype of `hidden_states`; sums are taken in float32.
    """
    if pooling in ("last_token", "eos_token"):
        return hidden_states[bounds[1:] - 1]
    if pooling == "bos_token":
        return hidden_states[bounds[:-1]]
    lengths, num_tokens = bounds.diff().long(), len(hidden_states)
    # The size is given, as it would otherwise be fetched from the GPU.
    text = torch.repeat_interleave(lengths, output_size=num_tokens)
    pooled = torch.ones_like(text) if token_type_ids is None else token_type_ids.to(text.device).long()
    counts = torch.segment_reduce(pooled.float(), "sum", lengths=lengths, unsafe=True)
    pooled = torch.where(counts[text] > 0, pooled, 1)
    if pooling == "weighted_mean":
        ranks = pooled.cumsum(0)
        pooled = pooled * (ranks - (ranks - pooled)[bounds[:-1].long()][text])
    weights = pooled.float()
    # Without atomic additions, so that it is the same every time.
    sums = torch.segment_reduce(weights[:, None] * hidden_states.float(), "sum", lengths=lengths, unsafe=True)
    totals = torch.segment_reduce(weights, "sum", lengths=lengths, unsafe=True)
    return (sums / totals[:, None]).to(hidden_states.dtype)
