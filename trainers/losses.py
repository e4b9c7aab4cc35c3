"""The losses of ProCLIP's curriculum, as pure functions of unit-length embeddings (ProCLIP, arXiv 2510.18795, method).

They are differentiable in every tensor argument, take float32, bfloat16, float16 or float64, compute in at least
float32 even under autocast, and return a scalar `()` of float32 (float64 for float64 inputs).

The `global_*` forms are for training on several ranks: they compare this rank's rows with the rows of all ranks. Their
mean over the ranks, which is how DDP averages their gradients, is the loss of the joined batch in one process, even if
the ranks have different numbers of rows, or none. With one process they equal the plain form.

Memory is linear in the batch: the matrix of all rows against all columns is computed one block of rows at a time, and
again in the backward pass.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from trainers.base.distributed import gather_with_grad, row_counts, world_size
from trainers.compute.precision import at_least_float32


# Numbers in a block of rows against all columns; a loss and its gradient hold a dozen such blocks. On a CPU, 2 MB of float64, which stay in
# its caches; on a GPU, which wants large matrices, 64 MB of float32: all of 4,096 rows against each other.
BLOCK_ELEMENTS = 2**18
GPU_BLOCK_ELEMENTS = 2**24


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
    total = (at_least_float32(student) - at_least_float32(teacher)).square().sum()
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
    student, teacher = at_least_float32(student), at_least_float32(teacher)
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
    logit_scale = _as_scalar("logit_scale", logit_scale, image_embeds)
    images, texts = at_least_float32(image_embeds), at_least_float32(text_embeds)
    rows = len(images)
    labels = torch.arange(rows, device=images.device)
    if rows * rows > block_elements(images.device):
        return _info_nce_sum(images, texts, images, texts, labels, logit_scale) / rows
    with torch.autocast(images.device.type, enabled=False):
        logits = logit_scale * (images @ texts.T)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float,
) -> torch.Tensor:
    """SigLIP's loss: each image with each text is a binary question, "do they belong together?" (arXiv 2303.15343, Algorithm 1).

    Args:
        image_embeds: `(batch_size, dim)`, unit-length rows; image i belongs to text i alone.
        text_embeds: `(batch_size, dim)`, unit-length rows.
        logit_scale: `()`, the multiplier of the cosines itself, not its logarithm.
        logit_bias: `()`, added to the logits.

    Returns:
        `()`, -(1/N) sum_ij log sigmoid(z_ij (logit_scale x_i . y_j + logit_bias)) with z_ij = 1 for pairs and -1 else: the sum over
        the texts, averaged over the images, in nats.

    Raises:
        ValueError: shapes differ or are not 2-D, no rows, or a logit scale or bias that is no scalar.
    """
    _check_pair("image_embeds", image_embeds, "text_embeds", text_embeds)
    logit_scale = _as_scalar("logit_scale", logit_scale, image_embeds)
    logit_bias = _as_scalar("logit_bias", logit_bias, image_embeds)
    labels = torch.arange(len(image_embeds), device=image_embeds.device)
    total = _sigmoid_sum(
        at_least_float32(image_embeds), at_least_float32(text_embeds), labels, logit_scale, logit_bias
    )
    return total / len(image_embeds)


def global_instance_alignment_loss(
    student: torch.Tensor, teacher: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """`instance_alignment_loss` over the joined batch of all ranks, each computing its own rows.

    Args and errors as for `instance_alignment_loss`, with the local rows.

    Returns:
        `()`. Its mean over the ranks is `instance_alignment_loss` of the joined batch, for either reduction.
    """
    if world_size() == 1:
        return instance_alignment_loss(student, teacher, reduction)
    _check_pair("student", student, "teacher", teacher, local=True)
    _check_choice("reduction", reduction, ("mean", "sum"))
    total = (at_least_float32(student) - at_least_float32(teacher)).square().sum() * world_size()
    return total / sum(row_counts(student)) if reduction == "mean" else total


def global_structure_alignment_loss(
    student: torch.Tensor, teacher: torch.Tensor, reduction: str = "mean", distance: str = "squared"
) -> torch.Tensor:
    """`structure_alignment_loss` over the joined batch of all ranks.

    Pairs across ranks count too; the published code leaves them out. Args and errors as for
    `structure_alignment_loss`, with the local rows.

    Returns:
        `()`. Its mean over the ranks is `structure_alignment_loss` of the joined batch, for either reduction.
    """
    if world_size() == 1:
        return structure_alignment_loss(student, teacher, reduction, distance)
    _check_structure(student, teacher, reduction, distance, local=True)
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    counts = row_counts(student)
    columns = gather_with_grad(student, counts), gather_with_grad(teacher, counts)
    # Each rank holds its rows' share of the sum, and the mean over the ranks divides by their number.
    total = _structure_sum(student, columns[0], teacher, columns[1], distance) * world_size()
    pairs = sum(counts) * (sum(counts) - 1) / 2
    return total / max(pairs, 1) if reduction == "mean" else total


def global_info_nce_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor | float
) -> torch.Tensor:
    """`info_nce_loss` over the joined batch of all ranks, each computing its own rows against the gathered columns.

    Args and errors as for `info_nce_loss`, with the local rows.

    Returns:
        `()`. Its mean over the ranks is `info_nce_loss` of the joined batch; with equal ranks it is the mean over the local rows.
    """
    if world_size() == 1:
        return info_nce_loss(image_embeds, text_embeds, logit_scale)
    _check_pair("image_embeds", image_embeds, "text_embeds", text_embeds, local=True)
    logit_scale = _as_scalar("logit_scale", logit_scale, image_embeds)
    images, texts = at_least_float32(image_embeds), at_least_float32(text_embeds)
    counts = row_counts(images)
    # One collective for both sides: what costs is the wait for the slowest rank.
    all_images, all_texts = gather_with_grad(torch.cat([images, texts], dim=1), counts).chunk(2, dim=1)
    total = _info_nce_sum(images, texts, all_images, all_texts, _own_columns(images, counts), logit_scale)
    return total * world_size() / sum(counts)


def global_sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float,
) -> torch.Tensor:
    """`sigmoid_loss` over the joined batch of all ranks, each computing its own images against the gathered texts.

    Args and errors as for `sigmoid_loss`, with the local rows.

    Returns:
        `()`. Its mean over the ranks is `sigmoid_loss` of the joined batch; with equal ranks it is the mean over the local images.
    """
    if world_size() == 1:
        return sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias)
    _check_pair("image_embeds", image_embeds, "text_embeds", text_embeds, local=True)
    logit_scale = _as_scalar("logit_scale", logit_scale, image_embeds)
    logit_bias = _as_scalar("logit_bias", logit_bias, image_embeds)
    images, texts = at_least_float32(image_embeds), at_least_float32(text_embeds)
    counts = row_counts(images)
    all_texts = gather_with_grad(texts, counts)
    total = _sigmoid_sum(images, all_texts, _own_columns(images, counts), logit_scale, logit_bias)
    return total * world_size() / sum(counts)


def _own_columns(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The positions of this rank's rows among the gathered ones."""
    return torch.arange(len(rows), device=rows.device) + sum(counts[: dist.get_rank()])


def _info_nce_sum(
    images: torch.Tensor,
    texts: torch.Tensor,
    all_images: torch.Tensor,
    all_texts: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: torch.Tensor,
) -> torch.Tensor:
    def of_block(images: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, enabled=False):
            image_to_text = F.cross_entropy(logit_scale * (images @ all_texts.T), labels, reduction="sum")
            text_to_image = F.cross_entropy(logit_scale * (texts @ all_images.T), labels, reduction="sum")
            return (image_to_text + text_to_image) / 2

    return _sum_over_blocks(of_block, len(all_texts), images, texts, labels)


def _sigmoid_sum(
    images: torch.Tensor,
    all_texts: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
) -> torch.Tensor:
    def of_block(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, enabled=False):
            logits = logit_scale * (images @ all_texts.T) + logit_bias
            signs = torch.full_like(logits, -1.0).scatter_(1, labels[:, None], 1.0)
            return -F.logsigmoid(signs * logits).sum()

    return _sum_over_blocks(of_block, len(all_texts), images, labels)


def _structure_sum(
    student: torch.Tensor,
    student_columns: torch.Tensor,
    teacher: torch.Tensor,
    teacher_columns: torch.Tensor,
    distance: str,
) -> torch.Tensor:
    penalty = F.mse_loss if distance == "squared" else F.smooth_l1_loss
    # Once, and not in every block.
    dtype = _distance_dtype(student)
    student_columns, teacher_columns = student_columns.to(dtype), teacher_columns.to(dtype)

    def of_block(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        student_distances = _pairwise_distances(student, student_columns)
        teacher_distances = _pairwise_distances(teacher, teacher_columns)
        # Halved: all rows are among the columns, so each pair counts twice, and a row's distance to itself is 0.
        return penalty(student_distances, teacher_distances, reduction="sum").to(student.dtype) / 2

    return _sum_over_blocks(of_block, len(student_columns), student, teacher)


def _sum_over_blocks(of_block: Callable[..., torch.Tensor], num_columns: int, *rows: torch.Tensor) -> torch.Tensor:
    """Sum of `of_block(*blocks)` over blocks of `rows`, with one block's matrix of rows against columns in memory at a time."""
    block = max(1, block_elements(rows[0].device) // num_columns)
    if len(rows[0]) <= block:
        return of_block(*rows)
    blocks = zip(*(side.split(block) for side in rows), strict=True)
    # Nothing is drawn at random in a block.
    return sum(checkpoint(of_block, *parts, use_reentrant=False, preserve_rng_state=False) for parts in blocks)


def block_elements(device: torch.device) -> int:
    """How many elements a block's matrix has at most on `device`."""
    return BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS


def _pairwise_distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Euclidean distances `(num_rows, num_columns)`; 0, with gradient 0, where a row and a column coincide."""
    # With 1,024 rows of 768 a loss and its backward take 160 ms on one CPU core. torch.pdist is exact too and takes 120 ms, but its backward
    # on CUDA allocates N x N x dim (3 GB here), and it cannot set local rows against gathered columns. torch.cdist without matmul takes
    # 1,100 ms.
    dtype = _distance_dtype(rows)
    rows, columns = rows.to(dtype), columns.to(dtype)
    with torch.autocast(rows.device.type, enabled=False):
        squared, rounding = _squared_distances(rows, columns)
    # Below the rounding error there is no telling two rows apart, and sqrt has an infinite slope at 0.
    coincide = squared <= rounding
    return squared.masked_fill(coincide, 1.0).sqrt().masked_fill(coincide, 0.0)


def _distance_dtype(rows: torch.Tensor) -> torch.dtype:
    """float64 on a CPU, where it takes twice as long as float32. Most GPUs take 64 times as long, and Apple's have none."""
    return torch.float64 if rows.device.type == "cpu" else rows.dtype


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances `(num_rows, num_columns)` of unit-length rows, float32 or float64, and what rounding may leave of one that is 0.

    ||a||^2 + ||b||^2 - 2ab cancels for near pairs: at distance 0.01 float32 is off by 0.5 %, as is torch.cdist by matmul; float64 by 2e-11.
    In float32 each number is therefore split, a = a' + a'', where a' has 11 bits behind the point: ||a' - b'||^2 is then exact in float32,
    because all of its terms are multiples of 2^-22, and the rest is small, and so is its rounding. At distance 0.01 that is off by 2e-6, for
    three matrix products in place of one (tests/trainers/test_losses.py).
    """
    if rows.dtype == torch.float64:
        scale = rows.square().sum(1)[:, None] + columns.square().sum(1)
        return scale - 2 * (rows @ columns.T), 32 * torch.finfo(rows.dtype).eps * scale
    (high_rows, low_rows), (high_columns, low_columns) = _split(rows), _split(columns)
    scale = high_rows.square().sum(1)[:, None] + high_columns.square().sum(1)
    high = scale - 2 * (high_rows @ high_columns.T)
    # ||a||^2 - ||a'||^2 = a''(a + a') and ab - a'b' = a''b + a'b''. As a' has no gradient, that of the sum is 2 (a - b), as it should be.
    squares = (low_rows * (rows + high_rows)).sum(1)[:, None] + (low_columns * (columns + high_columns)).sum(1)
    products = torch.cat([low_rows, high_rows], dim=1) @ torch.cat([columns, low_columns], dim=1).T
    return high + (squares - 2 * products), 2**-5 * torch.finfo(rows.dtype).eps * scale


def _split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows` as a sum: multiples of 2^-11, without gradient, and what is left."""
    high = (rows.detach() * 2**11).round() / 2**11
    return high, rows - high


def _as_scalar(name: str, value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    value = torch.as_tensor(value, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, but has shape {tuple(value.shape)}.")
    return at_least_float32(value.reshape(()))


def _check_structure(
    student: torch.Tensor, teacher: torch.Tensor, reduction: str, distance: str, local: bool = False
) -> None:
    _check_pair("student", student, "teacher", teacher, local)
    _check_choice("reduction", reduction, ("mean", "sum"))
    _check_choice("distance", distance, ("squared", "smooth_l1"))


def _check_pair(
    first_name: str, first: torch.Tensor, second_name: str, second: torch.Tensor, local: bool = False
) -> None:
    """`local`: the rows of one rank, which may have none."""
    if first.dim() != 2 or first.shape != second.shape or (len(first) == 0 and not local):
        raise ValueError(
            f"{first_name} and {second_name} must have one and the same shape (batch_size, dim) with at least one "
            f"row, but have {tuple(first.shape)} and {tuple(second.shape)}."
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but is {value!r}.")
