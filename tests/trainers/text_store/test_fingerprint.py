"""A store is filled further, or read, only by the encoder that made it."""

import json
import logging

import pytest

from tests.modeling_proclip.test_identity import exchange_two_tokens
from tests.trainers.fake_encoder import contents
from tests.trainers.tiny_encoders import make_texts, tiny_clip, tiny_proclip
from trainers.data import OnTheFlyStore, TextEmbeddingStore
from trainers.text_store.encoding import encoder_fingerprint, load_encoder
from trainers.text_store.layout import warn_once
from trainers.text_store.verify import verify_store


TEXTS = make_texts(8, longest=3)


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_fingerprint(path, change):
    edit(path / "store.json", lambda settings: change(settings["fingerprint"]))


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in `tmp_path / "model"`, and the store that it made of half of the texts."""
    model, processor = tiny_proclip()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    TextEmbeddingStore.build(TEXTS[:4], model, processor, tmp_path / "store", progress=False)
    return tmp_path


@pytest.fixture(autouse=True)
def said_nothing_yet(caplog):
    caplog.set_level(logging.WARNING, "trainers")
    warn_once.cache_clear()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda c: c["text_config"].update(rms_norm_eps=0.1), "config.rms_norm_eps is 1e-06 there and 0.1 here"),
        ("config.json", lambda c: c["text_config"].update(hidden_act="relu"), "config.hidden_act is 'silu' there and 'relu' here"),
        (
            "config.json",
            lambda c: c["text_config"].update(rope_parameters={"rope_theta": 50.0, "rope_type": "default"}),
            "config.rope_parameters.rope_theta is 10000.0 there and 50.0 here",
        ),
        ("config.json", lambda c: c.update(text_pooling="last_token"), "pooling is 'mean' there and 'last_token' here"),
        ("tokenizer.json", exchange_two_tokens, "tokenizer.model is '[0-9a-f]{64}' there and"),
    ],
)  # fmt: skip
def test_another_encoder_of_the_same_weights_is_refused(saved, file, change, message):
    before = contents(saved / "store")
    edit(saved / "model" / file, change)
    encoder = load_encoder(str(saved / "model"), "cpu")
    for attempt in (
        lambda: TextEmbeddingStore.build(TEXTS, *encoder, saved / "store", progress=False),
        lambda: OnTheFlyStore(TextEmbeddingStore(saved / "store"), *encoder),
        lambda: verify_store(saved / "store", TEXTS, *encoder, progress=False),
    ):
        with pytest.raises(ValueError, match=f"store was made by another encoder: {message}"):
            attempt()
    assert contents(saved / "store") == before


def test_another_dtype_of_the_model_is_named(saved):
    model, processor = load_encoder(str(saved / "model"), "cpu", dtype="bfloat16")
    with pytest.raises(
        ValueError, match="another encoder: model_dtype is 'float32' there and 'bfloat16' here; .* here; build a store"
    ):
        TextEmbeddingStore.build(TEXTS, model, processor, saved / "store", progress=False)


def test_a_two_tower_model_counts_with_its_configuration(tmp_path):
    model, tokenizer = tiny_clip()
    TextEmbeddingStore.build(TEXTS[:4], model, tokenizer, tmp_path, progress=False)
    model.config.text_config.eos_token_id = 7
    with pytest.raises(ValueError, match="another encoder: config.text_config.eos_token_id is"):
        TextEmbeddingStore.build(TEXTS, model, tokenizer, tmp_path, progress=False)


def test_where_a_model_is_does_not_count(saved, caplog):
    (saved / "model").rename(saved / "moved")
    encoder = load_encoder(str(saved / "moved"), "cpu")
    assert len(TextEmbeddingStore.build(TEXTS, *encoder, saved / "store", progress=False)) == 8
    assert not caplog.records


def test_a_store_of_an_earlier_release_is_used_with_one_warning(saved, caplog):
    edit_fingerprint(
        saved / "store",
        lambda f: [
            f.pop(field)
            for field in ("model_dtype", "config", "tokenizer", "encoding", "versions", "text_model_sha256")
        ],
    )
    encoder = load_encoder(str(saved / "model"), "cpu")
    for texts in (TEXTS[:6], TEXTS):
        store = TextEmbeddingStore.build(texts, *encoder, saved / "store", progress=False)
    assert len(store) == 8
    (record,) = caplog.records
    assert (
        "earlier release, which did not record model_dtype, config, tokenizer, encoding, versions"
        in record.getMessage()
    )
    with pytest.raises(ValueError, match="another encoder: weights_sha256 is"):
        TextEmbeddingStore.build(TEXTS, *tiny_proclip(seed=1), saved / "store", progress=False)


def test_another_release_of_a_library_is_said_once(saved, caplog):
    edit_fingerprint(saved / "store", lambda f: f["versions"].update(transformers="5.1"))
    encoder = load_encoder(str(saved / "model"), "cpu")
    for texts in (TEXTS[:6], TEXTS):
        TextEmbeddingStore.build(texts, *encoder, saved / "store", progress=False)
    (record,) = caplog.records
    assert "other releases of libraries: transformers is '5.1' there and '5." in record.getMessage()


def test_what_our_own_code_makes_of_a_text_counts(saved):
    edit_fingerprint(saved / "store", lambda f: f.update(encoding=0))
    with pytest.raises(ValueError, match="another encoder: encoding is 0 there and 1 here"):
        TextEmbeddingStore.build(TEXTS, *load_encoder(str(saved / "model"), "cpu"), saved / "store", progress=False)


def test_a_model_without_parts_named_after_texts_counts_as_a_whole():
    """Such as one that a user wrote."""
    tokenizer = tiny_clip()[1]

    def encoder(seed):
        model = tiny_clip()[0]
        model.words, model.text_model = model.text_model, None
        del model.text_model, model.text_projection
        model.words.final_layer_norm.weight.data += seed
        return encoder_fingerprint(model, tokenizer)

    assert encoder(0) == encoder(0)
    assert encoder(0)["weights_sha256"] != encoder(1)["weights_sha256"]
