"""The losses against naive forms, in every precision, and on degenerate batches."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import SiglipConfig, SiglipModel

from trainers import losses
from trainers.losses import info_nce_loss, instance_alignment_loss, sigmoid_loss, structure_alignment_loss


def unit(rows: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def naive_structure_loss(student: torch.Tensor, teacher: torch.Tensor, reduction: str, distance: str) -> torch.Tensor:
    terms = []
    for i in range(len(student)):
        for j in range(i + 1, len(student)):
            difference = (student[i] - student[j]).norm() - (teacher[i] - teacher[j]).norm()
            absolute = difference.abs()
            smooth = torch.where(absolute < 1, absolute**2 / 2, absolute - 0.5)
            terms.append(difference**2 if distance == "squared" else smooth)
    return torch.stack(terms).mean() if reduction == "mean" else torch.stack(terms).sum()


# Against naive forms


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("distance", ["squared", "smooth_l1"])
def test_structure_loss_equals_the_double_loop(reduction: str, distance: str):
    teacher = unit(7, 12, seed=1, dtype=torch.float64)
    student = unit(7, 12, seed=2, dtype=torch.float64)
    # A collapsed student puts differences of more than 1 in, where the two distances part.
    student[:4] = F.normalize(student[:1] + 0.01 * student[:4], dim=-1)
    teacher[1] = -teacher[0]
    ours, naive = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = structure_alignment_loss(ours, teacher, reduction, distance)
    expected = naive_structure_loss(naive, teacher, reduction, distance)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-7, atol=1e-9)


def test_info_nce_loss_equals_its_formula():
    image, text = unit(6, 8, 1), unit(6, 8, 2)
    scores = (14.0 * image @ text.T).double()
    expected = 0.0
    for i in range(6):
        expected += (scores[i].exp().sum() / scores[i, i].exp()).log() / 12
        expected += (scores[:, i].exp().sum() / scores[i, i].exp()).log() / 12
    torch.testing.assert_close(info_nce_loss(image, text, 14.0).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [instance_alignment_loss, structure_alignment_loss])
def test_gradients_of_alignment_losses(loss, reduction: str):
    student = unit(5, 4, 1, torch.float64).requires_grad_()
    teacher = unit(5, 4, 2, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, reduction), (student, teacher))


def test_gradients_of_info_nce_loss():
    image, text = unit(5, 4, 1, torch.float64).requires_grad_(), unit(5, 4, 2, torch.float64).requires_grad_()
    logit_scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(info_nce_loss, (image, text, logit_scale))


# Precision


def test_near_pairs_keep_their_distance():
    # By float32 matmul the distance of 1e-4 is lost altogether.
    base = unit(16, 768, 1, torch.float64)
    near = F.normalize(base + 1e-4 * unit(16, 768, 2, torch.float64), dim=-1)
    student, teacher = torch.cat([base, near]).float(), unit(32, 768, 3)
    leaf, naive = student.clone().requires_grad_(), student.double().requires_grad_()
    structure_alignment_loss(leaf, teacher, "sum").backward()
    naive_structure_loss(naive, teacher.double(), "sum", "squared").backward()
    torch.testing.assert_close(leaf.grad.double(), naive.grad, rtol=1e-4, atol=1e-5)


def test_coinciding_rows_have_distance_zero_at_any_width():
    for dim in (16, 768, 4096):
        rows = unit(64, dim, 1).repeat(2, 1)
        distances = losses._pairwise_distances(rows, rows)
        assert (distances.diagonal() == 0).all()
        assert (distances.diagonal(64) == 0).all()
        assert int((distances == 0).sum()) == 4 * 64


def test_distances_are_float64_on_a_cpu_only():
    rows = torch.empty(2, 3)
    assert losses._distance_dtype(rows) == torch.float64
    assert losses._distance_dtype(rows.to("meta")) == torch.float32, "as on a GPU"
    assert losses._distance_dtype(rows.to("meta", torch.float64)) == torch.float64, "as it was given"


@pytest.mark.parametrize("dim", [16, 768, 4096])
@pytest.mark.parametrize(
    "distance, error, error_of_float32", [(0.001, 1e-3, 0.1), (0.01, 1e-5, 1e-3), (0.1, 1e-6, 1e-5)]
)
def test_distances_of_near_pairs_in_float32(dim: int, distance: float, error: float, error_of_float32: float):
    """Relative errors of the split form that GPUs use, and of the usual one: hundreds of times as large."""
    rows = unit(128, dim, 1, torch.float64)
    columns = F.normalize(rows + distance * unit(128, dim, 2, torch.float64), dim=-1).float()
    rows = rows.float()
    exact = (rows.double() - columns.double()).norm(dim=1)

    def largest_error(squared: torch.Tensor) -> float:
        return ((squared.diagonal().clamp(min=0).sqrt() - exact) / exact).abs().max().item()

    usual = rows.square().sum(1)[:, None] + columns.square().sum(1) - 2 * (rows @ columns.T)
    assert largest_error(losses._squared_distances(rows, columns)[0]) < error
    assert largest_error(usual) > error_of_float32


@pytest.mark.parametrize("distance", ["squared", "smooth_l1"])
def test_structure_loss_in_float32_equals_that_in_float64(monkeypatch, distance: str):
    """With near pairs, coinciding ones, and a student that has collapsed: the loss to 1e-6, each gradient to 1e-4 of the largest."""
    base = unit(24, 768, 1)
    rows = torch.cat([base, F.normalize(base + 0.01 * unit(24, 768, 2), dim=-1), base[:4], base[:1].repeat(4, 1)])
    results = []
    for dtype in (torch.float64, torch.float32):
        monkeypatch.setattr(losses, "_distance_dtype", lambda rows, dtype=dtype: dtype)
        student = rows.clone().requires_grad_()
        loss = structure_alignment_loss(student, unit(len(rows), 768, 3), "sum", distance)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    (loss, gradient), (loss_of_float32, gradient_of_float32) = results
    torch.testing.assert_close(loss_of_float32, loss, rtol=1e-6, atol=0)
    assert torch.isfinite(gradient_of_float32).all()
    torch.testing.assert_close(gradient_of_float32, gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("dim", [16, 768, 4096])
def test_coinciding_rows_have_distance_zero_in_float32_too(dim: int):
    rows = unit(64, dim, 1).repeat(2, 1)
    squared, rounding = losses._squared_distances(rows, rows)
    assert int((squared <= rounding).sum()) == 4 * 64


def test_a_gpu_takes_larger_blocks():
    cpu, gpu = (losses.block_elements(torch.device(kind)) for kind in ("cpu", "cuda"))
    assert cpu == losses.BLOCK_ELEMENTS and gpu == losses.GPU_BLOCK_ELEMENTS == 4096**2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype):
    a, b = unit(9, 64, 1, dtype), unit(9, 64, 2, dtype)
    for loss in (instance_alignment_loss, structure_alignment_loss, lambda x, y: info_nce_loss(x, y, 30.0)):
        half, full = a.clone().requires_grad_(), a.float().requires_grad_()
        result, expected = loss(half, b), loss(full, b.float())
        result.backward()
        expected.backward()
        assert result.dtype == torch.float32
        assert torch.equal(result, expected)
        assert torch.equal(half.grad, full.grad.to(dtype))


def test_autocast_does_not_lower_the_precision():
    a, b = unit(9, 64, 1), unit(9, 64, 2)
    for loss in (instance_alignment_loss, structure_alignment_loss, lambda x, y: info_nce_loss(x, y, 30.0)):
        expected = loss(a, b)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(a, b), expected)


# Meaning of the reductions


def test_mean_of_the_pairs_does_not_depend_on_the_batch_size():
    # Of the structure loss, every pair of a large batch is in as many of its 6-row subsets as any other: the mean over
    # all subsets is the loss of the whole for "mean", and for "sum" it falls with the number of pairs, 15 / 28.
    student, teacher = unit(8, 8, 1, torch.float64), unit(8, 8, 2, torch.float64)
    subsets = list(torch.combinations(torch.arange(8), 6))
    for loss, sum_ratio in ((instance_alignment_loss, 6 / 8), (structure_alignment_loss, 15 / 28)):
        for reduction, ratio in (("mean", 1.0), ("sum", sum_ratio)):
            of_subsets = torch.stack([loss(student[rows], teacher[rows], reduction) for rows in subsets]).mean()
            torch.testing.assert_close(of_subsets, ratio * loss(student, teacher, reduction))


def test_smooth_l1_is_half_the_square_for_small_differences():
    student, teacher = unit(8, 64, 1), unit(8, 64, 2)
    halved = structure_alignment_loss(student, teacher) / 2
    torch.testing.assert_close(structure_alignment_loss(student, teacher, distance="smooth_l1"), halved)


def test_losses_do_not_depend_on_the_order_of_the_rows():
    a, b = unit(8, 16, 1), unit(8, 16, 2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for loss in (instance_alignment_loss, structure_alignment_loss, lambda x, y: info_nce_loss(x, y, 20.0)):
        torch.testing.assert_close(loss(a[order], b[order]), loss(a, b))


def test_structure_loss_ignores_a_rotation_and_instance_loss_does_not():
    teacher = unit(8, 16, 1)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    assert structure_alignment_loss(teacher @ rotation, teacher) < 1e-12
    assert instance_alignment_loss(teacher @ rotation, teacher) > 0.1


# Degenerate and bad input


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_structure_loss_of_one_row_is_zero_and_differentiable(reduction: str):
    student = unit(1, 8).requires_grad_()
    loss = structure_alignment_loss(student, unit(1, 8, 1), reduction)
    loss.backward()
    assert loss == 0
    assert torch.equal(student.grad, torch.zeros(1, 8))


@pytest.mark.parametrize("distance", ["squared", "smooth_l1"])
def test_collapsed_student_has_finite_gradients(distance: str):
    student = unit(1, 8).repeat(5, 1).requires_grad_()
    loss = structure_alignment_loss(student, unit(5, 8, 1), distance=distance)
    loss.backward()
    assert loss > 0
    assert torch.equal(student.grad, torch.zeros(5, 8))


@pytest.mark.parametrize("loss", [instance_alignment_loss, structure_alignment_loss])
def test_bad_input_of_alignment_losses(loss):
    with pytest.raises(ValueError, match=r"student and teacher .*\(3, 8\) and \(4, 8\)"):
        loss(unit(3, 8), unit(4, 8))
    with pytest.raises(ValueError, match=r"\(3, 8\) and \(3, 9\)"):
        loss(unit(3, 8), unit(3, 9))
    with pytest.raises(ValueError, match="at least one row"):
        loss(torch.zeros(0, 8), torch.zeros(0, 8))
    with pytest.raises(ValueError, match=r"shape \(batch_size, dim\)"):
        loss(torch.zeros(8), torch.zeros(8))
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', but is 'batchmean'"):
        loss(unit(3, 8), unit(3, 8), "batchmean")


def test_unknown_distance():
    with pytest.raises(ValueError, match="distance must be one of 'squared', 'smooth_l1', but is 'l2'"):
        structure_alignment_loss(unit(3, 8), unit(3, 8), distance="l2")


def test_bad_input_of_info_nce_loss():
    with pytest.raises(ValueError, match=r"image_embeds and text_embeds .*\(3, 8\) and \(4, 8\)"):
        info_nce_loss(unit(3, 8), unit(4, 8), 1.0)
    with pytest.raises(ValueError, match=r"logit_scale must be one number, but has shape \(2,\)"):
        info_nce_loss(unit(3, 8), unit(3, 8), torch.ones(2))


# SigLIP's sigmoid loss


def naive_sigmoid_loss(images: torch.Tensor, texts: torch.Tensor, scale: float, bias: float) -> torch.Tensor:
    total = 0.0
    for i in range(len(images)):
        for j in range(len(texts)):
            logit = scale * (images[i] @ texts[j]) + bias
            total = total - torch.log(torch.sigmoid(logit if i == j else -logit))
    return total / len(images)


def test_sigmoid_loss_by_hand():
    # Logits [[1, -1], [-1, 1]]: two right answers a row, each of log(1 + e^-1).
    embeds = torch.eye(2)
    assert sigmoid_loss(embeds, embeds, 2.0, -1.0).item() == pytest.approx(2 * math.log(1 + math.exp(-1)), rel=1e-6)


def test_sigmoid_loss_is_that_of_siglip():
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    siglip = SiglipModel(
        SiglipConfig(
            text_config={**config, "vocab_size": 20, "projection_size": 8},
            vision_config={**config, "image_size": 4, "patch_size": 2},
        )
    ).eval()
    with torch.no_grad():
        siglip.logit_scale.fill_(2.0)
        siglip.logit_bias.fill_(-4.0)
    theirs = siglip(input_ids=torch.randint(3, 20, (5, 6)), pixel_values=torch.randn(5, 3, 4, 4), return_loss=True)
    loss = sigmoid_loss(theirs.image_embeds, theirs.text_embeds, siglip.logit_scale.exp(), siglip.logit_bias)
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-6, atol=1e-6)
    parameters = [siglip.logit_scale, siglip.logit_bias, siglip.vision_model.head.probe]
    ours, expected = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, theirs.loss))
    for actual, gradient in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-5, atol=1e-6)


def test_sigmoid_loss_refuses():
    x = unit(3, 4)
    with pytest.raises(ValueError, match="logit_bias must be one number"):
        sigmoid_loss(x, x, 1.0, torch.zeros(3))
    with pytest.raises(ValueError, match="image_embeds and text_embeds must have one and the same shape"):
        sigmoid_loss(x, x[:2], 1.0, 0.0)


# A block of rows at a time


@pytest.mark.parametrize("block", [1, 50, 10**9])
@pytest.mark.parametrize("name", ["info_nce", "sigmoid", "structure"])
def test_blocks_are_exact(monkeypatch, name, block):
    """Of 13 rows: one, three, or all at a time, against the plain matrix of all against all."""
    images, texts = (unit(13, 6, seed, torch.float64).requires_grad_() for seed in (1, 2))
    scale, bias = torch.tensor(7.0).double().requires_grad_(), torch.tensor(-2.0).double().requires_grad_()
    logits = scale * images @ texts.T
    if name == "info_nce":
        labels = torch.arange(13)
        expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    elif name == "sigmoid":
        expected = naive_sigmoid_loss(images, texts, scale, bias)
    else:
        expected = naive_structure_loss(images, texts, "mean", "squared")
    leaves = (images, texts, scale, bias)
    expected_grads = torch.autograd.grad(expected, leaves, allow_unused=True)

    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", block)
    loss = {
        "info_nce": lambda: info_nce_loss(images, texts, scale),
        "sigmoid": lambda: sigmoid_loss(images, texts, scale, bias),
        "structure": lambda: structure_alignment_loss(images, texts),
    }[name]()
    torch.testing.assert_close(loss, expected)
    for actual, gradient in zip(torch.autograd.grad(loss, leaves, allow_unused=True), expected_grads, strict=True):
        assert (actual is None) == (gradient is None)
        if actual is not None:
            torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["info_nce", "sigmoid", "structure"])
def test_no_tensor_of_all_rows_against_all_columns(monkeypatch, name):
    """Neither in the forward nor in the backward pass."""
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", 40 * 8)
    images, texts = (unit(40, 6, seed).requires_grad_() for seed in (1, 2))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in tree_flatten(result)[0]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        loss = {
            "info_nce": lambda: info_nce_loss(images, texts, 5.0),
            "sigmoid": lambda: sigmoid_loss(images, texts, 5.0, -1.0),
            "structure": lambda: structure_alignment_loss(images, texts),
        }[name]()
        loss.backward()
    assert largest == 40 * 8
