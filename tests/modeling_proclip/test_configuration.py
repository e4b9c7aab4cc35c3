"""ProCLIPConfig refuses what no model can be built from, and survives JSON."""

import json
import math

import pytest
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, LlamaConfig, SiglipVisionConfig

from modeling_proclip import ProCLIPConfig
from tests.modeling_proclip import tiny


def test_defaults_are_the_published_ones():
    """LLM2CLIP's adapter and pooling (`docs/paper_index.md` of the papers' settings), CLIP's temperature."""
    config = ProCLIPConfig()
    assert (config.adapter_num_layers, config.adapter_expansion, config.adapter_input_norm) == (4, 2, "l2")
    assert config.text_pooling == "mean"
    assert config.logit_scale_init_value == pytest.approx(math.log(1 / 0.07))
    assert isinstance(config.vision_config, CLIPVisionConfig) and isinstance(config.text_config, LlamaConfig)


@pytest.mark.parametrize(
    "key, suggestion",
    [
        ("text_poling", "did you mean 'text_pooling'"),
        ("adapter_input_norms", "did you mean 'adapter_input_norm'"),
        ("projection_dims", "did you mean 'projection_dim'"),
        ("zzz", "known keys: .*adapter_expansion.*vision_projection"),
    ],
)
def test_unknown_keys_are_refused(key, suggestion):
    with pytest.raises(ValueError, match=f"ProCLIPConfig has no key '{key}'; {suggestion}"):
        ProCLIPConfig(**{key: 1})


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"projection_dim": 8, "matryoshka_dims": [4, 9]},
            "matryoshka_dims must be from 1 to projection_dim .8., got 9",
        ),
        ({"projection_dim": 0}, "projection_dim must be positive, got 0"),
        ({"adapter_expansion": -1}, "adapter_expansion must be positive"),
        ({"adapter_expansion": math.nan}, "adapter_expansion must be positive"),
        ({"adapter_layer_norm_eps": 0.0}, "adapter_layer_norm_eps must be positive"),
        ({"adapter_num_layers": -1}, "adapter_num_layers must not be negative"),
        ({"logit_bias_init_value": math.inf}, "logit_bias_init_value must be finite"),
        ({"logit_scale_init_value": math.inf}, "logit_scale_init_value is a logarithm and must be finite"),
        ({"vision_projection": False}, r"must be the vision tower's hidden_size \(24\). Set vision_projection=True"),
        (
            {"vision_config": {"model_type": "clip"}},
            "of type 'clip' has no hidden_size: pass the configuration of one tower",
        ),
        ({"vision_config": {"model_type": "resnet"}}, "of type 'resnet' has no hidden_size"),
        ({"text_config": {"model_type": "gemma3"}}, "of type 'gemma3' has no hidden_size"),
        ({"text_config": {"model_type": "t5"}}, "of type 't5' is an encoder-decoder"),
        ({"text_config": {"model_type": "no_such_model"}}, "no_such_model"),
        ({"adapter_input_norm": "L2"}, "adapter_input_norm"),
        ({"text_pooling": "max"}, "text_pooling"),
        ({"adapter_num_layers": 2.5}, "adapter_num_layers"),
        ({"projection_dim": "512"}, "projection_dim"),
        ({"lean": "yes"}, "lean"),
        ({"attn_implementation": {"text": "eager"}}, "Unknown tower 'text'"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(Exception, match=message):
        tiny.config(**values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "adapter_num_layers": 0,
            "adapter_expansion": 1.5,
            "adapter_input_norm": "standardize",
            "adapter_output_bias": False,
        },
        {"vision_config": SiglipVisionConfig(**tiny.VISION), "vision_projection": False, "projection_dim": 24},
        {"text_config": {"model_type": "qwen3", **tiny.TEXT}, "text_pooling": "last_token", "lean": True},
        {"text_model_name_or_path": "some/llm", "text_model_revision": "abc", "text_model_sha256": "00"},
        {"dtype": "bfloat16", "attn_implementation": "eager"},
    ],
)
def test_round_trip(values, tmp_path):
    config = tiny.config(**values)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is ProCLIPConfig
    assert again.to_json_string() == config.to_json_string()
    assert (
        ProCLIPConfig(**json.loads(config.to_json_string(use_diff=False))).to_json_string() == config.to_json_string()
    )
    assert type(again.text_config) is type(config.text_config) and type(again.vision_config) is type(
        config.vision_config
    )


def test_the_library_s_own_keys_are_no_unknown_ones(tmp_path):
    tiny.config().save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())
    recorded |= {
        "auto_map": {"AutoModel": "modeling_proclip.ProCLIPModel"},
        "_name_or_path": "x",
        "architectures": ["ProCLIPModel"],
    }
    recorded |= {"torch_dtype": "float16", "output_attentions": False, "quantization_config": {"quant_method": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    config = ProCLIPConfig.from_pretrained(tmp_path)
    assert str(config.dtype) == "torch.float16" and config.auto_map == recorded["auto_map"]


def test_keys_of_a_later_release_are_kept_with_a_warning(tmp_path, caplog):
    """At the top and in the towers; the model loads and saves them again."""
    model = tiny.model()
    model.save_pretrained(tmp_path / "later")
    recorded = json.loads((tmp_path / "later/config.json").read_text())
    recorded |= {"adapter_layers": 4, "new_setting": {"a": [1, None]}}
    recorded["text_config"]["new_attention"] = "ring"
    recorded["vision_config"]["new_patches"] = 3
    (tmp_path / "later/config.json").write_text(json.dumps(recorded))
    for loader in (AutoConfig, ProCLIPConfig):
        caplog.clear()
        config = loader.from_pretrained(tmp_path / "later")
        assert "does not know and keeps unused: adapter_layers, new_setting." in caplog.text
        assert config.adapter_layers == 4 and config.new_setting == {"a": [1, None]}
    loaded = AutoModel.from_pretrained(tmp_path / "later")
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert again == {**recorded, "architectures": ["ProCLIPModel"]}
    with pytest.raises(ValueError, match="ProCLIPConfig has no key 'new_setting'"):
        ProCLIPConfig(new_setting=1)


@pytest.mark.parametrize("key, value", [("pad_token_id", 3), ("tokenizer_class", "LlamaTokenizer"), ("my_note", "x")])
def test_what_other_code_sets_is_saved_and_loaded(key, value, tmp_path):
    config = tiny.config()
    setattr(config, key, value)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path, text_pooling="bos_token")
    assert getattr(again, key) == value and again.text_pooling == "bos_token"
    again.save_pretrained(tmp_path / "again")
    assert getattr(ProCLIPConfig.from_pretrained(tmp_path / "again"), key) == value


def test_the_caller_s_configuration_stays_causal():
    text_config = LlamaConfig(**tiny.TEXT)
    before = text_config.to_dict()
    assert tiny.config(text_config=text_config).text_config.is_causal is False
    assert text_config.to_dict() == before


def test_text_config_is_bidirectional_however_it_comes(tmp_path):
    tiny.config().save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())
    recorded["text_config"]["is_causal"] = True
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    for config in (
        ProCLIPConfig(),
        ProCLIPConfig(text_config=LlamaConfig(is_causal=True)),
        ProCLIPConfig(text_config={"model_type": "qwen2", "is_causal": True}),
        AutoConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path, text_config={"rms_norm_eps": 1e-3}),
    ):
        assert config.text_config.is_causal is False


def test_overrides(tmp_path):
    tiny.config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, text_pooling="bos_token", text_config={"rms_norm_eps": 1e-3})
    assert config.text_pooling == "bos_token"
    assert config.text_config.rms_norm_eps == 1e-3 and config.text_config.hidden_size == tiny.TEXT["hidden_size"]


def test_a_tower_s_attention_is_kept():
    """The library sets a configuration's attention on its parts, to None by default; a loaded LLM would lose its mask."""
    text_config = LlamaConfig(**tiny.TEXT)
    text_config._attn_implementation = "sdpa"
    assert tiny.config(text_config=text_config).text_config._attn_implementation == "sdpa"
    config = tiny.config(text_config=text_config, attn_implementation={"vision_config": "eager"})
    assert config.text_config._attn_implementation == "sdpa"
    assert config.vision_config._attn_implementation == "eager"
    assert (
        tiny.config(text_config=text_config, attn_implementation="eager").text_config._attn_implementation == "eager"
    )
