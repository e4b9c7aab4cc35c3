"""ProCLIPModel saved and loaded: round trips, settings, dtypes and places of its parts, and what a checkpoint lacks."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification

from modeling_proclip import ProCLIPConfig, ProCLIPModel, ProCLIPOutput
from tests.modeling_proclip import tiny


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForZeroShotImageClassification, ProCLIPModel])
def test_round_trip(folder, auto_class):
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert type(model) is ProCLIPModel and not model.training
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.text_config.is_causal is False
    for name, tensor in tiny.model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    tiny.assert_same_embeddings(tiny.model(), model)


def test_round_trip_of_the_input_statistics(tmp_path):
    model = tiny.model(adapter_input_norm="standardize")
    model.text_adapter.set_input_statistics(torch.randn(32), torch.rand(32) + 0.5)
    model.save_pretrained(tmp_path)
    tiny.assert_same_embeddings(model, AutoModel.from_pretrained(tmp_path))
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.text_adapter.input_mean, model.text_adapter.input_mean), "rounded to half precision"


def test_overrides_at_load(folder):
    model = AutoModel.from_pretrained(folder, text_pooling="last_token", text_config={"rms_norm_eps": 1e-3})
    assert model.config.text_pooling == "last_token" and model.config.text_config.is_causal is False
    replaced = AutoConfig.for_model("llama", **tiny.TEXT)
    assert ProCLIPModel.from_pretrained(folder, text_config=replaced).config.text_config.is_causal is False
    with pytest.raises(Exception, match="adapter_num_layers must not be negative"):
        AutoModel.from_pretrained(folder, adapter_num_layers=-1)
    with pytest.raises(TypeError, match="text_poling"):
        AutoModel.from_pretrained(folder, text_poling="mean")


@pytest.mark.parametrize("auto_class", [AutoModel, ProCLIPModel])
def test_dtypes_of_the_parts(folder, auto_class, caplog):
    def dtypes(model):
        return model.vision_model.dtype, model.text_model.dtype, model.dtype, model.logit_scale.dtype

    half, full = torch.bfloat16, torch.float32
    assert dtypes(auto_class.from_pretrained(folder, dtype="bfloat16")) == (half, half, half, full)
    mixed = auto_class.from_pretrained(folder, dtype={"text_config": "bfloat16"})
    assert dtypes(mixed) == (full, half, full, full)
    assert {parameter.dtype for parameter in mixed.text_model.parameters()} == {half}
    mixed.save_pretrained(folder / "mixed")
    again = auto_class.from_pretrained(folder / "mixed")
    assert dtypes(again) == (full, half, full, full)
    tiny.assert_same_embeddings(mixed, again)
    assert dtypes(auto_class.from_pretrained(folder / "mixed", dtype=torch.float32)) == (full, full, full, full)
    vision = auto_class.from_pretrained(folder, dtype={"vision_config": half, "": full})
    assert dtypes(vision) == (half, full, full, full)
    vision(**tiny.inputs())
    half_model = auto_class.from_pretrained(folder, dtype=half)
    half_model.save_pretrained(folder / "half")
    assert dtypes(auto_class.from_pretrained(folder / "half")) == (half, half, half, full)
    with pytest.raises(ValueError, match="Unknown tower 'txt_config'"):
        auto_class.from_pretrained(folder, dtype={"txt_config": half})


def test_attention_of_the_towers(folder):
    model = AutoModel.from_pretrained(folder, attn_implementation={"text_config": "eager", "vision_config": "sdpa"})
    assert model.text_model.config._attn_implementation == "eager"
    assert model.vision_model.config._attn_implementation == "sdpa"
    tiny.assert_same_embeddings(tiny.model(), model, tolerance=1e-5)
    eager = AutoModel.from_pretrained(folder, attn_implementation="eager")
    assert eager.text_model.config._attn_implementation == eager.vision_model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="Unknown tower 'text_model': the keys are vision_config, text_config"):
        AutoModel.from_pretrained(folder, attn_implementation={"text_model": "eager"})


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(folder, device_map):
    tiny.assert_same_embeddings(tiny.model(), AutoModel.from_pretrained(folder, device_map=device_map))


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
def test_llm_offloaded_to_disk(folder):
    device_map = dict.fromkeys(("vision_model", "visual_projection", "text_adapter", "logit_scale"), "cpu")
    model = AutoModel.from_pretrained(
        folder, device_map=device_map | {"text_model": "disk"}, offload_folder=folder / "off"
    )
    assert model.text_model.embed_tokens.weight.device.type == "meta"
    tiny.assert_same_embeddings(tiny.model(), model)


def test_vision_side_alone(folder):
    model = AutoModel.from_pretrained(folder, load_text_model=False)
    assert model.text_model is None
    inputs, whole = tiny.inputs(), tiny.model()
    llm_embeds = whole.get_llm_embeds(*(inputs[name] for name in tiny.TEXT_INPUTS))
    expected = whole(**inputs)
    outputs = model(llm_embeds=llm_embeds, pixel_values=inputs["pixel_values"])
    assert torch.equal(outputs.logits_per_image, expected.logits_per_image)
    with pytest.raises(ValueError, match="loaded without its LLM"):
        model(input_ids=inputs["input_ids"])
    assert model.get_input_embeddings() is model.vision_model.embeddings.patch_embedding


def test_missing_weights_are_initialised_and_named(tmp_path, caplog, monkeypatch):
    """What a checkpoint lacks must not be left as the memory happened to be."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # only set where CI is
    config = tiny.config(adapter_input_norm="standardize", logit_scale_init_value=1.25)
    torch.manual_seed(0)
    ProCLIPModel(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if name.startswith("text_model.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModel.from_pretrained(tmp_path)
    for name in ("logit_scale", "visual_projection.weight", "text_adapter.projection.bias", "text_adapter.input_std"):
        assert name in caplog.text
    assert model.logit_scale.item() == 1.25
    assert torch.equal(model.text_adapter.input_mean, torch.zeros(32))
    assert torch.equal(model.text_adapter.input_std, torch.ones(32))
    assert torch.equal(model.text_adapter.layer_norm.weight, torch.ones(32))
    linears = [module for module in model.text_adapter.modules() if isinstance(module, torch.nn.Linear)]
    for linear in linears:
        bound = linear.in_features**-0.5
        for parameter in (linear.weight, linear.bias):
            assert parameter.abs().max() <= bound and parameter.std() > bound / 3
    assert model.visual_projection.weight.std().item() == pytest.approx(24**-0.5, rel=0.2)
    assert 0.05 < model.vision_model.embeddings.class_embedding.std() < 0.5
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_auto_classes(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is ProCLIPConfig and config.to_dict() == AutoModel.from_pretrained(folder).config.to_dict()
    assert type(AutoModel.from_config(config)) is ProCLIPModel
    assert ProCLIPOutput.__annotations__["logits_per_image"]
