"""Bidirectional attention and its proof, padding, pooling."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from modeling_proclip import ProCLIPModel
from modeling_proclip.text_tower import check_bidirectional, pool_tokens
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
    with pytest.raises(ValueError, match=rf"Model with '{attention}' attention stays causal"):
        check_bidirectional(text_model(family, attention, causal=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_accepts_a_sliding_window(attention):
    """A window of 4 reaches 4 tokens to either side: the five tokens of the probe."""
    check_bidirectional(text_model("mistral", attention, sliding_window=4))


@pytest.mark.parametrize(
    "family, attention, where",
    [
        ("stablelm", "sdpa", "without padding"),
        ("nemotron", "sdpa", "without padding"),
        ("llama4_text", "sdpa", "in a padded batch"),
        ("llama4_text", "eager", "without padding"),
    ],
)
def test_refuses_families_that_ignore_the_setting(family, attention, where):
    with pytest.raises(ValueError, match=f"stays causal {where}.*Try attn_implementation"):
        check_bidirectional(text_model(family, attention))
    if family == "stablelm":
        check_bidirectional(text_model(family, "eager"))  # the remedy that the error names


def test_refuses_attention_to_padding():
    model = text_model("llama")
    forward = model.forward
    model.forward = lambda attention_mask=None, **inputs: forward(**inputs)
    with pytest.raises(ValueError, match="LlamaModel with 'sdpa' attention attends to padding"):
        check_bidirectional(model)


def test_loading_and_pairing_prove_it(tmp_path):
    causal = {"model_type": "stablelm", **tiny.TEXT}
    with pytest.raises(ValueError, match="StableLmModel with 'sdpa' attention stays causal"):
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


# Pooling


def naive_pooling(states: torch.Tensor, mask: torch.Tensor, marked: torch.Tensor | None, pooling: str) -> torch.Tensor:
    rows = []
    for i in range(len(states)):
        tokens = [j for j in range(states.shape[1]) if mask[i, j]]
        pooled = [j for j in tokens if marked is None or marked[i, j]] or tokens
        if pooling == "bos_token":
            rows.append(states[i, tokens[0]])
        elif pooling in ("last_token", "eos_token"):
            rows.append(states[i, tokens[-1]])
        else:
            weights = [1.0 if pooling == "mean" else rank for rank in range(1, len(pooled) + 1)]
            total = sum(w * states[i, j] for w, j in zip(weights, pooled, strict=True))
            rows.append(total / sum(weights))
    return torch.stack(rows)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last_token", "eos_token", "bos_token"])
def test_pooling_against_a_naive_loop(pooling, side):
    torch.manual_seed(0)
    states = torch.randn(4, 6, 3, requires_grad=True)
    lengths = torch.tensor([6, 4, 1, 3])
    positions = torch.arange(6).expand(4, 6)
    mask = (positions >= 6 - lengths[:, None] if side == "left" else positions < lengths[:, None]).long()
    marked = mask * (torch.rand(4, 6) > 0.5)
    marked[3] = 0  # nothing marked in a row
    for token_type_ids in (None, marked):
        expected = naive_pooling(states, mask, token_type_ids, pooling)
        actual = pool_tokens(states, mask, token_type_ids, pooling)
        torch.testing.assert_close(actual, expected)
        (expected_gradient,) = torch.autograd.grad(expected.square().sum(), states)
        (gradient,) = torch.autograd.grad(actual.square().sum(), states)
        torch.testing.assert_close(gradient, expected_gradient)


def test_pooling_sums_in_float32():
    """256 + 1 is 256 in bfloat16: a running sum in it would stop there."""
    states = torch.ones(1, 1000, 2, dtype=torch.bfloat16)
    for pooling in ("mean", "weighted_mean"):
        pooled = pool_tokens(states, torch.ones(1, 1000), None, pooling)
        assert pooled.dtype == torch.bfloat16 and torch.equal(pooled, torch.ones(1, 2, dtype=torch.bfloat16))
