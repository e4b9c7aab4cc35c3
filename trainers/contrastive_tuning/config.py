"""Settings of stage 2, contrastive tuning, with LLM2CLIP and LiT as presets."""

from dataclasses import dataclass

from trainers.alignment.config import AlignmentConfig


# ProCLIP, arXiv 2510.18795, Table 8: one weight for L_reg, on sums over 512 pairs a device.
PUBLISHED_LAMBDA = 4e-4
PUBLISHED_BATCH = 512

_METHODS = ("proclip", "llm2clip", "lit")


def batch_invariant_weights(
    lambda_: float = PUBLISHED_LAMBDA, per_device_batch: int = PUBLISHED_BATCH, distance: str = "squared"
) -> tuple[float, float]:
    """The two weights with which `reduction="mean"` and `structure_distance="squared"` give the loss that a single weight gives on sums over a
    batch, lambda (L_ins + L_struct) (ProCLIP, arXiv 2510.18795, method).

    The sum over N pairs is N times their mean; the sum over the pairs of pairs is N (N - 1) / 2 times theirs.

    Args:
        lambda_: weight of the sums.
        per_device_batch: N, the number of pairs that were summed over.
        distance: what L_struct summed, "squared" (paper) or "smooth_l1" (published code), which is half of the square on unit vectors.

    Returns:
        `(lambda_ins, lambda_struct)`; (0.2048, 52.3) for the paper's formula at its settings, (0.2048, 26.2) for its code's.
    """
    if distance not in ("squared", "smooth_l1"):
        raise ValueError(f"distance must be 'squared' or 'smooth_l1', got {distance!r}.")
    pairs = per_device_batch * (per_device_batch - 1) / 2
    return lambda_ * per_device_batch, lambda_ * pairs * (1 if distance == "squared" else 0.5)


@dataclass
class ContrastiveTuningConfig(AlignmentConfig):
    r"""Arguments of [`ContrastiveTuningTrainer`]: those of [`~transformers.TrainingArguments`] and the following.

    Args:
        method (`"proclip"`, `"llm2clip"` or `"lit"`, defaults to `"proclip"`):
            "proclip": L_info + lambda_ins L_ins + lambda_struct L_struct, regularised towards the EMA teacher, after stage 1. "llm2clip"
            (arXiv 2411.04997): L_info alone, without a teacher, from a fresh adapter. "lit" (arXiv 2111.07991): the same with the image
            encoder frozen.
        loss (`"info_nce"` or `"sigmoid"`, defaults to `"info_nce"`):
            L_info: symmetric InfoNCE over the joined batch (ProCLIP, LLM2CLIP, LiT), or SigLIP's sigmoid loss (arXiv 2303.15343), for SigLIP
            towers: it trains the model's `logit_bias` too, and does not bound the logit scale, which is above 100 in SigLIP.
        ema_decay (`float`, defaults to 0.999): Decay alpha of the EMA teacher.
        reduction (`"mean"` or `"sum"`, defaults to `"mean"`):
            How L_ins and L_struct are reduced. "mean" does not depend on the batch size. "sum" is the paper's formula; it sums over the joined
            batch of all processes (the published code: over each process's own, averaged over the processes).
        structure_distance (`"squared"` or `"smooth_l1"`, defaults to `"squared"`):
            How L_struct measures a difference of distances: its square (paper), or smooth L1 (published code), half of the square.
        lambda_ins, lambda_struct (`float`, *optional*):
            Weights of L_ins and L_struct. "proclip": with "sum" the published 4e-4 for both; with "mean" 0.2048 and 52.3, the same at the
            published 512 pairs a device ([`batch_invariant_weights`]). 0 for the other methods.
        freeze_vision (`bool`, *optional*): Whether the image encoder (tower and projection) is frozen. True for "lit", else False.
        adapter_learning_rate (`float`, *optional*):
            Learning rate of the text adapter; `learning_rate` by default. A much higher one destroys what stage 1 inherited.
        gradient_caching_batch_size (`int`, *optional*):
            Rows of a micro-batch. The batch of `per_device_train_batch_size` rows stays in the host's memory and goes through the model this
            many rows at a time, twice; loss and gradients are those of the whole batch ([`cached_backward`], arXiv 2101.06983). One device
            can train with the papers' batch size in the memory of a micro-batch.
        matryoshka_dims (`list[int]`, *optional*):
            Sizes of shorter embeddings to train at the same time (Matryoshka, arXiv 2205.13147): the first so many dimensions of every embedding,
            brought to unit length. The loss is the sum of L_stage2 over the whole embedding and over each of these prefixes, with
            weight 1 each (its eq. 1 with every c_m = 1; sentence-transformers' default too). Logged as `prefix_64_loss` and so on, and
            recorded in the model's configuration. Costs the loss once more for each size, which is little beside the encoders.

    Defaults that differ from [`~transformers.TrainingArguments`]. ProCLIP, arXiv 2510.18795, Table 8: `per_device_train_batch_size` 512,
    `learning_rate` 1e-5, `lr_scheduler_type` "cosine", `weight_decay` 0.05, `adam_beta2` 0.98, `adam_epsilon` 1e-6, `num_train_epochs`
    4, `ema_decay` 0.999. Ours: `per_device_eval_batch_size` 512, as a contrastive loss is compared at equal batches;
    `dataloader_drop_last` True, as a smaller last batch has another loss (False is exact too, on any number of processes; evaluation reads
    all rows in any case); `remove_unused_columns` False, as captions are no input of the model; `ddp_find_unused_parameters` False, as
    every trained parameter has a gradient in every step; `logging_nan_inf_filter` False, as training stops at such a loss.

    Raises:
        ValueError: If a choice is unknown, a value contradicts `method`, a number makes no sense, or with `gradient_accumulation_steps`
            > 1: a contrastive loss compares the pairs of a batch with each other.
    """

    per_device_train_batch_size: int = PUBLISHED_BATCH
    per_device_eval_batch_size: int = PUBLISHED_BATCH

    method: str = "proclip"
    loss: str = "info_nce"
    ema_decay: float = 0.999
    freeze_vision: bool | None = None
    adapter_learning_rate: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.method not in _METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {self.method!r}.")
        if self.loss not in ("info_nce", "sigmoid"):
            raise ValueError(f"loss must be 'info_nce' or 'sigmoid', got {self.loss!r}.")
        self._apply_method()
        self.refuse_batch_of_one()
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay must be between 0 and 1, got {self.ema_decay}.")
        if self.adapter_learning_rate is not None and not self.adapter_learning_rate > 0:
            raise ValueError(f"adapter_learning_rate must be positive, got {self.adapter_learning_rate}.")
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: a contrastive loss compares the pairs of a batch with each "
                "other, so its mean over small batches is not the loss of the joined batch. Raise per_device_train_batch_size instead, and set "
                "gradient_caching_batch_size to what fits into memory."
            )

    def _apply_method(self) -> None:
        freeze_vision = self.method == "lit"
        if self.freeze_vision is None:
            self.freeze_vision = freeze_vision
        elif self.freeze_vision != freeze_vision:
            raise ValueError(
                f"method={self.method!r} means freeze_vision={freeze_vision}, but it is {self.freeze_vision}: leave it out, or choose "
                "another method ('lit' freezes the image encoder)."
            )
        if self.method == "proclip":
            published = (PUBLISHED_LAMBDA, PUBLISHED_LAMBDA)
            # Also for smooth L1: the published weight, carried from the sum to the mean of the same distances.
            weights = published if self.reduction == "sum" else batch_invariant_weights()
            self.lambda_ins = weights[0] if self.lambda_ins is None else self.lambda_ins
            self.lambda_struct = weights[1] if self.lambda_struct is None else self.lambda_struct
            if self.lambda_ins == self.lambda_struct == 0:
                raise ValueError("lambda_ins and lambda_struct are both 0, which is method='llm2clip'.")
            return
        for name in ("lambda_ins", "lambda_struct"):
            if getattr(self, name):
                raise ValueError(
                    f"method={self.method!r} means {name}=0, but it is {getattr(self, name)}: leave it out, or choose method='proclip'."
                )
            setattr(self, name, 0.0)
