"""ProCLIPModel.from_vision_text_pretrained: any CLIP or SigLIP beside any LLM, from paths and from objects, every weight kept."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ResNetConfig,
    ResNetModel,
    Siglip2VisionConfig,
    ViTConfig,
    ViTModel,
)

from modeling_proclip import ProCLIPModel
from modeling_proclip.attention_proof import check_bidirectional
from tests.modeling_proclip import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Saved models: a CLIP, its vision tower with and without projection, a SigLIP, an LLM with and without its head."""
    root = tmp_path_factory.mktemp("models")
    clip, siglip = tiny.clip(), tiny.siglip()
    with torch.no_grad():
        clip.logit_scale.fill_(3.5)
        siglip.logit_scale.fill_(4.5)
    projected = CLIPVisionModelWithProjection(clip.config.vision_config)
    projected.vision_model.load_state_dict(clip.vision_model.state_dict())
    projected.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    torch.manual_seed(1)
    causal_lm = LlamaForCausalLM(LlamaConfig(**tiny.TEXT))
    models = {"clip": clip, "siglip": siglip, "projected": projected, "bare": clip.vision_model}
    models |= {"causal_lm": causal_lm, "llm": causal_lm.model}
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    expected, actual = one.state_dict(), other.state_dict()
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("as_objects", [False, True], ids=["paths", "objects"])
@pytest.mark.parametrize("text", ["llm", "causal_lm"])
@pytest.mark.parametrize("vision", ["clip", "siglip", "projected", "bare"])
def test_every_pair(folders, vision, text, as_objects, tmp_path):
    def load(name):
        kinds = {"causal_lm": LlamaForCausalLM, "projected": CLIPVisionModelWithProjection}
        return kinds.get(name, AutoModel).from_pretrained(folders[name])

    sources = (load(vision), load(text)) if as_objects else (folders[vision], str(folders[text]))
    model = ProCLIPModel.from_vision_text_pretrained(*sources)
    whole = load(vision)
    tower = whole if vision == "bare" else whole.vision_model
    assert_same_weights(tower, model.vision_model)
    assert_same_weights(LlamaModel.from_pretrained(folders["llm"]), model.text_model)
    assert model.config.text_model_name_or_path == str(folders[text])
    if vision in ("clip", "projected"):
        assert torch.equal(model.visual_projection.weight, whole.visual_projection.weight)
        assert model.config.projection_dim == 16 and model.config.vision_projection
    else:
        assert isinstance(model.visual_projection, torch.nn.Identity)
        assert model.config.projection_dim == 24 and not model.config.vision_projection
    scale = {"clip": 3.5, "siglip": 4.5}.get(vision, model.config.logit_scale_init_value)
    assert model.logit_scale.item() == pytest.approx(scale)
    assert not model.training
    # None would fall back to eager attention without a mask.
    for part in (model.vision_model, model.text_model):
        assert part.config._attn_implementation == "sdpa"

    pixels = tiny.inputs()["pixel_values"]
    with torch.no_grad():
        features = model.get_image_features(pixels).pooler_output
        if vision in ("clip", "siglip"):
            assert torch.equal(features, whole.get_image_features(pixels).pooler_output)
        elif vision == "projected":
            assert torch.equal(features, whole(pixels).image_embeds)
        else:
            assert torch.equal(features, whole(pixels).pooler_output)
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
        assert_same_weights(model, again)
        assert torch.equal(again(**tiny.inputs()).logits_per_text, model(**tiny.inputs()).logits_per_text)


@pytest.mark.parametrize("vision", ["clip", "siglip", "biased"])
def test_another_llm_for_a_proclip(folders, vision, tmp_path):
    if vision == "biased":
        old = tiny.model(vision_projection_bias=True)
    else:
        old = ProCLIPModel.from_vision_text_pretrained(folders[vision], folders["llm"])
    old.save_pretrained(tmp_path)
    torch.manual_seed(5)
    other = LlamaModel(LlamaConfig(**{**tiny.TEXT, "hidden_size": 16}))
    new = ProCLIPModel.from_vision_text_pretrained(tmp_path, other)
    assert_same_weights(old.vision_model, new.vision_model)
    assert_same_weights(old.visual_projection, new.visual_projection)
    assert new.text_adapter.projection.in_features == 16 and new.logit_scale == old.logit_scale
    assert new.config.vision_projection_bias == (vision == "biased")


@pytest.mark.parametrize("way", ["pairing", "constructor", "lean"])
def test_the_caller_s_llm_stays_causal(way, tmp_path):
    """What reads in both directions shares its weights."""
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**tiny.TEXT)).eval()
    ids = torch.arange(5, 12)[None]
    before = llm(ids).logits
    if way == "pairing":
        pair = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), llm)
    elif way == "constructor":
        pair = ProCLIPModel(tiny.config(text_config=llm.config), text_model=llm.model)
    else:
        llm.save_pretrained(tmp_path / "llm")
        made = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), tmp_path / "llm")
        made.save_pretrained(tmp_path / "lean", lean=True)
        pair = ProCLIPModel.from_pretrained(tmp_path / "lean", text_model=llm)
    assert torch.equal(llm(ids).logits, before) and getattr(llm.config, "is_causal", True)
    check_bidirectional(pair.text_model)
    assert pair.text_model.config is pair.config.text_config
    for name, parameter in llm.model.named_parameters():
        assert pair.text_model.get_parameter(name) is parameter


def test_image_encoders_that_do_not_pool_are_refused():
    llm = LlamaModel(LlamaConfig(**tiny.TEXT))
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    with pytest.raises(
        ValueError, match="ResNetModel has no hidden_size, so it is no image encoder that ProCLIP takes"
    ):
        ProCLIPModel.from_vision_text_pretrained(resnet, llm)
    vit = ViTModel(ViTConfig(**tiny.VISION), add_pooling_layer=False)
    with pytest.raises(
        ValueError, match="ViTModel gives no pooled image of shape .batch_size, hidden_size.: take one"
    ):
        ProCLIPModel.from_vision_text_pretrained(vit, llm).get_image_features(torch.zeros(1, 3, 16, 16))


def test_parts_of_a_loaded_model_are_taken_themselves():
    clip = tiny.clip()
    model = ProCLIPModel.from_vision_text_pretrained(clip, LlamaModel(LlamaConfig(**tiny.TEXT)))
    assert model.vision_model is clip.vision_model and model.visual_projection is clip.visual_projection
    assert model.config.text_model_name_or_path is None


def test_exchanged_modules_keep_their_weights():
    """Modules that the library did not make look uninitialised to it."""
    clip, llm = tiny.clip(), LlamaModel(LlamaConfig(**tiny.TEXT))
    llm.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    clip.vision_model.post_layernorm = torch.nn.LayerNorm(24)
    torch.nn.init.constant_(clip.vision_model.post_layernorm.weight, 0.3)
    expected = llm.layers[0].mlp.up_proj.weight.clone()
    model = ProCLIPModel.from_vision_text_pretrained(clip, llm)
    assert torch.equal(model.text_model.layers[0].mlp.up_proj.weight, expected)
    assert (model.vision_model.post_layernorm.weight == 0.3).all()


def test_a_fresh_projection_is_said(folders, caplog):
    llm = LlamaModel(LlamaConfig(**tiny.TEXT))
    with pytest.raises(Exception, match=r"hidden_size \(24\). Set vision_projection=True"):
        ProCLIPModel.from_vision_text_pretrained(folders["bare"], llm, projection_dim=8)
    assert "random until it is trained" not in caplog.text
    model = ProCLIPModel.from_vision_text_pretrained(folders["bare"], llm, projection_dim=8, vision_projection=True)
    assert model.visual_projection.weight.shape == (8, 24)
    assert (
        "The image encoder has no projection of its own; the one made for it is random until it is trained."
        in caplog.text
    )


@pytest.mark.parametrize("override", [{"projection_dim": 8}, {"vision_projection": False, "projection_dim": 24}])
def test_a_projection_cannot_be_overridden(override):
    with pytest.raises(ValueError, match="has its own projection to 16 dimensions"):
        ProCLIPModel.from_vision_text_pretrained(tiny.clip(), LlamaModel(LlamaConfig(**tiny.TEXT)), **override)


def test_config_keywords(folders):
    settings = {
        "adapter_num_layers": 1,
        "adapter_expansion": 8,
        "adapter_input_norm": "none",
        "text_pooling": "last_token",
    }
    model = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), folders["llm"], **settings, logit_scale_init_value=1)
    assert settings.items() <= model.config.to_dict().items()
    assert len(model.text_adapter.blocks) == 1 and model.text_adapter.blocks[0].fc1.out_features == 256
    assert model.logit_scale.item() == 1
    with pytest.raises(ValueError, match="has no key 'adapter_layers'; did you mean 'adapter_num_layers'"):
        ProCLIPModel.from_vision_text_pretrained(tiny.clip(), folders["llm"], adapter_layers=1)


def test_dtype_and_attention_of_each_tower(folders):
    model = ProCLIPModel.from_vision_text_pretrained(
        folders["clip"],
        folders["llm"],
        dtype={"vision_config": torch.float16, "text_config": "bfloat16"},
        attn_implementation={"vision_config": "eager", "text_config": "sdpa"},
    )
    assert model.vision_model.dtype == model.visual_projection.weight.dtype == torch.float16
    assert model.text_model.dtype == torch.bfloat16
    assert model.dtype == model.logit_scale.dtype == torch.float32
    assert model.vision_model.config._attn_implementation == "eager"
    assert model.text_model.config._attn_implementation == "sdpa"
    assert model(**tiny.inputs()).logits_per_image.isfinite().all()
    both = ProCLIPModel.from_vision_text_pretrained(folders["clip"], folders["llm"], dtype=torch.bfloat16)
    assert both.vision_model.dtype == both.text_model.dtype == torch.bfloat16
    for argument in ("dtype", "attn_implementation"):
        with pytest.raises(ValueError, match="Unknown tower 'vision'"):
            ProCLIPModel.from_vision_text_pretrained(
                folders["clip"], folders["llm"], **{argument: {"vision": "eager"}}
            )


@pytest.mark.parametrize("missing", ["vision_model.post_layernorm.weight", "visual_projection.weight"])
def test_refuses_an_incomplete_image_encoder(folders, missing, tmp_path):
    tiny.clip().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[missing]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"has no weights for '{missing}' of CLIPModel"):
        ProCLIPModel.from_vision_text_pretrained(tmp_path, folders["llm"])


def test_refuses_what_is_no_tower(folders):
    llm = get_peft_model(LlamaModel.from_pretrained(folders["llm"]), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"got PeftModel; merge PEFT adapters first: merge_and_unload\(\)"):
        ProCLIPModel.from_vision_text_pretrained(tiny.clip(), llm)
    with pytest.raises(Exception, match="vision_config of type 'clip' has no hidden_size"):
        tiny.config(vision_config={"model_type": "clip"})


def test_siglip2_takes_its_own_inputs():
    """An image encoder whose pictures come as patches with a mask and a shape."""
    vision = Siglip2VisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, patch_size=2, num_patches=16
    )
    model = tiny.model(vision_config=vision, vision_projection=False, projection_dim=24)
    inputs = {
        "pixel_values": torch.randn(2, 16, 12),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [2, 8]]),
    }
    outputs = model(**inputs, input_ids=tiny.inputs()["input_ids"])
    assert outputs.logits_per_image.shape == (2, 3)


def test_bare_vision_model_object():
    tower = CLIPVisionModel(tiny.clip().config.vision_config)
    model = ProCLIPModel.from_vision_text_pretrained(tower, LlamaModel(LlamaConfig(**tiny.TEXT)))
    assert model.vision_model is tower
