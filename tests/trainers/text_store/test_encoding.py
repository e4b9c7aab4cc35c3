import json

import pytest
import torch
from transformers import CLIPVisionModel

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from modeling_proclip.identity import weights_sha256
from tests.modeling_proclip import tiny
from tests.trainers.tiny_encoders import make_texts, tiny_clip, tiny_proclip
from trainers.compute import onednn
from trainers.data import encode_texts
from trainers.text_store import encoding
from trainers.text_store.encoding import characters_read, count_truncated, encoder_fingerprint, load_encoder


def gather(texts, model, processor, **kwargs):
    batches = list(encode_texts(texts, model, processor, **kwargs))
    indices = [i for batch in batches for i in batch.indices]
    assert sorted(indices) == list(range(len(texts)))  # each text exactly once
    embeddings = torch.cat([batch.embeddings for batch in batches])
    return embeddings[torch.tensor(indices).argsort()], batches


def test_sorted_batches_equal_one_text_at_a_time():
    model, processor = tiny_proclip()
    texts = [*make_texts(40), "", "   ", "one", "x" * 500]
    embeddings, _ = gather(texts, model, processor, token_budget=300)
    for text, embedding in zip(texts, embeddings, strict=True):
        with torch.no_grad():
            alone = model.get_llm_embeds(**processor(text=[text], return_tensors="pt"))[0]
        torch.testing.assert_close(embedding, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_packed_texts_equal_one_text_at_a_time(packed):
    model, processor = tiny_proclip()
    texts = [*make_texts(40), "", "   ", "one", "x" * 500]
    alone, _ = gather(texts, model, processor, token_budget=1, packed=False)
    embeddings, batches = gather(texts, model, processor, token_budget=300, packed=packed)
    torch.testing.assert_close(embeddings, alone, atol=1e-5, rtol=1e-5)
    assert len(batches) < len(texts)


def test_texts_are_packed_on_a_gpu_and_padded_elsewhere(monkeypatch):
    """And where a family cannot be packed."""
    model, processor = tiny_proclip()
    inputs = []
    monkeypatch.setattr(model, "get_llm_embeds", lambda **given: inputs.append(given) or torch.zeros(1, 32))
    for kind, reason, expected in (("cpu", None, False), ("cuda", None, True), ("cuda", "softcap", False)):
        monkeypatch.setattr(encoding, "why_padded", lambda text_model, reason=reason: reason)
        assert encoding._packs(model, torch.device(kind), None) is expected
    list(encode_texts(["a fox"], model, processor))
    assert "attention_mask" in inputs[0]
    with pytest.raises(ValueError, match="the texts of this model cannot be packed: softcap"):
        next(encode_texts(["a fox"], model, processor, packed=True))
    clip, tokenizer = tiny_clip("clip")
    assert not encoding._packs(clip, torch.device("cuda"), None)


@pytest.mark.parametrize("packed", [False, True])
def test_longrope_is_chosen_by_a_text_s_own_length(packed):
    """Phi-3 has other frequencies beyond its first length, and takes them for all texts of a batch with a longer one."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0 + 3 * i for i in range(4)]}
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 24, **factors}
    model, processor = tiny_proclip(max_length=64)
    torch.manual_seed(0)
    sizes = {**tiny.TEXT, "head_dim": 8, "vocab_size": model.text_model.config.vocab_size}
    model = tiny.model(
        text_config={"model_type": "phi3", **sizes, "rope_parameters": rope, "original_max_position_embeddings": 24}
    )
    texts = ["a fox", *make_texts(20, longest=60)]
    lengths = [len(ids) for ids in processor(text=texts, padding=False)["input_ids"]]
    assert min(lengths) <= 24 < max(lengths)
    alone, _ = gather(texts, model, processor, token_budget=1, packed=False)
    embeddings, _ = gather(texts, model, processor, token_budget=100_000, packed=packed)
    torch.testing.assert_close(embeddings, alone, atol=1e-5, rtol=1e-5)
    together = processor(text=texts, return_tensors="pt")
    with pytest.raises(
        ValueError, match=r"beyond 24 tokens this LLM has other positions .LongRoPE.* of \d+ tokens was padded to 64"
    ):
        model.get_text_features(**together)
    rope["rope_type"] = "dynamic"
    model.text_model.config.rope_parameters = rope
    model.text_model.config.max_position_embeddings = 24
    with pytest.raises(
        ValueError, match="beyond 24 this LLM's positions .dynamic RoPE. depend on the texts before it"
    ):
        next(encode_texts(texts, model, processor))
    with pytest.raises(ValueError, match="beyond 24 this LLM's positions .dynamic RoPE."):
        model.get_text_features(**together)


def test_a_tokenizer_of_another_model_is_refused():
    model, processor = tiny_proclip()
    processor.tokenizer.add_tokens([f"token-{i}" for i in range(100)])
    with pytest.raises(ValueError, match=r"the tokenizer gives token \d+, and the model has 420 tokens"):
        next(encode_texts(["a token-99"], model, processor))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_two_tower_model_gives_its_own_text_features(family):
    model, tokenizer = tiny_clip(family)
    texts = [*make_texts(30), "", "fox " * 100]
    embeddings, _ = gather(texts, model, tokenizer, token_budget=200)
    for text, embedding in zip(texts, embeddings, strict=True):
        padding = "max_length" if family == "siglip" else False  # SigLIP was trained on padding, without a mask
        tokens = tokenizer([text], truncation=True, max_length=48, padding=padding, return_tensors="pt")
        if family == "siglip":
            tokens = {"input_ids": tokens["input_ids"]}
        with torch.no_grad():
            alone = model.get_text_features(**tokens).pooler_output[0]
        torch.testing.assert_close(embedding, alone, atol=1e-5, rtol=1e-5)


def test_batches_keep_the_budget_and_are_filled():
    model, processor = tiny_proclip(max_length=40)
    texts = make_texts(100)
    lengths = [len(row) for row in processor(text=texts, padding=False)["input_ids"]]
    _, batches = gather(texts, model, processor, token_budget=150)
    longest = [max(lengths[i] for i in batch.indices) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, length, next_length in zip(batches, longest, longest[1:], strict=False):
        assert len(batch.indices) * length <= 150
        assert (len(batch.indices) + 1) * length > 150, "one more text would have fitted"
        assert min(lengths[i] for i in batch.indices) >= next_length
    padded = sum(len(batch.indices) * length for batch, length in zip(batches, longest, strict=True))
    assert padded < 1.1 * sum(lengths)


def test_a_text_longer_than_the_budget_is_a_batch_of_its_own():
    model, processor = tiny_proclip()
    _, batches = gather(make_texts(5, longest=20), model, processor, token_budget=1)
    assert [len(batch.indices) for batch in batches] == [1] * 5


def test_truncated_texts_are_counted_and_a_text_that_just_fits_is_not():
    model, processor = tiny_proclip(max_length=24)
    fits = "1"
    while len(processor.tokenizer(fits + "1")["input_ids"]) <= 24:
        fits += "1"
    assert len(processor.tokenizer(fits)["input_ids"]) == 24
    _, batches = gather([fits, fits + "1", fits + "  ", "short"], model, processor)
    assert sum(batch.num_truncated for batch in batches) == 1
    model, tokenizer = tiny_clip(context=10)
    _, batches = gather(["fox", "fox " * 8, "fox " * 9], model, tokenizer)
    assert sum(batch.num_truncated for batch in batches) == 1


@pytest.mark.parametrize("kind", ["proclip", "clip", "siglip"])
@pytest.mark.parametrize("text", ["two red fox under the house " * 20, "狐狸" * 100, "house" * 60, " fox", ""])
def test_what_comes_after_the_characters_read_changes_nothing(kind, text):
    model, processor = tiny_proclip(max_length=40) if kind == "proclip" else tiny_clip(kind)
    read = characters_read(text, model, processor)
    if count_truncated([text], model, processor):
        assert 0 < read < len(text)
        tails = [text, text[:read], text[:read] + " quiet river", text[:read] + "🦊"]
        embeddings = [gather([tail], model, processor)[0] for tail in tails]
        assert all(torch.equal(embeddings[0], other) for other in embeddings[1:])
        assert not torch.equal(embeddings[0], gather([text[: read - 1]], model, processor)[0])
    else:
        assert read == len(text)


def test_runs_in_eval_mode_without_gradient_and_leaves_grad_mode_alone():
    model, processor = tiny_proclip()
    model.train()
    for batch in encode_texts(make_texts(3), model, processor):
        assert not batch.embeddings.requires_grad
        assert torch.is_grad_enabled()
    assert not model.text_model.training


def test_embeddings_have_the_model_s_dtype():
    model, processor = tiny_proclip()
    embeddings, _ = gather(make_texts(3), model.to(torch.bfloat16), processor)
    assert embeddings.dtype == torch.bfloat16 and embeddings.shape == (3, 32)


@pytest.mark.skipif(not onednn.HAS_ONEDNN, reason="torch was built without oneDNN")
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_through_onednn_equal_torch_s_own(bias):
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(24, 40, bias=bias), torch.randn(3, 5, 24)
    with torch.no_grad():
        expected = layer.double()(inputs.double()).float()
        layer.float()
        with onednn.OneDNNLinear():
            torch.testing.assert_close(layer(inputs), expected, atol=1e-5, rtol=1e-5)
            with torch.profiler.profile() as profile:
                layer(inputs)
            assert layer.bfloat16()(inputs.bfloat16()).dtype == torch.bfloat16
    assert any("mkldnn::_linear_pointwise" in event.key for event in profile.key_averages())


def test_refuses_what_cannot_encode_texts():
    model, processor = tiny_proclip()
    with pytest.raises(ValueError, match="needs its ProCLIPProcessor"):
        next(encode_texts(["a"], model, processor.tokenizer))
    with pytest.raises(ValueError, match="token_budget must be at least 1, got 0"):
        next(encode_texts(["a"], model, processor, token_budget=0))
    with pytest.raises(ValueError, match="CLIPVisionModel has no text side"):
        next(encode_texts(["a"], CLIPVisionModel(model.config.vision_config), processor))
    model.text_model = None
    with pytest.raises(ValueError, match="loaded without its LLM"):
        next(encode_texts(["a"], model, processor))


def test_fingerprint_tells_encoders_apart():
    model, processor = tiny_proclip()
    fingerprint = encoder_fingerprint(model, processor)

    def changed(model, processor):
        other = encoder_fingerprint(model, processor)
        return {field for field in fingerprint if fingerprint[field] != other[field]}

    assert changed(*tiny_proclip()) == set()
    assert changed(*tiny_proclip(seed=1)) == {"weights_sha256", "text_model_sha256"}
    assert changed(*tiny_proclip(max_length=32)) == {"max_length"}
    assert changed(*tiny_proclip(text_pooling="last_token")) == {"pooling"}
    assert changed(*tiny_proclip(template="{text}")) == {"prompt_template", "tokens_sha256", "tokenizer"}
    instructed = ProCLIPProcessor(
        processor.image_processor, tiny_proclip()[1].tokenizer, processor.prompt_template, "Describe:", 64
    )
    assert changed(model, instructed) == {"instruction", "tokens_sha256", "tokenizer"}
    model.text_adapter.projection.weight.data.zero_()
    assert changed(model, processor) == set(), "the adapter comes after the stored embedding"


def test_fingerprint_survives_saving_and_is_the_checkpoint_s_own_hash(tmp_path):
    model, processor = tiny_proclip()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model.text_model.save_pretrained(tmp_path / "llm")
    fingerprint = encoder_fingerprint(model, processor)
    assert encoder_fingerprint(*load_encoder(str(tmp_path / "model"), "cpu")) == fingerprint
    assert fingerprint["weights_sha256"] == weights_sha256(tmp_path / "llm")
    json.dumps(fingerprint)


def test_fingerprint_names_the_files_of_an_llm_in_another_dtype(tmp_path):
    """Trainers know the LLM by the hash of its files, and a store may be made in half precision."""
    model, processor = tiny_proclip()
    model.text_model.save_pretrained(tmp_path / "llm")
    vision = CLIPVisionModel(model.config.vision_config)
    half = ProCLIPModel.from_vision_text_pretrained(
        vision, tmp_path / "llm", dtype={"text_config": torch.bfloat16, "vision_config": torch.float32}
    )
    fingerprint = encoder_fingerprint(half, processor)
    assert fingerprint["text_model_sha256"] == weights_sha256(tmp_path / "llm") != fingerprint["weights_sha256"]


def test_load_encoder_of_a_clip_and_of_a_model_without_texts(tmp_path):
    model, tokenizer = tiny_clip()
    model.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    fingerprint = encoder_fingerprint(model, tokenizer)
    model.visual_projection.weight.data.zero_()
    assert encoder_fingerprint(model, tokenizer) == fingerprint, "pictures play no part"
    texts = make_texts(4)
    loaded, _ = gather(texts, *load_encoder(str(tmp_path / "clip"), "cpu"))
    torch.testing.assert_close(loaded, gather(texts, model, tokenizer)[0])
    model.text_projection.weight.data *= 2
    assert encoder_fingerprint(model, tokenizer)["weights_sha256"] != fingerprint["weights_sha256"]
    CLIPVisionModel(model.config.vision_config).save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="CLIPVisionModel has no text side"):
        load_encoder(str(tmp_path / "vision"), "cpu")


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_goes_to_a_gpu_in_one_pinned_copy(monkeypatch, packed):
    """With copying replaced by a list of what would be copied."""
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "token_type_ids": [0, 1, 1]}] * 2
    inputs = encoding.pack_rows(rows) if packed else encoding.pad_rows(rows, 0, "left")
    to, copies = torch.Tensor.to, []

    def copy(tensor, target, non_blocking=False):
        if isinstance(target, torch.dtype):
            return to(tensor, target)
        assert tensor.flags_pinned and target.type == "cuda" and non_blocking
        copies.append(tensor)
        return tensor

    def pin(tensor):
        tensor.flags_pinned = True
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    copied = encoding._on_device(inputs, torch.device("cuda"))
    assert len(copies) == 1 and list(copied) == list(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(copied[name], value) and copied[name].dtype == value.dtype
        else:
            assert copied[name] == value


def test_the_next_batch_is_prepared_before_the_last_one_is_looked_at(monkeypatch):
    """So that a GPU never waits for it; and texts are tokenised by the call itself."""
    model, processor = tiny_proclip()
    events = []
    for name in ("_tokenize", "_on_device"):
        real = getattr(encoding, name)
        monkeypatch.setattr(encoding, name, lambda *args, name=name, real=real: events.append(name) or real(*args))
    batches = encode_texts(make_texts(2), model, processor, token_budget=1)
    assert events == ["_tokenize"]
    next(batches)
    assert events == ["_tokenize", "_on_device", "_on_device"]
