"""What is kept of an evaluation is what was computed, by this encoder, or an error that names the file."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.modeling_proclip import tiny
from trainers.evaluation.scoring.encoders import Encoder
from trainers.evaluation.scoring.feature_cache import SHARD_SIZE, FeatureCache, ShardWriter
from trainers.storage.mapped_safetensors import DamagedFileError


KEYS = np.random.default_rng(0).integers(-(2**63), 2**63, (700, 2))
EMBEDS = torch.randn(700, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    """Two shards."""
    cache = FeatureCache(tmp_path, "images", {"by": "a test"})
    cache.prepare()
    with ShardWriter(cache, KEYS, str) as writer:
        writer.add(range(SHARD_SIZE), EMBEDS[:SHARD_SIZE])
        writer.add(range(SHARD_SIZE, 700), EMBEDS[SHARD_SIZE:])
    return cache


def read(cache: FeatureCache) -> torch.Tensor:
    again = FeatureCache(cache.path.parent, "images", {"by": "a test"})
    return torch.cat(list(again.blocks(KEYS[::-1].copy(), size=300)))


def test_embeddings_come_back_in_the_order_of_the_keys(cache):
    assert torch.equal(read(cache), EMBEDS.flip(0))
    assert len(list(cache.path.glob("shard-*"))) == 2


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("embeds", "the embedding in row [01] is not what was written there"),
        ("keys", "its keys have changed since they were written"),
        ("checksums", "the embedding in row [01] is not what was written there"),
    ],
)
@pytest.mark.parametrize("exchanged", [False, True])
def test_what_has_changed_is_named(cache, tensor, message, exchanged):
    file = cache.path / "shard-0000-000001.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = (start + place for place in json.loads(data[8:start])[tensor]["data_offsets"])
    size = (end - begin) // (700 - SHARD_SIZE)
    if exchanged:
        row, next_row = data[begin : begin + size], data[begin + size : begin + 2 * size]
        data[begin : begin + 2 * size] = next_row + row
    else:
        data[begin] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedFileError) as error:
        read(cache)
    remedy = "Delete this file and evaluate again: only what it held is embedded anew"
    assert re.fullmatch(f"{file} is damaged: {message}. {remedy}", str(error.value))
    file.unlink()
    assert len(FeatureCache(cache.path.parent, "images", {"by": "a test"}).missing(KEYS)) == 700 - SHARD_SIZE


def test_two_shards_that_exchanged_their_names_are_still_right(cache):
    a, b = sorted(cache.path.glob("shard-*"))
    a.rename(cache.path / "aside")
    b.rename(a)
    (cache.path / "aside").rename(b)
    assert torch.equal(read(cache), EMBEDS.flip(0))


def test_a_shard_of_another_encoder_s_cache_is_refused(cache):
    other = FeatureCache(cache.path.parent, "images", {"by": "another test"})
    other.prepare()
    other.add(KEYS[:3], EMBEDS[:3] + 1)
    (shard,) = other.path.glob("shard-*")
    shard.replace(cache.path / "shard-0001-000000.safetensors")
    with pytest.raises(DamagedFileError, match="shard-0001-000000.safetensors is damaged: .* by another encoder"):
        read(cache)


def test_a_shard_without_checksums_is_refused(cache):
    file = cache.path / "shard-0000-000000.safetensors"
    tensors = load_file(file)
    del tensors["checksums"]
    save_file(tensors, file)
    with pytest.raises(DamagedFileError, match="it has no checksums"):
        read(cache)


def fingerprints(model, processor) -> tuple[str, str]:
    encoder = Encoder(model, processor, "tiny")
    return json.dumps(encoder.image_fingerprint()), json.dumps(encoder.text_fingerprint())


def set_in(config, **values):
    for name, value in values.items():
        setattr(config, name, value)


@pytest.mark.parametrize(
    ("change", "images", "texts"),
    [
        (lambda model, processor: None, False, False),
        (lambda model, processor: set_in(model.text_model.config, hidden_act="relu"), False, True),
        (lambda model, processor: set_in(model.text_model.config, rms_norm_eps=0.1), False, True),
        (lambda model, processor: set_in(model.vision_model.config, hidden_act="relu"), True, False),
        (lambda model, processor: set_in(model.vision_model.config, layer_norm_eps=0.1), True, False),
        (lambda model, processor: set_in(processor.image_processor, resample=0), True, False),
        (lambda model, processor: processor.tokenizer.add_tokens(["boat"]), False, True),
        (lambda model, processor: set_in(model.config, text_model_name_or_path="elsewhere"), False, False),
        (lambda model, processor: model.text_adapter.projection.weight.data.zero_(), False, False),
    ],
)
def test_another_encoder_has_another_cache(change, images, texts):
    model, processor = tiny.model(), tiny.processor(prompt_template=tiny.LLAMA3, max_length=40)
    before = fingerprints(model, processor)
    model, processor = copy.deepcopy(model), copy.deepcopy(processor)
    change(model, processor)
    after = fingerprints(model, processor)
    assert (before[0] != after[0], before[1] != after[1]) == (images, texts)


def test_another_release_of_a_library_has_another_cache(monkeypatch):
    before = fingerprints(tiny.model(), tiny.processor())
    monkeypatch.setattr("modeling_proclip.identity.version", lambda name: "99.1.2")
    after = fingerprints(tiny.model(), tiny.processor())
    assert before[0] != after[0] and before[1] != after[1]
