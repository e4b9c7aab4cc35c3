"""Half-precision embeddings are compared in float32."""

import torch
import torch.nn.functional as F


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, or as it is if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def unit_length(embeds: torch.Tensor) -> torch.Tensor:
    """`(..., dim)` of any length and dtype to unit length, in at least float32: half precision would leave lengths of 1 +- 0.004."""
    return F.normalize(at_least_float32(embeds), dim=-1)
