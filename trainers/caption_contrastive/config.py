"""Settings of stage 0, caption-contrastive tuning of the LLM."""

from dataclasses import dataclass

from trainers.base.config import Refused

from .lora import LoraTrainingArguments


@dataclass
class CaptionContrastiveConfig(LoraTrainingArguments):
    r"""Arguments of [`CaptionContrastiveTrainer`]: those of [`~transformers.TrainingArguments`] and the following.

    Args:
        lora_r (`int`, defaults to 16), lora_alpha (`int`, defaults to 32), lora_dropout (`float`, defaults to 0.05):
            Settings of the LoRA on every linear layer of the trained decoder layers (LLM2CLIP, arXiv 2411.04997; the dropout is LLM2Vec's).
        lora_num_layers (`int`, *optional*):
            Number of decoder layers of the LLM, counted from the last, that get a LoRA. All by default, as published.
        cache_frozen_layers (`bool`, defaults to `False`):
            With `lora_num_layers`: compute the hidden states of the frozen lower layers once for each text, keep them in memory, and run only
            the upper layers in each step. The same numbers in less time, if texts are read many times and fit into memory; all rows are
            read before training begins. See [`FrozenLayerStates`].
        loss_scale (`float`, defaults to 50):
            Multiplier of the cosines (LLM2CLIP's run_supervised.py; LLM2Vec's loss: 20).
        plain_text_share (`float`, *optional*):
            Share of the batches with plain text, if there is a `plain_text_dataset`. By default each of its rows is read once per epoch, as
            in LLM2Vec.
        max_length (`int`, *optional*):
            Most tokens of a text, including the template. By default that of the processor, or 512 with a tokenizer (LLM2CLIP, v6).
        gradient_caching_batch_size (`int`, *optional*):
            Most texts in memory at once. A batch of any size is then trained on exactly, at the cost of one more forward pass.
        micro_batch_tokens (`int`, *optional*):
            Most padded tokens of a forward pass. A batch is sorted by length and cut accordingly, so that short texts are not padded to the
            longest one; the loss is still that of the whole batch.

    Defaults that differ from [`~transformers.TrainingArguments`]. LLM2CLIP, v6: `learning_rate` 2e-4, `warmup_steps` 300,
    `num_train_epochs` 1; its batch of 2,048 pairs over all devices is up to you: `per_device_train_batch_size` 64 (LLM2Vec),
    `per_device_eval_batch_size` 64. Ours: `dataloader_drop_last` True (rows that do not fill a batch are left out in any case,
    as they would have other negatives); `remove_unused_columns` False, as captions are no input of the model;
    `ddp_find_unused_parameters` False; `data_seed` that of `seed`; `logging_nan_inf_filter` False.

    Raises:
        ValueError: If a value is out of range, `cache_frozen_layers` comes without `lora_num_layers`, or `gradient_accumulation_steps` is
            above 1: the loss compares the texts of a batch.
    """

    learning_rate: float = 2e-4
    warmup_steps: float = 300
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64

    cache_frozen_layers: bool = False
    loss_scale: float = 50.0
    plain_text_share: float | None = None
    gradient_caching_batch_size: int | None = None
    micro_batch_tokens: int | None = None

    refused = Refused(
        LoraTrainingArguments.refused,
        train_sampling_strategy=(
            ("random",),
            "batches are drawn from one source each; micro_batch_tokens sorts by length",
        ),
        include_num_input_tokens_seen=(("no",), "Trainer does not count the tokens of micro-batches"),
    )

    def __post_init__(self):
        super().__post_init__()
        self.refuse_batch_of_one()
        if self.data_seed != self.seed:
            raise ValueError(
                f"data_seed={self.data_seed}: pairs and their order are drawn from seed; set that instead."
            )
        if self.cache_frozen_layers and self.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha={self.neftune_noise_alpha}: with cache_frozen_layers the token embeddings are not read; leave one of both out."
            )
        self.check_at_least_one("gradient_caching_batch_size", "micro_batch_tokens")
        if not self.loss_scale > 0:
            raise ValueError(f"loss_scale must be positive, got {self.loss_scale}.")
        if self.plain_text_share is not None and not 0 <= self.plain_text_share < 1:
            raise ValueError(f"plain_text_share must be at least 0 and below 1, got {self.plain_text_share}.")
        if self.cache_frozen_layers and self.lora_num_layers is None:
            raise ValueError("cache_frozen_layers needs lora_num_layers: with a LoRA in every layer none is frozen.")
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: the loss compares the texts of a batch with each other, so "
                "its sum over small batches is not that of the joined batch. Raise per_device_train_batch_size and set "
                "gradient_caching_batch_size to what memory allows."
            )
