"""A ProCLIP model with PEFT adapters on a tower: small files that hold all that was trained, the text adapter and the logit scale too."""

import copy
import json
import os
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from modeling_proclip import ProCLIPModel

from .data.store_files import write_file, write_safetensors


TRAINING_FILE = "training.json"
_LOGIT_SCALE = "base_model.model.logit_scale"


class ProCLIPPeftModel(PeftModel):
    r"""
    As [`peft.get_peft_model`] of a [`ProCLIPModel`]: PEFT's adapters on the modules that `peft_config` names, on the image encoder
    (`vision_model`), on the LLM (`text_model`) or on both. The text adapter is trained beside them and saved with them (PEFT's
    `modules_to_save`), and so is the logit scale, which PEFT alone would leave out, as it is a parameter without a module.

    What it saves is loaded by `PeftModel.from_pretrained(base, folder)`, by Transformers' `base.load_adapter(folder)`, and by
    `ProCLIPPeftModel.from_pretrained(base, folder, is_trainable=True)` to go on training.

    Args:
        model ([`ProCLIPModel`]): The base. Load it in float32: what is trained must not be in half precision.
        peft_config (`PeftConfig`): Such as `LoraConfig(target_modules=r"vision_model\..*\.(q_proj|v_proj)")`; it is copied. Name modules that
            are to be trained whole, such as "visual_projection", in its `modules_to_save`.
        kwargs: Of [`peft.PeftModel`].

    Raises:
        TypeError: If `model` is another one.

    Example:

    ```python
    >>> from peft import LoraConfig
    >>> from trainers.peft_model import ProCLIPPeftModel

    >>> model = ProCLIPPeftModel(base, LoraConfig(r=16, lora_alpha=32, target_modules=r"vision_model\..*\.(q_proj|v_proj)"))
    >>> ContrastiveTuningTrainer(model, ContrastiveTuningConfig("stage-2"), pairs, text_store=llm_store, processing_class=processor).train()
    >>> model.save_pretrained("my-adapter")
    ```"""

    def __init__(self, model: ProCLIPModel, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any):
        if not isinstance(model, ProCLIPModel):
            raise TypeError(f"ProCLIPPeftModel is for a ProCLIPModel, got {type(model).__name__}")
        peft_config = copy.copy(peft_config)
        saved = set(peft_config.modules_to_save or ()) | {"text_adapter"}
        peft_config.modules_to_save = sorted(saved)
        if peft_config.base_model_name_or_path is None:
            peft_config.base_model_name_or_path = model.name_or_path or None
        super().__init__(model, peft_config, adapter_name, **kwargs)
        model.logit_scale.requires_grad_(not peft_config.inference_mode)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As [`peft.PeftModel.save_pretrained`], with the logit scale, and with `training.json` where a trainer recorded its stages."""
        super().save_pretrained(str(save_directory), *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(save_directory)
        file = folder / SAFETENSORS_WEIGHTS_NAME
        with safe_open(file, framework="pt") as tensors:
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}
        state[_LOGIT_SCALE] = self.get_base_model().logit_scale.detach().cpu().contiguous()
        write_safetensors(file, state, {"format": "pt"})
        if self.config.training:
            write_file(folder / TRAINING_FILE, json.dumps(self.config.training, indent=2).encode() + b"\n")
