"""A store that embeds what it lacks."""

import threading

import pytest
import torch
from torch.utils.data import DataLoader

from tests.trainers.tiny_encoders import make_texts, tiny_proclip
from tests.trainers.tiny_training import text_rows
from trainers.data import OnTheFlyStore, TextEmbeddingStore


TEXTS = make_texts(20)


@pytest.fixture
def on_the_fly(tmp_path):
    model, processor = tiny_proclip()
    store = TextEmbeddingStore.build(TEXTS[:12], model, processor, tmp_path, progress=False)
    return OnTheFlyStore(store, model, processor, num_cached=5)


def test_missing_texts_are_embedded(on_the_fly, tmp_path):
    model, processor = tiny_proclip()
    with torch.no_grad():
        naive = torch.cat([model.get_llm_embeds(**processor(text=[text], return_tensors="pt")) for text in TEXTS])
    asked = [15, 3, 19, 15, 0]
    found = on_the_fly.lookup([TEXTS[i] for i in asked])
    torch.testing.assert_close(found, naive[asked], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[[1, 4]], on_the_fly.store.lookup([TEXTS[3], TEXTS[0]])) and torch.equal(
        found[0], found[3]
    )
    assert on_the_fly.num_embedded == 2
    on_the_fly.lookup([TEXTS[15], TEXTS[19]])
    assert on_the_fly.num_embedded == 2, "they are kept"
    assert on_the_fly.lookup([]).shape == (0, 32)
    assert len(TextEmbeddingStore(tmp_path)) == 12, "nothing is written"
    assert on_the_fly.statistics()[0].equal(on_the_fly.store.statistics()[0])


def test_no_more_are_kept_than_asked_for(on_the_fly):
    on_the_fly.lookup(TEXTS[12:20])
    assert len(on_the_fly._cache) == 5 and on_the_fly.num_embedded == 8
    on_the_fly.lookup(TEXTS[15:20])
    assert on_the_fly.num_embedded == 8
    on_the_fly.lookup(TEXTS[12:13])
    assert on_the_fly.num_embedded == 9


def test_many_threads_share_one(on_the_fly):
    """With a cache that is smaller than what each of them asks for."""
    expected, failed = on_the_fly.lookup(TEXTS), []

    def read(seed):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist()
        try:
            found = on_the_fly.lookup([TEXTS[i] for i in order])
            torch.testing.assert_close(found, expected[order], atol=1e-5, rtol=1e-5)
        except (AssertionError, KeyError) as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_dtype_is_the_stores(tmp_path):
    model, processor = tiny_proclip()
    store = TextEmbeddingStore.build(TEXTS[:12], model, processor, tmp_path, dtype="bfloat16", progress=False)
    assert OnTheFlyStore(store, model, processor).lookup(TEXTS).dtype == torch.bfloat16


def test_data_workers_embed_on_the_cpu(on_the_fly):
    expected = on_the_fly.lookup(TEXTS)
    loader = DataLoader(TEXTS, batch_size=20, num_workers=1, collate_fn=on_the_fly.lookup)
    torch.testing.assert_close(next(iter(loader)), expected, atol=1e-5, rtol=1e-5)


def test_another_encoder_is_refused(on_the_fly):
    model, processor = tiny_proclip(seed=1)
    with pytest.raises(ValueError, match="made by another encoder: weights_sha256 is"):
        OnTheFlyStore(on_the_fly.store, model, processor)


def test_a_trainer_takes_it_with_the_model_that_it_trains(tmp_path):
    """Whose LLM it takes off while it trains."""
    from trainers import RepresentationInheritanceConfig, RepresentationInheritanceTrainer

    model, processor = tiny_proclip()
    texts = [text for row in text_rows(8) for text in row["text"]]
    store = TextEmbeddingStore.build(texts[:5], model, processor, tmp_path / "store", progress=False)
    teacher_store = {text: torch.randn(16, generator=torch.Generator().manual_seed(i)) for i, text in enumerate(texts)}

    class Teacher:
        def lookup(self, texts):
            return torch.stack([teacher_store[text] for text in texts])

    args = RepresentationInheritanceConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        max_steps=4,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    on_the_fly = OnTheFlyStore(store, model, processor)
    trainer = RepresentationInheritanceTrainer(
        model, args, text_rows(8), text_store=on_the_fly, teacher_store=Teacher()
    )
    trainer.train()
    assert trainer.state.global_step == 4 and on_the_fly.num_embedded > 0 and model.text_model is not None
