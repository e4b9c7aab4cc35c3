"""The losses of ProCLIP's curriculum, as pure functions of unit-length embeddings (ProCLIP, arXiv 2510.18795, method).

All of them are differentiable in every tensor argument, take float32, bfloat16, float16 or float64, compute in at
least float32 whatever autocast says, and return a scalar `()` of float32 (float64 for float64 inputs).

The `global_*` forms are for training on several ranks: they compare this rank's rows with the rows of all ranks, so
memory stays linear in the local batch. Their mean over the ranks, which is also what DDP makes of their gradients, is
the loss of the joined batch in one process; with one process they are the plain form. `instance_alignment_loss` with
reduction "mean" needs no such form: it sees one row at a time.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .distributed import gather_with_grad, world_size


def instance_alignment_loss(student: torch.Tensor, teacher: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Squared distance of each student embedding to its teacher embedding: L_ins (ProCLIP, arXiv 2510.18795, method).

    Args:
        student: `(batch_size, dim)`, unit-length rows.
        teacher: `(batch_size, dim)`, unit-length rows.
        reduction: "mean" is (1/N) sum_i ||s_i - t_i||^2, which does not depend on the batch size; "sum" is the
            published form, without 1/N.

    Returns:
        `()`, between 0 and 4 for "mean".

    Raises:
        ValueError: shapes differ or are not 2-D, no rows, or an unknown reduction.
    """
    _check_pair("student", student, "teacher", teacher)
    _check_choice("reduction", reduction, ("mean", "sum"))
    total = (_upcast(student) - _upcast(teacher)).square().sum()
    return total / len(student) if reduction == "mean" else total


def structure_alignment_loss(
    student: torch.Tensor, teacher: torch.Tensor, reduction: str = "mean", distance: str = "squared"
) -> torch.Tensor:
    """Difference between the pairwise distances of student and teacher: L_struct (ProCLIP, arXiv 2510.18795, method).

    Args:
        student: `(batch_size, dim)`, unit-length rows.
        teacher: `(batch_size, dim)`, unit-length rows.
        reduction: "mean" is 2/(N(N-1)) sum_{i<j}, which does not depend on the batch size; "sum" is the published
            form, sum_{i<j}.
        distance: what is summed of d_ij = ||s_i - s_j|| - ||t_i - t_j||: "squared", d^2 (the paper), or "smooth_l1",
            smooth L1 with beta 1 (the published code), which is d^2/2 wherever |d| < 1.

    Returns:
        `()`; 0, with gradient 0, for a batch of one row. Rows that coincide have gradient 0 through their distance.

    Raises:
        ValueError: shapes differ or are not 2-D, no rows, or an unknown reduction or distance.
    """
    _check_structure(student, teacher, reduction, distance)
    student, teacher = _upcast(student), _upcast(teacher)
    total = _structure_sum(student, student, teacher, teacher, distance)
    pairs = len(student) * (len(student) - 1) / 2
    return total / max(pairs, 1) if reduction == "mean" else total


def info_nce_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor | float
) -> torch.Tensor:
    """Symmetric InfoNCE: image i belongs to text i, all other rows are negatives (L_info of ProCLIP, as in CLIP).

    Args:
        image_embeds: `(batch_size, dim)`, unit-length rows.
        text_embeds: `(batch_size, dim)`, unit-length rows.
        logit_scale: `()`, the multiplier of the cosines itself (1 / temperature), not its logarithm.

    Returns:
        `()`, the mean of the image-to-text and the text-to-image cross entropy, in nats.

    Raises:
        ValueError: shapes differ or are not 2-D, no rows, or a logit scale that is no scalar.
    """
    _check_pair("image_embeds", image_embeds, "text_embeds", text_embeds)
    logit_scale = _as_scalar(logit_scale, image_embeds)
    with torch.autocast(image_embeds.device.type, enabled=False):
        logits = logit_scale * (_upcast(image_embeds) @ _upcast(text_embeds).T)
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def global_info_nce_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor | float
) -> torch.Tensor:
    """`info_nce_loss` over the joined batch of all ranks, each computing its own rows against the gathered columns.

    Args and errors as for `info_nce_loss`, with the local rows; every rank must bring the same number of them.

    Returns:
        `()`, the mean over the local rows. Its mean over the ranks is `info_nce_loss` of the joined batch.
    """
    _check_pair("image_embeds", image_embeds, "text_embeds", text_embeds)
    if world_size() == 1:
        return info_nce_loss(image_embeds, text_embeds, logit_scale)
    logit_scale = _as_scalar(logit_scale, image_embeds)
    image_embeds, text_embeds = _upcast(image_embeds), _upcast(text_embeds)
    # One collective for both sides: what costs is the wait for the slowest rank.
    all_images, all_texts = gather_with_grad(torch.cat([image_embeds, text_embeds], dim=1)).chunk(2, dim=1)
    rows = len(image_embeds)
    labels = torch.arange(rows, device=image_embeds.device) + dist.get_rank() * rows
    with torch.autocast(image_embeds.device.type, enabled=False):
        image_to_text = F.cross_entropy(logit_scale * (image_embeds @ all_texts.T), labels)
        text_to_image = F.cross_entropy(logit_scale * (text_embeds @ all_images.T), labels)
    return (image_to_text + text_to_image) / 2


def global_structure_alignment_loss(
    student: torch.Tensor, teacher: torch.Tensor, reduction: str = "mean", distance: str = "squared"
) -> torch.Tensor:
    """`structure_alignment_loss` over the joined batch of all ranks.

    Pairs across ranks count too; the published code leaves them out. Args and errors as for
    `structure_alignment_loss`, with the local rows; every rank must bring the same number of them.

    Returns:
        `()`. Its mean over the ranks is `structure_alignment_loss` of the joined batch, for either reduction.
    """
    _check_structure(student, teacher, reduction, distance)
    ranks = world_size()
    if ranks == 1:
        return structure_alignment_loss(student, teacher, reduction, distance)
    student, teacher = _upcast(student), _upcast(teacher)
    total = _structure_sum(student, gather_with_grad(student), teacher, gather_with_grad(teacher), distance)
    # Each rank holds its rows' share of the sum, and the mean over the ranks divides by their number.
    total = total * ranks
    rows = len(student) * ranks
    return total / (rows * (rows - 1) / 2) if reduction == "mean" else total


def _structure_sum(
    student: torch.Tensor,
    student_columns: torch.Tensor,
    teacher: torch.Tensor,
    teacher_columns: torch.Tensor,
    distance: str,
) -> torch.Tensor:
    # Halved: with all rows among the columns each pair is met twice, and a row's distance to itself is 0.
    student_distances = _pairwise_distances(student, student_columns)
    teacher_distances = _pairwise_distances(teacher, teacher_columns)
    penalty = F.mse_loss if distance == "squared" else F.smooth_l1_loss
    return penalty(student_distances, teacher_distances, reduction="sum").to(student.dtype) / 2


def _pairwise_distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Euclidean distances `(num_rows, num_columns)`; 0, with gradient 0, where a row and a column coincide."""
    # ||a||^2 + ||b||^2 - 2ab cancels for near pairs: at distance 0.01 float32 is off by 0.3 %, as is torch.cdist by
    # matmul; float64 by 2e-11. With 1,024 rows of 768 a loss and its backward take 160 ms on one CPU core, in float32
    # 80 ms. torch.pdist is exact too and takes 120 ms, but its backward on CUDA allocates N x N x dim (3 GB here), and
    # it cannot set local rows against gathered columns. torch.cdist without matmul takes 1,100 ms.
    dtype = _distance_dtype(rows.device)
    rows, columns = rows.to(dtype), columns.to(dtype)
    with torch.autocast(rows.device.type, enabled=False):
        scale = rows.square().sum(1)[:, None] + columns.square().sum(1)
        squared = scale - 2 * (rows @ columns.T)
    # Below the rounding error there is no telling two rows apart, and sqrt has an infinite slope at 0.
    coincide = squared <= 32 * torch.finfo(dtype).eps * scale
    return squared.masked_fill(coincide, 1.0).sqrt().masked_fill(coincide, 0.0)


def _distance_dtype(device: torch.device) -> torch.dtype:
    # Apple's GPUs have no float64: there, pairs nearer than 0.003 count as coinciding.
    return torch.float32 if device.type == "mps" else torch.float64


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _as_scalar(logit_scale: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    logit_scale = torch.as_tensor(logit_scale, device=like.device)
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must be one number, but has shape {tuple(logit_scale.shape)}.")
    return _upcast(logit_scale.reshape(()))


def _check_structure(student: torch.Tensor, teacher: torch.Tensor, reduction: str, distance: str) -> None:
    _check_pair("student", student, "teacher", teacher)
    _check_choice("reduction", reduction, ("mean", "sum"))
    _check_choice("distance", distance, ("squared", "smooth_l1"))


def _check_pair(first_name: str, first: torch.Tensor, second_name: str, second: torch.Tensor) -> None:
    if first.dim() != 2 or first.shape != second.shape or len(first) == 0:
        raise ValueError(
            f"{first_name} and {second_name} must have one and the same shape (batch_size, dim) with at least one "
            f"row, but have {tuple(first.shape)} and {tuple(second.shape)}."
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but is {value!r}.")
