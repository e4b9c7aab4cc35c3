"""lambda and the batch: with "mean" regulariser and gradient do not depend on the batch, with "sum" they grow as N and N^2."""

import pytest
import torch
from torch.nn import functional as F

from trainers.contrastive_tuning.config import batch_invariant_weights
from trainers.losses import instance_alignment_loss, structure_alignment_loss


BATCHES = [64, 128, 256, 512, 1024]
POOL = 4096


def pool() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of a student and of the teacher that it has moved away from, in one direction and at random."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(POOL, 32, generator=generator)
    student = torch.linspace(0.4, 1.6, 32) * teacher + 0.1 * torch.randn(POOL, 32, generator=generator)
    return F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)


def measured(loss_of, reduction: str, batch_size: int) -> tuple[float, float]:
    """Over the batches of one epoch of the pool: the mean loss, and the mean length of a whole batch's gradient for a common parameter."""
    losses, gradients = [], []
    for student, teacher in zip(*(side.split(batch_size) for side in pool()), strict=True):
        weight = torch.eye(32, requires_grad=True)  # moves all rows, as a model's parameter does
        loss = loss_of(F.normalize(student @ weight, dim=-1), teacher, reduction)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, weight)[0])
    return sum(losses) / len(losses), torch.stack(gradients).mean(0).norm().item()


@pytest.mark.parametrize(
    ("loss_of", "growth"),
    [(instance_alignment_loss, lambda n: n), (structure_alignment_loss, lambda n: n * (n - 1) / 2)],
    ids=["L_ins", "L_struct"],
)
def test_regulariser_over_batches(loss_of, growth):
    loss, gradient = measured(loss_of, "mean", 64)
    for batch_size in BATCHES[1:]:
        # Every epoch sees the same rows; the pairs of rows differ, by which L_struct is uncertain to 1 or 2 %.
        assert measured(loss_of, "mean", batch_size) == (
            pytest.approx(loss, rel=0.03),
            pytest.approx(gradient, rel=0.05),
        )
        summed = measured(loss_of, "sum", batch_size)
        assert summed == (
            pytest.approx(loss * growth(batch_size), rel=0.03),
            pytest.approx(gradient * growth(batch_size), rel=0.05),
        )
    assert growth(1024) / growth(64) > 15


@pytest.mark.parametrize("batch_size", BATCHES)
def test_published_weight_carried_over_to_any_batch(batch_size):
    """At the published batch the means weigh what the sums did; at another one the sums would weigh differently, the means do not."""
    student, teacher = (side[:512] for side in pool())
    lambda_ins, lambda_struct = batch_invariant_weights(4e-4, 512)
    published = 4e-4 * (
        instance_alignment_loss(student, teacher, "sum") + structure_alignment_loss(student, teacher, "sum")
    )
    student, teacher = (side[-batch_size:] for side in pool())
    ours = lambda_ins * instance_alignment_loss(student, teacher)
    ours = ours + lambda_struct * structure_alignment_loss(student, teacher)
    torch.testing.assert_close(ours, published, rtol=0.1, atol=0)
    summed = 4e-4 * (
        instance_alignment_loss(student, teacher, "sum") + structure_alignment_loss(student, teacher, "sum")
    )
    assert (abs(summed / published - 1) > 0.4) == (batch_size != 512)
