"""Bidirectional attention and its proof, layer by layer, and padding that does not matter."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from modeling_proclip import ProCLIPModel, attention_proof
from modeling_proclip.attention_proof import check_bidirectional
from tests.modeling_proclip import tiny


FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64},
    "phi3": {},
}


def text_model(family: str, attention: str = "sdpa", causal: bool = False, **overrides) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**tiny.TEXT, **FAMILIES.get(family, {}), **overrides})
    config.is_causal = causal
    return AutoModel.from_config(config, attn_implementation=attention).eval()


# The probe


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_accepts_families_that_obey(family, attention):
    check_bidirectional(text_model(family, attention))
    with pytest.raises(ValueError, match=rf"Model with '{attention}' attention, layer 0 .*, stays causal"):
        check_bidirectional(text_model(family, attention, causal=True))


@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_accepts_a_sliding_window(attention, window):
    """A window of 4 reaches 4 tokens to either side: the five tokens of the probe."""
    check_bidirectional(text_model("mistral", attention, sliding_window=window))


@pytest.mark.parametrize(
    "family, layer_types, refused",
    [
        ("lfm2", ["conv", "full_attention"], "conv"),
        ("qwen3_next", ["full_attention", "linear_attention"], "linear_attention"),
        ("qwen3_5_text", ["linear_attention", "full_attention"], "linear_attention"),
        ("llama4_text", ["chunked_attention", "full_attention"], "chunked_attention"),
    ],
)
def test_refuses_layers_of_another_kind_by_name(family, layer_types, refused):
    """One layer that attends in both directions would move the first token for all of them."""
    with pytest.raises(ValueError, match=f"has layers of type '{refused}'.*full_attention and sliding_attention"):
        check_bidirectional(text_model(family, layer_types=layer_types))


@pytest.mark.parametrize(
    "family, layer_types, layer",
    [("lfm2", ["full_attention", "conv"], 1), ("qwen3_next", ["linear_attention", "full_attention"], 0)],
)
def test_proves_every_layer(family, layer_types, layer, monkeypatch):
    """Also of a hybrid whose layers have names that say nothing."""
    monkeypatch.setattr(attention_proof, "ATTENTION_LAYERS", {"conv", "linear_attention", "full_attention"})
    with pytest.raises(ValueError, match=rf"layer {layer} \(.*DecoderLayer\), stays causal without padding"):
        check_bidirectional(text_model(family, layer_types=layer_types))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_refuses_positions_that_count_padding(kind):
    """An embedding would change by 88 and 74 % beside a longer text."""
    with pytest.raises(
        ValueError, match="gives a text other states beside padding.*Take an LLM with rotary positions"
    ):
        check_bidirectional(text_model(kind))
    with pytest.raises(ValueError, match="gives a text other states beside padding"):
        check_bidirectional(text_model(kind).bfloat16())


def test_accepts_rounding_that_many_layers_multiply():
    """Of SmolLM2-135M in bfloat16, 30 layers make 34 % of the rounding that padding costs; here they make 21 %."""
    check_bidirectional(text_model("llama", num_hidden_layers=12, initializer_range=0.4).bfloat16())


def test_accepts_a_family_without_a_padding_token():
    check_bidirectional(text_model("codegen", "eager", n_embd=32, n_head=4, n_layer=2, rotary_dim=4))


def test_refuses_a_family_that_needs_a_mask():
    with pytest.raises(ValueError, match="MptModel with 'eager' attention does not run as an LLM of ProCLIP does"):
        check_bidirectional(text_model("mpt", "eager", d_model=32, n_heads=4, n_layers=2))


def test_accepts_learned_positions_of_tokens_only():
    """RoBERTa counts its positions over what is no padding."""
    check_bidirectional(text_model("roberta"))


@pytest.mark.parametrize("family", ["stablelm", "nemotron"])
def test_refuses_families_that_ignore_the_setting(family):
    with pytest.raises(ValueError, match="stays causal without padding.*Try attn_implementation"):
        check_bidirectional(text_model(family))
    if family == "stablelm":
        check_bidirectional(text_model(family, "eager"))  # the remedy that the error names


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_refuses_chunks(attention, monkeypatch):
    monkeypatch.setattr(attention_proof, "ATTENTION_LAYERS", {"chunked_attention"})
    with pytest.raises(ValueError, match="stays causal (without padding|in a padded batch)"):
        check_bidirectional(text_model("llama4_text", attention))


def test_refuses_attention_to_padding():
    model = text_model("llama")
    forward = model.forward
    model.forward = lambda attention_mask=None, **inputs: forward(**inputs)
    with pytest.raises(ValueError, match="LlamaModel with 'sdpa' attention, layer 0 .* attends to padding"):
        check_bidirectional(model)


def test_loading_and_pairing_prove_it(tmp_path):
    causal = {"model_type": "stablelm", **tiny.TEXT}
    with pytest.raises(
        ValueError, match="StableLmModel with 'sdpa' attention, layer 0 .StableLmDecoderLayer., stays causal"
    ):
        ProCLIPModel.from_vision_text_pretrained(tiny.clip(), text_model("stablelm"))
    tiny.model(text_config=causal).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stays causal"):
        AutoModel.from_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path, attn_implementation={"text_config": "eager"})
    AutoModel.from_pretrained(tmp_path, load_text_model=False)


def test_probe_leaves_no_trace():
    model = text_model("llama", attention_dropout=0.5)
    model.train()
    model.layers[0].eval()
    random_state = torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    check_bidirectional(model)
    model.config.is_causal = True
    with pytest.raises(ValueError, match="stays causal"):
        check_bidirectional(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probe_in_half_precision(dtype):
    check_bidirectional(text_model("llama").to(dtype))
    with pytest.raises(ValueError, match="stays causal"):
        check_bidirectional(text_model("llama", causal=True).to(dtype))


# Padding


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_and_batching_do_not_matter(family, attention):
    """One text alone, and in batches padded on the left and on the right with other lengths: the same embedding."""
    model = tiny.model(text_config={"model_type": family, **tiny.TEXT, **FAMILIES[family]})
    model.text_model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 420, (length,), generator=generator) for length in (9, 4, 1, 6)]
    alone = torch.cat([model.get_llm_embeds(text[None]) for text in texts])
    masked = torch.cat([model.get_llm_embeds(text[None], torch.ones(1, len(text))) for text in texts])
    torch.testing.assert_close(masked, alone, atol=1e-5, rtol=0)
    for side in ("left", "right"):
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=7, padding_side=side)
        ones = [torch.ones_like(text) for text in texts]
        mask = nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)
        torch.testing.assert_close(model.get_llm_embeds(ids, mask), alone, atol=1e-5, rtol=0, msg=side)
