"""Configuration of the EVA-CLIP vision tower, which LLM2CLIP and ProCLIP have as `EVA02-L-14`."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


@strict
class EvaCLIPVisionConfig(PreTrainedConfig):
    r"""Configuration of an [`EvaCLIPVisionModel`]. The defaults are EVA02-CLIP-L/14 at 224 pixels (EVA-CLIP, arXiv 2303.15389; EVA-02,
    arXiv 2303.11331).

    Args:
        hidden_size (`int`, defaults to 1024): Width of the tower.
        intermediate_size (`int`, defaults to 2730): Hidden width of an MLP.
        num_hidden_layers (`int`, defaults to 24): Number of layers.
        num_attention_heads (`int`, defaults to 16): Number of attention heads.
        num_channels (`int`, defaults to 3): Channels of an image.
        image_size (`int`, defaults to 224): Height and width of an image in pixels.
        patch_size (`int`, defaults to 14): Height and width of a patch in pixels.
        qkv_bias (`bool`, defaults to `True`): Whether queries and values have a bias. Keys have none.
        gated_mlp (`bool`, defaults to `True`): SwiGLU (EVA02) in place of two linear layers around GELU (EVA01).
        sub_layer_norm (`bool`, defaults to `True`): Layer norms before the last linear layer of attention and MLP (EVA02).
        layer_scale_init_value (`float`, *optional*): Start of a learned scale a channel on every residual branch (EVA01); `None` has none.
        rope_pretrained_grid (`int`, *optional*, defaults to 16):
            Patches a side that the rotary positions were made for; positions of another grid are scaled to it. `None` has no rotary
            positions (EVA01).
        rope_theta (`float`, defaults to 10000): Base of the rotary frequencies.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of the layer norms, except that inside a plain MLP, which has PyTorch's 1e-5.
        attention_dropout (`float`, defaults to 0): Dropout of the attention weights while training.
        initializer_range (`float`, defaults to 0.02): Standard deviation of random weights."""

    model_type = "proclip_eva_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 2730
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    qkv_bias: bool = True
    gated_mlp: bool = True
    sub_layer_norm: bool = True
    layer_scale_init_value: int | float | None = None
    rope_pretrained_grid: int | None = 16
    rope_theta: int | float = 10000.0
    layer_norm_eps: float = 1e-6
    attention_dropout: int | float = 0.0
    initializer_range: float = 0.02

    def validate_architecture(self):
        """Part of the `@strict` validation: refuses combinations that no model can be built from."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"EvaCLIPVisionConfig.hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        head_size = self.hidden_size // self.num_attention_heads
        if self.rope_pretrained_grid is not None and (head_size % 4 or self.rope_pretrained_grid < 1):
            raise ValueError(
                f"Rotary positions need heads whose width is a multiple of 4, got {head_size}, and a rope_pretrained_grid of at least 1, "
                f"got {self.rope_pretrained_grid}."
            )


# Here and not in the package's __init__, which does not travel to the Hub: a ProCLIPConfig finds its towers by their type.
AutoConfig.register("proclip_eva_vision", EvaCLIPVisionConfig, exist_ok=True)

__all__ = ["EvaCLIPVisionConfig"]
