"""The loss of stage 0 against the reference's records, a naive loop and hand-computed numbers, on one and several ranks."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.golden import load
from tests.trainers.base.test_distributed import run_on_ranks
from trainers.caption_contrastive.losses import caption_contrastive_loss, global_caption_contrastive_loss


@pytest.mark.parametrize("scale", [20, 50])
@pytest.mark.parametrize("negatives", ["no_neg", "with_neg"])
def test_reference_case(scale, negatives):
    golden = load("g6_hard_negative_nll")
    names = ["q", "d_pos"] + ["d_neg"] * (negatives == "with_neg")
    leaves = [golden.inputs[name].clone().requires_grad_() for name in names]
    loss = caption_contrastive_loss(*leaves, scale=scale)
    loss.backward()
    golden.assert_close(f"out.scale{scale}.{negatives}.loss", loss)
    for name, leaf in zip(names, leaves, strict=True):
        golden.assert_close(f"grad.scale{scale}.{negatives}.in.{name}", leaf.grad)


def naive(queries, documents, negatives, scale, query_keys, document_keys, negative_keys):
    total = 0.0
    columns, keys = [*documents, *negatives], [*document_keys, *negative_keys]
    for i, query in enumerate(queries):
        scores = [
            scale * F.cosine_similarity(query, column, dim=0)
            for j, column in enumerate(columns)
            if j == i or not set(query_keys[i].tolist()) & set(keys[j].tolist())
        ]
        total = total - scale * F.cosine_similarity(query, documents[i], dim=0) + torch.stack(scores).logsumexp(0)
    return total / len(queries)


def random_batch(count: int, num_negatives: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    embeds = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (count, count, num_negatives)]
    # Few different keys, so that many documents fit other queries.
    keys = [torch.randint(8, (count, 3), generator=generator), torch.randint(8, (count, 2), generator=generator)]
    return embeds, [*keys, torch.randint(8, (num_negatives, 2), generator=generator)]


def call(loss, embeds, keys, scale=20.0):
    names = ("query_keys", "document_keys", "negative_keys")
    return loss(*embeds, scale=scale, **dict(zip(names, keys, strict=True)))


def test_masked_loss_and_gradients_are_the_naive_ones():
    embeds, keys = random_batch(9, 4)
    leaves = [e.clone().requires_grad_() for e in embeds]
    others = [e.clone().requires_grad_() for e in embeds]
    loss, expected = call(caption_contrastive_loss, leaves, keys), naive(*others, 20.0, *keys)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    grads, naive_grads = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, others)
    for grad, naive_grad in zip(grads, naive_grads, strict=True):
        torch.testing.assert_close(grad, naive_grad, rtol=1e-10, atol=1e-12)
    assert not torch.isclose(loss, caption_contrastive_loss(*leaves, scale=20.0))


def test_mask_by_hand():
    # Queries 0 and 1 are of one picture: document 1 does not count against query 0, nor document 0 against query 1.
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    queries = documents = torch.stack([east, east, north])
    query_keys, document_keys = torch.tensor([[7], [7], [8]]), torch.tensor([[7], [7], [8]])
    loss = caption_contrastive_loss(queries, documents, scale=2.0, query_keys=query_keys, document_keys=document_keys)
    # Each of the first two has its own (2) and one other (0), the third its own (2) and two others (0).
    expected = (2 * math.log(1 + math.exp(-2)) + math.log(1 + 2 * math.exp(-2))) / 3
    assert math.isclose(loss.item(), expected, rel_tol=1e-6)


def test_refusals():
    embeds, keys = random_batch(3, 2)
    with pytest.raises(ValueError, match="query_embeds and document_embeds"):
        caption_contrastive_loss(embeds[0], embeds[1][:2])
    with pytest.raises(ValueError, match="negative_embeds"):
        caption_contrastive_loss(embeds[0], embeds[1], embeds[2][:, :5])
    with pytest.raises(ValueError, match="or none of them"):
        caption_contrastive_loss(*embeds, query_keys=keys[0], document_keys=keys[1])
    with pytest.raises(ValueError, match="document_keys"):
        call(caption_contrastive_loss, embeds, [keys[0], keys[1][:2], keys[2]])


# Several ranks


def on_rank(rank: int, world_size: int) -> dict:
    result = {}
    if world_size == 2:
        golden = load("g6_hard_negative_nll_world2")
        for case, names in (("with_neg", ("q", "d_pos", "d_neg")), ("no_neg", ("q", "d_pos"))):
            leaves = [golden.inputs[f"rank{rank}.{name}"].clone().requires_grad_() for name in names]
            loss = global_caption_contrastive_loss(*leaves, scale=20.0)
            result[case] = {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))}
    embeds, keys = random_batch(7, 5)
    slices = [slices_of_rank(rank, world_size, len(e)) for e in embeds]
    leaves = [e[s].clone().requires_grad_() for e, s in zip(embeds, slices, strict=True)]
    loss = call(global_caption_contrastive_loss, leaves, [k[s] for k, s in zip(keys, slices, strict=True)])
    result["masked"] = {"loss": loss.detach(), "grads": list(torch.autograd.grad(loss, leaves))}
    return result


def slices_of_rank(rank: int, world_size: int, count: int) -> slice:
    """Uneven: the first rank has one row less for each other rank, and hard negatives on the last rank only."""
    if count == 5:
        return slice(0, 5) if rank == world_size - 1 else slice(0, 0)
    edges = {2: [0, 3, 7], 3: [0, 1, 3, 7]}[world_size]
    return slice(edges[rank], edges[rank + 1])


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    return run_on_ranks(on_rank, request.param, tmp_path_factory.mktemp("ranks"))


def test_uneven_ranks_average_to_the_joined_batch(ranks):
    embeds, keys = random_batch(7, 5)
    leaves = [e.requires_grad_() for e in embeds]
    loss = call(caption_contrastive_loss, leaves, keys)
    expected = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(
        torch.stack([r["masked"]["loss"] for r in ranks]).mean(), loss.detach(), rtol=1e-12, atol=0
    )
    for i, gradient in enumerate(expected):
        parts = torch.cat([r["masked"]["grads"][i] for r in ranks]) / len(ranks)
        torch.testing.assert_close(parts, gradient, rtol=1e-10, atol=1e-12)


def test_reference_case_of_two_uneven_ranks(ranks):
    if len(ranks) != 2:
        pytest.skip("the record is of two ranks")
    golden = load("g6_hard_negative_nll_world2")
    # There every rank computes the whole loss; here their mean is it. The gradients that reach the inputs are the same.
    for case, names in (("with_neg", ("q", "d_pos", "d_neg")), ("no_neg", ("q", "d_pos"))):
        mean = (ranks[0][case]["loss"] + ranks[1][case]["loss"]) / 2
        for rank, result in enumerate(ranks):
            golden.assert_close(f"out.{case}.rank{rank}.loss", mean)
            for name in names:
                golden.assert_close(f"grad.{case}.rank{rank}.in.{name}", result[case][name])
    joined = [
        torch.cat([golden.inputs[f"rank{rank}.{name}"] for rank in (0, 1)]).requires_grad_()
        for name in ("q", "d_pos", "d_neg")
    ]
    loss = caption_contrastive_loss(*joined, scale=20.0)
    golden.assert_close("out.single_process.with_neg.loss", loss)
    for name, gradient in zip(("q", "d_pos", "d_neg"), torch.autograd.grad(loss, joined), strict=True):
        golden.assert_close(f"grad.single_process.with_neg.in.{name}", gradient)
    assert golden.unchecked() == set()
