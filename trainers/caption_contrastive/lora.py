"""A LoRA on an LLM's decoder layers, through PEFT, for caption-contrastive tuning and its warm-up."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel, set_seed

from trainers.base.config import StageArguments


@dataclass
class LoraTrainingArguments(StageArguments):
    """Fields and defaults that [`CaptionContrastiveConfig`] and [`MaskedNextTokenConfig`] share."""

    label_names: list[str] | None = None

    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_num_layers: int | None = None
    max_length: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.label_names is None:
            self.label_names = []  # PEFT hides the model's inputs, and Trainer would warn that it cannot find the labels
        self.check_at_least_one("lora_r", "lora_num_layers", "max_length")
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha must be positive, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}.")

    def check_at_least_one(self, *names: str) -> None:
        """Raises ValueError if one of the fields is set to less than 1."""
        for name in names:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def add_lora(text_model: PreTrainedModel, args: LoraTrainingArguments) -> Any:
    """The LLM with a fresh LoRA, initialised from `args.seed`, on every linear layer of its last `lora_num_layers` decoder layers, as a
    `PeftModel`. The LLM itself, a base model whose decoder layers are `text_model.layers`, is changed: the LoRA is inserted into its layers. Its weights
    are frozen; those of the LoRA are float32 if the LLM is in half precision. ImportError if PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            'a LoRA is trained through PEFT, which is not installed: pip install "proclip-transformers[peft]"'
        ) from error

    num_layers = len(text_model.layers)
    trained = num_layers if args.lora_num_layers is None else args.lora_num_layers
    if trained > num_layers:
        raise ValueError(f"lora_num_layers={trained}, but the LLM has {num_layers} layers.")
    targets = [
        f"layers.{i}.{name}"
        for i in range(num_layers - trained, num_layers)
        for name, module in text_model.layers[i].named_modules()
        if isinstance(module, nn.Linear)
    ]
    set_seed(args.seed)
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        task_type="FEATURE_EXTRACTION",
    )
    return get_peft_model(text_model, lora)
