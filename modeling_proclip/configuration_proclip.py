"""ProCLIP model configuration."""

import copy
import difflib
import math
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

from .configuration_eva_clip import EvaCLIPVisionConfig  # noqa: F401  it registers itself as a tower's type


logger = logging.get_logger(__name__)

TOWERS = ("vision_config", "text_config")

# Keys that the library itself passes beside the fields of a configuration, from config.json or from its own loading code.
_LIBRARY_KEYS = {
    "model_type",
    "auto_map",
    "name_or_path",
    "_name_or_path",
    "_commit_hash",
    "torch_dtype",
    "attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation_internal",
    "output_attentions",
    "num_labels",
    "quantization_config",
    "use_cache",  # transformers.Trainer sets it on the configuration of every model that it trains
}


def check_tower_keys(value: Any) -> None:
    """Refuse a key of a per-tower argument that the library would pass over without a word."""
    if isinstance(value, dict) and (unknown := set(value) - {"", *TOWERS}):
        raise ValueError(f"Unknown tower {sorted(unknown)[0]!r}: the keys are {', '.join(TOWERS)}.")


@strict
class ProCLIPConfig(PreTrainedConfig):
    r"""Configuration of a [`ProCLIPModel`]: a CLIP-style vision tower beside a decoder LLM that reads in both directions and a text adapter
    that takes its embeddings into CLIP's space (ProCLIP, arXiv 2510.18795; LLM2CLIP, arXiv 2411.04997).

    Args:
        vision_config (`dict` or `PreTrainedConfig`):
            Any vision tower of Transformers with a `pooler_output`, such as `CLIPVisionConfig` (default) or `SiglipVisionConfig`.
        text_config (`dict` or `PreTrainedConfig`):
            Any decoder LLM of Transformers (Llama by default). `is_causal = False` is set on it: that is what makes it bidirectional.
        projection_dim (`int`, defaults to 512): Size p of the shared embedding space: the projection size of the CLIP that is taught.
        vision_projection (`bool`, defaults to `True`):
            Whether a linear layer projects the pooled image (CLIP). SigLIP has none: its pooled image is the embedding.
        vision_projection_bias (`bool`, defaults to `False`): Whether that layer has a bias, as EVA-CLIP's head has.
        adapter_num_layers (`int`, defaults to 4):
            Number n of residual MLP blocks of the text adapter. 4 in the ProCLIP paper and LLM2CLIP, 1 in the published ProCLIP code.
        adapter_expansion (`float`, defaults to 2): Hidden size of a block over the LLM's size. 2 in LLM2CLIP, 8 in the published ProCLIP code.
        adapter_input_norm (`"l2"`, `"none"` or `"standardize"`, defaults to `"l2"`):
            What the adapter does to an LLM embedding first. "l2" divides by its length (published, OpenAI and EVA02 towers), "none" nothing
            (published, SigLIP2 tower), "standardize" first centres and scales every dimension by the statistics of a text store, kept as
            buffers of the model, then divides by the length: for an LLM without caption-contrastive tuning, whose embeddings are anisotropic.
        adapter_language_directions (`int`, defaults to 0):
            With "standardize": how many directions, those in which the means of the texts' languages differ most, are projected out of the
            standardised embedding, before its length. They are kept as a buffer of the model. 0 in the papers.
        adapter_num_anchors (`int`, defaults to 0):
            How many texts the adapter keeps the normalised embeddings of, as a buffer. A text that is near none of them (another language, say) is
            read as a mean of those that it is nearest to, which the adapter was trained on; a text that is near one is read as it is. 0 in
            the papers.
        adapter_anchor_temperature (`float`, defaults to 0.02): Of the softmax over the cosines that weighs the anchors in that mean.
        adapter_anchor_threshold (`float`, defaults to 0.8):
            Cosine with the nearest anchor at which a text is read half as it is and half as that mean.
        adapter_output_bias (`bool`, defaults to `True`): Whether the adapter's last linear layer has a bias.
        adapter_layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the adapter's layer norms.
        text_pooling (`"mean"`, `"weighted_mean"`, `"last_token"`, `"eos_token"` or `"bos_token"`, defaults to `"mean"`):
            How the LLM's token states become one embedding; see [`pool_tokens`].
        logit_scale_init_value (`float`, defaults to ln(1 / 0.07)): Start of the logit scale, as its logarithm (CLIP, arXiv 2103.00020).
        logit_bias_init_value (`float`, *optional*):
            Start of a bias that is added to the logits, for SigLIP's sigmoid loss (-10 in arXiv 2303.15343). None: the model has none.
        matryoshka_dims (`list[int]`, *optional*):
            Sizes of the shorter embeddings that the model was trained for: its first so many dimensions are an embedding by themselves, once
            brought to unit length (arXiv 2205.13147). The trainers write it; `truncate_dim` takes any size.
        text_model_name_or_path (`str`, *optional*): Where the LLM came from. A lean checkpoint loads it from there.
        text_model_revision (`str`, *optional*): Commit of that repository.
        text_model_sha256 (`str`, *optional*): Content hash of the LLM's weights; see [`weights_sha256`]. A lean checkpoint refuses any other.
        vision_model_name_or_path (`str`, *optional*): Where the image encoder came from, for the model card. Nothing is loaded from there.
        training (`list[dict]`, *optional*): How the checkpoint came to be, a record a training stage, for the model card. The trainers write
            it.
        lean (`bool`, defaults to `False`):
            Whether the checkpoint leaves the LLM's weights out, as `save_pretrained(..., lean=True)` does.

    Unknown keys that are passed and impossible combinations raise an error that names the key and the remedy. Unknown keys of a saved file
    are kept, with a warning.

    Example:

    ```python
    >>> from modeling_proclip import ProCLIPConfig, ProCLIPModel

    >>> model = ProCLIPModel(ProCLIPConfig(text_config={"model_type": "qwen3", "num_hidden_layers": 2}))  # random weights
    ```"""

    model_type = "proclip"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    vision_projection: bool = True
    vision_projection_bias: bool = False
    adapter_num_layers: int = 4
    adapter_expansion: int | float = 2
    adapter_input_norm: Literal["l2", "none", "standardize"] = "l2"
    adapter_language_directions: int = 0
    adapter_num_anchors: int = 0
    adapter_anchor_temperature: int | float = 0.02
    adapter_anchor_threshold: int | float = 0.8
    adapter_output_bias: bool = True
    adapter_layer_norm_eps: float = 1e-5
    text_pooling: Literal["mean", "weighted_mean", "last_token", "eos_token", "bos_token"] = "mean"
    logit_scale_init_value: int | float = 2.6592600769815985
    logit_bias_init_value: int | float | None = None
    matryoshka_dims: list[int] | None = None
    text_model_name_or_path: str | None = None
    text_model_revision: str | None = None
    text_model_sha256: str | None = None
    vision_model_name_or_path: str | None = None
    training: list[dict[str, Any]] | None = None
    lean: bool = False

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As [`~transformers.PreTrainedConfig.from_dict`], for a saved configuration. Keys that are unknown here, which a later release or
        other code has added, are kept with a warning.
        """
        known = {field.name for field in fields(cls)}
        unknown = {key: value for key, value in config_dict.items() if key not in known | _LIBRARY_KEYS}
        if unknown:
            logger.warning(
                f"The saved ProCLIPConfig has keys that this release does not know and keeps unused: {', '.join(sorted(unknown))}. If a later "
                "release wrote them, the model may be meant to work differently."
            )
        made = super().from_dict({key: value for key, value in config_dict.items() if key not in unknown}, **kwargs)
        config = made[0] if isinstance(made, tuple) else made  # a tuple with unused keywords
        for key, value in unknown.items():
            setattr(config, key, value)
        return made

    def __post_init__(self, **kwargs):
        known = {field.name for field in fields(self)}
        for key in kwargs:
            if key not in _LIBRARY_KEYS:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}."
                raise ValueError(f"ProCLIPConfig has no key {key!r}; {hint}")
        # The library would set these to None on the configurations of the towers too; an empty dict leaves those as they are. A loaded
        # LLM whose attention implementation is None attends to padding.
        for key in ("attn_implementation", "experts_implementation"):
            kwargs[key] = {} if kwargs.get(key) is None else kwargs[key]
            check_tower_keys(kwargs[key])
        super().__post_init__(**kwargs)
        if getattr(self.text_config, "is_causal", True):
            self.text_config = copy.deepcopy(self.text_config)  # the caller's stays as it is
            self.text_config.is_causal = False

    def validate_architecture(self):
        """Part of the `@strict` validation: refuses combinations that no model can be built from."""
        for name in ("projection_dim", "adapter_expansion", "adapter_layer_norm_eps", "adapter_anchor_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"ProCLIPConfig.{name} must be positive, got {getattr(self, name)}.")
        if self.adapter_num_layers < 0:
            raise ValueError(f"ProCLIPConfig.adapter_num_layers must not be negative, got {self.adapter_num_layers}.")
        for name in ("adapter_language_directions", "adapter_num_anchors"):
            if getattr(self, name) < 0:
                raise ValueError(f"ProCLIPConfig.{name} must not be negative, got {getattr(self, name)}.")
        if self.adapter_language_directions and self.adapter_input_norm != "standardize":
            raise ValueError(
                'ProCLIPConfig.adapter_language_directions needs adapter_input_norm="standardize", got '
                f"{self.adapter_input_norm!r}: directions are those of standardised embeddings."
            )
        if self.adapter_num_anchors and self.adapter_input_norm == "none":
            raise ValueError(
                'ProCLIPConfig.adapter_num_anchors needs adapter_input_norm "l2" or "standardize": anchors are compared by their cosines.'
            )
        if not -1 <= self.adapter_anchor_threshold <= 1:
            raise ValueError(
                f"ProCLIPConfig.adapter_anchor_threshold is a cosine, at least -1 and at most 1, got {self.adapter_anchor_threshold}."
            )
        for dim in self.matryoshka_dims or ():
            if not 0 < dim <= self.projection_dim:
                raise ValueError(
                    f"ProCLIPConfig.matryoshka_dims must be from 1 to projection_dim ({self.projection_dim}), got {dim}."
                )
        if not math.isfinite(self.logit_scale_init_value):
            raise ValueError(
                f"ProCLIPConfig.logit_scale_init_value is a logarithm and must be finite, got {self.logit_scale_init_value}."
            )
        if self.logit_bias_init_value is not None and not math.isfinite(self.logit_bias_init_value):
            raise ValueError(f"ProCLIPConfig.logit_bias_init_value must be finite, got {self.logit_bias_init_value}.")
        for name in TOWERS:
            sub_config = getattr(self, name)
            if not isinstance(getattr(sub_config, "hidden_size", None), int) or sub_config.is_encoder_decoder:
                kind = "has no hidden_size" if not sub_config.is_encoder_decoder else "is an encoder-decoder"
                raise ValueError(
                    f"ProCLIPConfig.{name} of type {sub_config.model_type!r} {kind}: pass the configuration of one tower (for a whole CLIP or "
                    f"a multimodal LLM, its own {name})."
                )
        if not self.vision_projection and self.projection_dim != self.vision_config.hidden_size:
            raise ValueError(
                f"ProCLIPConfig.projection_dim is {self.projection_dim}, but without vision_projection it must be the vision tower's hidden_size "
                f"({self.vision_config.hidden_size}). Set vision_projection=True for a projection."
            )


__all__ = ["ProCLIPConfig"]
