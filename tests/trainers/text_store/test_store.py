"""What goes into a text store and what comes out."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from tests.trainers.fake_encoder import FakeEncoder, contents, fake_embedding
from tests.trainers.tiny_encoders import make_texts, tiny_clip, tiny_proclip
from trainers.data import TextEmbeddingStore, encode_texts
from trainers.text_store import layout as store_layout


def test_stores_what_the_llm_says(tmp_path):
    model, processor = tiny_proclip()
    texts = make_texts(30)
    store = TextEmbeddingStore.build(iter(texts), model, processor, tmp_path, shard_size=8, token_budget=100)
    naive = {}
    for text in texts:
        with torch.no_grad():
            naive[text] = model.get_llm_embeds(**processor(text=[text], return_tensors="pt"))[0]
    for asked in (texts, texts[::-1], [texts[20], texts[3], texts[20]], []):
        expected = torch.stack([naive[text] for text in asked]) if asked else torch.empty(0, 32)
        torch.testing.assert_close(store.lookup(asked), expected, atol=1e-5, rtol=1e-5)
    assert (len(store), store.dim, store.dtype) == (30, 32, torch.float32)
    assert texts[7] in store and "nothing of the kind" not in store
    assert store.fingerprint["prompt_template"] == processor.prompt_template


def test_stores_what_a_clip_says(tmp_path):
    model, tokenizer = tiny_clip()
    texts = make_texts(10)
    store = TextEmbeddingStore.build(texts, model, tokenizer, tmp_path)
    with torch.no_grad():
        expected = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
    torch.testing.assert_close(store.lookup(texts), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(encoder, tmp_path, dtype):
    texts = make_texts(25)
    encoder.build(texts, tmp_path, dtype=dtype)
    found = TextEmbeddingStore(tmp_path).lookup(texts)
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, torch.stack([fake_embedding(text) for text in texts]).to(found.dtype))


def test_lookup_equals_a_dict_over_many_shards(encoder, tmp_path):
    texts = make_texts(1000)
    store = encoder.build(texts, tmp_path, shard_size=37)
    naive = {text: fake_embedding(text) for text in texts}
    for seed in range(3):
        asked = [texts[i] for i in torch.randint(1000, (500,), generator=torch.Generator().manual_seed(seed))]
        assert torch.equal(store.lookup(asked), torch.stack([naive[text] for text in asked]))


def test_repeated_and_stored_texts_are_embedded_once(encoder, tmp_path):
    texts = make_texts(30)
    first = encoder.build([*texts[:20], *texts[:20]], tmp_path)
    assert encoder.embedded == texts[:20]
    summary = first.build_summary
    assert (summary.num_texts, summary.num_new, summary.num_stored, summary.num_repeated) == (40, 20, 0, 20)
    second = encoder.build((text for text in [*texts, texts[29]]), tmp_path)
    assert encoder.embedded == texts
    summary = second.build_summary
    assert (summary.num_texts, summary.num_new, summary.num_stored, summary.num_repeated) == (31, 10, 20, 1)
    assert torch.equal(second.lookup(texts), torch.stack([fake_embedding(text) for text in texts]))
    assert len(first) == 20 and len(second) == 30, "an open store does not change"


def test_rows_are_in_input_order(encoder, tmp_path):
    texts = make_texts(25)
    store = encoder.build(texts, tmp_path)
    assert [file.name for file in store_layout.shard_paths(tmp_path)] == [
        f"shard-0000{i}.safetensors" for i in range(3)
    ]
    assert torch.equal(store.shards[1].read("embeds"), torch.stack([fake_embedding(text) for text in texts[10:20]]))


def test_missing_texts_are_named(encoder, tmp_path):
    store = encoder.build(make_texts(5), tmp_path)
    with pytest.raises(KeyError) as error:
        store.lookup([*make_texts(5), "fox", "fox", "boat", "r" * 200, "river"])
    message = error.value.args[0]
    assert message.startswith(f"4 of the texts are not in the text store {tmp_path}: 'fox', 'boat', 'rrr")
    assert "river" not in message and len(message) < 300 + len(str(tmp_path)) and "proclip embed" in message


def test_refuses_what_are_no_texts(encoder, tmp_path):
    with pytest.raises(TypeError, match="not one string"):
        encoder.build("fox", tmp_path)
    with pytest.raises(TypeError, match="text number 1 is not a string but NoneType"):
        encoder.build(["fox", None], tmp_path)
    with pytest.raises(ValueError, match="text number 0 is not valid Unicode"):
        encoder.build(["\ud800"], tmp_path)
    with pytest.raises(TypeError, match="not one string"):
        encoder.build(["fox"], tmp_path).lookup("fox")


def test_refuses_wrong_settings(encoder, tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        encoder.build(["fox"], tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="shard_size must be at least 1, got 0"):
        encoder.build(["fox"], tmp_path, shard_size=0)


def test_workers_of_a_data_loader_can_use_it(encoder, tmp_path):
    texts = make_texts(20)
    store = encoder.build(texts, tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(store)).lookup(texts), store.lookup(texts))
    assert len(pickle.dumps(store)) < 1000
    loader = DataLoader(texts, batch_size=5, num_workers=1, collate_fn=store.lookup)
    assert torch.equal(torch.cat(list(loader)), store.lookup(texts))


def test_statistics_equal_torch(encoder, tmp_path):
    texts = make_texts(100)
    store = encoder.build(texts, tmp_path, shard_size=33)
    everything = torch.stack([fake_embedding(text) for text in texts]).double()
    mean, std = store.statistics()
    assert mean.dtype == std.dtype == torch.float64
    torch.testing.assert_close(mean, everything.mean(dim=0), atol=1e-12, rtol=0)
    torch.testing.assert_close(std, everything.std(dim=0, correction=0), atol=1e-12, rtol=0)


def test_statistics_do_not_cancel_far_from_zero(monkeypatch, tmp_path):
    encoder = FakeEncoder(monkeypatch, lambda text: torch.full((1,), 1e6) + (int(text) % 2))
    _, std = encoder.build([str(i) for i in range(40)], tmp_path).statistics()
    torch.testing.assert_close(std, torch.tensor([0.5], dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("field", ["weights_sha256", "pooling", "max_length", "instruction"])
def test_another_encoder_is_refused(encoder, tmp_path, field):
    encoder.build(["fox"], tmp_path)
    before = contents(tmp_path)
    encoder.fingerprint[field] = "other"
    with pytest.raises(ValueError, match=f"made by another encoder: {field} is .* there and 'other' here"):
        encoder.build(["fox", "boat"], tmp_path)
    assert contents(tmp_path) == before


def test_another_dtype_is_refused_but_another_name_of_the_same_model_is_not(encoder, tmp_path):
    encoder.build(["fox"], tmp_path)
    with pytest.raises(ValueError, match="made by another encoder: dtype is 'float32' there and 'float16' here"):
        encoder.build(["boat"], tmp_path, dtype="float16")
    encoder.fingerprint["model"] = "moved"
    assert len(encoder.build(["boat"], tmp_path)) == 2


def test_no_texts(encoder, tmp_path):
    with pytest.raises(ValueError, match="there are no texts to embed"):
        encoder.build([], tmp_path)
    encoder.build(["fox"], tmp_path)
    assert len(encoder.build([], tmp_path)) == 1


def test_embeddings_that_are_not_finite_are_refused(monkeypatch, tmp_path):
    encoder = FakeEncoder(monkeypatch, lambda text: torch.tensor([1.0, float("nan" if text == "5 bad" else text)]))
    texts = [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="embedding of '5 bad' is not finite"):
        encoder.build([*texts, "5 bad"], tmp_path)
    assert len(TextEmbeddingStore(tmp_path)) == 10, "the shard before it stays"
    with pytest.raises(
        ValueError, match="'70000' is not finite .*7e\\+04 does not fit into torch.float16: store bfloat16"
    ):
        encoder.build(["70000"], tmp_path / "half", dtype="float16")
    assert "70000" in encoder.build(["70000"], tmp_path / "brain", dtype="bfloat16")


def test_real_batches_are_what_the_store_got(tmp_path):
    """The store's windows do not change what `encode_texts` gives for a text."""
    model, processor = tiny_proclip()
    texts = make_texts(20)
    store = TextEmbeddingStore.build(texts, model, processor, tmp_path, shard_size=6)
    for batch in encode_texts(texts, model, processor):
        torch.testing.assert_close(
            store.lookup([texts[i] for i in batch.indices]), batch.embeddings, atol=1e-5, rtol=1e-5
        )
