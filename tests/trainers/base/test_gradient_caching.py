"""Cached gradients against those of one pass over the whole batch: values, random state, precision, several processes."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.nn import functional as F

from tests.trainers.base.test_distributed import run_on_ranks
from trainers.base.gradient_caching import cached_backward
from trainers.losses import global_info_nce_loss, global_structure_alignment_loss


class Pair(nn.Module):
    """Two encoders that drop, and a parameter that only the loss uses."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Dropout(dropout), nn.Linear(9, 5))
        self.text = nn.Linear(7, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        images, texts = self.frozen(self.image(batch[0])), self.text(batch[1])
        return F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)


def batch(rows: slice = slice(None), seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(10, 6, generator=generator)[rows], torch.randn(10, 7, generator=generator)[rows]


def loss_of(model: nn.Module):
    """InfoNCE and a loss that compares the rows of one side; the texts' columns serve as the teacher."""

    def loss_fn(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        structure = global_structure_alignment_loss(images, texts.detach())
        return global_info_nce_loss(images, texts, model.logit_scale.exp()) + structure

    return loss_fn


def cached_gradients(
    model: Pair, sizes: list[int], accelerator: Accelerator, wrapped: nn.Module | None = None, rows=slice(None)
):
    wrapped = model if wrapped is None else wrapped
    micro_batches = list(zip(*(side.split(sizes) for side in batch(rows)), strict=True))
    loss = cached_backward(wrapped, micro_batches, loss_of(model), accelerator=accelerator, model=wrapped)
    assert not loss.requires_grad
    return {"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def plain_gradients(model: Pair) -> dict[str, torch.Tensor]:
    loss = loss_of(model)(*model(batch()))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert name == "loss" or value.abs().max() > 1e-4, name
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=tolerance, msg=name)


@pytest.fixture
def accelerator(request):
    yield Accelerator(cpu=True, mixed_precision=getattr(request, "param", "no"))
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.mark.parametrize("sizes", [[10], [5, 5], [4, 4, 2], [1] * 10])
def test_gradients_are_those_of_the_whole_batch(accelerator, sizes):
    assert_same(cached_gradients(Pair(), sizes, accelerator), plain_gradients(Pair()))


def test_gradients_are_added_to_those_that_are_there(accelerator):
    model = Pair()
    once = {name: value.clone() for name, value in cached_gradients(model, [4, 6], accelerator).items()}
    twice = cached_gradients(model, [6, 4], accelerator)
    for name in once.keys() - {"loss"}:
        torch.testing.assert_close(twice[name], 2 * once[name])


def test_both_passes_drop_the_same(accelerator):
    """Against one graph over the same micro-batches: they draw in the same order there."""
    micro_batches = list(zip(*(side.split(3) for side in batch()), strict=True))
    naive, model = Pair(dropout=0.5), Pair(dropout=0.5)
    torch.manual_seed(3)
    joined = [torch.cat(side) for side in zip(*map(naive, micro_batches), strict=True)]
    loss_of(naive)(*joined).backward()
    draw_after = torch.rand(3)

    torch.manual_seed(3)
    cached = cached_gradients(model, [3, 3, 3, 1], accelerator)
    assert torch.equal(torch.rand(3), draw_after), "the random state afterwards is that of one pass"
    del cached["loss"]
    assert_same(cached, {name: p.grad for name, p in naive.named_parameters() if p.requires_grad})


def test_the_graph_of_one_micro_batch_at_a_time(accelerator):
    model, alive, most = Pair(), [0], [0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if x.requires_grad:
                alive[0] += len(x)
                most[0] = max(most[0], alive[0])
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive[0] -= len(grad)
            return grad

    def embed(micro_batch):
        return tuple(Counted.apply(side) if torch.is_grad_enabled() else side for side in model(micro_batch))

    micro_batches = list(zip(*(side.split(2) for side in batch()), strict=True))
    cached_backward(embed, micro_batches, loss_of(model), accelerator=accelerator, model=model)
    assert (alive[0], most[0]) == (0, 4), "two rows of images and two of texts"


@pytest.mark.parametrize("accelerator", ["bf16"], indirect=True)
def test_autocast(accelerator):
    """Pass 1 runs without gradient: weights that autocast had cast there must not serve pass 2."""
    model, naive = Pair(), Pair()
    cached = cached_gradients(model, [5, 5], accelerator)
    with torch.autocast("cpu", torch.bfloat16):
        embeds = [naive(micro) for micro in zip(*(side.split(5) for side in batch()), strict=True)]
    loss_of(naive)(*(torch.cat(side) for side in zip(*embeds, strict=True))).backward()
    del cached["loss"]
    # The naive graph adds the two halves' weight gradients up in bfloat16.
    assert_same(cached, {name: p.grad for name, p in naive.named_parameters() if p.requires_grad}, tolerance=1e-3)
    assert model.text.weight.grad.abs().max() > 1e-2


def test_scaled_gradients(accelerator):
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, plain = cached_gradients(Pair(), [5, 5], accelerator), plain_gradients(Pair())
    torch.testing.assert_close(scaled.pop("loss"), plain.pop("loss"))
    assert_same({name: grad / 1024 for name, grad in scaled.items()}, plain)


def test_half_precision_embeddings_meet_in_float32(accelerator):
    model, seen = Pair(), []

    def loss_fn(images, texts):
        seen.extend((images.dtype, texts.dtype))
        return loss_of(model)(images, texts)

    def embed(micro_batch):
        return tuple(side.bfloat16() for side in model(micro_batch))

    cached_backward(embed, [batch(), batch(seed=2)], loss_fn, accelerator=accelerator, model=model)
    assert seen == [torch.float32] * 2 and model.text.weight.grad.isfinite().all()


def test_refused(accelerator):
    with pytest.raises(ValueError, match="no micro-batches"):
        cached_backward(Pair(), [], sum, accelerator=accelerator, model=Pair())


def ddp_job(rank: int, world_size: int) -> dict:
    # As `accelerate launch` tells it; the process group exists already, so the address is not used.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    # Ten rows: 5 and 5 of two ranks, with different numbers of micro-batches.
    model = Pair()
    wrapped = nn.parallel.DistributedDataParallel(model)
    sizes = [[2, 2, 1], [4, 1]][rank]
    return cached_gradients(model, sizes, Accelerator(cpu=True), wrapped, rows=slice(5 * rank, 5 * rank + 5))


def test_ddp(tmp_path: Path):
    ranks = run_on_ranks(ddp_job, 2, tmp_path)
    plain = plain_gradients(Pair())
    torch.testing.assert_close((ranks[0].pop("loss") + ranks[1].pop("loss")) / 2, plain.pop("loss"))
    for rank in ranks:
        assert_same(rank, plain)
