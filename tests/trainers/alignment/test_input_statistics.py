"""Input statistics over several languages, and the removal of what tells the languages apart."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModel

from modeling_proclip import ProCLIPConfig
from tests.trainers.tiny_training import LLM_DIM, TinyStore, inheritance_trainer, tiny_model
from trainers.alignment.input_statistics import fit_input_statistics, set_anchors


LANGUAGES = ("en", "de", "fa")
TEXTS = {language: [f"{i} in {language}" for i in range(40)] for language in LANGUAGES}


@pytest.fixture(scope="module")
def store():
    """An embedding is that of the thing, with noise, and an offset of the language, each on a scale of its own."""
    generator = torch.Generator().manual_seed(0)
    store = TinyStore(LLM_DIM, 0, [text for texts in TEXTS.values() for text in texts])
    things, offsets = (torch.randn(n, LLM_DIM, generator=generator) for n in (40, 3))
    noise = torch.randn(3, 40, LLM_DIM, generator=generator) / 20
    store.embeds = ((things + noise + 5 * offsets[:, None]) * torch.linspace(1, 9, LLM_DIM)).flatten(0, 1)
    return store


def found_by_translation(model, store, language: str) -> float:
    """Of the texts in `language`, which find their English translation by the cosine of what the first block reads."""
    adapter = model.text_adapter
    adapter.blocks, adapter.layer_norm = torch.nn.ModuleList(), torch.nn.Identity()
    with torch.no_grad():
        adapter.projection.weight.copy_(torch.eye(LLM_DIM))
        adapter.projection.bias.zero_()
        english, other = (adapter(store.lookup(TEXTS[name])) for name in ("en", language))
    return (other @ english.T).argmax(dim=1).eq(torch.arange(40)).float().mean().item()


def test_directions_against_a_naive_reference(store):
    model = tiny_model(adapter_input_norm="standardize", adapter_language_directions=2)
    unequal = {"en": TEXTS["en"], "de": TEXTS["de"][:10], "fa": TEXTS["fa"][:3]}
    fit_input_statistics(model, store, unequal)
    adapter = model.text_adapter
    embeds = [store.lookup(texts).double() for texts in unequal.values()]
    mean = sum(e.mean(0) for e in embeds) / 3
    std = (sum(((e - mean) ** 2).mean(0) for e in embeds) / 3).sqrt()
    torch.testing.assert_close(adapter.input_mean, mean.float())
    torch.testing.assert_close(adapter.input_std, std.float())
    # Three means around their mean lie in a plane: nothing of them is left once it is projected out.
    directions = adapter.language_directions
    torch.testing.assert_close(directions @ directions.T, torch.eye(2), atol=1e-5, rtol=0)
    for e in embeds:
        offset = ((e.mean(0) - mean) / std).float()
        torch.testing.assert_close(
            offset - (offset @ directions.T) @ directions, torch.zeros(LLM_DIM), atol=1e-5, rtol=0
        )


def test_translations_find_each_other_once_the_directions_are_gone(store):
    found = {}
    for directions in (0, 2):
        model = tiny_model(
            adapter_input_norm="standardize", adapter_language_directions=directions, projection_dim=LLM_DIM
        )
        fit_input_statistics(model, store, TEXTS)
        found[directions] = found_by_translation(model, store, "fa")
    assert found[2] > 0.9 > 0.6 > found[0]


def test_they_are_saved_loaded_and_kept_in_float32(store, tmp_path):
    model = tiny_model(adapter_input_norm="standardize", adapter_language_directions=2, load_text_model=True)
    fit_input_statistics(model, store, TEXTS)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.config.adapter_language_directions == 2
    for name in ("input_mean", "input_std", "language_directions"):
        assert torch.equal(getattr(loaded.text_adapter, name), getattr(model.text_adapter, name)), name


def test_training_leaves_fitted_statistics_and_refuses_unset_directions(store, tmp_path):
    rows = [{"text": text} for text in TEXTS["de"]]
    stores = {"text_store": store, "teacher_store": TinyStore(8, 1, TEXTS["de"])}
    model = tiny_model(adapter_input_norm="standardize", adapter_language_directions=2)
    with pytest.raises(ValueError, match="fit_input_statistics"):
        inheritance_trainer(tmp_path, model, rows=rows, max_steps=1, **stores)
    fit_input_statistics(model, store, TEXTS)
    before = model.text_adapter.language_directions.clone()
    inheritance_trainer(tmp_path, model, rows=rows, max_steps=1, **stores).train()
    assert torch.equal(model.text_adapter.language_directions, before)


def test_with_anchors_a_translation_is_read_as_the_text_that_it_translates(store, tmp_path):
    settings = {"adapter_input_norm": "standardize", "adapter_language_directions": 2, "adapter_num_anchors": 40}
    model = tiny_model(**settings, load_text_model=True)
    fit_input_statistics(model, store, TEXTS)
    rows = [{"text": text} for text in TEXTS["en"]]
    stores = {"text_store": store, "teacher_store": TinyStore(8, 1, TEXTS["en"])}
    with pytest.raises(ValueError, match="set_anchors"):
        inheritance_trainer(tmp_path, model, rows=rows, max_steps=1, **stores)
    with pytest.raises(ValueError, match="adapter_num_anchors is 40, but there are 39 texts"):
        set_anchors(model, store, TEXTS["en"][1:])
    set_anchors(model, store, TEXTS["en"])
    model.config.adapter_anchor_threshold = model.text_adapter.anchor_threshold = 1.0
    adapter = model.text_adapter
    with torch.no_grad():
        english, persian = (adapter.normalize(store.lookup(TEXTS[language])) for language in ("en", "fa"))
        pulled = adapter.pull_to_anchors(persian)
    before, after = ((states * english).sum(-1).mean() for states in (persian, pulled))
    assert after > before + (1 - before) / 2
    inheritance_trainer(tmp_path, model, rows=rows, max_steps=1, **stores).train()
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(loaded.text_adapter.anchors, adapter.anchors)
    assert loaded.text_adapter.anchor_threshold == 1.0


def test_what_cannot_be_fitted_is_refused(store):
    model = tiny_model(adapter_input_norm="standardize", adapter_language_directions=3)
    with pytest.raises(ValueError, match="at least 4 languages, got 3"):
        fit_input_statistics(model, store, TEXTS)
    with pytest.raises(ValueError, match="'it' has no texts"):
        fit_input_statistics(model, store, {**TEXTS, "it": []})
    with pytest.raises(ValueError, match='need adapter_input_norm="standardize"; this model has'):
        fit_input_statistics(tiny_model(), store, TEXTS)
    for settings, message in (({"adapter_input_norm": "l2"}, 'needs adapter_input_norm="standardize"'),
                              ({"adapter_language_directions": -1}, "negative"),
                              ({"adapter_language_directions": 0, "adapter_num_anchors": 2, "adapter_input_norm": "none"}, "anchors"),
                              ({"adapter_input_norm": "standardize", "adapter_anchor_threshold": 2}, "a cosine")):  # fmt: skip
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            ProCLIPConfig(**{"adapter_language_directions": 2, **settings})
