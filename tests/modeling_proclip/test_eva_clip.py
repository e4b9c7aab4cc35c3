"""EVA-CLIP's vision tower: the reference's states and gradients (g2_eva02, g2_eva01_layerscale), and what Transformers expects of a model."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from modeling_proclip import EvaCLIPVisionConfig, EvaCLIPVisionModel, ProCLIPConfig, ProCLIPModel
from modeling_proclip.modeling_eva_clip import apply_rotary, rotary_tables
from tests import golden
from tests.modeling_proclip import tiny


EVA02 = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "rope_pretrained_grid": 3,
}
EVA01 = EVA02 | {
    "gated_mlp": False,
    "sub_layer_norm": False,
    "layer_scale_init_value": 0.1,
    "rope_pretrained_grid": None,
}
NAMES = {
    "gated": {
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.up_proj",
        "mlp.ffn_ln": "mlp.layer_norm",
        "mlp.w3": "mlp.down_proj",
    },
    "plain": {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
}


def tower(values: dict, **overrides) -> EvaCLIPVisionModel:
    torch.manual_seed(0)
    config = EvaCLIPVisionConfig(**values | overrides)
    model = EvaCLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and scales too: at 1 and 0 a wrong one would not show
            parameter.copy_(torch.randn_like(parameter) / 4 + (parameter.ndim == 1))
    return model


def pixels(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def load_recorded(case: str, attention: str, **values) -> tuple[golden.Golden, EvaCLIPVisionModel]:
    """The recorded tower under its own names, by a map written here: the converter's is tested elsewhere."""
    reference = golden.load(case)
    config = EvaCLIPVisionConfig(**values)
    config._attn_implementation = attention
    model = EvaCLIPVisionModel(config).eval()
    params, state = reference.params, {}
    state["embeddings.class_embedding"] = params["visual.cls_token"][0, 0]
    state["embeddings.position_embedding"] = params["visual.pos_embed"][0]
    for kind in ("weight", "bias"):
        state[f"embeddings.patch_embedding.{kind}"] = params[f"visual.patch_embed.proj.{kind}"]
        state[f"layer_norm.{kind}"] = params[f"visual.norm.{kind}"]
    for i in range(2):
        theirs, ours = f"visual.blocks.{i}.", f"layers.{i}."
        names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
        names |= NAMES["gated" if config.gated_mlp else "plain"]
        if config.gated_mlp:
            names |= {f"attn.{n}_proj": f"self_attn.{n}_proj" for n in "qkv"} | {
                "attn.inner_attn_ln": "self_attn.layer_norm"
            }
        else:
            for n, part in zip("qkv", params[f"{theirs}attn.qkv.weight"].chunk(3), strict=True):
                state[f"{ours}self_attn.{n}_proj.weight"] = part
            for n in "qv":
                state[f"{ours}self_attn.{n}_proj.bias"] = params[f"{theirs}attn.{n}_bias"]
            state |= {f"{ours}layer_scale{k}": params[f"{theirs}gamma_{k}"] for k in (1, 2)}
        for their_name, name in names.items():
            for kind in ("weight", "bias"):
                if f"{theirs}{their_name}.{kind}" in params:
                    state[f"{ours}{name}.{kind}"] = params[f"{theirs}{their_name}.{kind}"]
    model.load_state_dict(state)
    return reference, model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "case, values",
    [("g2_eva02", EVA02 | {"intermediate_size": 85}), ("g2_eva01_layerscale", EVA01 | {"intermediate_size": 128})],
)
def test_recorded_states(case, values, attention):
    reference, model = load_recorded(case, attention, **values)
    with torch.no_grad():
        outputs = model(reference.inputs["pixel_values"])
    reference.assert_close("out.vision_tokens_before_pool", outputs.last_hidden_state)
    embeds = F.linear(
        outputs.pooler_output, reference.params["visual.head.weight"], reference.params["visual.head.bias"]
    )
    reference.assert_close("out.image_embeds_unnorm", embeds)


def test_rotary_tables_are_the_recorded_ones():
    params = golden.load("g2_eva02").params
    cos, sin = rotary_tables(4, 8, 3)
    assert torch.equal(cos, params["visual.rope.freqs_cos"])
    assert torch.equal(sin, params["visual.rope.freqs_sin"])


def test_rotary_against_complex_numbers():
    """Every pair of channels is a complex number that turns with the patch's row (first half) or column (second half)."""
    grid, size, pretrained = 3, 8, 5
    states = torch.randn(1, 2, 1 + grid * grid, size)
    turned = apply_rotary(states, *rotary_tables(grid, size, pretrained))
    assert torch.equal(turned[:, :, 0], states[:, :, 0]), "the class token has no position"
    pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
    for row in range(grid):
        for column in range(grid):
            for pair in range(4):
                place = row if pair < 2 else column
                angle = torch.tensor(place * pretrained / grid * 10000 ** -((pair % 2) / 2))
                expected = pairs[0, :, 1 + row * grid + column, pair] * torch.polar(torch.tensor(1.0), angle)
                actual = turned[0, :, 1 + row * grid + column, 2 * pair : 2 * pair + 2]
                torch.testing.assert_close(actual, torch.view_as_real(expected))


@pytest.mark.parametrize("values", [EVA02, EVA01], ids=["eva02", "eva01"])
def test_sdpa_equals_eager_forward_and_backward(values):
    model = tower(values)
    results = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        pooled = model(pixels()).pooler_output
        pooled.square().sum().backward()
        results.append([pooled.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, sdpa in zip(*results, strict=True):
        torch.testing.assert_close(sdpa, eager, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    model = tower(EVA02).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert all(layer.gradient_checkpointing is checkpointing for layer in model.layers)
        model.zero_grad()
        model(pixels()).pooler_output.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_sub_norm_of_a_plain_mlp_has_the_reference_epsilon():
    model = tower(EVA01, sub_layer_norm=True)
    layer = model.layers[0]
    assert (layer.mlp.layer_norm.eps, layer.self_attn.layer_norm.eps, model.layer_norm.eps) == (1e-5, 1e-6, 1e-6)
    assert tower(EVA02).layers[0].mlp.layer_norm.eps == 1e-6


def test_hidden_states_and_attentions():
    model = tower(EVA02)
    model.set_attn_implementation("eager")
    outputs = model(pixels(), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, 17, 32)] * 3
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 4, 17, 17)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(dim=-1), torch.ones(2, 4, 17))


@pytest.mark.parametrize("values", [EVA02, EVA01], ids=["eva02", "eva01"])
def test_saved_and_loaded_by_the_auto_classes(values, tmp_path):
    model = tower(values)
    model.save_pretrained(tmp_path)
    config, loaded = AutoConfig.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert type(config) is EvaCLIPVisionConfig and type(loaded) is EvaCLIPVisionModel
    assert config.model_type == "proclip_eva_vision"
    with torch.no_grad():
        assert torch.equal(loaded(pixels()).pooler_output, model(pixels()).pooler_output)


def test_rotary_tables_are_computed_in_float32_before_they_are_halved(tmp_path):
    tower(EVA02).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.layer_norm.weight.dtype == torch.bfloat16
    torch.testing.assert_close(loaded.rotary_cos.float(), rotary_tables(4, 8, 3)[0], atol=4e-3, rtol=0)
    assert loaded(pixels()).pooler_output.isfinite().all()


def test_random_initialisation_leaves_nothing_uninitialised():
    model = EvaCLIPVisionModel(EvaCLIPVisionConfig(**EVA01))
    assert torch.equal(model.layers[1].layer_scale2, torch.full((32,), 0.1))
    assert 0.01 < model.embeddings.position_embedding.std() < 0.03
    assert 0.01 < model.embeddings.class_embedding.std() < 0.04


def test_trains_as_the_vision_tower_of_proclip(tmp_path):
    config = tiny.config(vision_config=EvaCLIPVisionConfig(**EVA02), vision_projection_bias=True)
    torch.manual_seed(0)
    model = ProCLIPModel(config)
    assert torch.equal(model.visual_projection.bias, torch.zeros(16)), "initialised"
    inputs = tiny.inputs() | {"pixel_values": torch.randn(3, 3, 32, 32)}
    model(**inputs, return_loss=True).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    vision = {name for name, _ in model.named_parameters() if name.startswith(("vision_model", "visual_projection"))}
    assert vision <= set(trained)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded.config, ProCLIPConfig) and isinstance(loaded.vision_model, EvaCLIPVisionModel)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


def test_pictures_of_the_wrong_size_are_refused():
    with pytest.raises(ValueError, match="28 x 32 pixels, and this model takes 32 x 32"):
        tower(EVA02)(torch.zeros(1, 3, 28, 32))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"num_attention_heads": 16}, "multiple of 4"),
        ({"rope_pretrained_grid": 0}, "at least 1"),
    ],
)
def test_impossible_configurations_are_refused(wrong, message):
    with pytest.raises(Exception, match=message):
        EvaCLIPVisionConfig(**EVA02 | wrong)
