"""Distillation from a teacher's embeddings, in stages 1 and 2."""

import torch

from trainers.losses import global_instance_alignment_loss, global_structure_alignment_loss

from .config import AlignmentConfig


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, args: AlignmentConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """lambda_ins L_ins + lambda_struct L_struct over the joined batch of all processes (ProCLIP, arXiv 2510.18795, method): L_stage1 for text
    embeddings, lambda L_reg of stage 2 for image embeddings.

    `student` and `teacher` are `(batch_size, projection_dim)`, unit length, this process's rows. Returns the loss `()`, whose mean over the processes
    is that of the joined batch, and its parts without their weights. A part with weight 0 is not computed.
    """
    loss, parts = student.new_zeros(()), {}
    if args.lambda_ins:
        parts["instance_loss"] = global_instance_alignment_loss(student, teacher, args.reduction)
        loss = loss + args.lambda_ins * parts["instance_loss"]
    if args.lambda_struct:
        parts["structure_loss"] = global_structure_alignment_loss(
            student, teacher, args.reduction, args.structure_distance
        )
        loss = loss + args.lambda_struct * parts["structure_loss"]
    return loss, parts
