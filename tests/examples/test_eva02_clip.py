"""EVA-CLIP's own file becomes an image encoder and a teacher; the layouts are recorded or rebuilt from the published code's formulas."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from modeling_proclip import ProCLIPModel
from modeling_proclip.conversion import ConversionError
from modeling_proclip.conversion.rules import Options
from modeling_proclip.conversion.stored_tensors import read_tensors
from tests import golden
from tests.modeling_proclip import tiny


EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "eva02_clip.py"))
WIDTH, HEADS, LAYERS, VOCABULARY, CONTEXT, DIM = 24, 2, 2, 50, 12, 16


def text_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"token_embedding.weight": (VOCABULARY, WIDTH), "positional_embedding": (CONTEXT, WIDTH)}
    shapes |= {"ln_final.weight": (WIDTH,), "ln_final.bias": (WIDTH,), "text_projection": (WIDTH, DIM)}
    for i in range(LAYERS):
        block = f"transformer.resblocks.{i}."
        for name, shape in {
            "attn.in_proj": (3 * WIDTH, WIDTH),
            "attn.out_proj": (WIDTH, WIDTH),
            "mlp.c_fc": (4 * WIDTH, WIDTH),
            "mlp.c_proj": (WIDTH, 4 * WIDTH),
        }.items():
            separator = "_" if name == "attn.in_proj" else "."
            shapes |= {f"{block}{name}{separator}weight": shape, f"{block}{name}{separator}bias": shape[:1]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}{name}.weight": (WIDTH,), f"{block}{name}.bias": (WIDTH,)}
    return {f"text.{name}": 0.3 * torch.randn(shape) + 0.1 for name, shape in shapes.items()}


def naive_text_features(state: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """OpenCLIP's text transformer, layer by layer."""
    state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][: tokens.shape[1]]
    mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
    for i in range(LAYERS):
        block = {n.removeprefix(f"transformer.resblocks.{i}."): t for n, t in state.items()}
        attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        attention.load_state_dict({n.removeprefix("attn."): t for n, t in block.items() if n.startswith("attn.")})
        y = F.layer_norm(x, (WIDTH,), block["ln_1.weight"], block["ln_1.bias"])
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = F.layer_norm(x, (WIDTH,), block["ln_2.weight"], block["ln_2.bias"])
        y = F.gelu(F.linear(y, block["mlp.c_fc.weight"], block["mlp.c_fc.bias"]))
        x = x + F.linear(y, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
    x = F.layer_norm(x, (WIDTH,), state["ln_final.weight"], state["ln_final.bias"])
    return x[torch.arange(len(x)), tokens.argmax(dim=1)] @ state["text_projection"]


@pytest.fixture
def tensors(tmp_path):
    reference = golden.load("g2_eva02")
    state = {name: tensor for name, tensor in reference.params.items() if not name.startswith("text.")}
    torch.save({**state, **text_tensors()}, tmp_path / "eva.pt")
    return reference, read_tensors(tmp_path / "eva.pt")


@torch.no_grad()
def test_the_image_encoder_is_the_recorded_one(tensors, tmp_path):
    reference, tensors = tensors
    model = EXAMPLE["vision_model"](tensors, Options(head_width=8, rope_pretrained_grid=3)).eval()
    images = model.get_image_features(pixel_values=reference.inputs["pixel_values"]).pooler_output
    reference.assert_close("out.image_embeds_unnorm", images)
    reference.assert_close("out.logit_scale_exp", model.logit_scale.exp())
    model.save_pretrained(tmp_path / "vision", lean=True)  # as a recipe reads it
    again = ProCLIPModel.from_pretrained(tmp_path / "vision", load_text_model=False)
    pair = ProCLIPModel.from_vision_text_pretrained(again, LlamaModel(LlamaConfig(**tiny.TEXT)))
    assert torch.equal(pair.get_image_features(pixel_values=reference.inputs["pixel_values"]).pooler_output, images)


@torch.no_grad()
def test_the_teacher_is_openclips_text_transformer(tensors):
    model = EXAMPLE["text_model"](tensors[1], HEADS)
    tokens = torch.tensor([[48, 3, 7, 49, 0, 0], [48, 9, 11, 12, 13, 49]])  # the end has the highest number
    expected = naive_text_features(text_tensors(), tokens)
    torch.testing.assert_close(model.get_text_features(input_ids=tokens).pooler_output, expected, atol=1e-5, rtol=1e-4)


def test_a_file_without_a_tensor_is_refused_by_its_name(tensors):
    tensors = dict(tensors[1])
    del tensors["text.transformer.resblocks.1.ln_2.bias"]
    with pytest.raises(ConversionError, match=r"no tensor 'text.transformer.resblocks.1.ln_2.bias'"):
        EXAMPLE["text_model"](tensors, HEADS)
