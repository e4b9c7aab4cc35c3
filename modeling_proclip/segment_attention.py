"""Attention within each text of a packed row: PyTorch's variable-length kernel on CUDA, SDPA text by text elsewhere."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

SEGMENT_ATTENTION = "proclip_segments"  # its name among Transformers' attention implementations
_VARLEN_OPTIONS = () if varlen_attn is None else inspect.signature(varlen_attn).parameters
# Torch 2.10 has the kernel without them, and Gemma needs a scale of its own, Mistral a window.
HAS_VARLEN = {"scale", "window_size"} <= set(_VARLEN_OPTIONS)
_KERNEL_DEVICES = ("cuda",)
# What some families add to their attention and this one has not.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in both directions within each text of a packed row, as Transformers' other attention functions take and return it.

    Args:
        query (`torch.Tensor` of shape `(1, num_heads, num_tokens, head_dim)`): Queries.
        key, value (`torch.Tensor` of shape `(1, num_key_value_heads, num_tokens, head_dim)`): Keys and values; heads are not repeated.
        sliding_window (`int`, *optional*): Tokens to either side that a token attends to, as SDPA's bidirectional mask counts them.
        cu_seq_lens_q (`torch.Tensor` of shape `(num_texts + 1,)`, int32): Where each text begins, and the end.
        max_length_q (`int`): Tokens of the longest text.

    Returns:
        `(1, num_tokens, num_heads, head_dim)`, and None for the weights.

    Raises:
        ValueError: If the row is not packed, or the family does more in its attention than this.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("segment attention is for packed texts: cu_seq_lens_q and max_length_q are missing.")
    if extra := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]:
        raise ValueError(f"its attention has {extra[0]!r}")
    if query.device.type in _KERNEL_DEVICES and not dropout:
        return _varlen_attention(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q)[None], None
    bounds = cu_seq_lens_q.tolist()
    outputs = [
        _attend(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], scaling, dropout, sliding_window)
        for start, end in zip(bounds, bounds[1:])
    ]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    bounds: torch.Tensor,
    max_length: int,
) -> torch.Tensor:
    options: dict[str, Any] = {"scale": scaling}
    if "enable_gqa" in _VARLEN_OPTIONS:  # earlier releases take fewer key heads without it
        options["enable_gqa"] = True
    if sliding_window is not None and sliding_window < max_length:
        options["window_size"] = (sliding_window, sliding_window)
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    return varlen_attn(query, key, value, bounds, bounds, max_length, max_length, **options)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention of one text, `(1, num_heads, length, head_dim)`."""
    _, num_heads, length, head_dim = query.shape
    num_key_heads = key.shape[1]
    # The queries that share a key head stand one after the other, as more tokens of one head: so no key is repeated.
    query = query.reshape(1, num_key_heads, -1, head_dim)
    mask = None
    if sliding_window is not None and sliding_window < length - 1:
        positions = torch.arange(length, device=query.device)
        mask = (positions[:, None] - positions).abs() <= sliding_window
        mask = mask.repeat(num_heads // num_key_heads, 1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.reshape(1, num_heads, length, -1)


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
AttentionMaskInterface.register(
    SEGMENT_ATTENTION, lambda *args, **kwargs: None
)  # the texts' bounds say what a mask would
