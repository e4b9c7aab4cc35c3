"""The same batch on one, two and three processes, with and without gradient caching: the same losses and gradients."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.trainers import tiny_llm
from tests.trainers.processes import run_processes
from tests.trainers.tiny_training import (
    assert_same_bits,
    inheritance_trainer,
    picture_rows,
    text_rows,
    tiny_model,
    training_state,
    tuning_trainer,
)
from trainers.base.sharding import full_tensor


# Eight steps in two epochs, with a checkpoint in the middle of the second, to resume from; the others take two steps.
LONG = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 5}
SHORT = {"max_steps": 2}
AS_PUBLISHED = {"reduction": "sum", "structure_distance": "smooth_l1"}
# The first step has four rows then: 3 and 1 of two processes, 2, 2 and none of three.
UNEVEN = {"num_rows": 4, "dataloader_drop_last": False, "max_steps": 1}
CASES = {
    "stage-1": (inheritance_trainer, {"lambda_struct": 1.0, **LONG}),
    "stage-1 uneven as published": (inheritance_trainer, {**AS_PUBLISHED, **UNEVEN}),
    "stage-2": (
        tuning_trainer,
        {"lambda_struct": 1.0, "ema_decay": 0.5, "num_rows": 22, "dataloader_drop_last": False, **LONG},
    ),
    "stage-2 as published": (tuning_trainer, {**AS_PUBLISHED, "lambda_ins": 0.1, **SHORT}),
    "stage-2 uneven": (tuning_trainer, {**UNEVEN, "moved_teacher": True}),
    "sigmoid": (tuning_trainer, {"loss": "sigmoid", "logit_bias_init_value": -3.0, **SHORT}),
    "sigmoid uneven as published": (
        tuning_trainer,
        {"loss": "sigmoid", "logit_bias_init_value": -3.0, "moved_teacher": True, **AS_PUBLISHED, **UNEVEN},
    ),
    "stage-1 nested": (inheritance_trainer, {"matryoshka_dims": [5, 2], **SHORT}),
    "stage-2 nested uneven": (tuning_trainer, {"matryoshka_dims": [5, 2], "moved_teacher": True, **UNEVEN}),
    "lit uneven": (tuning_trainer, {"method": "lit", **UNEVEN}),
}
# Rows of a micro-batch: 4 and 2 of six rows, 2 and 1 of three, 1 and 1 of two.
MICRO_BATCH = {1: 4, 2: 2, 3: 1}
CACHING = [False, True]


class KeepGradients(TrainerCallback):
    """The gradients of the first step."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            named = model.named_parameters()
            self.gradients = {name: full_tensor(p.grad).clone() for name, p in named if p.grad is not None}


def make_trainer(case: str, caching: bool, folder: Path, world_size: int, **changes):
    """Six pairs a batch, over all processes."""
    make, settings = CASES[case]
    settings = {"max_grad_norm": 0.0, "learning_rate": 1e-3, **settings, **changes}
    settings |= {"per_device_train_batch_size": 6 // world_size, "per_device_eval_batch_size": 6 // world_size}
    if caching:
        settings["gradient_caching_batch_size"] = MICRO_BATCH[world_size]
    rows = (text_rows if make is inheritance_trainer else picture_rows)(settings.pop("num_rows", 24))
    moved_teacher = settings.pop("moved_teacher", False)
    bias = {name: settings.pop(name) for name in ["logit_bias_init_value"] if name in settings}
    trainer = make(folder, tiny_model(**bias), rows, eval_dataset=rows, **settings)
    if moved_teacher:  # as it starts, the teacher is the student, and the distillation's gradient is 0
        trainer.ema.averaged.load_state_dict(
            {
                k: v + 0.05 * v.std(correction=0) if v.is_floating_point() else v
                for k, v in trainer.ema.averaged.state_dict().items()
            }
        )
    return trainer


def run_case(case: str, caching: bool, folder: Path, world_size: int) -> dict:
    """Gradients of the first step, logs, evaluation, end state."""
    trainer, keep = make_trainer(case, caching, folder, world_size), KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    logs = [{k: float(v) for k, v in log.items()} for log in trainer.state.log_history if "loss" in log]
    for log in logs:
        assert log.pop("samples_per_second") > 0 and 0 <= log.pop("data_wait") <= 1
    return {"gradients": keep.gradients, "logs": logs, "eval": trainer.evaluate(), "state": training_state(trainer)}


def run_stage_0(caching: bool, folder: Path, world_size: int) -> dict:
    """Loss and gradients of the LLM's first step, of twelve pairs with a hard negative each over all processes."""
    hard = [
        {**row, "negative": [other["text"][0]]} for row, other in zip(tiny_llm.ROWS, tiny_llm.ROWS[1:], strict=False)
    ]
    settings = {"gradient_caching_batch_size": 2 if world_size > 1 else 5} if caching else {}
    trainer = tiny_llm.trainer(
        folder,
        rows=hard,
        per_device_train_batch_size=12 // world_size,
        lora_dropout=0.0,
        max_steps=1,
        max_grad_norm=0.0,
        **settings,
    )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zero at first, and so would be the gradients of A
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    return {"gradients": keep.gradients, "loss": trainer.state.log_history[0]["loss"]}


def _rank(rank: int, world_size: int, folder: Path) -> None:
    for caching in CACHING:
        torch.save(run_stage_0(caching, folder / "stage-0", world_size), folder / f"stage-0 {caching} {rank}.pt")
    for case in CASES:
        for caching in CACHING:
            of_case = folder / f"{case} {caching}"
            result = run_case(case, caching, of_case, world_size)
            if world_size == 2 and (of_case / "checkpoint-5").exists():
                trainer = make_trainer(case, caching, of_case, world_size)
                trainer.train(resume_from_checkpoint=str(of_case / "checkpoint-5"))
                result["resumed"] = training_state(trainer)
            torch.save(result, folder / f"{case} {caching} {rank}.pt")


@functools.cache
def several_processes(world_size: int) -> list[dict[tuple[str, bool], dict]]:
    """What every process has found of every case."""
    with tempfile.TemporaryDirectory() as folder:
        run_processes(_rank, world_size, Path(folder))
        return [
            {
                (case, caching): torch.load(Path(folder, f"{case} {caching} {rank}.pt"), weights_only=True)
                for case in ["stage-0", *CASES]
                for caching in CACHING
            }
            for rank in range(world_size)
        ]


@functools.cache
def one_process(case: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return run_case(case, False, Path(folder), 1)


def assert_same_training(actual: dict, one: dict, steps: int) -> None:
    assert one["gradients"].keys() == actual["gradients"].keys() and one["gradients"]
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(actual["gradients"][name], gradient, atol=1e-5, rtol=1e-5, msg=name)
    assert len(actual["logs"]) == len(one["logs"]) == steps
    assert actual["logs"][0] == pytest.approx(one["logs"][0], rel=1e-5)
    for log, expected in zip(actual["logs"], one["logs"], strict=True):
        assert log == pytest.approx(expected, rel=1e-3)
    for name in (name for name in one["eval"] if "runtime" not in name and "per_second" not in name):
        if not name.endswith("time"):
            assert actual["eval"][name] == pytest.approx(one["eval"][name], rel=1e-3), name


def num_steps(case: str) -> int:
    return CASES[case][1].get("max_steps", 8)


@pytest.mark.parametrize("case", list(CASES))
def test_caching_on_one_process(tmp_path, case):
    assert_same_training(run_case(case, True, tmp_path, 1), one_process(case), num_steps(case))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("caching", CACHING, ids=["plain", "cached"])
@pytest.mark.parametrize("case", list(CASES))
def test_several_processes_train_as_one(world_size, case, caching):
    ranks = [results[case, caching] for results in several_processes(world_size)]
    for rank in ranks:
        assert_same_bits(rank["state"], ranks[0]["state"])
        assert rank["eval"].keys() == ranks[0]["eval"].keys()
    # Rank 0 logs for all: the loss, and each part of it.
    assert_same_training(ranks[0], one_process(case), num_steps(case))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("caching", CACHING, ids=["plain", "cached"])
def test_stage_0(tmp_path, world_size, caching):
    one = run_stage_0(False, tmp_path / "one", 1)
    if world_size == 1:
        results = [run_stage_0(caching, tmp_path, 1)]
    else:
        results = [results["stage-0", caching] for results in several_processes(world_size)]
    # As one vector: with cosines scaled by 50, float32's rounding of single small gradients is larger than that.
    expected = torch.cat([gradient.flatten() for gradient in one["gradients"].values()])
    for actual in results:
        gradients = torch.cat([actual["gradients"][name].flatten() for name in one["gradients"]])
        assert (gradients - expected).norm() < 1e-5 * expected.norm()
    assert results[0]["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize("caching", CACHING, ids=["plain", "cached"])
@pytest.mark.parametrize("case", ["stage-1", "stage-2"])
def test_two_processes_resume_in_the_middle_of_an_epoch(case, caching):
    for results in several_processes(2):
        assert_same_bits(results[case, caching]["resumed"], results[case, caching]["state"])
