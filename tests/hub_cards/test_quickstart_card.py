"""Cards hold what the results hold, in metadata that the Hub reads."""

import pytest
from huggingface_hub import ModelCard

from hub_cards import quickstart_card


def row(model: str, value: float) -> dict:
    return {
        "model": model,
        "budget": f"budget of {model}",
        "zero_shot_seen": value,
        "zero_shot_unseen": value / 2,
        "i2t_r@1": value / 4,
        "t2i_r@1": value / 8,
        "zero_shot_by_language": {"en": value, "de": value / 16},
    }


RESULTS = {
    "rows": [row("clip", 0.8888), row("proclip", 0.7776)],
    "num_concepts": 600,
    "num_seen": 150,
    "num_language_concepts": 150,
    "seed": 7,
    "size": "full",
}


def test_every_number_of_the_card_is_in_the_results():
    card = quickstart_card(RESULTS)
    assert "| proclip | 77.8 | 38.9 | 19.4 | 9.7 | budget of proclip |" in card.text
    assert "| clip | 88.9 | 5.6 |" in card.text
    assert "--seed 7" in card.text


def test_the_metadata_survives_a_round_trip(tmp_path):
    quickstart_card(RESULTS).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "cc-by-sa-4.0" and card.data.library_name == "transformers"
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["Image-to-text R@1"] == 0.1944 and len(values) == 4


def test_gemma_is_named_with_its_terms():
    card = quickstart_card({**RESULTS, "llm": "gemma3"})
    assert "--llm gemma3" in card.text and "Gemma Terms of Use" in card.text and "SmolLM2" not in card.text
    assert (card.data.base_model, card.data.license_name) == (["google/gemma-3-270m"], "cc-by-sa-4.0-and-gemma")


def test_missing_rows_are_named():
    with pytest.raises(ValueError, match="'proclip'"):
        quickstart_card({**RESULTS, "rows": [row("clip", 0.5)]})
