"""The vision tower of EVA-CLIP: a ViT with rotary positions, SwiGLU and sub-layer norms (EVA02), or with layer scale (EVA01)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_eva_clip import EvaCLIPVisionConfig


def rotary_tables(
    grid: int, head_size: int, pretrained_grid: int, theta: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the patches' rotary angles, in two dimensions (EVA-02, arXiv 2303.11331, section 2): two `torch.Tensor` of shape
    `(grid ** 2, head_size)`, float32, patches row by row.

    The first half of a head turns with the patch's row, the second with its column. Each has a frequency for every pair of neighbouring
    channels. The frequencies were made for `pretrained_grid` patches a side; positions of another grid are scaled to it.
    """
    size = head_size // 2
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    positions = torch.arange(grid, dtype=torch.float32) / grid * pretrained_grid
    angles = torch.outer(positions, frequencies).repeat_interleave(2, dim=1)
    angles = torch.cat([angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)], dim=-1)
    angles = angles.reshape(grid * grid, head_size)
    return angles.cos(), angles.sin()


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the patches of `states` `(batch_size, num_heads, 1 + num_patches, head_size)`; the class token in front has no position."""
    class_token, patches = states[:, :, :1], states[:, :, 1:]
    even, odd = patches.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return torch.cat([class_token, patches * cos.to(states.dtype) + turned * sin.to(states.dtype)], dim=2)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain arithmetic, which can also return its weights; every argument as Transformers' other implementations have it."""
    weights = (query @ key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class EvaCLIPEmbeddings(nn.Module):
    """Patches and the class token, with learned positions."""

    def __init__(self, config: EvaCLIPVisionConfig):
        super().__init__()
        self.image_size = config.image_size
        num_patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.zeros(1 + num_patches, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        if height != self.image_size or width != self.image_size:
            raise ValueError(
                f"Images are {height} x {width} pixels, and this model takes {self.image_size} x {self.image_size}: use its processor, or "
                "convert the checkpoint with another image_size."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding


class EvaCLIPAttention(nn.Module):
    """Self-attention with rotary positions on the patches (EVA02) or none (EVA01), and a layer norm before its output (sub-LN)."""

    def __init__(self, config: EvaCLIPVisionConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.head_size = size // config.num_attention_heads
        self.is_causal = False
        self.q_proj = nn.Linear(size, size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=config.qkv_bias)
        self.layer_norm = nn.LayerNorm(size, eps=config.layer_norm_eps) if config.sub_layer_norm else nn.Identity()
        self.out_proj = nn.Linear(size, size)

    def forward(
        self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

        query, key, value = (heads(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if rotary is not None:
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            None,
            scaling=self.head_size**-0.5,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.out_proj(self.layer_norm(output.flatten(2))), weights


class EvaCLIPMLP(nn.Module):
    """Two linear layers around GELU (EVA01)."""

    def __init__(self, config: EvaCLIPVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        # The published code leaves this one norm with PyTorch's epsilon of 1e-5, where all others of the tower have 1e-6.
        self.layer_norm = nn.LayerNorm(config.intermediate_size, eps=1e-5) if config.sub_layer_norm else nn.Identity()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.layer_norm(F.gelu(self.fc1(hidden_states))))


class EvaCLIPGatedMLP(nn.Module):
    """SwiGLU: a linear layer gated by the SiLU of another (EVA02)."""

    def __init__(self, config: EvaCLIPVisionConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        eps = config.layer_norm_eps
        self.layer_norm = nn.LayerNorm(config.intermediate_size, eps=eps) if config.sub_layer_norm else nn.Identity()
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.layer_norm(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)))


class EvaCLIPLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each residual scaled by a learned vector where the checkpoint has one (EVA01's layer scale)."""

    def __init__(self, config: EvaCLIPVisionConfig):
        super().__init__()
        size, eps, scale = config.hidden_size, config.layer_norm_eps, config.layer_scale_init_value
        self.layer_norm1 = nn.LayerNorm(size, eps=eps)
        self.self_attn = EvaCLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(size, eps=eps)
        self.mlp = EvaCLIPGatedMLP(config) if config.gated_mlp else EvaCLIPMLP(config)
        self.layer_scale1 = nn.Parameter(torch.full((size,), float(scale))) if scale is not None else None
        self.layer_scale2 = nn.Parameter(torch.full((size,), float(scale))) if scale is not None else None

    def forward(
        self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None, **kwargs: Any
    ) -> torch.Tensor:
        update, _ = self.self_attn(self.layer_norm1(hidden_states), rotary, **kwargs)
        hidden_states = hidden_states + (update if self.layer_scale1 is None else self.layer_scale1 * update)
        update = self.mlp(self.layer_norm2(hidden_states))
        return hidden_states + (update if self.layer_scale2 is None else self.layer_scale2 * update)


class EvaCLIPVisionModel(PreTrainedModel):
    r"""The vision tower of EVA-CLIP (EVA02-CLIP and EVA01-CLIP, arXiv 2303.15389). Its projection is `ProCLIPModel.visual_projection`.

    Drop path and patch dropout of the published training are left out: with them off, as in every published fine-tuning of ProCLIP and
    LLM2CLIP, the functions are the same.

    Args:
        config ([`EvaCLIPVisionConfig`]): Configuration.
    """

    config_class = EvaCLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["EvaCLIPEmbeddings", "EvaCLIPLayer"]
    _can_record_outputs = {"hidden_states": EvaCLIPLayer, "attentions": EvaCLIPAttention}

    def __init__(self, config: EvaCLIPVisionConfig):
        super().__init__(config)
        self.embeddings = EvaCLIPEmbeddings(config)
        self.layers = nn.ModuleList(EvaCLIPLayer(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        if config.rope_pretrained_grid is not None:
            cos, sin = self._rotary_tables()
            self.rotary_cos = nn.Buffer(cos, persistent=False)
            self.rotary_sin = nn.Buffer(sin, persistent=False)
        self.post_init()

    def _rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        grid, head_size = config.image_size // config.patch_size, config.hidden_size // config.num_attention_heads
        return rotary_tables(grid, head_size, config.rope_pretrained_grid, config.rope_theta)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, EvaCLIPEmbeddings):
            init.normal_(module.class_embedding, std=self.config.initializer_range)
            init.normal_(module.position_embedding, std=self.config.initializer_range)
        elif isinstance(module, EvaCLIPLayer) and module.layer_scale1 is not None:
            init.constant_(module.layer_scale1, float(self.config.layer_scale_init_value))
            init.constant_(module.layer_scale2, float(self.config.layer_scale_init_value))
        elif isinstance(module, EvaCLIPVisionModel) and self.config.rope_pretrained_grid is not None:
            # Not in the checkpoint, so memory is uninitialised here after from_pretrained.
            cos, sin = self._rotary_tables()
            init.copy_(module.rotary_cos, cos)
            init.copy_(module.rotary_sin, sin)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.patch_embedding = value

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.FloatTensor, **kwargs: Any) -> tuple | BaseModelOutputWithPooling:
        r"""Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, image_size, image_size)`): Normalised images.

        Returns:
            `BaseModelOutputWithPooling`; `last_hidden_state` `(batch_size, 1 + num_patches, hidden_size)` before the last layer norm, as
            in `CLIPVisionModel`, and `pooler_output` `(batch_size, hidden_size)`, its class token after it.
        """
        rotary = None if self.config.rope_pretrained_grid is None else (self.rotary_cos, self.rotary_sin)
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotary, **kwargs)
        pooled = self.layer_norm(hidden_states[:, 0])
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


__all__ = ["EvaCLIPVisionModel"]
