"""The losses and their gradients against the values recorded from the reference."""

import pytest
import torch
import torch.nn.functional as F

from tests.golden import Golden, load
from trainers import losses
from trainers.losses import info_nce_loss, instance_alignment_loss, structure_alignment_loss


def normalized_leaves(golden: Golden, prefix: str, names: list[str]) -> tuple[dict, dict]:
    """The inputs as leaves, and unit-length versions of them that keep their gradients."""
    leaves = {name: golden.inputs[prefix + name].clone().requires_grad_() for name in names}
    normalized = {name: F.normalize(leaf, dim=-1) for name, leaf in leaves.items()}
    for tensor in normalized.values():
        tensor.retain_grad()
    return leaves, normalized


def check_gradients(golden: Golden, prefix: str, leaves: dict, normalized: dict, setting: str = "") -> None:
    for name, leaf in leaves.items():
        golden.assert_close(f"grad.{prefix}{setting}in.{name}", leaf.grad)
        golden.assert_close(f"grad.{prefix}{setting}{name}_normalized", normalized[name].grad)


def check_stage1(golden: Golden, prefix: str = "") -> None:
    leaves, student = normalized_leaves(golden, prefix, ["student_short", "student_noise"])
    teacher_short = F.normalize(golden.inputs[prefix + "teacher_short"], dim=-1)
    teacher_noise = F.normalize(golden.inputs[prefix + "teacher_noise"], dim=-1)
    instance = instance_alignment_loss(student["student_short"], teacher_short, "sum")
    instance = instance + instance_alignment_loss(student["student_noise"], teacher_noise, "sum")
    structure = structure_alignment_loss(student["student_short"], teacher_short, "sum", "smooth_l1")
    (instance + structure).backward()

    golden.assert_close(f"out.{prefix}mse_sum_short_plus_noise", instance)
    golden.assert_close(f"out.{prefix}relation_loss_short", structure)
    golden.assert_close(f"out.{prefix}total_loss", instance + structure)
    upper = torch.ones(len(teacher_short), len(teacher_short)).triu(1).bool()
    for name, embeds in (("student", student["student_short"]), ("teacher", teacher_short)):
        golden.assert_close(f"out.{prefix}pdist_{name}_short", losses._pairwise_distances(embeds, embeds)[upper])
    check_gradients(golden, prefix, leaves, student)
    # The reference's `mse_loss` is the same object as its total, so logging it shows the wrong number. Ours are apart.
    assert golden.outputs[f"{prefix}ref_mse_var_aliases_total"]
    golden.checked.add(f"out.{prefix}ref_mse_var_aliases_total")


def check_stage2(golden: Golden, prefix: str = "", setting: str = "", weight: float | None = None) -> None:
    weight = golden.config["distill_loss_weight"] if weight is None else weight
    leaves, student = normalized_leaves(golden, prefix, ["student_image", "student_text"])
    teacher = F.normalize(golden.inputs[prefix + "teacher_image"], dim=-1)
    logit_scale = golden.inputs[prefix + "logit_scale"].clone().requires_grad_()
    # The recorded parameter is the logarithm; the loss takes the multiplier.
    info_nce = info_nce_loss(student["student_image"], student["student_text"], logit_scale.exp())
    instance = instance_alignment_loss(student["student_image"], teacher, "sum")
    structure = structure_alignment_loss(student["student_image"], teacher, "sum", "smooth_l1")
    distill = weight * (instance + structure)
    (info_nce + distill).backward()

    golden.assert_close(f"out.{prefix}{setting}total_loss", info_nce + distill)
    if not setting:
        golden.assert_close(f"out.{prefix}clip_loss", info_nce)
        golden.assert_close(f"out.{prefix}mse_sum_image", instance)
        golden.assert_close(f"out.{prefix}relation_loss_image", structure)
        golden.assert_close(f"out.{prefix}weighted_distill_loss", distill)
    check_gradients(golden, prefix, leaves, student, setting)
    golden.assert_close(f"grad.{prefix}{setting}in.logit_scale", logit_scale.grad)
    logits = student["student_image"] @ student["student_text"].T
    labels = torch.arange(len(logits))
    for name, scores in (("i2t_acc", logits), ("t2i_acc", logits.T)):
        golden.assert_close(f"out.{prefix}{setting}{name}", (scores.argmax(-1) == labels).float().mean())


@pytest.mark.parametrize("batch_size", [2, 5, 8])
def test_stage1_case(batch_size: int):
    golden = load(f"g3_stage1_b{batch_size}")
    check_stage1(golden)
    assert golden.unchecked() == set()


@pytest.mark.parametrize("batch_size", [2, 5, 8])
def test_stage2_case(batch_size: int):
    golden = load(f"g3_stage2_b{batch_size}")
    check_stage2(golden)
    check_stage2(golden, setting="no_distill.", weight=0.0)
    assert golden.unchecked() == set()


def test_degenerate_batches_case():
    golden = load("g3_edge_cases")
    for name in ("batch1", "duplicates", "beyond_beta", "equal"):
        check_stage1(golden, f"s1_{name}.")
    for name in ("batch1", "duplicates"):
        check_stage2(golden, f"s2_{name}.")
    assert golden.unchecked() == set()


def test_cliploss_of_one_process_case():
    golden = load("g4_cliploss_world1")
    image = golden.inputs["image_features"].clone().requires_grad_()
    text = golden.inputs["text_features"].clone().requires_grad_()
    logit_scale = golden.inputs["logit_scale"].clone().requires_grad_()
    loss = info_nce_loss(image, text, logit_scale.exp())
    loss.backward()
    golden.assert_close("out.smoothing_0.0.loss", loss)
    golden.assert_close("grad.smoothing_0.0.in.image_features", image.grad)
    golden.assert_close("grad.smoothing_0.0.in.text_features", text.grad)
    golden.assert_close("grad.smoothing_0.0.in.logit_scale", logit_scale.grad)
    labels = torch.arange(len(image))
    golden.assert_close("out.i2t_acc", ((image @ text.T).argmax(-1) == labels).float().mean())
    golden.assert_close("out.t2i_acc", ((text @ image.T).argmax(-1) == labels).float().mean())
    # Label smoothing is read from the command line by the reference and never used; there is none here.
    assert all("smoothing_0.1" in name for name in golden.unchecked())
