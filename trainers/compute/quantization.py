"""Embeddings in one byte or one bit a dimension, in the format of sentence-transformers' `quantize_embeddings`."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch


Precision = Literal["float32", "int8", "binary"]


@dataclass(frozen=True)
class Quantization:
    """How embeddings of unit length are stored. `encode` equals `sentence_transformers.util.quantize_embeddings` with the precisions "float32",
    "int8" and, for "binary", "ubinary"; queries stay float32 and are compared with what `decode` gives.

    Args:
        precision: "float32"; "int8", 255 steps from the smallest to the largest value of each dimension; or "binary", the sign of each
            dimension, eight to a byte.
        dim: dimensions of an embedding.
        ranges: `(2, dim)` float32, the smallest and the largest values, for "int8". Values outside of them are clipped.
    """

    precision: Precision
    dim: int
    ranges: np.ndarray | None = None

    @classmethod
    def calibrated(cls, precision: Precision, embeds: torch.Tensor) -> "Quantization":
        """With the ranges of `embeds (N, dim)`."""
        ranges = np.stack([embeds.amin(0).numpy(), embeds.amax(0).numpy()]) if precision == "int8" else None
        return cls(precision, embeds.shape[1], ranges)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Quantization":
        """What `to_dict` wrote."""
        ranges = values["ranges"]
        return cls(values["precision"], values["dim"], None if ranges is None else np.array(ranges, np.float32))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        ranges = None if self.ranges is None else self.ranges.tolist()
        return {"precision": self.precision, "dim": self.dim, "ranges": ranges}

    @property
    def num_bytes(self) -> int:
        """Bytes of an embedding."""
        return {"float32": 4 * self.dim, "int8": self.dim, "binary": (self.dim + 7) // 8}[self.precision]

    def encode(self, embeds: torch.Tensor) -> np.ndarray:
        """`embeds (N, dim)` float32 as `(N, dim)` float32 or int8, or `(N, ceil(dim / 8))` uint8."""
        values = embeds.numpy()
        if self.precision == "float32":
            return values
        if self.precision == "binary":
            return np.packbits(values > 0, axis=-1)
        start, step = self._buckets()
        return (np.clip(np.floor((values - start) / step), 0, 255) - 128).astype(np.int8)

    def decode(self, codes: np.ndarray) -> torch.Tensor:
        """What `encode` gave, as embeddings `(N, dim)` float32, not normalised: the lower end of each step, or 1 and -1."""
        if self.precision == "float32":
            return torch.from_numpy(codes)
        if self.precision == "binary":
            return torch.from_numpy(np.unpackbits(codes, axis=-1, count=self.dim).astype(np.float32) * 2 - 1)
        start, step = self._buckets()
        return torch.from_numpy((codes.astype(np.float32) + 128) * step + start)

    def _buckets(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.ranges is not None  # of int8
        step = (self.ranges[1] - self.ranges[0]) / 255
        return self.ranges[0], np.where(step == 0, np.float32(1), step)
