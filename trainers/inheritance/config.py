"""Settings of stage 1, representation inheritance."""

from dataclasses import dataclass

from trainers.alignment.config import AlignmentConfig


@dataclass
class RepresentationInheritanceConfig(AlignmentConfig):
    r"""Arguments of [`RepresentationInheritanceTrainer`]: those of [`~transformers.TrainingArguments`] and the following.

    Args:
        reduction (`"mean"` or `"sum"`, defaults to `"mean"`):
            How L_ins and L_struct are reduced. "mean" does not depend on the batch size. "sum" is the paper's formula; it sums over the joined
            batch of all processes (the published code: over each process's own, averaged over the processes), so the balance of the two
            parts moves with the batch.
        structure_distance (`"squared"` or `"smooth_l1"`, defaults to `"squared"`):
            How L_struct measures a difference of distances: its square (paper), or smooth L1 (published code), half of the square.
        lambda_ins, lambda_struct (`float`, *optional*):
            Weights of L_ins and L_struct. With "sum" 1 and 1 (L_stage1 = L_ins + L_struct, paper). Those sums over N texts are N and
            N (N - 1) / 2 times the means; without the common factor N, on which AdamW's steps do not depend, the published balance at 128
            texts a device is 1 and 63.5 with "mean". Our default with "mean" is 1 and 8, measured on the quickstart's texts and concepts
            (300 steps of 256 texts, two seeds; zero-shot of unseen concepts with weights 1, 8 and 63.5 of L_struct): 95.2, 96.6 and 88.6 %
            at learning rate 3e-4, 99.4, 99.6 and 99.4 % at 1e-3; L_ins ends lowest with 1 and 8, L_struct with 63.5.
        gradient_caching_batch_size (`int`, *optional*):
            Rows of a micro-batch. The batch of `per_device_train_batch_size` rows stays in the host's memory and goes through the model this
            many rows at a time, twice; loss and gradients are those of the whole batch ([`cached_backward`], arXiv 2101.06983). One device
            can train with the papers' batch size in the memory of a micro-batch.
        matryoshka_dims (`list[int]`, *optional*):
            Sizes of shorter embeddings to train at the same time (Matryoshka, arXiv 2205.13147): the first so many dimensions of every embedding,
            brought to unit length. The loss is the sum of L_stage1 over the whole embedding and over each of these prefixes, with
            weight 1 each (its eq. 1 with every c_m = 1; sentence-transformers' default too). Logged as `prefix_64_loss` and so on, and
            recorded in the model's configuration. Costs the loss once more for each size, which is little beside the encoders.

    Defaults that differ from [`~transformers.TrainingArguments`]. ProCLIP, arXiv 2510.18795, Table 8: `per_device_train_batch_size` 128,
    `learning_rate` 1e-5, `lr_scheduler_type` "cosine", `weight_decay` 0.05, `adam_beta2` 0.98, `adam_epsilon` 1e-6, `num_train_epochs`
    4. Ours: `per_device_eval_batch_size` 128, as L_struct is compared at equal batches; `dataloader_drop_last` True, as a smaller last batch
    has another loss (False is exact too, on any number of processes; evaluation reads all rows in any case); `remove_unused_columns` False,
    as captions are no input of the model; `ddp_find_unused_parameters` False, as every trained parameter has a gradient in every step;
    `logging_nan_inf_filter` False, as training stops at such a loss.

    Raises:
        ValueError: If a choice is unknown, a weight negative or both are 0, or with `gradient_accumulation_steps` > 1 unless
            `lambda_struct=0`: L_struct compares the texts of a batch with each other.
    """

    per_device_train_batch_size: int = 128
    per_device_eval_batch_size: int = 128

    def __post_init__(self):
        super().__post_init__()
        self.lambda_ins = 1.0 if self.lambda_ins is None else self.lambda_ins
        if self.lambda_struct is None:
            self.lambda_struct = 8.0 if self.reduction == "mean" else 1.0
        if self.lambda_ins == self.lambda_struct == 0:
            raise ValueError("lambda_ins and lambda_struct are both 0: there is nothing to train on.")
        if self.lambda_struct:
            self.refuse_batch_of_one()
        if self.gradient_accumulation_steps > 1 and self.lambda_struct:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: L_struct compares the texts of a batch with each other, "
                "so its sum over small batches is not that of the joined batch. Raise per_device_train_batch_size instead, and set "
                "gradient_caching_batch_size to what fits into memory; or set lambda_struct=0."
            )
