"""ProCLIP model: a CLIP-style image encoder beside a frozen, bidirectional LLM with a trainable text adapter."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_eva_clip import EvaCLIPVisionConfig
from .configuration_proclip import TOWERS, ProCLIPConfig
from .modeling_eva_clip import EvaCLIPVisionModel
from .packing import attending_by_segments, pack_batch, packs
from .pooling import pool_segments, pool_tokens
from .pretrained_proclip import ProCLIPPreTrainedModel
from .pretrained_towers import bidirectional
from .rotary import check_lengths
from .text_adapter import TextAdapter


@dataclass
class ProCLIPOutput(ModelOutput):
    r"""Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `return_loss=True`): Symmetric InfoNCE loss of the batch.
        logits_per_image (`torch.FloatTensor` of shape `(num_images, num_texts)`, *optional*):
            Cosine similarities times `logit_scale.exp()`, in float32, plus `logit_bias` if the model has one.
        logits_per_text (`torch.FloatTensor` of shape `(num_texts, num_images)`, *optional*): Its transpose.
        text_embeds (`torch.FloatTensor` of shape `(num_texts, projection_dim)`, *optional*): Text embeddings of unit length, in float32.
        image_embeds (`torch.FloatTensor` of shape `(num_images, projection_dim)`, *optional*): Image embeddings of unit length, in float32.
        text_model_output (`BaseModelOutputWithPooling`, *optional*): What [`ProCLIPModel.get_text_features`] gives.
        vision_model_output (`BaseModelOutputWithPooling`, *optional*): What [`ProCLIPModel.get_image_features`] gives.

    What belongs to a modality that was not given is `None`.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in super().to_tuple())


class ProCLIPModel(ProCLIPPreTrainedModel):
    r"""Image encoder E_I, frozen LLM embedder G and text adapter A of ProCLIP (arXiv 2510.18795). Image embedding v = unit(E_I(image)), text
    embedding t = unit(A(G(text))), score exp(logit_scale) * v . t.

    Args:
        config ([`ProCLIPConfig`]): Configuration.
        vision_model, text_model (`PreTrainedModel`, *optional*): Towers to take, with their weights, in place of randomly initialised ones.
        load_text_model (`bool`, defaults to `True`):
            `False` leaves the LLM out: images and `llm_embeds` only. Also an argument of `from_pretrained`.
        dtypes (`dict`, *optional*): dtypes of new towers, under `vision_config` and `text_config`. By default those of their configurations.
    """

    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The logit scale is a logarithm whose exponential multiplies every logit: half precision would round the scale by up to 4 %. The
    # statistics centre embeddings that lie close together: half precision would cancel what tells them apart.
    _keep_in_fp32_modules_strict = [
        "logit_scale",
        "logit_bias",
        "input_mean",
        "input_std",
        "language_directions",
        "anchors",
    ]
    _no_split_modules = ["TextAdapterBlock"]

    def __init__(
        self,
        config: ProCLIPConfig,
        *,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
        load_text_model: bool = True,
        dtypes: dict[str, Any] | None = None,
    ):
        super().__init__(config)
        config.validate()  # once more: `from_pretrained` sets what it is asked to override after the config's own validation
        if text_model is not None:
            text_model = bidirectional(text_model)
            config.text_config = text_model.config
        config.text_config.is_causal = False
        dtypes = dtypes or {tower: getattr(config, tower).dtype for tower in TOWERS}
        for tower in (vision_model, text_model):
            if tower is not None:  # `post_init` would initialise modules anew that were not loaded by the library
                for module in tower.modules():
                    module._is_hf_initialized = True
        if vision_model is None:
            # By type and not by class where the code is ours: Transformers loads a folder's remote code twice, once for the configuration
            # and once for the model, and this class of the one copy is not that of the other.
            eva = config.vision_config.model_type == EvaCLIPVisionConfig.model_type
            new = EvaCLIPVisionModel._from_config if eva else AutoModel.from_config
            vision_model = new(config.vision_config, dtype=dtypes["vision_config"])
        self.vision_model = vision_model
        if config.vision_projection:
            self.visual_projection = nn.Linear(
                config.vision_config.hidden_size, config.projection_dim, bias=config.vision_projection_bias
            )
        else:
            self.visual_projection = nn.Identity()
        if text_model is None and load_text_model and not config.lean:
            text_model = AutoModel.from_config(config.text_config, dtype=dtypes["text_config"])
        self.text_model = text_model
        if text_model is None:
            self._keys_to_ignore_on_load_unexpected = [r"^text_model\."]
        self.text_adapter = TextAdapter(config)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.logit_bias = None
        if config.logit_bias_init_value is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias_init_value)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, TextAdapter):
            # PyTorch's own initialisation, which the published code uses; `init` skips what a checkpoint has filled.
            for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
                bound = linear.in_features**-0.5
                init.uniform_(linear.weight, -bound, bound)
                if linear.bias is not None:
                    init.uniform_(linear.bias, -bound, bound)
            if module.input_norm == "standardize":
                init.zeros_(module.input_mean)
                init.ones_(module.input_std)
            if module.num_language_directions:
                init.zeros_(module.language_directions)
            if module.num_anchors:
                init.zeros_(module.anchors)
        elif isinstance(module, ProCLIPModel):
            if self.config.vision_projection:
                init.normal_(module.visual_projection.weight, std=self.config.vision_config.hidden_size**-0.5)
                if self.config.vision_projection_bias:
                    init.zeros_(module.visual_projection.bias)
            init.constant_(module.logit_scale, float(self.config.logit_scale_init_value))
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, float(self.config.logit_bias_init_value))
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @property
    def dtype(self) -> torch.dtype:
        """`torch.dtype`: dtype of the adapter. The library would take the logit scale's, which is always float32."""
        return self.text_adapter.projection.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        return (self.vision_model if self.text_model is None else self.text_model).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        (self.vision_model if self.text_model is None else self.text_model).set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutputWithPooling:
        r"""Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): From [`ProCLIPProcessor`].
            pixel_attention_mask (`torch.Tensor` of shape `(batch_size, max_num_patches)`, *optional*):
                For towers that keep an image's aspect ratio (SigLIP2 NaFlex), whose `pixel_values` are
                `(batch_size, max_num_patches, num_channels * patch_size ** 2)`: 1 on patches, 0 on padding.
            spatial_shapes (`torch.LongTensor` of shape `(batch_size, 2)`, *optional*): For the same towers, rows and columns of patches.
            truncate_dim (`int`, *optional*): Return only the first so many dimensions; see [`ProCLIPConfig`]`.matryoshka_dims`.
            kwargs: Arguments of the image encoder, such as `interpolate_pos_encoding` or `output_hidden_states`.

        Returns:
            `BaseModelOutputWithPooling`; `pooler_output` `(batch_size, truncate_dim or projection_dim)` is the embedding, not normalised.

        Raises:
            ValueError: If the image encoder does not pool, or `truncate_dim` is not from 1 to `projection_dim`.
        """
        self._check_truncate_dim(truncate_dim)
        shapes = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        kwargs.update({name: value for name, value in shapes.items() if value is not None})
        outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None or pooled.ndim != 2:
            raise ValueError(
                f"The image encoder {type(self.vision_model).__name__} gives no pooled image of shape (batch_size, hidden_size): take one that "
                "pools, such as CLIP, SigLIP, DINOv2 or a ViT with its pooling layer."
            )
        if self.config.vision_projection:
            outputs.pooler_output = self.visual_projection(pooled.to(self.visual_projection.weight.dtype))
        outputs.pooler_output = outputs.pooler_output[:, :truncate_dim]
        return outputs

    def _check_truncate_dim(self, truncate_dim: int | None) -> None:
        if truncate_dim is not None and not 0 < truncate_dim <= self.config.projection_dim:
            raise ValueError(
                f"truncate_dim={truncate_dim}, but this model's embeddings have {self.config.projection_dim} dimensions: give 1 to "
                f"{self.config.projection_dim}."
            )

    def get_llm_embeds(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> torch.FloatTensor:
        r"""The frozen LLM's pooled embedding G(text), which a text store keeps and `get_text_features(llm_embeds=...)` takes.

        Args:
            input_ids, attention_mask, token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                From [`ProCLIPProcessor`]; see [`pool_tokens`]. Or texts packed into one row, all of what [`pack_rows`] returns, if
                [`why_padded`] has nothing against it.
            kwargs: Arguments of the LLM.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, text_config.hidden_size)`.

        Raises:
            ValueError: If the model was loaded without its LLM, `input_ids` are floats, or a text would have other positions in this batch than
                alone (see [`rotary`]).
        """
        return self._run_text_model(input_ids, attention_mask, token_type_ids, **kwargs).pooler_output

    def _run_text_model(self, input_ids, attention_mask, token_type_ids, **kwargs) -> BaseModelOutputWithPooling:
        if self.text_model is None:
            raise ValueError(
                "This model was loaded without its LLM (load_text_model=False): pass llm_embeds in place of input_ids, or load the whole model."
            )
        if input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be whole numbers, got {input_ids.dtype}. Embeddings of the LLM are passed as llm_embeds=..., here and in "
                "get_text_features; get_llm_embeds makes them of tokens."
            )
        bounds = kwargs.get("cu_seq_lens_q")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if bounds is None:
            check_lengths(self.config.text_config, mask)
        with nullcontext() if bounds is None else attending_by_segments(self.text_model):
            outputs = self.text_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True, **kwargs
            )
        states, pooling = outputs.last_hidden_state, self.config.text_pooling
        if bounds is None:
            pooled = pool_tokens(states, mask, token_type_ids, pooling)
        else:
            pooled = pool_segments(states[0], bounds, None if token_type_ids is None else token_type_ids[0], pooling)
        return BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=pooled,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _run_fastest(self, input_ids, attention_mask, token_type_ids, **kwargs) -> BaseModelOutputWithPooling:
        """As `_run_text_model`. A padded batch is packed where that is faster, without gradient, if only the last states are asked for."""
        asked = {name for name, value in kwargs.items() if value is not None and value is not False} - {"return_dict"}
        packed = None
        if not (asked or attention_mask is None or self.text_model is None or torch.is_grad_enabled()):
            if packs(self.text_model, input_ids.device):
                check_lengths(self.config.text_config, attention_mask)
                packed = pack_batch(input_ids, attention_mask, token_type_ids)
        if packed is None:
            return self._run_text_model(input_ids, attention_mask, token_type_ids, **kwargs)
        row, places = packed
        outputs = self._run_text_model(**{"attention_mask": None, "token_type_ids": None, **row})
        states = outputs.last_hidden_state[0]
        outputs.last_hidden_state = states.new_zeros(*input_ids.shape, states.shape[1])
        outputs.last_hidden_state.flatten(0, 1)[places] = states
        return outputs

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        llm_embeds: torch.FloatTensor | None = None,
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutputWithPooling:
        r"""Args:
            input_ids, attention_mask, token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                From [`ProCLIPProcessor`].
            llm_embeds (`torch.FloatTensor` of shape `(batch_size, text_config.hidden_size)`, *optional*):
                Stored embeddings of the LLM, in place of tokens.
            truncate_dim (`int`, *optional*): Return only the first so many dimensions; see [`ProCLIPConfig`]`.matryoshka_dims`.
            kwargs: Arguments of the LLM, such as `output_hidden_states`.

        Returns:
            `BaseModelOutputWithPooling`; `pooler_output` `(batch_size, truncate_dim or projection_dim)` is the embedding, not normalised. With
            `llm_embeds` it is all there is.

        Raises:
            ValueError: Unless exactly one of `input_ids` and `llm_embeds` is given, if it is of another dtype or shape, or if `truncate_dim` is
                not from 1 to `projection_dim`.
        """
        self._check_truncate_dim(truncate_dim)
        if (input_ids is None) == (llm_embeds is None):
            raise ValueError("Give either input_ids or llm_embeds.")
        if llm_embeds is not None:
            hidden_size = self.config.text_config.hidden_size
            if llm_embeds.ndim != 2 or llm_embeds.shape[1] != hidden_size:
                raise ValueError(
                    f"llm_embeds must be of shape (batch_size, {hidden_size}), got {tuple(llm_embeds.shape)}: they are made with this model's own "
                    "LLM, by get_llm_embeds or `proclip embed`."
                )
            return BaseModelOutputWithPooling(pooler_output=self.text_adapter(llm_embeds)[:, :truncate_dim])
        outputs = self._run_fastest(input_ids, attention_mask, token_type_ids, **kwargs)
        outputs.pooler_output = self.text_adapter(outputs.pooler_output)[:, :truncate_dim]
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        llm_embeds: torch.FloatTensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> tuple | ProCLIPOutput:
        r"""Images, texts, or both. See [`~ProCLIPModel.get_image_features`] and [`~ProCLIPModel.get_text_features`] for the inputs.

        Args:
            return_loss (`bool`, *optional*): Return the symmetric InfoNCE loss; the i-th image and the i-th text are a pair.
            output_attentions, output_hidden_states (`bool`, *optional*): Return those of both towers, in their outputs.
            truncate_dim (`int`, *optional*): Compare only the first so many dimensions; see [`ProCLIPConfig`]`.matryoshka_dims`.
            kwargs: Arguments of the image encoder, such as `interpolate_pos_encoding`.

        Raises:
            ValueError: If neither modality is given, there is no pair for every item of a loss, or `truncate_dim` is not from 1 to
                `projection_dim`.

        Example:

        ```python
        >>> from transformers import AutoModel, AutoProcessor
        >>> import modeling_proclip  # registers the classes

        >>> model = AutoModel.from_pretrained("quickstart-output/proclip")
        >>> processor = AutoProcessor.from_pretrained("quickstart-output/proclip")
        >>> inputs = processor(text=["a red apple", "a ghost"], images=image, return_tensors="pt")
        >>> probs = model(**inputs).logits_per_image.softmax(dim=1)
        ```"""
        has_text, has_image = input_ids is not None or llm_embeds is not None, pixel_values is not None
        if not (has_text or has_image):
            raise ValueError("Give pixel_values, or input_ids or llm_embeds, or both sides.")
        both = {
            "truncate_dim": truncate_dim,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": True,
        }
        vision_outputs = text_outputs = image_embeds = text_embeds = logits_per_text = logits_per_image = loss = None
        if has_image:
            vision_outputs = self.get_image_features(pixel_values, **both, **kwargs)
            image_embeds = F.normalize(vision_outputs.pooler_output.float(), dim=-1)
        if has_text:
            text_outputs = self.get_text_features(input_ids, attention_mask, token_type_ids, llm_embeds, **both)
            text_embeds = F.normalize(text_outputs.pooler_output.float(), dim=-1)
        if has_text and has_image:
            scale = self.logit_scale.exp().to(text_embeds.device)
            logits_per_text = scale * (text_embeds @ image_embeds.to(text_embeds.device).T)
            if self.logit_bias is not None:
                logits_per_text = logits_per_text + self.logit_bias.to(text_embeds.device)
            logits_per_image = logits_per_text.T
        if return_loss:
            if logits_per_text is None or logits_per_text.shape[0] != logits_per_text.shape[1]:
                raise ValueError(
                    "return_loss needs as many texts as images, the i-th text belonging to the i-th image."
                )
            pairs = torch.arange(len(logits_per_text), device=logits_per_text.device)
            loss = (F.cross_entropy(logits_per_image, pairs) + F.cross_entropy(logits_per_text, pairs)) / 2
        return ProCLIPOutput(
            loss, logits_per_image, logits_per_text, text_embeds, image_embeds, text_outputs, vision_outputs
        )


__all__ = ["ProCLIPModel", "ProCLIPOutput"]
