"""What a trained checkpoint records of its training, and the card that the trainers write of it."""

import json

import pytest
from huggingface_hub import ModelCard

from hub_cards import model_card
from modeling_proclip import ProCLIPConfig
from tests.trainers.tiny_training import CAPTIONS, inheritance_trainer, picture_rows, tiny_model, tuning_trainer
from trainers.data import PairSource, open_pairs


def test_the_trainers_card_tells_of_its_run(tmp_path):
    """`push_to_hub` calls it after it saved the model."""
    trainer = tuning_trainer(tmp_path, tiny_model(load_text_model=True), max_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="mine", license="mit")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "# mine" in card.text
    assert "**contrastive tuning** (`ContrastiveTuningTrainer`): 2 steps of 6 rows" in card.text


def test_checkpoints_record_the_stages_before_and_the_steps_so_far(tmp_path):
    model = tiny_model(load_text_model=True)
    inheritance_trainer(tmp_path / "1", model, max_steps=3).train()
    tuning_trainer(tmp_path / "2", model, max_steps=4, save_strategy="steps", save_steps=2).train()
    config = ProCLIPConfig.from_pretrained(tmp_path / "2" / "checkpoint-2")
    assert [(stage["stage"], stage["steps"]) for stage in config.training] == [
        ("representation inheritance", 3),
        ("contrastive tuning", 2),
    ]
    assert [stage["steps"] for stage in model.config.training] == [3, 4]


def test_the_best_weights_are_recorded_with_their_own_steps(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    settings |= {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    model = tiny_model(load_text_model=True)
    trainer = tuning_trainer(tmp_path, model, eval_dataset=picture_rows(6), **settings)
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 4
    (record,) = model.config.training
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    assert (record["steps"], record["num_epochs"], record["final"]["loss"]) == (best, best / 4, losses[best])
    trainer.save_model()
    assert ProCLIPConfig.from_pretrained(tmp_path).training == [record]
    assert ProCLIPConfig.from_pretrained(tmp_path / "checkpoint-4").training[0]["steps"] == 4


def test_a_model_that_was_not_trained_records_nothing(tmp_path):
    trainer = tuning_trainer(tmp_path, tiny_model(load_text_model=True), max_steps=2)
    trainer.save_model()
    assert ProCLIPConfig.from_pretrained(tmp_path).training is None


@pytest.mark.parametrize("streaming", [False, True])
def test_the_data_is_recorded_and_on_the_card(tmp_path, streaming):
    rows = "".join(
        json.dumps({"image": f"{i}.png", "text": captions[0]}) + "\n" for i, captions in enumerate(CAPTIONS)
    )
    (tmp_path / "captions.jsonl").write_text(rows)
    source = PairSource(source=str(tmp_path / "captions.jsonl"), streaming=streaming)
    model = tiny_model(load_text_model=True)
    inheritance_trainer(tmp_path / "run", model, open_pairs(source, images=False), max_steps=2).train()
    (stage,) = model.config.training
    assert stage["num_rows"] == (None if streaming else len(CAPTIONS))
    assert stage["data"] == {"source": "captions.jsonl", "split": "train", "revision": None, "on_hub": False}
    model.save_pretrained(tmp_path / "model")
    card = model_card(tmp_path / "model")
    assert "| data | captions.jsonl, train |" in card.text and "| data, captions.jsonl | unknown |" in card.text
    assert (" rows, from a stream," in card.text) == streaming
    assert card.data.datasets is None and str(tmp_path) not in str(card)
    assert model_card(tmp_path / "model", datasets={"owner/pictures": "mit"}).data.datasets == ["owner/pictures"]
