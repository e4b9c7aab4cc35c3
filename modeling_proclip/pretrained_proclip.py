"""How a ProCLIP is loaded, saved and published: with its LLM or without, each tower in its own dtype."""

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .attention_proof import check_bidirectional
from .configuration_proclip import ProCLIPConfig, check_tower_keys
from .finite_weights import check_finite
from .lean_checkpoint import record_text_model, recorded_text_model
from .pretrained_towers import (
    explain_flash_attention,
    lasting_name,
    pretrained_text_tower,
    pretrained_vision_tower,
    tower_argument,
    tower_dtypes,
)
from .publisher import find_publisher, private_by_default, take_hub_arguments


logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound="ProCLIPPreTrainedModel")


class ProCLIPPreTrainedModel(PreTrainedModel):
    """What [`ProCLIPModel`] does with checkpoints."""

    config_class = ProCLIPConfig
    base_model_prefix = "proclip"

    vision_model: PreTrainedModel
    text_model: PreTrainedModel | None

    @classmethod
    @explain_flash_attention()
    def from_vision_text_pretrained(
        cls: type[Model],
        vision: str | os.PathLike | PreTrainedModel,
        text: str | os.PathLike | PreTrainedModel,
        *,
        vision_revision: str = "main",
        text_revision: str = "main",
        dtype: str | torch.dtype | dict | None = None,
        attn_implementation: str | dict | None = None,
        **config_kwargs: Any,
    ) -> Model:
        r"""Pair a pretrained image encoder with a pretrained LLM. The adapter is fresh: train it (stage 1, then stage 2).

        Args:
            vision (`str`, `os.PathLike` or `PreTrainedModel`):
                Name, path or loaded model of a CLIP or SigLIP, whose image encoder, projection and logit scale are taken, or of an image
                encoder alone. Of a loaded model the parts themselves are taken, not copies.
            text (`str`, `os.PathLike` or `PreTrainedModel`):
                Name, path or loaded model of a decoder LLM; a language-modelling head is dropped. A loaded model stays causal: what reads in
                both directions is a copy that shares its weights.
            vision_revision, text_revision (`str`, defaults to `"main"`): Revisions on the Hub. The LLM's commit is kept in the config.
            dtype, attn_implementation (*optional*): For both towers, or a dict with the keys `vision_config` and `text_config`.
            config_kwargs: Fields of [`ProCLIPConfig`].

        Raises:
            ValueError: If the LLM stays causal, a checkpoint lacks weights, or a config key is unknown.
            ImportError: If `attn_implementation` asks for a FlashAttention that is not installed.
        """
        for argument in (dtype, attn_implementation):
            check_tower_keys(argument)
        vision_name = vision.name_or_path if isinstance(vision, PreTrainedModel) else vision
        vision_model, projection, logit_scale = pretrained_vision_tower(
            vision,
            vision_revision,
            tower_argument(dtype, "vision_config"),
            tower_argument(attn_implementation, "vision_config"),
        )
        text_model, name_or_path, commit = pretrained_text_tower(
            text,
            text_revision,
            tower_argument(dtype, "text_config"),
            tower_argument(attn_implementation, "text_config"),
        )
        defaults = {
            "projection_dim": vision_model.config.hidden_size if projection is None else projection.out_features,
            "vision_projection": projection is not None,
            "vision_projection_bias": projection is not None and projection.bias is not None,
            "text_model_name_or_path": name_or_path,
            "text_model_revision": commit,
            "vision_model_name_or_path": lasting_name(vision_name) or None,
        }
        if logit_scale is not None:
            defaults["logit_scale_init_value"] = logit_scale
        config = ProCLIPConfig(
            vision_config=vision_model.config, text_config=text_model.config, **{**defaults, **config_kwargs}
        )
        model = cls(config, vision_model=vision_model, text_model=text_model)
        if projection is not None:
            if (config.vision_projection, config.projection_dim) != (True, projection.out_features):
                raise ValueError(
                    f"The image encoder has its own projection to {projection.out_features} dimensions: leave projection_dim and "
                    "vision_projection out."
                )
            model.visual_projection = projection
        elif config.vision_projection:
            logger.warning(
                "The image encoder has no projection of its own; the one made for it is random until it is trained."
            )
        check_bidirectional(model.text_model)
        return model.eval()

    @classmethod
    @explain_flash_attention()
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        text_model: str | os.PathLike | PreTrainedModel | None = None,
        load_text_model: bool = True,
        verify_text_model: bool = True,
        **kwargs: Any,
    ) -> Model:
        r"""As [`~transformers.PreTrainedModel.from_pretrained`]. A lean checkpoint brings its LLM back from where the config says.

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
        r"""Saves as [`~transformers.PreTrainedModel.save_pretrained`] does.

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
        r"""Publishes the model with its card and the code that loads it anywhere, in one commit: `hub_cards.publish.publish_model`.

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
