"""All three stages on two processes, by every file of `recipes/accelerate/`, started as a user starts them, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_proclip import ProCLIPModel
from tests.trainers.tiny_recipe import settings, write_parts, write_recipe
from trainers.base.checkpoints import verify
from trainers.compute.precision import unit_length
from trainers.recipe.curriculum import Curriculum
from trainers.recipe.schema import load_recipe


ROOT = Path(__file__).parents[3]
STAGES = ["caption_contrastive", "inheritance", "contrastive_tuning"]
# File of recipes/accelerate -> what is started (accelerate itself takes neither FSDP nor DeepSpeed on CPUs), and what the second process writes in a checkpoint.
LAUNCHES = {
    "ddp": ("trainers.cli", "rng_state_1.pth"),
    "fsdp2": ("tests.trainers.fsdp_on_cpu", "optimizer_0/__1_0.distcp"),
    "deepspeed_zero1": ("tests.trainers.deepspeed_on_cpu", "global_step4/zero_pp_rank_1_*_optim_states.pt"),
    "deepspeed_zero2": ("tests.trainers.deepspeed_on_cpu", "global_step4/zero_pp_rank_1_*_optim_states.pt"),
}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """Nothing is random but what the seed decides for every number of processes: no dropout."""
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    config = json.loads((folder / "clip" / "config.json").read_text())
    config["vision_config"]["attention_dropout"] = 0.0
    (folder / "clip" / "config.json").write_text(json.dumps(config))
    content = settings(folder)
    stage_0 = {"global_batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "lora_r": 4, "lora_dropout": 0.0}
    stage_0 |= {"max_steps": 3, "save_steps": 2, "logging_steps": 1, "disable_tqdm": True}
    content["stages"]["inheritance"]["max_steps"] = 3
    content["stages"]["contrastive_tuning"]["max_steps"] = 4
    content["stages"] = {"caption_contrastive": stage_0, **content["stages"]}
    return content


@pytest.fixture(scope="module")
def one_process(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    Curriculum(load_recipe(write_recipe(folder / "recipe.yaml", {**content, "output_dir": str(folder / "out")}))).run()
    return folder / "out"


def last_losses(output_dir: Path) -> dict[str, float]:
    return {
        stage: json.loads((output_dir / stage / "complete.json").read_text())["last_log"]["loss"] for stage in STAGES
    }


def embeddings(output_dir: Path) -> torch.Tensor:
    """Of images and token sequences, by the result, loaded in this process."""
    model = ProCLIPModel.from_pretrained(output_dir / "contrastive_tuning" / "model").eval()
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        images = model.get_image_features(pixel_values=pixels).pooler_output
        texts = model.get_text_features(input_ids=tokens, attention_mask=torch.ones_like(tokens)).pooler_output
    return torch.cat([unit_length(images), unit_length(texts)])


def test_every_file_is_launched():
    assert LAUNCHES.keys() == {file.stem for file in (ROOT / "recipes" / "accelerate").glob("*.yaml")}


@pytest.mark.parametrize("name", LAUNCHES)
def test_two_processes_train_as_one(content, one_process, tmp_path, name):
    module, of_second = LAUNCHES[name]
    recipe = write_recipe(tmp_path / "recipe.yaml", {**content, "output_dir": str(tmp_path / "out")})
    config = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    launch = f"-m accelerate.commands.launch --config_file {config} --num_processes 2".split()
    finished = subprocess.run(
        [sys.executable, *launch, "-m", module, "train", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert last_losses(tmp_path / "out") == pytest.approx(last_losses(one_process), abs=1e-4)
    torch.testing.assert_close(embeddings(tmp_path / "out"), embeddings(one_process), rtol=0, atol=1e-5)
    checkpoint = tmp_path / "out" / "contrastive_tuning" / "checkpoints" / "checkpoint-4"
    verify(checkpoint)  # whose manifest is written last, when all processes have written theirs
    (file,) = checkpoint.glob(of_second)
    assert file.relative_to(checkpoint).as_posix() in json.loads((checkpoint / "manifest.json").read_text())["files"]
