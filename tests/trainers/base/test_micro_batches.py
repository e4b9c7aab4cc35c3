"""A batch in parts: the parts themselves, and on CUDA the order in which they are copied and computed."""

from contextlib import nullcontext

import pytest
import torch

from trainers.base import micro_batches
from trainers.base.micro_batches import MicroBatches


def batch(rows: int = 7) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.arange(rows * 2.0).view(rows, 2), "llm_embeds": torch.arange(rows * 3.0).view(-1, 3)}


@pytest.mark.parametrize("size, expected", [(3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_the_parts_are_the_batch(size, expected):
    parts = MicroBatches(batch(), size, torch.device("cpu"))
    for _ in range(2):  # the forward pass twice
        found = list(parts)
        assert [len(part["pixel_values"]) for part in found] == expected
        for name, whole in batch().items():
            assert torch.equal(torch.cat([part[name] for part in found]), whole)


@pytest.mark.parametrize("size", [3, 7])
def test_the_next_part_is_copied_while_one_is_computed(size, monkeypatch):
    """In place of CUDA's streams, a list of what happens."""
    events: list[str] = []

    class Stream:
        def wait_stream(self, other):
            events.append("wait")

    def send(part, device, non_blocking):
        assert device.type == "cuda" and non_blocking
        events.append(f"copy {len(part['pixel_values'])}")
        return part

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: events.append("record"))
    monkeypatch.setattr(micro_batches, "send_to_device", send)
    whole = batch()
    seen = []
    for part in MicroBatches(whole, size, torch.device("cuda")):
        events.append(f"compute {len(part['pixel_values'])}")
        seen.append(part["pixel_values"])
    assert torch.equal(torch.cat(seen), whole["pixel_values"])
    two = ["record"] * 2  # a part has two tensors
    if size == 7:
        assert events == ["copy 7", "wait", *two, "compute 7"]
    else:
        expected = ["copy 3", "wait", "copy 3", *two, "compute 3", "wait", "copy 1", *two, "compute 3", "wait", *two]
        assert events == [*expected, "compute 1"]
