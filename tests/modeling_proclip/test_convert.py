"""`convert`: every recorded checkpoint (g2_*), in every wrapping, gives the reference's outputs and gradients through `AutoModel`."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from modeling_proclip import ProCLIPModel, convert
from tests import golden
from tests.modeling_proclip import tiny
from tests.reference_layout import Map, adapter_map, reference_gradients, vision_map


# Case -> what its shapes cannot tell.
CASES = {
    "g2_vit_quickgelu": {"head_width": 8},
    "g2_vit_gelu": {"head_width": 16, "quick_gelu": False},
    "g2_llm2clip_vit": {"head_width": 8},
    "g2_eva02": {"head_width": 8, "rope_pretrained_grid": 3},
    "g2_eva01_layerscale": {"head_width": 8},
}
WRAPPERS = {
    "bare": lambda state: state,
    "trainer": lambda state: {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}},
    "deepspeed": lambda state: {"module": state},
    "ddp": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "trainer_ddp": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
}


def load(folder) -> ProCLIPModel:
    model, info = AutoModel.from_pretrained(folder, load_text_model=False, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(model, ProCLIPModel)
    return model.eval()


def eva_map(reference: golden.Golden, num_layers: int = 2) -> Map:
    """The reference's EVA and `EvaCLIPVisionModel`, for gradients; its fused rows of the key's bias do not exist."""
    ours = "vision_model."
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    names |= {f"attn.{n}_proj": f"self_attn.{n}_proj" for n in "qkv"} | {"attn.inner_attn_ln": "self_attn.layer_norm"}
    names |= {
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.up_proj",
        "mlp.w3": "mlp.down_proj",
        "mlp.ffn_ln": "mlp.layer_norm",
    }
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    result = [("visual.cls_token", (f"{ours}embeddings.class_embedding",))]
    result += [("visual.pos_embed", (f"{ours}embeddings.position_embedding",))]
    tops = {
        "patch_embed.proj": f"{ours}embeddings.patch_embedding",
        "norm": f"{ours}layer_norm",
        "head": "visual_projection",
    }
    for kind in ("weight", "bias"):
        result += [(f"visual.{theirs}.{kind}", (f"{name}.{kind}",)) for theirs, name in tops.items()]
    for i in range(num_layers):
        theirs, layer = f"visual.blocks.{i}.", f"{ours}layers.{i}."
        result += [(f"{theirs}{a}.{k}", (f"{layer}{b}.{k}",)) for a, b in names.items() for k in ("weight", "bias")]
        fused = tuple(f"{layer}self_attn.{n}_proj.weight" for n in "qkv")
        result += [(f"{theirs}attn.qkv.weight", fused)]
        result += [(f"{theirs}attn.{n}_bias", (f"{layer}self_attn.{n}_proj.bias",)) for n in "qv"]
        result += [(f"{theirs}gamma_{k}", (f"{layer}layer_scale{k}",)) for k in (1, 2)]
    return [(theirs, ours) for theirs, ours in result if theirs in reference.params]


def layout_of(reference: golden.Golden) -> Map:
    num_blocks = reference.config["text_proj_effective"]["num_linear_blocks"]
    eva = "eva_model_name" in reference.config["vision_cfg"]
    vision = eva_map(reference) if eva else vision_map(reference.config["vision_cfg"]["layers"])
    return [*vision, *adapter_map(num_blocks, ours="text_adapter."), ("logit_scale", ("logit_scale",))]


def assert_outputs(reference: golden.Golden, model: ProCLIPModel) -> None:
    with torch.no_grad():
        images = model.get_image_features(reference.inputs["pixel_values"])
        texts = model.get_text_features(llm_embeds=reference.inputs["text_embeds_llm"])
        both = model(
            pixel_values=reference.inputs["pixel_values"],
            llm_embeds=reference.inputs["text_embeds_llm"],
            return_loss=True,
        )
    reference.assert_close("out.vision_tokens_before_pool", images.last_hidden_state)
    reference.assert_close("out.image_embeds_unnorm", images.pooler_output)
    reference.assert_close("out.text_embeds_unnorm", texts.pooler_output)
    reference.assert_close("out.image_embeds_norm", both.image_embeds)
    reference.assert_close("out.text_embeds_norm", both.text_embeds)
    reference.assert_close("out.logit_scale_exp", model.logit_scale.exp())
    reference.assert_close("out.logits_per_image", both.logits_per_image)
    reference.assert_close("out.clip_loss", both.loss)


@pytest.mark.parametrize("case", CASES)
def test_recorded_outputs_and_gradients(case, tmp_path):
    reference = golden.load(case)
    torch.save(reference.params, tmp_path / "published.pt")
    convert(tmp_path / "published.pt", tmp_path / "out", **CASES[case])
    model = load(tmp_path / "out")
    assert_outputs(reference, model)

    inputs = reference.inputs
    model(pixel_values=inputs["pixel_values"], llm_embeds=inputs["text_embeds_llm"], return_loss=True).loss.backward()
    for name, gradient in reference_gradients(model, layout_of(reference)).items():
        reference.assert_close(f"grad.param.{name}", gradient.reshape(reference.params[name].shape))
    assert reference.unchecked() == set()


def test_recorded_siglip2(tmp_path):
    reference = golden.load("g2_siglip2_timm")
    torch.save({"state_dict": reference.params}, tmp_path / "published.pt")
    report = convert(tmp_path / "published.pt", tmp_path / "out", head_width=8)
    model = load(tmp_path / "out")
    assert (
        report.config.vision_config.model_type == "siglip_vision_model" and report.config.adapter_input_norm == "none"
    )
    with torch.no_grad():
        images = model.get_image_features(reference.inputs["pixel_values"])
        texts = model.get_text_features(llm_embeds=reference.inputs["llm_embeds"])
    reference.assert_close("out.tokens", images.last_hidden_state)
    reference.assert_close("out.encode_image", images.pooler_output)
    reference.assert_close("out.encode_text", texts.pooler_output)
    assert reference.unchecked() == set()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("case", [*CASES, "g2_siglip2_timm"])
def test_every_wrapping_gives_the_same_file(case, wrapper, tmp_path):
    params = golden.load(case).params
    torch.save(params, tmp_path / "bare.pt")
    torch.save(WRAPPERS[wrapper](params), tmp_path / "wrapped.pt")
    options = CASES.get(case, {"head_width": 8})
    for name in ("bare", "wrapped"):
        convert(tmp_path / f"{name}.pt", tmp_path / name, **options)
    for file in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "bare" / file).read_bytes() == (tmp_path / "wrapped" / file).read_bytes()


@pytest.mark.parametrize("variant", ["bare", "trainer", "ddp_prefixed"])
def test_recorded_files_of_the_reference(variant, tmp_path):
    convert(golden.GOLDEN_DIR / f"g2_vit_quickgelu.{variant}.pt", tmp_path / "out", head_width=8)
    assert_outputs(golden.load("g2_vit_quickgelu"), load(tmp_path / "out"))


def test_recorded_deepspeed_file_in_half_precision(tmp_path):
    """Its parameters are the recorded ones rounded to fp16; they stay fp16, and every one is kept bit by bit."""
    reference = golden.load("g2_vit_quickgelu")
    report = convert(golden.GOLDEN_DIR / "g2_vit_quickgelu.deepspeed_fp16.pt", tmp_path / "half", head_width=8)
    assert report.facts["dtype"] == "float16"
    rounded = {name: tensor.half().float() for name, tensor in reference.params.items()}
    torch.save(rounded, tmp_path / "rounded.pt")
    convert(tmp_path / "rounded.pt", tmp_path / "rounded", head_width=8)
    half, single = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "rounded"))
    assert half.keys() == single.keys()
    for name, tensor in half.items():
        assert tensor.dtype == (torch.float32 if name == "logit_scale" else torch.float16)
        assert torch.equal(tensor.float(), single[name])
    model = AutoModel.from_pretrained(tmp_path / "half", load_text_model=False, dtype=torch.float32).eval()
    with torch.no_grad():
        embeds = model.get_image_features(reference.inputs["pixel_values"]).pooler_output
        expected = load(tmp_path / "rounded").get_image_features(reference.inputs["pixel_values"]).pooler_output
    assert torch.equal(embeds, expected)
    torch.testing.assert_close(embeds, reference.outputs["image_embeds_unnorm"], atol=1e-2, rtol=0)


@pytest.mark.parametrize("case", [*CASES, "g2_siglip2_timm"])
def test_round_trip(case, tmp_path):
    """Converted, loaded, saved and loaded again by the library: the same outputs."""
    reference = golden.load(case)
    torch.save(reference.params, tmp_path / "published.pt")
    convert(tmp_path / "published.pt", tmp_path / "out", **CASES.get(case, {"head_width": 8}))
    first = load(tmp_path / "out")
    first.save_pretrained(tmp_path / "again")
    second = load(tmp_path / "again")
    with torch.no_grad():
        one, two = (
            model.get_image_features(reference.inputs["pixel_values"]).pooler_output for model in (first, second)
        )
    torch.testing.assert_close(two, one, atol=1e-6, rtol=0)
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(tmp_path / "out" / "model.safetensors").keys()
    )


# The layout of LLM2CLIP's Hub folders


def hub_tensors(model: ProCLIPModel, vision_prefix: str = "vision_model.") -> dict[str, torch.Tensor]:
    """The names that third parties report of `microsoft/LLM2CLIP-Openai-*`."""
    renamed = {
        "text_adapter.layer_norm": "text_adapter.adaptor.2",
        "text_adapter.projection": "text_adapter.adaptor.3",
    }
    renamed |= {f"text_adapter.blocks.{i}.layer_norm": f"text_adapter.adaptor.{i}.ln" for i in range(2)}
    renamed |= {f"text_adapter.blocks.{i}.fc1": f"text_adapter.adaptor.{i}.fn.0" for i in range(2)}
    renamed |= {f"text_adapter.blocks.{i}.fc2": f"text_adapter.adaptor.{i}.fn.3" for i in range(2)}
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("text_model."):
            continue
        module, _, kind = name.rpartition(".")
        name = f"{renamed[module]}.{kind}" if module in renamed else name
        state[re.sub(r"^vision_model\.", vision_prefix, name)] = tensor.contiguous()
    return state


@pytest.mark.parametrize("vision_prefix", ["vision_model.", "vision_model.vision_model."])
def test_hub_folder(vision_prefix, tmp_path):
    model = tiny.model()
    state = hub_tensors(model, vision_prefix)
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    remote_code = {"AutoModel": "modeling_llm2clip.LLM2CLIPModel"}
    config = {
        "architectures": ["LLM2CLIPModel"],
        "model_type": "clip",
        "auto_map": remote_code,
        "projection_dim": 1280,
    }
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"hidden_act": "quick_gelu"}}))
    (folder / "modeling_llm2clip.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    convert(folder, tmp_path / "out", head_width=12)
    assert_same(model, load(tmp_path / "out"))
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "out").glob("*.py"))


def assert_same(expected: ProCLIPModel, actual: ProCLIPModel) -> None:
    inputs = {"pixel_values": tiny.inputs()["pixel_values"], "llm_embeds": torch.randn(3, 32)}
    with torch.no_grad():
        one, two = expected(**inputs), actual(**inputs)
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "name, index", [("model", "model.safetensors.index.json"), ("pytorch_model", "pytorch_model.bin.index.json")]
)
def test_sharded_folder(name, index, tmp_path):
    model = tiny.model()
    state = hub_tensors(model)
    names, places = sorted(state), {}
    suffix = "safetensors" if name == "model" else "bin"
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{name}-{i:05}-of-00002.{suffix}"
        shard = {key: state[key] for key in part}
        save_file(shard, tmp_path / file) if suffix == "safetensors" else torch.save(shard, tmp_path / file)
        places |= dict.fromkeys(part, file)
    (tmp_path / index).write_text(json.dumps({"weight_map": places}))
    convert(tmp_path, tmp_path / "out", head_width=12)
    assert_same(model, load(tmp_path / "out"))


def test_hub_folder_says_its_activation_and_the_option_wins(tmp_path):
    save_file(hub_tensors(tiny.model()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}))
    acts = [
        convert(
            tmp_path, tmp_path / "out", head_width=12, quick_gelu=quick, dry_run=True
        ).config.vision_config.hidden_act
        for quick in (None, True, False)
    ]
    assert acts == ["gelu", "quick_gelu", "gelu"]


def test_a_missing_logit_scale_is_the_cards(tmp_path):
    state = hub_tensors(tiny.model())
    del state["logit_scale"]
    save_file(state, tmp_path / "model.safetensors")
    report = convert(tmp_path, tmp_path / "out", head_width=12)
    assert any("logit_scale" in note for note in report.notes)
    torch.testing.assert_close(load(tmp_path / "out").logit_scale.exp(), torch.tensor(100.0))
