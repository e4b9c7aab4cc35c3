"""What both trainers share, on real runs: killed and resumed to the same bits, and two processes that train as one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import TrainerCallback

import trainers
from tests.trainers.tiny_training import (
    copy_state,
    inheritance_trainer,
    killed_trainer,
    picture_rows,
    text_rows,
    tiny_model,
    tuning_trainer,
)
from trainers.alignment import last_complete_checkpoint


REPOSITORY = Path(__file__).parents[2]


def training_state(trainer) -> dict[str, torch.Tensor]:
    """All tensors that training has moved: model, optimizer and EMA teacher."""
    state = copy_state(trainer.model)
    for i, moments in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
    if getattr(trainer, "ema", None) is not None:
        state |= {f"ema.{name}": value for name, value in trainer.ema.averaged.state_dict().items()}
    return state


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("job", ["stage-1", "stage-2"])
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
    # Stage 2 was killed in the middle of writing the third checkpoint, with its weights in place.
    assert left == {"checkpoint-3", "checkpoint-6"} | ({"checkpoint-9"} if job == "stage-2" else set())
    if job == "stage-2":
        assert (tmp_path / "killed" / "checkpoint-9" / "model.safetensors").exists()

    whole = killed_trainer(job, tmp_path / "whole")
    whole.train()
    resumed = killed_trainer(job, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 12
    resumed_steps = [log["step"] for log in resumed.state.log_history if "loss" in log]
    assert resumed_steps == list(range(1, 13)), "resumed at step 6, with the log of the steps before"
    assert_same_bits(training_state(resumed), training_state(whole))
    for name in ("model.safetensors", "ema_teacher.safetensors")[: 2 if job == "stage-2" else 1]:
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


class KeepGradients(TrainerCallback):
    """The gradients of the first step."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            named = model.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


# Eight steps in two epochs, with a checkpoint in the middle of the second, to resume from; the variants take two steps.
LONG = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 5}
SHORT = {"max_steps": 2}
AS_PUBLISHED = {"reduction": "sum", "structure_distance": "smooth_l1"}
CASES = {
    "stage-1": (inheritance_trainer, {"lambda_struct": 1.0, **LONG}),
    "stage-1 as published": (inheritance_trainer, {**AS_PUBLISHED, **SHORT}),
    "stage-2": (tuning_trainer, {"lambda_struct": 1.0, "ema_decay": 0.5, **LONG}),
    "stage-2 as published": (tuning_trainer, {**AS_PUBLISHED, "lambda_ins": 0.1, **SHORT}),
    "lit": (tuning_trainer, {"method": "lit", **SHORT}),
}


def make_trainer(case: str, folder: Path, world_size: int):
    """Six pairs a batch, over all processes."""
    make, settings = CASES[case]
    settings = {"max_grad_norm": 0.0, "learning_rate": 1e-3, **settings}
    settings |= {"per_device_train_batch_size": 6 // world_size, "per_device_eval_batch_size": 6 // world_size}
    rows = text_rows() if make is inheritance_trainer else picture_rows()
    return make(folder, tiny_model(), rows, eval_dataset=rows, **settings)


def run_case(case: str, folder: Path, world_size: int) -> dict:
    """Gradients of the first step, logs, evaluation, end state."""
    trainer, keep = make_trainer(case, folder, world_size), KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    return {
        "gradients": keep.gradients,
        "logs": [{k: float(v) for k, v in log.items()} for log in trainer.state.log_history if "loss" in log],
        "eval": trainer.evaluate(),
        "state": training_state(trainer),
    }


def _rank(rank: int, world_size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for case in CASES:
        result = run_case(case, folder / case, world_size)
        if (folder / case / "checkpoint-5").exists():
            trainer = make_trainer(case, folder / case, world_size)
            trainer.train(resume_from_checkpoint=str(folder / case / "checkpoint-5"))
            result["resumed"] = training_state(trainer)
        torch.save(result, folder / f"{case} {rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(2, port, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_train_as_one(tmp_path, two_processes, case):
    one = run_case(case, tmp_path, 1)
    ranks = [torch.load(two_processes / f"{case} {rank}.pt", weights_only=True) for rank in range(2)]
    assert_same_bits(ranks[0]["state"], ranks[1]["state"])
    for two in ranks:
        assert one["gradients"].keys() == two["gradients"].keys() and one["gradients"]
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(two["gradients"][name], gradient, atol=1e-5, rtol=1e-5, msg=name)
    # Rank 0 logs for all: the loss, and each part of it.
    assert len(ranks[0]["logs"]) == len(one["logs"]) == (8 if "num_train_epochs" in CASES[case][1] else 2)
    for two_log, one_log in zip(ranks[0]["logs"], one["logs"], strict=True):
        assert two_log == pytest.approx(one_log, rel=1e-3)
    assert ranks[0]["logs"][0] == pytest.approx(one["logs"][0], rel=1e-5)
    for name in (name for name in one["eval"] if name.endswith("loss")):
        assert ranks[0]["eval"][name] == pytest.approx(one["eval"][name], rel=1e-3)


@pytest.mark.parametrize("case", ["stage-1", "stage-2"])
def test_two_processes_resume_in_the_middle_of_an_epoch(two_processes, case):
    for rank in range(2):
        result = torch.load(two_processes / f"{case} {rank}.pt", weights_only=True)
        assert_same_bits(result["resumed"], result["state"])


def test_importing_the_package_stays_light():
    code = "import sys, trainers, trainers.cli; assert 'torch' not in sys.modules; print(sorted(trainers.__all__))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == json.dumps(sorted(trainers.__all__)).replace('"', "'"), done.stderr
    assert all(hasattr(trainers, name) and name in dir(trainers) for name in trainers.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'CaptionTrainer'"):
        trainers.CaptionTrainer  # noqa: B018
