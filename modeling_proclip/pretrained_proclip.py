"""How a ProCLIP is loaded, saved and published: with its LLM or without, each tower in its own dtype."""

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .attention_proof import check_bidirectional
from .configuration_proclip import ProCLIPConfig, check_tower_keys
from .finite_weights import check_finite
from .lean_checkpoint import record_text_model, recorded_text_model
from .pretrained_towers import tower_dtypes
from .publisher import find_publisher, private_by_default, take_hub_arguments


Model = TypeVar("Model", bound="ProCLIPPreTrainedModel")


class ProCLIPPreTrainedModel(PreTrainedModel):
    """What [`ProCLIPModel`] does with checkpoints."""

    config_class = ProCLIPConfig
    base_model_prefix = "proclip"

    vision_model: PreTrainedModel
    text_model: PreTrainedModel | None

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        text_model: str | os.PathLike | PreTrainedModel | None = None,
        load_text_model: bool = True,
        verify_text_model: bool = True,
        **kwargs: Any,
    ) -> Model:
        r"""
        As [`~transformers.PreTrainedModel.from_pretrained`]. A lean checkpoint brings its LLM back from where the config says.

        Args:
            text_model (`str`, `os.PathLike` or `PreTrainedModel`, *optional*):
                Where the LLM of a lean checkpoint lies now, or the LLM itself (give that to this class: `AutoModel` copies its arguments).
            load_text_model (`bool`, defaults to `True`): `False` loads the vision side and the adapter only.
            verify_text_model (`bool`, defaults to `True`):
                `False` takes the LLM whatever its weights are: one in another dtype than its files, quantised, or tuned since.
            kwargs: `dtype` and `attn_implementation` may be a dict with the keys `vision_config` and `text_config`, and `""` for the rest. By
                default every part has the dtype that it was saved in.

        Raises:
            ValueError: If the LLM found is not the one that the checkpoint was made with, or stays causal.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        check_tower_keys(dtype)
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **kwargs)
        # The library loads a whole model in one dtype, but towers that are made in another one are filled in theirs.
        dtypes = tower_dtypes(dtype, config)
        # AutoModel asks for PEFT adapters this way. They may be on the LLM, which a lean checkpoint brings later.
        adapters = dict(kwargs.pop("adapter_kwargs", None) or {})
        late_adapter = adapters.pop("_adapter_model_path", None) if config.lean and load_text_model else None
        loaded = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            load_text_model=load_text_model,
            dtypes=dtypes,
            dtype=dtypes[""] or "auto",
            adapter_kwargs=adapters,
            **kwargs,
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info
        if load_text_model and model.config.lean:
            model.text_model = recorded_text_model(
                model.config, text_model, dtypes["text_config"], kwargs, verify=verify_text_model
            )
            model.config.text_config = model.text_model.config
        elif text_model is not None:
            raise ValueError("text_model is for a lean checkpoint; this one has its LLM inside.")
        if late_adapter is not None:
            model.load_adapter(late_adapter, adapter_kwargs=adapters)
        if model.text_model is not None:
            check_bidirectional(model.text_model)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        lean: bool | None = None,
        **kwargs: Any,
    ) -> None:
        r"""
        Saves as [`~transformers.PreTrainedModel.save_pretrained`] does.

        Args:
            push_to_hub (`bool`, defaults to `False`):
                Publish the folder once it is saved, as [`push_to_hub`] does, with `repo_id` (by default the folder's name), `private`,
                `revision`, `commit_message` and `token`.
            lean (`bool`, *optional*):
                Leave the frozen LLM out and record its name, revision and content hash instead; `from_pretrained` fetches it. By default a
                model is saved as it was loaded.

        Raises:
            ValueError: If a full checkpoint is asked of a model without its LLM, or a lean one of a model whose LLM was changed since it
                was loaded or has no name; or if a weight to save is NaN or infinite.
            PublishError: If the Hub does not take it.
        """
        hub_arguments = take_hub_arguments(kwargs, Path(save_directory).name) if push_to_hub else None
        self._save(save_directory, is_main_process, state_dict, lean, *args, **kwargs)
        if hub_arguments is not None and is_main_process:
            publisher = find_publisher("publish")
            if publisher is None:
                self.push_to_hub(**hub_arguments)
            else:
                publisher.publish_saved(save_directory, **hub_arguments)

    def _save(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool,
        state_dict: dict[str, torch.Tensor] | None,
        lean: bool | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if self._hf_peft_config_loaded:  # by add_adapter or load_adapter: only the adapters are saved
            check_finite(self.state_dict() if state_dict is None else state_dict, f"{save_directory} was not written")
            return super().save_pretrained(save_directory, is_main_process, state_dict, False, *args, **kwargs)
        lean = (self.config.lean or self.text_model is None) if lean is None else lean
        if self.text_model is None and not lean:
            raise ValueError("This model was loaded without its LLM: it can only be saved with lean=True.")
        state_dict = self.state_dict() if state_dict is None else state_dict
        prefix = "text_model."
        text_state = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        record_text_model(self.config, text_state, lean)
        self.config.vision_config.dtype = self.vision_model.dtype
        if self.text_model is not None:
            self.config.text_config.dtype = self.text_model.dtype
        if lean:
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
        check_finite(state_dict, f"{save_directory} was not written")
        was_lean, self.config.lean = self.config.lean, lean
        try:
            super().save_pretrained(save_directory, is_main_process, state_dict, False, *args, **kwargs)
        finally:
            self.config.lean = was_lean

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        r"""
        Publishes the model with its card and the code that loads it anywhere, in one commit: `hub_cards.publish.publish_model`.

        Args:
            repo_id (`str`): `owner/name`, or the name alone of a repository of your own.
            kwargs: `processor` (to send with it; without one the repository keeps the one that it has), `private` (new repositories are,
                unless `False`), `lean`, `revision`, `commit_message`, `max_shard_size`, `card` and `token`.

        Returns:
            `PublishReport`.

        Raises:
            PublishError: If the model is not complete, or the Hub does not take it.
        """
        publisher = find_publisher("publish")
        if publisher is None:
            return super().push_to_hub(repo_id, **private_by_default(kwargs))
        return publisher.publish_model(self, repo_id, **kwargs)
