"""Several gloo ranks against one process with the joined batch, and against the reference's record of 2 and 3 ranks."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from tests.golden import Golden, load
from trainers.base.distributed import gather_with_grad
from trainers.losses import (
    global_info_nce_loss,
    global_instance_alignment_loss,
    global_sigmoid_loss,
    global_structure_alignment_loss,
    info_nce_loss,
    instance_alignment_loss,
    sigmoid_loss,
    structure_alignment_loss,
)


STRUCTURE_SETTINGS = [(reduction, distance) for reduction in ("mean", "sum") for distance in ("squared", "smooth_l1")]


def run_on_ranks(job: Callable[[int, int], dict], world_size: int, folder: Path) -> list[dict]:
    """Calls `job(rank, world_size)` in that many processes and returns what each of them returned."""
    mp.spawn(_run_on_rank, args=(job, world_size, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run_on_rank(rank: int, job: Callable[[int, int], dict], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(job(rank, world_size), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # a process that takes gloo's threads down one by one is aborted now and then


def differentiate(loss: torch.Tensor, **leaves: torch.Tensor) -> dict:
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


# What every rank computes


def rank_inputs(golden: Golden, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image = golden.inputs[f"rank{rank}.image_features"].clone().requires_grad_()
    text = golden.inputs[f"rank{rank}.text_features"].clone().requires_grad_()
    return image, text, golden.inputs["logit_scale"].clone().requires_grad_()


def joined(golden: Golden, name: str) -> torch.Tensor:
    world_size = golden.config["world_size"]
    return torch.cat([golden.inputs[f"rank{rank}.{name}"] for rank in range(world_size)])


def golden_job(rank: int, world_size: int) -> dict:
    golden = load(f"g4_cliploss_world{world_size}")
    image, text, logit_scale = rank_inputs(golden, rank)
    leaves = {"image_features": image, "text_features": text, "logit_scale": logit_scale}
    result = {
        "local_rows": differentiate(global_info_nce_loss(image, text, logit_scale.exp()), **leaves),
        "whole": differentiate(
            info_nce_loss(gather_with_grad(image), gather_with_grad(text), logit_scale.exp()), **leaves
        ),
    }
    for reduction, distance in STRUCTURE_SETTINGS:
        loss = global_structure_alignment_loss(image, text.detach(), reduction, distance)
        result[f"structure_{reduction}_{distance}"] = differentiate(loss, image_features=image)

    # Rank r weighs row i of what it gathers by 10 r + i.
    x = torch.arange(3.0).add(10 * rank).requires_grad_()
    gathered = gather_with_grad(x)
    weights = 10.0 * rank + torch.arange(3.0 * world_size)
    result["gather"] = {"values": gathered.detach(), **differentiate((weights * gathered).sum(), x=x)}
    result["transposed"] = gather_with_grad(torch.full((2, 3, 4), float(rank)).transpose(0, 2))
    counts = ROWS[world_size]
    images, texts = (part.split(counts)[rank].requires_grad_() for part in pairs(sum(counts)))
    for name, (loss_of, _) in LOSSES.items():
        scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
        loss = loss_of(images, texts, scale, bias)
        grads = torch.autograd.grad(loss, (images, texts, scale, bias), allow_unused=True, materialize_grads=True)
        result[f"uneven {name}"] = [loss.detach(), *grads]
    x = torch.full((counts[rank], 2), float(rank), requires_grad=True)
    gathered = gather_with_grad(x)
    result["uneven gather"] = [gathered.detach(), *torch.autograd.grad((gathered * (rank + 1)).sum(), x)]
    return result


# Rows of each rank, and what is computed of them: on several ranks, and of the joined batch.
ROWS = {2: [3, 4], 3: [4, 0, 1]}
LOSSES = {
    "info_nce": (lambda i, t, s, b: global_info_nce_loss(i, t, s), lambda i, t, s, b: info_nce_loss(i, t, s)),
    "sigmoid": (global_sigmoid_loss, sigmoid_loss),
} | {
    f"{name} {reduction}": (
        lambda i, t, s, b, loss=several, reduction=reduction: loss(i, t, reduction),
        lambda i, t, s, b, loss=one, reduction=reduction: loss(i, t, reduction),
    )
    for name, several, one in (
        ("instance", global_instance_alignment_loss, instance_alignment_loss),
        ("structure", global_structure_alignment_loss, structure_alignment_loss),
    )
    for reduction in ("mean", "sum")
}


def pairs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(F.normalize(torch.randn(rows, 6, generator=generator), dim=-1) for _ in range(2))


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request, tmp_path_factory) -> list[dict]:
    return run_on_ranks(golden_job, request.param, tmp_path_factory.mktemp("ranks"))


def test_gather_concatenates_in_rank_order(ranks: list[dict]):
    expected = torch.cat([torch.arange(3.0) + 10 * rank for rank in range(len(ranks))])
    for result in ranks:
        assert torch.equal(result["gather"]["values"], expected)
        assert result["transposed"].shape == (4 * len(ranks), 3, 2)
        assert result["transposed"][:, 0, 0].tolist() == [float(r) for r in range(len(ranks)) for _ in range(4)]


def test_gather_sums_the_gradients_of_all_ranks(ranks: list[dict]):
    for rank, result in enumerate(ranks):
        row = 3 * rank + torch.arange(3.0)
        assert torch.equal(result["gather"]["x"], sum(10.0 * other + row for other in range(len(ranks))))


def test_ranks_may_have_different_numbers_of_rows(ranks: list[dict]):
    """One of three has none."""
    world_size = len(ranks)
    counts = ROWS[world_size]
    rows = torch.repeat_interleave(torch.arange(float(world_size)), torch.tensor(counts))
    for rank, result in enumerate(ranks):
        gathered, grad = result["uneven gather"]
        assert torch.equal(gathered, rows[:, None].expand(-1, 2))
        # The sum of what the ranks send back: 1 + 2 + ...
        assert torch.equal(grad, torch.full((counts[rank], 2), world_size * (world_size + 1) / 2))


@pytest.mark.parametrize("name", list(LOSSES))
def test_uneven_ranks_average_to_the_joined_batch(ranks: list[dict], name: str):
    counts = ROWS[len(ranks)]
    leaves = [part.requires_grad_() for part in (*pairs(sum(counts)), torch.tensor(9.0), torch.tensor(-3.0))]
    loss = LOSSES[name][1](*leaves)
    expected = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    losses, images, texts, scale, bias = zip(*(result[f"uneven {name}"] for result in ranks), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), loss.detach(), rtol=1e-5, atol=1e-6)
    averaged = [torch.cat(images) / len(ranks), torch.cat(texts) / len(ranks)]
    averaged += [torch.stack(scale).mean(), torch.stack(bias).mean()]
    for actual, gradient in zip(averaged, expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-5, atol=1e-5)
    assert expected[0].abs().max() > 1e-3


def test_info_nce_case(ranks: list[dict]):
    world_size = len(ranks)
    golden = load(f"g4_cliploss_world{world_size}")
    image = joined(golden, "image_features").requires_grad_()
    text = joined(golden, "text_features").requires_grad_()
    logit_scale = golden.inputs["logit_scale"].clone().requires_grad_()
    leaves = {"image_features": image, "text_features": text, "logit_scale": logit_scale}
    single = differentiate(info_nce_loss(image, text, logit_scale.exp()), **leaves)
    golden.assert_close("out.single_process.loss", single["loss"])
    for name in leaves:
        golden.assert_close(f"grad.single_process.in.{name}", single[name])

    # Right in the reference: gathering with gradients. Ours are these two, rank by rank.
    for setting, form in (("local_true", "local_rows"), ("local_false", "whole")):
        for rank, result in enumerate(ranks):
            case = f"{setting}.gather_grad_true.rank{rank}"
            golden.assert_close(f"out.{case}.loss", result[form]["loss"])
            for name in leaves:
                golden.assert_close(f"grad.{case}.in.{name}", result[form][name])

    # Wrong in the reference: gathering without gradients.
    for rank in range(world_size):
        for setting in ("local_true", "local_false"):
            own = own_rows_gradient(golden, rank, local_loss=setting == "local_true")
            case = f"{setting}.gather_grad_false.rank{rank}"
            golden.assert_close(f"out.{case}.loss", own["loss"])
            for name in leaves:
                golden.assert_close(f"grad.{case}.in.{name}", own[name])

    # Accuracies: over the rank's own rows with local_loss, over all rows without.
    logits = {"i2t_acc": image @ text.T, "t2i_acc": text @ image.T}
    labels = torch.arange(len(image))
    for name, scores in logits.items():
        hits = (scores.argmax(-1) == labels).float()
        for gather_grad in ("true", "false"):
            for rank, of_rank in enumerate(hits.chunk(world_size)):
                setting = f"gather_grad_{gather_grad}.rank{rank}.{name}"
                golden.assert_close(f"out.local_true.{setting}", of_rank.mean())
                golden.assert_close(f"out.local_false.{setting}", hits.mean())
    assert golden.unchecked() == set()


def own_rows_gradient(golden: Golden, rank: int, local_loss: bool) -> dict:
    """Loss and gradient on one rank when nothing that was gathered carries a gradient.

    The reference puts the rank's own rows back among the gathered ones, with their gradient, only without local_loss.
    """
    image, text, logit_scale = rank_inputs(golden, rank)
    rows = slice(rank * len(image), (rank + 1) * len(image))
    images, texts = joined(golden, "image_features"), joined(golden, "text_features")
    if local_loss:
        labels = torch.arange(rows.start, rows.stop)
        loss = F.cross_entropy(logit_scale.exp() * image @ texts.T, labels) / 2
        loss = loss + F.cross_entropy(logit_scale.exp() * text @ images.T, labels) / 2
    else:
        images = torch.cat([images[: rows.start], image, images[rows.stop :]])
        texts = torch.cat([texts[: rows.start], text, texts[rows.stop :]])
        loss = info_nce_loss(images, texts, logit_scale.exp())
    return differentiate(loss, image_features=image, text_features=text, logit_scale=logit_scale)


@pytest.mark.parametrize("world_size", [2, 3])
def test_which_settings_of_the_reference_train_as_one_process(world_size: int):
    # DDP turns a rank's feature gradient g into g / world_size of a parameter gradient, summed over the ranks; right is
    # therefore world_size times the gradient of the joined batch on the features, and once on the logit scale.
    golden = load(f"g4_cliploss_world{world_size}")

    def factor_of(setting: str, name: str) -> float | None:
        """The common factor between the recorded gradients and those of the joined batch, None if there is none."""
        recorded = torch.cat([golden.grads[f"{setting}.rank{rank}.in.{name}"] for rank in range(world_size)])
        expected = golden.grads[f"single_process.in.{name}"]
        factor = ((recorded * expected).sum() / expected.square().sum()).item()
        return factor if torch.allclose(recorded, factor * expected, atol=1e-5) else None

    for name in ("image_features", "text_features"):
        assert factor_of("local_true.gather_grad_true", name) == pytest.approx(world_size, rel=1e-5)
        assert factor_of("local_false.gather_grad_true", name) == pytest.approx(world_size, rel=1e-5)
        # 1 / world_size of the right step ...
        assert factor_of("local_false.gather_grad_false", name) == pytest.approx(1, rel=1e-5)
        # ... and another direction altogether.
        assert factor_of("local_true.gather_grad_false", name) is None
    for setting in ("local_true", "local_false"):
        for gather_grad in ("true", "false"):
            case = f"{setting}.gather_grad_{gather_grad}"
            scale = [golden.grads[f"{case}.rank{rank}.in.logit_scale"] for rank in range(world_size)]
            torch.testing.assert_close(torch.stack(scale).mean(), golden.grads["single_process.in.logit_scale"])
            loss = [golden.outputs[f"{case}.rank{rank}.loss"] for rank in range(world_size)]
            torch.testing.assert_close(torch.stack(loss).mean(), golden.outputs["single_process.loss"])


@pytest.mark.parametrize(("reduction", "distance"), STRUCTURE_SETTINGS)
def test_structure_loss_averages_to_that_of_the_joined_batch(ranks: list[dict], reduction: str, distance: str):
    golden = load(f"g4_cliploss_world{len(ranks)}")
    student, teacher = joined(golden, "image_features").requires_grad_(), joined(golden, "text_features")
    loss = structure_alignment_loss(student, teacher, reduction, distance)
    single = differentiate(loss, image_features=student)
    results = [result[f"structure_{reduction}_{distance}"] for result in ranks]
    torch.testing.assert_close(torch.stack([result["loss"] for result in results]).mean(), single["loss"])
    gradient = torch.cat([result["image_features"] for result in results]) / len(ranks)
    torch.testing.assert_close(gradient, single["image_features"], rtol=1e-5, atol=1e-7)


# Through DDP: the parameters' gradients


class TwoTowers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(6, 5), torch.nn.Linear(7, 5)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.3))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1), self.logit_scale.exp()


def stage2_gradients(model: torch.nn.Module, rows: slice, info_nce: Callable, structure: Callable) -> dict:
    generator = torch.Generator().manual_seed(1)
    images, texts, teacher = (torch.randn(8, dim, generator=generator)[rows] for dim in (6, 7, 5))
    image_embeds, text_embeds, logit_scale = model(images, texts)
    teacher = F.normalize(teacher, dim=-1)
    loss = info_nce(image_embeds, text_embeds, logit_scale)
    loss = loss + 0.2 * instance_alignment_loss(image_embeds, teacher) + 5.0 * structure(image_embeds, teacher)
    loss.backward()
    gradients = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **gradients}


def ddp_job(rank: int, world_size: int) -> dict:
    model = torch.nn.parallel.DistributedDataParallel(TwoTowers())
    rows = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    return stage2_gradients(model, rows, global_info_nce_loss, global_structure_alignment_loss)


def test_ddp_gradients_equal_those_of_one_process(tmp_path: Path):
    single = stage2_gradients(TwoTowers(), slice(None), info_nce_loss, structure_alignment_loss)
    first, second = run_on_ranks(ddp_job, 2, tmp_path)
    torch.testing.assert_close((first.pop("loss") + second.pop("loss")) / 2, single.pop("loss"))
    assert first.keys() == single.keys()
    for name, gradient in single.items():
        assert gradient.abs().max() > 1e-3
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], gradient, rtol=1e-5, atol=1e-6)


# One process


def check_one_process() -> None:
    x = F.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert gather_with_grad(x) is x
    assert torch.equal(global_info_nce_loss(x, x.flip(0), 10.0), info_nce_loss(x, x.flip(0), 10.0))
    assert torch.equal(
        global_structure_alignment_loss(x, x.sort().values), structure_alignment_loss(x, x.sort().values)
    )


def test_one_process_without_a_group():
    check_one_process()


def test_one_process_with_a_group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check_one_process()
    finally:
        dist.destroy_process_group()
