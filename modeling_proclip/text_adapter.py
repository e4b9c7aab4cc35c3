"""The trainable text adapter of ProCLIP."""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_proclip import ProCLIPConfig


class TextAdapterBlock(nn.Module):
    """x + Linear(GELU(Linear(LayerNorm(x)))), the residual block of LLM2CLIP's adapter (arXiv 2411.04997)."""

    def __init__(self, size: int, hidden_size: int, layer_norm_eps: float):
        super().__init__()
        self.layer_norm = nn.LayerNorm(size, eps=layer_norm_eps)
        self.fc1 = nn.Linear(size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.fc2(F.gelu(self.fc1(self.layer_norm(hidden_states))))


# How sharply an adapter with anchors tells texts that are near one from those that are not: the width of the sigmoid, as a cosine.
_ANCHOR_WIDTH = 0.03


class TextAdapter(nn.Module):
    """From the LLM's embedding space to CLIP's: input norm, anchors (if it has any), residual blocks, layer norm, linear projection.

    ProCLIP trains it first by distillation from CLIP's text encoder (stage 1), then together with the image encoder (stage 2).
    """

    def __init__(self, config: ProCLIPConfig):
        super().__init__()
        size, eps = config.text_config.hidden_size, config.adapter_layer_norm_eps
        self.input_norm = config.adapter_input_norm
        hidden_size = round(size * config.adapter_expansion)
        self.blocks = nn.ModuleList(TextAdapterBlock(size, hidden_size, eps) for _ in range(config.adapter_num_layers))
        self.layer_norm = nn.LayerNorm(size, eps=eps)
        self.projection = nn.Linear(size, config.projection_dim, bias=config.adapter_output_bias)
        if self.input_norm == "standardize":
            self.register_buffer("input_mean", torch.zeros(size))
            self.register_buffer("input_std", torch.ones(size))
        self.num_language_directions = config.adapter_language_directions
        if self.num_language_directions:
            self.register_buffer("language_directions", torch.zeros(self.num_language_directions, size))
        self.num_anchors = config.adapter_num_anchors
        self.anchor_temperature = config.adapter_anchor_temperature
        self.anchor_threshold = config.adapter_anchor_threshold
        if self.num_anchors:
            self.register_buffer("anchors", torch.zeros(self.num_anchors, size))

    def set_input_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set what `adapter_input_norm="standardize"` subtracts and divides by, `(hidden_size,)` each; see `TextEmbeddingStore.statistics`."""
        if self.input_norm != "standardize":
            raise ValueError(
                f'Input statistics need adapter_input_norm="standardize"; this model has {self.input_norm!r}.'
            )
        if mean.shape != self.input_mean.shape or std.shape != self.input_std.shape:
            raise ValueError(
                f"mean and std must have shape {tuple(self.input_mean.shape)}, got {tuple(mean.shape)} and {tuple(std.shape)}."
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError(
                "mean and std must be finite and every std positive: is some dimension of the text store constant?"
            )
        self.input_mean.copy_(mean)
        self.input_std.copy_(std)

    def normalize(self, llm_embeds: torch.Tensor) -> torch.Tensor:
        """The input norm, of `(batch_size, hidden_size)`, in float32."""
        # In float32: embeddings of an LLM lie close together, and half precision would cancel what tells them apart.
        hidden_states = llm_embeds.to(device=self.projection.weight.device, dtype=torch.float32)
        if self.input_norm == "standardize":
            hidden_states = (hidden_states - self.input_mean) / self.input_std
        if self.num_language_directions:
            hidden_states = hidden_states - (hidden_states @ self.language_directions.T) @ self.language_directions
        if self.input_norm != "none":
            hidden_states = F.normalize(hidden_states, dim=-1)
        return hidden_states

    def pull_to_anchors(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Replace what is far from all anchors by a mean of the nearest ones.

        The weights of that mean are a softmax of the cosines, as ASIF (arXiv 2210.01738) maps one space to another by the cosines to texts that
        are known in both. What replaces it, and by how much, depends on the nearest anchor's cosine c: the text itself keeps the
        share sigmoid((c - threshold) / width).

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, hidden_size)`): Of unit length, float32.

        Returns:
            The same shape, unit length.
        """
        # Outside of autocast, which would round the cosines to half precision.
        with torch.autocast(hidden_states.device.type, enabled=False):
            cosines = hidden_states @ self.anchors.T
            share = torch.sigmoid((cosines.amax(dim=-1, keepdim=True) - self.anchor_threshold) / _ANCHOR_WIDTH)
            pulled = F.normalize(torch.softmax(cosines / self.anchor_temperature, dim=-1) @ self.anchors, dim=-1)
            return F.normalize(share * hidden_states + (1 - share) * pulled, dim=-1)

    def forward(self, llm_embeds: torch.Tensor) -> torch.Tensor:
        """`(batch_size, hidden_size)` to `(batch_size, projection_dim)`, not normalised."""
        hidden_states = self.normalize(llm_embeds)
        if self.num_anchors:
            hidden_states = self.pull_to_anchors(hidden_states)
        hidden_states = hidden_states.to(self.projection.weight.dtype)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.projection(self.layer_norm(hidden_states))
