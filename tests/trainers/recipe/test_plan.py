"""The steps of the dry run are the Trainer's, in all stages; and the stores hold as many texts as it says."""

import copy
import json

import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from tests.modeling_proclip import tiny
from tests.trainers.tiny_recipe import NUM_PAIRS, settings, write_parts, write_recipe
from trainers.recipe.curriculum import Curriculum
from trainers.recipe.files import RecipeError
from trainers.recipe.plan import plan_stages, plan_stores
from trainers.recipe.schema import load_recipe
from trainers.recipe.stages import llm_trainer
from trainers.recipe.steps import LLM_STAGES
from trainers.text_store.store import TextEmbeddingStore


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A recipe file with all three stages, whose text stores and untrained pair are made: what the trainers of stages 1 and 2 need."""
    folder = tmp_path_factory.mktemp("prepared")
    write_parts(folder)
    content = settings(folder)
    plain = [{"query": f"what is {i}?", "document": f"{i} is a number"} for i in range(11)]
    (folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    content["data"]["plain_texts"] = {"source": str(folder / "plain.jsonl"), "text_columns": ["query", "document"]}
    recipe = write_recipe(folder / "recipe.yaml", content)
    Curriculum(load_recipe(recipe))._prepare()
    LlamaForCausalLM(LlamaConfig(**tiny.TEXT)).save_pretrained(folder / "causal")
    AutoTokenizer.from_pretrained(tiny.LLAMA_DIR).save_pretrained(folder / "causal")
    content["stages"]["caption_contrastive"] = {"global_batch_size": 8, "lora_r": 2, "disable_tqdm": True}
    return write_recipe(folder / "recipe.yaml", content)


def trainer_of(curriculum, stage):
    if stage in LLM_STAGES:
        return llm_trainer(curriculum, stage)
    folder = curriculum.output_dir / "preparation" / "model"
    model = ProCLIPModel.from_pretrained(folder, load_text_model=False)
    return curriculum._trainer(stage, model, ProCLIPProcessor.from_pretrained(folder))


def planned(curriculum, stage, monkeypatch):
    monkeypatch.setattr(curriculum, "state_of", lambda step: "to do")  # stage 0 was added to a prepared pair
    return next(plan for plan in plan_stages(curriculum) if plan.name == stage)


@pytest.mark.parametrize(
    "stage, overrides",
    [
        ("inheritance", ["num_train_epochs=0.6"]),
        ("inheritance", ["num_train_epochs=1.5", "global_batch_size=7"]),
        ("inheritance", ["num_train_epochs=2", "global_batch_size=7", "dataloader_drop_last=false"]),
        ("inheritance", ["max_steps=9"]),
        ("inheritance", ["num_train_epochs=0.1", "global_batch_size=40"]),
        ("contrastive_tuning", ["num_train_epochs=0.6"]),
        ("contrastive_tuning", ["num_train_epochs=2.5", "global_batch_size=7", "device_batch_size=2"]),
        ("contrastive_tuning", ["num_train_epochs=1", "global_batch_size=7", "dataloader_drop_last=false"]),
        ("contrastive_tuning", ["max_steps=7", "device_batch_size=3"]),
        ("caption_contrastive", ["num_train_epochs=0.6"]),
        ("caption_contrastive", ["num_train_epochs=2", "global_batch_size=5", "device_batch_size=2"]),
        ("caption_contrastive", ["num_train_epochs=1", "global_batch_size=4", "plain_text_share=0.5"]),
        ("caption_contrastive", ["num_train_epochs=1", "global_batch_size=7", "dataloader_drop_last=false"]),
        ("masked_next_token", ["num_train_epochs=0.6", "global_batch_size=7"]),
        ("masked_next_token", ["num_train_epochs=1.5", "global_batch_size=7", "dataloader_drop_last=false"]),
    ],
)
def test_steps_and_epochs_are_the_trainers(prepared, stage, overrides, monkeypatch):
    overrides = [f"stages.{stage}.{setting}" for setting in overrides]
    if stage == "masked_next_token":
        overrides.append(f"model.text={prepared.parent / 'causal'}")
    curriculum = Curriculum(load_recipe(prepared, overrides))
    plan = planned(curriculum, stage, monkeypatch)
    trainer = trainer_of(curriculum, stage)
    _, per_epoch, *_, max_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert plan.steps == max_steps
    if curriculum.arguments[stage].max_steps > 0:
        assert plan.epochs == max_steps / per_epoch
    else:
        assert plan.epochs == curriculum.arguments[stage].num_train_epochs


@pytest.mark.parametrize("epochs, batch", [(0.6, 8), (1, 5), (2.5, 7)])
def test_a_streams_steps_are_the_ones_that_are_run(prepared, epochs, batch, monkeypatch):
    overrides = ["data.train.streaming=true", f"data.num_pairs={NUM_PAIRS}", "stages.caption_contrastive=null"]
    overrides += [
        f"stages.contrastive_tuning.{setting}"
        for setting in (f"num_train_epochs={epochs}", f"global_batch_size={batch}")
    ]
    curriculum = Curriculum(load_recipe(prepared, overrides))
    plan = planned(curriculum, "contrastive_tuning", monkeypatch)
    trainer = trainer_of(curriculum, "contrastive_tuning")
    assert plan.steps == trainer.args.max_steps == int(epochs * NUM_PAIRS / batch)
    assert plan.epochs == pytest.approx(plan.steps * batch / NUM_PAIRS)


@pytest.mark.parametrize("rows", [8, 9, 15, 16, 17])
@pytest.mark.parametrize("drop_last", [True, False])
def test_several_processes_have_the_steps_of_one(rows, drop_last):
    """accelerate deals batches of 4 out to two processes; the plan counts batches of 8."""
    loaders = [
        prepare_data_loader(
            DataLoader(range(rows), batch_size=4, drop_last=drop_last), num_processes=2, process_index=i
        )
        for i in range(2)
    ]
    expected = rows // 8 if drop_last else -(-rows // 8)
    assert [len(loader) for loader in loaders] == [len(list(loader)) for loader in loaders] == [expected] * 2


def test_what_was_run_has_the_planned_steps(prepared):
    overrides = [
        "stages.caption_contrastive=null",
        "stages.inheritance.num_train_epochs=0.5",
        "stages.inheritance.global_batch_size=6",
    ]
    curriculum = Curriculum(load_recipe(prepared, overrides))
    (plan, _) = plan_stages(curriculum)
    curriculum.run("inheritance")
    done = json.loads((curriculum.output_dir / "inheritance" / "complete.json").read_text())
    assert plan.steps == done["steps"] == 3  # of 40 rows six batches of 6


@pytest.mark.parametrize(
    "stage, setting, message",
    [
        ("inheritance", "global_batch_size=41", "stages.inheritance: there are 40 rows, fewer than one batch of 41"),
        ("caption_contrastive", "global_batch_size=12", "plain_text_dataset has 11 rows, fewer than one batch of 12"),
        ("caption_contrastive", "global_batch_size=30", "train_dataset has 24 rows, fewer than one batch of 30"),
    ],
)
def test_rows_that_fill_no_batch_are_refused_before_anything_runs(prepared, stage, setting, message, monkeypatch):
    curriculum = Curriculum(load_recipe(prepared, [f"stages.{stage}.{setting}"]))
    with pytest.raises(RecipeError, match=message):
        planned(curriculum, stage, monkeypatch)


@pytest.mark.parametrize("setting", ["max_steps=0", "num_train_epochs=0"])
def test_a_stage_that_would_train_nothing_is_refused(prepared, setting):
    with pytest.raises(RecipeError, match="which trains nothing"):
        load_recipe(prepared, [f"stages.inheritance.{setting}"])


def test_one_process_with_several_gpus_is_refused(prepared, tmp_path):
    curriculum = Curriculum(load_recipe(prepared, [f"output_dir={tmp_path / 'out'}"]))
    curriculum.arguments["inheritance"]._n_gpu = 4
    with pytest.raises(RecipeError, match="one process sees 4 GPUs: start one for each"):
        curriculum.run()


@pytest.mark.parametrize("own_texts", [True, False])
@pytest.mark.parametrize("held_out", [True, False])
def test_the_stores_hold_as_many_texts_as_planned(tmp_path, own_texts, held_out):
    write_parts(tmp_path)
    content = copy.deepcopy(settings(tmp_path))
    if not own_texts:
        del content["data"]["texts"]
    if held_out:
        rows = [{"image": "0.png", "short": f"short {i}", "long": f"a longer one {i}"} for i in range(5)]
        (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        content["data"]["eval"] = {"source": str(tmp_path / "eval.jsonl"), "text_columns": ["short", "long"]}
    curriculum = Curriculum(load_recipe(write_recipe(tmp_path / "recipe.yaml", content)))
    plans = {plan.name: plan.texts for plan in plan_stores(curriculum)}
    curriculum._prepare()
    for which in ("llm", "teacher"):
        assert plans[which] == len(TextEmbeddingStore(curriculum.store_path(which)))
    assert plans["llm"] == 2 * NUM_PAIRS + 40 * own_texts + 10 * held_out
