"""Packed texts: the same as one by one, forward and backward, for every family and pooling; texts stay apart; what the row costs."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel

from modeling_proclip import ProCLIPModel, modeling_proclip, segment_attention
from modeling_proclip.packing import pack_rows, packs, why_padded
from tests.modeling_proclip import tiny
from tests.modeling_proclip.test_attention_proof import FAMILIES, text_model


POOLINGS = ["mean", "weighted_mean", "last_token", "eos_token", "bos_token"]
# A window that is shorter than the texts is what SDPA's mask makes of it: as many tokens to either side.
PACKED = {
    **FAMILIES,
    "mistral with a window": {"model_type": "mistral", "sliding_window": 3},
    "gemma3_text with a window": {
        "model_type": "gemma3_text",
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 2,
    },
    "qwen2 with a window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
}
LENGTHS = (9, 4, 1, 13, 9)


def rows(seed: int = 0) -> list[dict[str, list[int]]]:
    """Texts of several lengths, of which some tokens are pooled, and of one none."""
    generator = torch.Generator().manual_seed(seed)
    texts = [
        {
            "input_ids": torch.randint(5, 420, (length,), generator=generator).tolist(),
            "token_type_ids": torch.randint(0, 2, (length,), generator=generator).tolist(),
        }
        for length in LENGTHS
    ]
    texts[1]["token_type_ids"] = [0] * LENGTHS[1]
    return texts


def model_of(family: str, pooling: str = "mean") -> ProCLIPModel:
    text = {**tiny.TEXT, "model_type": family, **PACKED[family]}
    return tiny.model(text_config=text, text_pooling=pooling)


def one_by_one(model: ProCLIPModel, texts: list[dict[str, list[int]]]) -> torch.Tensor:
    """The naive reference: each text alone."""
    return torch.cat(
        [model.get_llm_embeds(**{name: torch.tensor([ids]) for name, ids in text.items()}) for text in texts]
    )


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", PACKED)
@torch.no_grad()
def test_packed_equals_one_by_one(family, pooling):
    model = model_of(family, pooling)
    assert why_padded(model.text_model) is None
    packed = model.get_llm_embeds(**pack_rows(rows()))
    torch.testing.assert_close(packed, one_by_one(model, rows()), atol=1e-5, rtol=0)
    assert model.text_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", PACKED)
def test_packed_gradients_equal_those_one_by_one(family, pooling):
    model = model_of(family, pooling)
    weights = torch.randn(len(LENGTHS), tiny.TEXT["hidden_size"], generator=torch.Generator().manual_seed(1))
    parameters = list(model.text_model.parameters())
    expected = torch.autograd.grad((one_by_one(model, rows()) * weights).sum(), parameters)
    found = torch.autograd.grad((model.get_llm_embeds(**pack_rows(rows())) * weights).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * other.abs().max().clamp(min=1).item(), rtol=0)


@pytest.mark.parametrize("family", PACKED)
@torch.no_grad()
def test_another_text_in_the_middle_moves_nothing_of_its_neighbours(family):
    model = model_of(family)
    before = model.get_llm_embeds(**pack_rows(rows()))
    texts = rows()
    texts[1] = {name: values[:-1] for name, values in rows(seed=1)[3].items()}  # longer, and of other tokens
    after = model.get_llm_embeds(**pack_rows(texts))
    others = [0, 2, 3, 4]
    assert torch.equal(after[others], before[others]) and not torch.equal(after[1], before[1])


@torch.no_grad()
def test_what_a_packed_row_costs():
    """One attention a layer and text, of keys that are not repeated and without a mask; nothing is fetched from the device in between."""
    model = model_of("llama", "last_token")
    assert model.config.text_config.num_key_value_heads < model.config.text_config.num_attention_heads
    packed = pack_rows(rows())
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        model.get_llm_embeds(**packed)
    calls = [event for event in profiler.events() if event.name == "aten::scaled_dot_product_attention"]
    assert len(calls) == len(LENGTHS) * model.config.text_config.num_hidden_layers
    assert all(not call.input_shapes[3] for call in calls), "an attention mask"
    assert all(call.input_shapes[1][1] == 2 for call in calls), "repeated key heads"
    names = {event.name for event in profiler.events()}
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::repeat", "aten::repeat_interleave"}


@pytest.mark.skipif(not segment_attention.HAS_VARLEN, reason="this torch has no variable-length kernel")
@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_what_a_packed_row_costs_on_a_gpu(pooling, monkeypatch):
    """One kernel a layer, and nothing that the host would have to wait for: on the meta device, whose tensors have no values to fetch."""
    monkeypatch.setattr(segment_attention, "_KERNEL_DEVICES", ("cuda", "meta"))
    model = model_of("mistral with a window", pooling).to("meta")
    packed = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in pack_rows(rows()).items()}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        embeds = model.get_llm_embeds(**packed)
    assert embeds.shape == (len(LENGTHS), tiny.TEXT["hidden_size"])
    names = [event.name for event in profiler.events()]
    assert names.count("torch_attn::_varlen_attn") == model.config.text_config.num_hidden_layers
    assert not {"aten::repeat", "aten::masked_fill", "aten::scaled_dot_product_attention"} & set(names)


@torch.no_grad()
def test_all_that_the_features_and_the_model_give():
    """Packed texts are inputs like others: of the projected features, and of the whole model."""
    model = model_of("llama")
    embeds = one_by_one(model, rows())
    expected = model.get_text_features(llm_embeds=embeds).pooler_output
    found = model.get_text_features(**pack_rows(rows()))
    torch.testing.assert_close(found.pooler_output, expected, atol=1e-5, rtol=0)
    assert found.last_hidden_state.shape == (1, sum(LENGTHS), tiny.TEXT["hidden_size"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_a_padded_batch_is_packed_on_a_gpu(pooling, side, monkeypatch):
    """By whoever asks for text features, such as sentence-transformers: the same embeddings, and states where they would be."""
    model = model_of("llama", pooling)
    texts = [{**text, "attention_mask": [1] * len(text["input_ids"])} for text in rows()]
    batch = {
        name: nn.utils.rnn.pad_sequence([torch.tensor(text[name]) for text in texts], True, 0, side)
        for name in texts[0]
    }
    expected = model.get_text_features(**batch)
    monkeypatch.setattr(modeling_proclip, "packs", lambda text_model, device: True)
    calls = []
    model.text_model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    found = model.get_text_features(**batch)
    assert calls[0]["input_ids"].shape == (1, sum(LENGTHS)) and calls[0]["attention_mask"] is None
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)
    mask = batch["attention_mask"][..., None]
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state * mask, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        model(**batch).text_embeds, nn.functional.normalize(expected.pooler_output), atol=1e-5, rtol=0
    )

    # What packing cannot give, or would change, is padded: hidden states, gradients, texts without tokens, what a caller packs or not.
    assert len(model.get_text_features(**batch, output_hidden_states=True).hidden_states) == 3
    with torch.enable_grad():
        model.get_text_features(**batch).pooler_output.sum().backward()
    model.get_llm_embeds(**batch)
    model.get_text_features(**{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])})
    assert [call["input_ids"].shape[0] for call in calls[2:]] == [len(LENGTHS)] * 4


@torch.no_grad()
def test_texts_of_two_rotary_lengths_are_refused_packed_too(monkeypatch):
    monkeypatch.setattr(modeling_proclip, "packs", lambda text_model, device: True)
    model = model_of("llama")
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4, "rope_theta": 100.0}
    model.text_model.config.rope_parameters = rope
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    with pytest.raises(ValueError, match="beyond 4 tokens this LLM has other positions"):
        model.get_text_features(torch.full((2, 6), 7), mask)


def test_texts_are_packed_on_cuda_if_they_can_be():
    model = text_model("llama")
    assert packs(model, torch.device("cuda")) and not packs(model, torch.device("cpu"))
    assert not packs(text_model("roberta"), torch.device("cuda"))


@pytest.mark.parametrize(
    "family, attention, values, reason",
    [
        ("gemma2", "eager", {"attn_logit_softcapping": 50.0}, "softcap"),
        ("gpt_oss", "eager", {"num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux"),
        ("roberta", "sdpa", {}, "other states than alone"),
    ],
)
def test_what_does_not_fit_stays_padded(family, attention, values, reason):
    model = text_model(family, attention, **values)
    assert reason in why_padded(model)
    assert model.config._attn_implementation == attention


def test_a_model_is_tried_once(monkeypatch):
    model = text_model("llama")
    assert why_padded(model) is None
    monkeypatch.setattr(type(model), "forward", None)
    assert why_padded(model) is None


def test_trying_leaves_no_trace():
    model = text_model("llama").train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    why_padded(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


def test_texts_that_would_touch_are_padded(monkeypatch):
    """Of an implementation that ignores the bounds, as SDPA, eager and flex attention do when a model is not causal."""
    model = text_model("llama")
    monkeypatch.setattr("modeling_proclip.packing.SEGMENT_ATTENTION", "sdpa")
    assert "other states than alone" in why_padded(model)


@pytest.mark.parametrize("version, package", [(2, "flash-attn"), (3, "flash-attn-3"), (4, "flash-attn-4")])
@pytest.mark.parametrize("way", ["loading", "pairing"])
def test_flash_attention_that_is_not_installed(version, package, way, tmp_path):
    attention = {"text_config": f"flash_attention_{version}"}
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(ImportError, match=f"flash_attention_{version} cannot be used: .* {package}\\).*PyTorch's own"):
        if way == "loading":
            AutoModel.from_pretrained(tmp_path, attn_implementation=attention)
        else:
            ProCLIPModel.from_vision_text_pretrained(tiny.clip(), tiny.LLAMA_DIR, attn_implementation=attention)


@pytest.mark.parametrize("window", [None, 2, 50])
@pytest.mark.parametrize("gqa_option", [False, True])
def test_what_the_kernel_is_given(window, gqa_option, monkeypatch):
    """The arithmetic that `varlen_attn` documents, text by text, in place of the kernel: the same as on the CPU."""

    def reference(
        query, key, value, bounds, same_bounds, longest, same_longest, *, scale, window_size=(-1, -1), enable_gqa=None
    ):
        assert enable_gqa is (True if gqa_option else None) and bounds is same_bounds and bounds.dtype == torch.int32
        assert longest == same_longest == max(LENGTHS)
        outputs = []
        for start, end in zip(bounds.tolist(), bounds[1:].tolist()):
            positions = torch.arange(end - start)
            distance = positions[:, None] - positions
            left, right = (end if size < 0 else size for size in window_size)
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
            scores = (q @ k.mT * scale).masked_fill((distance > left) | (-distance > right), -torch.inf)
            outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(outputs)

    options = {"scale", "window_size", *(["enable_gqa"] if gqa_option else [])}
    monkeypatch.setattr(segment_attention, "varlen_attn", reference)
    monkeypatch.setattr(segment_attention, "_VARLEN_OPTIONS", options)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 8, generator=generator) for heads in (4, 2, 2))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    given = {"scaling": 0.3, "sliding_window": window, "cu_seq_lens_q": bounds, "max_length_q": max(LENGTHS)}
    expected, _ = segment_attention.segment_attention(None, query, key, value, None, **given)
    found = segment_attention._varlen_attention(query, key, value, 0.3, window, bounds, max(LENGTHS))
    torch.testing.assert_close(found[None], expected, atol=1e-5, rtol=0)
    assert expected.is_contiguous(), "as SDPA returns it: AFMoE and JetMoE look at it in another shape"


def test_texts_without_tokens_are_refused():
    with pytest.raises(ValueError, match="text 1 of the batch has no tokens"):
        pack_rows([{"input_ids": [1, 2]}, {"input_ids": []}])
