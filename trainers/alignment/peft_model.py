"""A ProCLIP model with PEFT adapters on its towers: small files hold everything that was trained, with text adapter and logit scale."""

import copy
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from hub_cards import adapter_card
from hub_cards.adapter import TRAINING_FILE
from hub_cards.publish import publish, publish_saved
from modeling_proclip import ProCLIPModel
from modeling_proclip.finite_weights import check_finite
from modeling_proclip.publisher import take_hub_arguments
from trainers.storage.files import write_file, write_safetensors


_LOGIT_SCALE = "base_model.model.logit_scale"


class ProCLIPPeftModel(PeftModel):
    r"""As [`peft.get_peft_model`] of a [`ProCLIPModel`]: PEFT's adapters on the modules that `peft_config` names, on the image encoder
    (`vision_model`), on the LLM (`text_model`) or on both. The text adapter is trained beside them and saved with them (PEFT's
    `modules_to_save`), and so is the logit scale, which PEFT alone would leave out, as it is a parameter without a module.

    What it saves is loaded by `PeftModel.from_pretrained(base, folder)`, by Transformers' `base.load_adapter(folder)`, and by
    `ProCLIPPeftModel.from_pretrained(base, folder, is_trainable=True)` to go on training.

    Args:
        model ([`ProCLIPModel`]): The base. It may be in half precision: the trainer converts what is trained to float32.
        peft_config (`PeftConfig`): Such as `LoraConfig(target_modules=r"vision_model\..*\.(q_proj|v_proj)")`; it is copied. Name modules that
            are to be trained whole, such as "visual_projection", in its `modules_to_save`.
        kwargs: Passed to [`peft.PeftModel`].

    Raises:
        TypeError: If `model` is another one.

    Example:

    ```python
    >>> from peft import LoraConfig
    >>> from trainers.alignment.peft_model import ProCLIPPeftModel

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

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves as [`peft.PeftModel.save_pretrained`] does, with the logit scale, a card, and `training.json` where a trainer recorded its stages.
        With `push_to_hub` the folder is published too, to `repo_id` (by default its name). Raises ValueError if a trained weight is NaN or
        infinite.
        """
        saved = kwargs.get("state_dict")
        if saved is None:
            saved = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        check_finite(saved, f"{save_directory} was not written")
        hub_arguments = take_hub_arguments(kwargs, Path(save_directory).name) if push_to_hub else None
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
        write_file(folder / "README.md", str(adapter_card(folder)).encode())
        if hub_arguments is not None:
            publish_saved(folder, **hub_arguments)

    @classmethod
    def from_pretrained(
        cls, model: ProCLIPModel, model_id: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> "ProCLIPPeftModel":
        """As [`peft.PeftModel.from_pretrained`], with the record of the adapters' training in the model's configuration."""
        loaded = super().from_pretrained(model, str(model_id), *args, **kwargs)
        record = _training_record(str(model_id), kwargs.get("revision"), kwargs.get("token"))
        if record is not None:
            loaded.config.training = record
        return loaded

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "ProCLIP adapters",
        token: str | None = None,
        **card: Any,
    ) -> str | None:
        """Publishes what `save_pretrained` writes, in one commit, as `proclip publish` does.

        Args:
            repo_id: `owner/name`, or the name alone of a repository of your own.
            private: Whether only its owner sees a new repository: `None` means yes. One that is there must be as private.
            revision: Branch, made if it is not there.
            card: Arguments of [`~hub_cards.adapter_card`], such as `base_model` and `license`.

        Returns:
            The commit.

        Raises:
            PublishError: If the Hub does not take it.
        """
        settings: dict[str, Any] = {
            "private": private,
            "revision": revision,
            "message": commit_message,
            "token": token,
        }
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return publish(folder, repo_id, card=card, **settings).commit


def _training_record(model_id: str, revision: str | None, token: str | None) -> list[dict[str, Any]] | None:
    """What a trainer recorded beside adapters, in a folder or a repository; None if there is nothing."""
    file = Path(model_id, TRAINING_FILE)
    if not Path(model_id).is_dir():
        try:
            file = Path(hf_hub_download(model_id, TRAINING_FILE, revision=revision, token=token))
        except EntryNotFoundError:
            return None
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
