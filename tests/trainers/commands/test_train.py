import copy
import json
import shutil

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from tests.trainers.tiny_recipe import settings, write_parts, write_recipe
from trainers.cli import app
from trainers.data import TextEmbeddingStore
from trainers.recipe.curriculum import Curriculum
from trainers.recipe.plan import plan_stages, plan_stores
from trainers.recipe.schema import load_recipe


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["train", *map(str, arguments)])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


@pytest.fixture
def recipe(parts, tmp_path):
    """A recipe file with an output directory of its own, whose devices take at most 4 rows at once."""
    content = copy.deepcopy(settings(parts))
    content["output_dir"] = str(tmp_path / "out")
    content["stages"]["contrastive_tuning"]["device_batch_size"] = 4
    return write_recipe(tmp_path / "recipe.yaml", content)


def test_a_dry_run_prints_the_plan_and_writes_nothing(recipe, tmp_path):
    result = run(recipe, "--dry-run")
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.strip()}
    assert rows["inheritance"] == ["40", "1", "5", "8", "1", "×", "8", "to", "do"]
    assert rows["contrastive_tuning"] == ["24", "2", "6", "8", "1", "×", "4*", "to", "do"]
    assert "gradient caching" in result.output
    assert not (tmp_path / "out").exists()


def test_the_process_group_is_destroyed(recipe, tmp_path):
    """Else torch warns at the end of each process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    assert run(recipe, "--dry-run").exit_code == 0
    assert not dist.is_initialized()


def test_the_planned_store_is_the_size_of_the_built_one(recipe):
    llm, teacher = plan_stores(Curriculum(load_recipe(recipe)))
    assert (llm.texts, llm.dim, llm.dtype, llm.stored) == (40 + 2 * 24, 32, "float32", 0)
    assert (teacher.texts, teacher.dim) == (40, 16)
    curriculum = Curriculum(load_recipe(recipe))
    curriculum.run("inheritance")
    store = TextEmbeddingStore(curriculum.store_path("llm"))
    llm, teacher = plan_stores(curriculum)
    assert (llm.stored, teacher.stored) == (llm.texts, teacher.texts) == (88, 40)
    assert llm.num_bytes < store.num_bytes < llm.num_bytes + 4096  # and a header in every file


def test_the_command_runs_resumes_and_says_what_came_out(recipe, tmp_path):
    result = run(recipe, "--stage", "inheritance", "stages.inheritance.max_steps=2")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "inheritance" / "model" / "model.safetensors").is_file()
    result = run(recipe, "stages.inheritance.max_steps=3")
    assert result.exit_code == 1
    assert "stages.inheritance.max_steps was 2 and is 3" in result.output
    result = run(recipe, "stages.inheritance.max_steps=2", "stages.contrastive_tuning.max_steps=1")
    assert result.exit_code == 0, result.output
    states = [plan.state for plan in plan_stages(_curriculum(recipe))]
    assert states == ["finished", "finished"]
    assert result.output.strip().endswith(f"the model is in {tmp_path / 'out' / 'contrastive_tuning' / 'model'}")


def _curriculum(recipe) -> Curriculum:
    changes = ["stages.inheritance.max_steps=2", "stages.contrastive_tuning.max_steps=1"]
    return Curriculum(load_recipe(recipe, changes))


def test_refusals_are_one_line(recipe, tmp_path):
    result = run(recipe, "model.visoin=clip")
    assert result.exit_code == 1
    assert result.output.strip() == f"error: {recipe}: model.visoin: unknown key; did you mean 'vision'?"
    assert run(tmp_path / "nowhere.yaml").output.strip() == f"error: there is no recipe {tmp_path / 'nowhere.yaml'}"
    result = run(recipe, "--stage", "stage-2")
    assert result.exit_code == 1 and "no stage 'stage-2'" in result.output


def test_gradient_caching_trains_as_the_whole_batch_does(parts, recipe, tmp_path):
    # Dropout draws other numbers for other micro-batches.
    clip = shutil.copytree(parts / "clip", tmp_path / "clip")
    values = json.loads((clip / "config.json").read_text())
    values["vision_config"]["attention_dropout"] = 0.0
    (clip / "config.json").write_text(json.dumps(values))
    losses = []
    for size in (8, 4):
        change = [f"stages.contrastive_tuning.device_batch_size={size}", "stages.contrastive_tuning.max_steps=1"]
        Curriculum(load_recipe(recipe, [f"model.vision={clip}", *change])).run()
        folder = tmp_path / "out" / "contrastive_tuning"
        losses.append(json.loads((folder / "complete.json").read_text())["last_log"]["loss"])
        folder.rename(tmp_path / f"tuned-{size}")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
