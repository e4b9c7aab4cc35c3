import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file
from transformers import CLIPModel

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from tests.trainers.tiny_recipe import Interrupted, die_in_stage, interrupt, settings, write_parts, write_recipe
from trainers.data import TextEmbeddingStore
from trainers.recipe.curriculum import Curriculum
from trainers.recipe.files import RecipeError
from trainers.recipe.plan import plan_stores
from trainers.recipe.schema import load_recipe


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


@pytest.fixture(scope="module")
def content(parts):
    return settings(parts)


@pytest.fixture(scope="module")
def whole(parts, content):
    """The output directory of a run that nothing interrupted."""
    Curriculum(load_recipe(write_recipe(parts / "whole.yaml", content))).run()
    return parts / "out"


def changed(content, tmp_path, **changes):
    """The recipe with other settings, by dotted key with "__" for a dot, and an output directory of its own."""
    content = copy.deepcopy(content)
    tmp_path.mkdir(exist_ok=True)
    for key, value in {"output_dir": str(tmp_path / "out"), **changes}.items():
        target = content
        *parents, last = key.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    return load_recipe(write_recipe(tmp_path / "recipe.yaml", content))


def weights(output_dir, stage):
    return load_file(Path(output_dir) / stage / "model" / "model.safetensors")


def assert_same_weights(one, other):
    for stage in ("preparation", "inheritance", "contrastive_tuning"):
        first, second = weights(one, stage), weights(other, stage)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), stage


def test_each_stage_starts_from_the_last_one_and_trains_its_part(whole):
    pair, inherited, tuned = (weights(whole, step) for step in ("preparation", "inheritance", "contrastive_tuning"))
    moved = {name for name in pair if not torch.equal(pair[name], inherited[name])}
    assert all(name.startswith("text_adapter.") for name in moved)
    assert "text_adapter.input_mean" in moved  # the statistics of the text store
    moved = {name for name in pair if not torch.equal(inherited[name], tuned[name])}
    assert "logit_scale" in moved and any(name.startswith("vision_model.") for name in moved)
    assert "text_adapter.input_mean" not in moved


def test_the_result_loads_with_its_llm_and_embeds(whole):
    folder = whole / "contrastive_tuning" / "model"
    model, processor = ProCLIPModel.from_pretrained(folder), ProCLIPProcessor.from_pretrained(folder)
    store = TextEmbeddingStore(whole / "text-stores" / "llm")
    text = "0"  # the first caption of the first picture begins with its number
    inputs = processor(text=[text], return_tensors="pt")
    assert model.get_text_features(**inputs).pooler_output.shape == (1, 16)
    assert store.fingerprint["prompt_template"] == processor.prompt_template
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".bin") == []
    card = (folder / "README.md").read_text()
    assert "ContrastiveTuningTrainer" in card and "RepresentationInheritanceTrainer" in card


def test_the_stores_hold_what_their_stages_read(whole, content):
    llm, teacher = (TextEmbeddingStore(whole / "text-stores" / which) for which in ("llm", "teacher"))
    assert (len(llm), len(teacher)) == (2 * 24 + 40, 40)
    assert (llm.dim, teacher.dim) == (32, 16)


def test_what_was_done_is_on_record(whole):
    done = json.loads((whole / "contrastive_tuning" / "complete.json").read_text())
    assert done["steps"] == 6 and done["seconds"] > 0 and "info_nce_loss" in done["last_log"]
    assert done["arguments"]["lambda_struct"] == pytest.approx(4e-4 * 512 * 511 / 2)
    assert done["arguments"]["per_device_train_batch_size"] == 8
    assert done["versions"]["torch"] == torch.__version__
    assert done["recipe"]["stages"]["inheritance"]["learning_rate"] == 1e-2


def test_the_resolved_recipe_runs_as_it_is_and_finds_all_finished(whole):
    resolved = yaml.safe_load((whole / "recipe.yaml").read_text())
    assert resolved["model"]["teacher"] == resolved["model"]["vision"]
    assert resolved["stages"]["contrastive_tuning"]["ema_decay"] == 0.999
    curriculum = Curriculum(load_recipe(whole / "recipe.yaml"))
    assert [curriculum.state_of(stage) for stage in curriculum.recipe.stages] == ["finished", "finished"]
    before = (whole / "contrastive_tuning" / "complete.json").stat().st_mtime_ns
    assert curriculum.run() == whole / "contrastive_tuning" / "model"
    assert (whole / "contrastive_tuning" / "complete.json").stat().st_mtime_ns == before


def test_interrupted_anywhere_and_run_again_it_ends_with_the_same_bits(whole, content, tmp_path, monkeypatch):
    recipe = changed(content, tmp_path)

    def run(prepare=lambda curriculum: None):
        curriculum = Curriculum(recipe)
        prepare(curriculum)
        with pytest.raises(Interrupted):
            curriculum.run()
        return curriculum

    build = Curriculum._build_store
    with monkeypatch.context() as patched:  # the LLM's store is built, the teacher's is not

        def build_first(self, which, *parts):
            (interrupt if which == "teacher" else build)(self, which, *parts)

        patched.setattr(Curriculum, "_build_store", build_first)
        run()
    assert (tmp_path / "out" / "text-stores" / "llm" / "store.json").is_file()
    finish = Curriculum._finish

    def unfinished(step):
        return lambda self, name, facts: interrupt() if name == step else finish(self, name, facts)

    for step in ("preparation", "inheritance", "contrastive_tuning"):
        if step != "preparation":  # before its first checkpoint, then after it
            run(lambda curriculum, step=step: die_in_stage(curriculum, step, 1, interrupt))
            assert Curriculum(recipe).checkpoint_of(step) is None
            run(lambda curriculum, step=step: die_in_stage(curriculum, step, 3, interrupt))
            assert Curriculum(recipe).checkpoint_of(step).endswith("checkpoint-2")
            checkpoints = tmp_path / "out" / step / "checkpoints"
            shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-2.bak")  # is no checkpoint
        with monkeypatch.context() as patched:  # all is there but the last file
            patched.setattr(Curriculum, "_finish", unfinished(step))
            run()
        assert Curriculum(recipe).state_of(step) == "begun"
    Curriculum(recipe).run()
    assert_same_weights(whole, tmp_path / "out")


def test_killed_in_the_middle_of_stage_2_the_same_command_finishes(whole, content, tmp_path):
    changed(content, tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    killed = subprocess.run(
        [sys.executable, "-m", "tests.trainers.tiny_recipe", tmp_path / "recipe.yaml"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out" / "contrastive_tuning" / "model").exists()
    command = [sys.executable, "-m", "trainers.cli", "train", str(tmp_path / "recipe.yaml")]
    finished = subprocess.run(
        command, env={**environment, "COLUMNS": "160"}, capture_output=True, text=True, cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    assert "contrastive_tuning" in finished.stdout and "finished" in finished.stdout
    assert_same_weights(whole, tmp_path / "out")


def test_two_processes_train_as_one(whole, content, tmp_path):
    changed(content, tmp_path)
    command = "-m torch.distributed.run --standalone --nproc_per_node 2 -m trainers.cli train".split()
    finished = subprocess.run(
        [sys.executable, *command, str(tmp_path / "recipe.yaml"), "--stage", "inheritance"],
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    lines = [line.strip() for line in finished.stdout.splitlines()]
    (row,) = (line.split() for line in lines if line.startswith("inheritance") and "finished," in line)
    assert row[1:9] == ["40", "1", "5", "8", "2", "×", "4", "finished,"]
    one, two = weights(whole, "inheritance"), weights(tmp_path / "out", "inheritance")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_one_stage_at_a_time(whole, content, tmp_path):
    recipe = changed(content, tmp_path)
    with pytest.raises(
        RecipeError, match="starts from the result of inheritance, which is not finished: run --stage inheritance"
    ):
        Curriculum(recipe).run("contrastive_tuning")
    with pytest.raises(RecipeError, match="no stage 'tuning', only inheritance, contrastive_tuning"):
        Curriculum(recipe).run("tuning")
    Curriculum(recipe).run("inheritance")
    assert not (tmp_path / "out" / "contrastive_tuning").exists()
    Curriculum(recipe).run("contrastive_tuning")
    assert_same_weights(whole, tmp_path / "out")


def test_a_changed_recipe_is_refused_by_the_key_that_changed(whole, content, tmp_path):
    output = {"output_dir": str(whole)}
    recipe = changed(content, tmp_path, **output, stages__inheritance__learning_rate=1e-3)
    with pytest.raises(
        RecipeError, match=r"finished with another recipe: stages.inheritance.learning_rate was 0.01 and is 0.001"
    ):
        Curriculum(recipe).run()
    recipe = changed(content, tmp_path, **output, data__train__source=content["data"]["texts"]["source"])
    with pytest.raises(
        RecipeError, match=r"preparation was finished with another recipe: data.train.source was '.*pairs"
    ):
        Curriculum(recipe).run()
    # What only says how often to log and save, and the end of the curriculum, may change.
    recipe = changed(content, tmp_path, **output, stages__inheritance__logging_steps=5)
    assert Curriculum(recipe).state_of("inheritance") == "finished"
    recipe = changed(content, tmp_path, **output, stages__contrastive_tuning__learning_rate=1e-3)
    assert Curriculum(recipe).state_of("inheritance") == "finished"
    with pytest.raises(RecipeError, match="contrastive_tuning.learning_rate"):
        Curriculum(recipe).state_of("contrastive_tuning")


def test_a_stage_that_was_begun_with_another_recipe_is_refused(content, tmp_path):
    curriculum = Curriculum(changed(content, tmp_path))
    die_in_stage(curriculum, "inheritance", 3, interrupt)
    with pytest.raises(Interrupted):
        curriculum.run()
    recipe = changed(content, tmp_path, stages__inheritance__num_train_epochs=3)
    with pytest.raises(
        RecipeError, match="inheritance was begun with another recipe: stages.inheritance.num_train_epochs"
    ):
        Curriculum(recipe).run()


def test_two_runs_in_one_folder_are_refused(whole, content, parts):
    curriculum = Curriculum(load_recipe(parts / "whole.yaml"))
    with FileLock(whole / ".lock"), pytest.raises(RecipeError, match="another run is writing to .*out"):
        curriculum.run()


def test_without_stage_1_stage_2_starts_from_the_fresh_adapter(content, tmp_path):
    content = copy.deepcopy(content)
    del content["stages"]["inheritance"], content["data"]["texts"]
    tuning = content["stages"]["contrastive_tuning"]
    del tuning["published_lambda"]
    tuning["method"] = "lit"
    Curriculum(changed(content, tmp_path)).run()
    out = tmp_path / "out"
    assert not (out / "text-stores" / "teacher").exists()
    pair, tuned = weights(out, "preparation"), weights(out, "contrastive_tuning")
    assert all(torch.equal(pair[name], tuned[name]) for name in pair if name.startswith("vision_model."))
    assert any(not torch.equal(pair[name], tuned[name]) for name in pair if name.startswith("text_adapter."))


def test_a_stream_is_resumed_to_the_same_bits(content, tmp_path):
    content = copy.deepcopy(content)
    del content["data"]["texts"]
    content["data"]["train"] |= {"streaming": True, "shuffle_buffer_size": 8}
    for key in ("inheritance", "contrastive_tuning"):  # 24 pictures, twice, by 8
        content["stages"][key]["num_train_epochs"] = 2
    with pytest.raises(RecipeError, match=r"data.num_pairs: a stream cannot be counted"):
        Curriculum(changed(content, tmp_path))
    content["data"]["num_pairs"] = 24
    (tmp_path / "whole").mkdir()
    Curriculum(changed(content, tmp_path / "whole")).run()
    recipe = changed(content, tmp_path)
    for stage in ("inheritance", "contrastive_tuning"):
        curriculum = Curriculum(recipe)
        assert curriculum.arguments[stage].max_steps == 6
        die_in_stage(curriculum, stage, 3, interrupt)
        with pytest.raises(Interrupted):
            curriculum.run()
    Curriculum(recipe).run()
    assert_same_weights(tmp_path / "whole" / "out", tmp_path / "out")


def test_what_cannot_be_a_stream_is_refused(content, tmp_path):
    streamed = {**content["data"]["train"], "streaming": True}
    stage_0 = {"global_batch_size": 8, "max_steps": 1}
    with pytest.raises(RecipeError, match="data.eval.streaming: caption_contrastive reads held-out rows by number"):
        Curriculum(changed(content, tmp_path, data__eval=streamed, stages__caption_contrastive=stage_0))
    with pytest.raises(RecipeError, match="stages.caption_contrastive: reads rows by number"):
        Curriculum(changed(content, tmp_path, data__train=streamed, stages__caption_contrastive=stage_0))


@pytest.mark.parametrize("stage", ["inheritance", "contrastive_tuning"])
def test_what_a_trainer_refuses_is_said_before_anything_runs(content, tmp_path, stage):
    recipe = changed(
        content,
        tmp_path,
        **{f"stages__{stage}__reduction": "median"},
        **({"stages__contrastive_tuning__published_lambda": None}),
    )
    with pytest.raises(RecipeError, match=f"stages.{stage}: reduction must be one of"):
        Curriculum(recipe)
    assert not (tmp_path / "out").exists()


def test_missing_parts_are_named(content, tmp_path):
    for key, name in (("model__vision", "nowhere/clip"), ("data__train__source", "nowhere/pairs.parquet")):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises((OSError, ValueError), match=name):
            Curriculum(changed(content, tmp_path, **{key: str(tmp_path / name)})).run()
        assert not (tmp_path / "out" / "preparation" / "complete.json").exists()


def test_settings_that_a_trainer_refuses_are_named_as_a_recipe_has_them(content, tmp_path):
    in_recipe = r"stages.contrastive_tuning: .*=1 on one process.*\(In a recipe, for per_device_train_batch_size: set global_batch_size"
    with pytest.raises(RecipeError, match=in_recipe):
        Curriculum(changed(content, tmp_path, stages__contrastive_tuning__global_batch_size=1))


def test_a_checkpoint_that_cannot_be_resumed_is_named_with_the_remedy(content, tmp_path):
    recipe = changed(content, tmp_path)
    curriculum = Curriculum(recipe)
    die_in_stage(curriculum, "inheritance", 3, interrupt)
    with pytest.raises(Interrupted):
        curriculum.run()
    stage = tmp_path / "out" / "inheritance"
    checkpoint = stage / "checkpoints" / "checkpoint-2"
    of_fsdp = checkpoint / "pytorch_model_fsdp_0"
    of_fsdp.mkdir()
    remedy = f"To run the stage anew, delete {stage}$"
    with pytest.raises(RecipeError, match=f"was written under FSDP, and this run is without .*{remedy}"):
        Curriculum(recipe).run()
    of_fsdp.rmdir()
    file = checkpoint / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(RecipeError, match=f"optimizer.pt was damaged after it was written: .*{remedy}"):
        Curriculum(recipe).run()
    shutil.rmtree(stage)
    Curriculum(recipe).run("inheritance")


def test_texts_embedded_on_the_fly_train_as_those_of_a_store_do(whole, content, tmp_path, monkeypatch):
    """As far as the texts go that the statistics come from, which is the beginning of the training texts."""
    monkeypatch.setattr("trainers.recipe.curriculum.ON_THE_FLY_TEXTS", 3)
    monkeypatch.setattr("trainers.recipe.steps.ON_THE_FLY_TEXTS", 3)
    config = {"adapter_num_layers": 1}
    stored = changed(content, tmp_path / "stored", model__config=config)
    embedded = changed(content, tmp_path / "embedded", model__config=config, text_stores={"llm": {"on_the_fly": True}})
    assert next(plan.texts for plan in plan_stores(Curriculum(embedded)) if plan.name == "llm") == 6
    for recipe in (stored, embedded):
        Curriculum(recipe).run()
    out = tmp_path / "embedded" / "out"
    assert len(TextEmbeddingStore(out / "text-stores" / "llm")) == 6  # 3 of stage 1, 3 of stage 2
    for stage in ("inheritance", "contrastive_tuning"):
        one, two = weights(tmp_path / "stored" / "out", stage), weights(out, stage)
        assert one.keys() == two.keys()  # neither holds the LLM
        # Adam makes large steps of small gradients' rounding, so the embeddings' last bits show.
        assert all(torch.allclose(one[name], two[name], atol=2e-2) for name in one), stage
        logs = [
            json.loads((folder / stage / "complete.json").read_text())["last_log"]
            for folder in (tmp_path / "stored" / "out", out)
        ]
        assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-3)
    with pytest.raises(RecipeError, match="text_stores.on_the_fly was True and is None"):
        Curriculum(changed(content, tmp_path / "embedded", model__config=config)).run()


def test_an_image_encoder_stored_in_half_precision_is_trained_in_float32(parts, content, tmp_path):
    """`precision` says what is computed in: the weights that are trained are float32, however the checkpoint stores them."""
    shutil.copytree(parts / "clip", tmp_path / "clip")
    CLIPModel.from_pretrained(tmp_path / "clip", dtype=torch.bfloat16).save_pretrained(tmp_path / "clip")
    assert CLIPModel.from_pretrained(tmp_path / "clip").dtype == torch.bfloat16
    recipe = changed(content, tmp_path, precision="bfloat16", model__vision=str(tmp_path / "clip"))
    curriculum = Curriculum(recipe)
    curriculum._prepare()
    pair = ProCLIPModel.from_pretrained(curriculum.output_dir / "preparation" / "model", load_text_model=False)
    assert {parameter.dtype for parameter in pair.parameters()} == {torch.float32}
