"""What both trainers share, on real runs: killed and resumed to the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trainers
from tests.trainers.tiny_training import (
    KILLED_IN,
    assert_same_bits,
    inheritance_trainer,
    killed_trainer,
    training_state,
)
from trainers.base.checkpoints import last_complete_checkpoint


REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("job", list(KILLED_IN))
def test_killed_and_resumed_is_as_never_killed(tmp_path, job):
    killed = subprocess.run(
        [sys.executable, "-m", "tests.trainers.tiny_training", job, str(tmp_path / "killed")],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr
    left = {folder.name for folder in (tmp_path / "killed").iterdir()}
    assert left == {"checkpoint-3", "checkpoint-6"} | ({"checkpoint-9"} if KILLED_IN[job] == "checkpoint" else set())
    if KILLED_IN[job] == "checkpoint":
        assert (tmp_path / "killed" / "checkpoint-9" / "model.safetensors").exists()

    whole = killed_trainer(job, tmp_path / "whole")
    whole.train()
    resumed = killed_trainer(job, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 12
    resumed_steps = [log["step"] for log in resumed.state.log_history if "loss" in log]
    assert resumed_steps == list(range(1, 13)), "resumed at step 6, with the log of the steps before"
    assert_same_bits(training_state(resumed), training_state(whole))
    for name in ("model.safetensors", "ema_teacher.safetensors")[: 2 if job.startswith("stage-2") else 1]:
        files = [load_file(tmp_path / run / "checkpoint-12" / name) for run in ("killed", "whole")]
        assert_same_bits(*files)


def test_an_older_run_in_the_same_folder_does_not_complete_a_checkpoint(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    inheritance_trainer(tmp_path, **settings).train()
    trainer = inheritance_trainer(tmp_path, **settings)
    trainer._save_rng_state = lambda folder: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_last_complete_checkpoint(tmp_path, caplog):
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        last_complete_checkpoint(tmp_path)
    for step, state in ((9, "{}"), (10, '{"epoch": 1.0}'), (100, '{"epoch": 2'), (200, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-100 was not written to its end" in caplog.text


def test_importing_the_package_stays_light():
    code = "import sys, trainers, trainers.cli; assert 'torch' not in sys.modules; print(sorted(trainers.__all__))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == json.dumps(sorted(trainers.__all__)).replace('"', "'"), done.stderr
    assert all(hasattr(trainers, name) and name in dir(trainers) for name in trainers.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'CaptionTrainer'"):
        trainers.CaptionTrainer  # noqa: B018
