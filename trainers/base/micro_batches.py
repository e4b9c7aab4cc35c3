"""A batch in the host's memory that goes to the device in parts, each while the one before it is computed."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from accelerate.utils import send_to_device


class MicroBatches:
    """Parts of a batch on `device`, one after the other, as often as they are iterated over.

    On CUDA a stream of its own copies the next part while the last one is computed, from pinned memory (`dataloader_pin_memory`, which is on by
    default). It costs the memory of a second part.

    Args:
        batch: tensors of equal length along the first dimension.
        size: rows of a part; the last may have fewer.
        device: where the parts are computed.
    """

    def __init__(self, batch: Mapping[str, torch.Tensor], size: int, device: torch.device):
        sides = zip(*(side.split(size) for side in batch.values()), strict=True)
        self.parts: Sequence[dict[str, torch.Tensor]] = [dict(zip(batch, part, strict=True)) for part in sides]
        self.device = device

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self._copied_ahead() if self.device.type == "cuda" else self._copied()

    def _copied(self) -> Iterator[dict[str, torch.Tensor]]:
        for part in self.parts:
            yield send_to_device(part, self.device)

    def _copied_ahead(self) -> Iterator[dict[str, torch.Tensor]]:
        copying, computing = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        waiting = list(reversed(self.parts))

        def copy() -> dict[str, torch.Tensor]:
            with torch.cuda.stream(copying):
                return send_to_device(waiting.pop(), self.device, non_blocking=True)

        following = copy()
        while following:
            part = following
            computing.wait_stream(copying)
            following = copy() if waiting else {}
            for tensor in part.values():
                tensor.record_stream(computing)  # else the copying stream might write over what is still read
            yield part
