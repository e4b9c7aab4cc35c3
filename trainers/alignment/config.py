"""Settings that stages 1 and 2 share."""

from dataclasses import dataclass

from trainers.base.config import Refused, StageArguments


@dataclass
class AlignmentConfig(StageArguments):
    """Fields and defaults that stages 1 and 2 share; see [`RepresentationInheritanceConfig`] and [`ContrastiveTuningConfig`]."""

    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.05
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    num_train_epochs: float = 4.0

    reduction: str = "mean"
    structure_distance: str = "squared"
    lambda_ins: float | None = None
    lambda_struct: float | None = None
    gradient_caching_batch_size: int | None = None
    matryoshka_dims: list[int] | None = None

    refused = Refused(
        StageArguments.refused,
        use_liger_kernel=((False,), "it has no kernels for the parts of a ProCLIPModel that are trained"),
        neftune_noise_alpha=(
            (None,),
            "the LLM's embeddings are looked up: there are no token embeddings to add noise to",
        ),
        train_sampling_strategy=(("random", "sequential"), "rows have no token lengths"),
        include_num_input_tokens_seen=(("no",), "pixels would be counted as tokens"),
    )

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (("reduction", ("mean", "sum")), ("structure_distance", ("squared", "smooth_l1"))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}."
                )
        for name in ("lambda_ins", "lambda_struct"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.gradient_caching_batch_size is not None and self.gradient_caching_batch_size < 1:
            raise ValueError(
                f"gradient_caching_batch_size must be the rows of a micro-batch, at least 1, or None for none; it is "
                f"{self.gradient_caching_batch_size}."
            )
        if self.gradient_caching_batch_size is not None and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} with gradient_caching_batch_size="
                f"{self.gradient_caching_batch_size}: a cached step has one whole batch, per_device_train_batch_size, which may be as large "
                "as you like; leave gradient_accumulation_steps at 1."
            )
        if self.matryoshka_dims is not None:
            self._check_matryoshka_dims(self.matryoshka_dims)
        if not self.dataloader_drop_last and self.world_size > 1 and not self.accelerator_config.even_batches:
            raise ValueError(
                "even_batches=False with dataloader_drop_last=False: some processes would have no last batch, and the others would wait for "
                "them. Leave even_batches True: the rows that it repeats to fill the last batch do not count in the loss."
            )

    @staticmethod
    def _check_matryoshka_dims(dims: list[int]) -> None:
        if not isinstance(dims, (list, tuple)) or not dims or not all(type(dim) is int and dim > 0 for dim in dims):
            raise ValueError(
                f"matryoshka_dims must list the sizes of the shorter embeddings, such as [256, 128, 64], or be None; it is {dims!r}."
            )
        if len(set(dims)) < len(dims):
            raise ValueError(f"matryoshka_dims names a size twice: {dims}.")
