"""What counts as the same model, and how a difference is named."""

import json

import pytest
import torch
from transformers import AutoConfig, CLIPConfig

from modeling_proclip import ProCLIPConfig
from modeling_proclip.identity import (
    config_values,
    differences,
    library_versions,
    llm_config_values,
    load_llm_config,
    state_sha256,
    tokenizer_values,
)
from tests.modeling_proclip import tiny


LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def changed(there, here) -> list[str]:
    return [line.split(" is ")[0] for line in differences(there, here)]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"hidden_act": "relu"}, ["hidden_act"]),
        ({"rms_norm_eps": 1e-5}, ["rms_norm_eps"]),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, ["rope_parameters.rope_theta"]),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, ["head_dim", "num_attention_heads", "num_key_value_heads"]),
        ({"something_new": 3}, ["something_new"]),
        ({"something_new": False, "another": None}, []),
        ({"use_cache": False, "attention_dropout": 0.1, "dtype": "float16", "architectures": ["LlamaForCausalLM"]}, []),
        ({"name_or_path": "elsewhere", "initializer_range": 1.0, "id2label": {0: "a"}, "is_causal": False}, []),
        ({"pad_token_id": 9, "bos_token_id": 8, "eos_token_id": [7, 8]}, []),
    ],
)  # fmt: skip
def test_configuration_of_an_llm(values, names):
    llama = AutoConfig.for_model("llama", **tiny.TEXT)
    other = AutoConfig.for_model("llama", **{**tiny.TEXT, **values})
    assert sorted(changed(llm_config_values(llama), llm_config_values(other))) == names


def test_special_tokens_count_where_the_model_looks_for_them():
    """CLIP pools the end-of-text token."""
    clip = CLIPConfig(text_config=tiny.CLIP_TEXT, vision_config=tiny.VISION)
    other = CLIPConfig(text_config={**tiny.CLIP_TEXT, "eos_token_id": 3}, vision_config=tiny.VISION)
    assert changed(config_values(clip), config_values(other)) == ["text_config.eos_token_id"]


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA_3_ROPE, "max_position_embeddings": 131072},
        {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "gpt2"},
    ],
    ids=lambda values: values["model_type"],
)
def test_a_configuration_is_the_same_after_it_was_saved_in_a_checkpoint(values, tmp_path):
    """Also one in an old spelling."""
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_llm_config(tmp_path)
    ProCLIPConfig(text_config=config).save_pretrained(tmp_path / "checkpoint")
    saved = AutoConfig.from_pretrained(tmp_path / "checkpoint").text_config
    assert changed(llm_config_values(saved), llm_config_values(load_llm_config(tmp_path))) == []


def test_differences_are_named_with_both_values():
    there, here = {"a": 1, "b": {"c": "silu", "long": list(range(100))}}, {"b": {"c": "relu", "long": [1]}}
    assert list(differences(there, here)) == [
        "a is 1 there and not given here",
        "b.c is 'silu' there and 'relu' here",
        "b.long is [0, 1, 2, 3, 4, 5, ...] there and [1] here",
    ]


def exchange_two_tokens(backend):
    vocab = backend["model"]["vocab"]
    vocab["t"], vocab["b"] = vocab["b"], vocab["t"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (exchange_two_tokens, "model"),
        (lambda backend: backend.update(normalizer={"type": "Lowercase"}), "normalizer"),
        (lambda backend: backend["pre_tokenizer"]["pretokenizers"].pop(0), "pre_tokenizer"),
        (lambda backend: backend["added_tokens"][-1].update(lstrip=True), "added_tokens"),
    ],
)
def test_tokenizer(change, part, tmp_path):
    tokenizer = tiny.processor().tokenizer
    tokenizer.save_pretrained(tmp_path)
    backend = json.loads((tmp_path / "tokenizer.json").read_text())
    change(backend)
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    assert changed(tokenizer_values(tokenizer), tokenizer_values(tiny.tokenizer(tmp_path))) == [part]


def test_tokenizer_is_the_same_whatever_it_was_called_with():
    tokenizer = tiny.processor().tokenizer
    before = tokenizer_values(tokenizer)
    tokenizer(["a", "a longer text"], padding="max_length", truncation=True, max_length=3)
    assert tokenizer_values(tokenizer) == before
    tokenizer.truncation_side = "left"
    assert changed(before, tokenizer_values(tokenizer)) == ["truncation_side"]


def test_state_hash_tells_names_dtypes_shapes_and_bits_apart():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = [
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(1)},
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.full((1,), -1.0)},
    ]
    assert len({state_sha256(one) for one in [state, *others]}) == 5
    assert state_sha256(dict(reversed(state.items()))) == state_sha256(state)


def test_versions_are_without_the_patch_release():
    assert set(library_versions()) == {"transformers", "tokenizers"}
    assert all(number.count(".") == 1 for number in library_versions().values())
