"""Training under DeepSpeed's ZeRO on two processes against one process: losses, weights, checkpoints, resuming, refusals."""

import functools
import os
import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from tests.trainers import tiny_llm
from tests.trainers.alignment import test_equivalence as equivalence
from tests.trainers.alignment.test_peft_training import adapted
from tests.trainers.deepspeed_on_cpu import choose_deepspeed
from tests.trainers.processes import run_processes
from tests.trainers.tiny_training import assert_same_bits, copy_state, inheritance_trainer, tuning_trainer
from trainers.base.zero import check_zero, zero_settings


STAGES_OF_ZERO = [1, 2]
# "stage-1" and "stage-2" take eight steps, with a checkpoint after the fifth, in the middle of an epoch.
RUNS = [
    ("stage-1", False),
    ("stage-2", False),
    ("stage-2", True),
    ("stage-2 uneven", True),
    ("sigmoid uneven as published", False),
    ("lit uneven", False),
]
RESUMED = [("stage-1", False), ("stage-2", True)]


def end_state(trainer) -> dict[str, torch.Tensor]:
    ema = getattr(trainer, "ema", None)
    of_teacher = {} if ema is None else {f"ema.{name}": value for name, value in ema.averaged.state_dict().items()}
    return copy_state(trainer.model) | of_teacher


def losses(trainer) -> list[dict[str, float]]:
    ours = {"samples_per_second", "data_wait"}
    return [
        {key: float(value) for key, value in log.items() if key not in ours}
        for log in trainer.state.log_history
        if "loss" in log
    ]


def run(trainer, **train) -> dict:
    trainer.train(**train)
    return {"logs": losses(trainer), "state": end_state(trainer)}


def run_case(case: str, caching: bool, folder: Path, world_size: int) -> dict:
    trainer = equivalence.make_trainer(case, caching, folder, world_size, max_grad_norm=0.5)
    return {**run(trainer), "eval": trainer.evaluate()}


def resume(case: str, caching: bool, folder: Path, world_size: int) -> dict[str, torch.Tensor]:
    trainer = equivalence.make_trainer(case, caching, folder, world_size, max_grad_norm=0.5)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    return end_state(trainer)


def stage_0(caching: bool, folder: Path, world_size: int, **settings) -> dict:
    """Three steps of the LLM's LoRA, and what the tuned LLM embeds."""
    if caching:  # with other numbers of micro-batches on each process
        settings |= {"gradient_caching_batch_size": 2, "micro_batch_tokens": 60}
    trainer = tiny_llm.trainer(
        folder,
        per_device_train_batch_size=6 // world_size,
        learning_rate=1e-3,
        lora_dropout=0.0,
        max_steps=3,
        **settings,
    )
    found = run(trainer)
    found["texts"] = trainer.embed_texts(["one", "a longer text"])
    trainer.save_model(str(folder / "adapter"))
    return found


def accumulated(folder: Path, world_size: int) -> dict:
    """Two batches a step, of stage 1 without the loss that compares rows."""
    settings = {"lambda_struct": 0.0, "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 1e-3}
    return run(inheritance_trainer(folder, per_device_train_batch_size=6 // world_size, **settings))


def half_precision(folder: Path, world_size: int) -> dict:
    return run(
        tuning_trainer(folder, per_device_train_batch_size=6 // world_size, max_steps=2, learning_rate=1e-3, bf16=True)
    )


def with_peft(folder: Path, world_size: int) -> dict:
    """PEFT adapters on the image encoder, beside a text adapter with a learning rate of its own; what is saved."""
    settings = {"max_steps": 2, "learning_rate": 1e-3, "adapter_learning_rate": 1e-2}
    trainer = tuning_trainer(folder, adapted(), per_device_train_batch_size=6 // world_size, **settings)
    found = run(trainer)
    trainer.save_model(str(folder / "adapter"))
    return found


def clamped(folder: Path, world_size: int) -> list[float]:
    """The logit scale after each step, from one that is above its bound."""
    trainer = tuning_trainer(folder, per_device_train_batch_size=6 // world_size, max_steps=3, method="llm2clip")
    with torch.no_grad():
        trainer.model.logit_scale.fill_(5.0)
    trainer.train()
    return [log["logit_scale"] for log in trainer.state.log_history if "loss" in log]


def not_finite(folder: Path) -> dict:
    """What is said of gradients that are not finite, and whether the weights are as before."""
    trainer = inheritance_trainer(folder, per_device_train_batch_size=3, max_steps=2)
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss, **kwargs: backward(loss * float("inf"), **kwargs)
    before = copy_state(trainer.model)
    try:
        trainer.train()
    except ValueError as error:
        return {"said": str(error), "before": before, "after": copy_state(trainer.model)}
    raise AssertionError("trained on")


def _rank(rank: int, world_size: int, folder: Path) -> None:
    choose_deepspeed()
    results: dict = {}
    for zero in STAGES_OF_ZERO:
        # As `accelerate launch` sets it for recipes/accelerate/deepspeed_zero1.yaml and 2.
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(zero)
        place = folder / str(zero)
        for caching in (False, True):
            results[zero, "stage-0", caching] = stage_0(caching, place / f"stage-0 {caching}", world_size)
        for case, caching in RUNS:
            results[zero, case, caching] = run_case(case, caching, place / f"{case} {caching}", world_size)
        for case, caching in RESUMED:
            results[zero, case, caching]["resumed"] = resume(case, caching, place / f"{case} {caching}", world_size)
        results[zero, "accumulated"] = accumulated(place / "accumulated", world_size)
        results[zero, "bf16"] = half_precision(place / "bf16", world_size)
        results[zero, "peft"] = with_peft(place / "peft", world_size)
        results[zero, "clamped"] = clamped(place / "clamped", world_size)
        results[zero, "not finite"] = not_finite(place / "not-finite")
    torch.save(results, folder / f"{rank}.pt")
    os._exit(0)  # a process that takes gloo's threads down one by one is aborted now and then


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp())


@functools.cache
def two_processes() -> list[dict]:
    """What each process has found."""
    run_processes(_rank, 2, folder(), preload=["deepspeed"], ACCELERATE_USE_DEEPSPEED="true")
    return [torch.load(folder() / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same_training(ranks: list[dict], one: dict, tolerance: float = 1e-5) -> None:
    for rank in ranks:
        assert_same_bits(rank["state"], ranks[0]["state"])
    assert len(ranks[0]["logs"]) == len(one["logs"]) > 0
    for log, expected in zip(ranks[0]["logs"], one["logs"], strict=True):
        assert log == pytest.approx(expected, rel=10 * tolerance, abs=tolerance)
    assert ranks[0]["state"].keys() == one["state"].keys()
    for name, value in one["state"].items():
        torch.testing.assert_close(ranks[0]["state"][name], value, rtol=tolerance, atol=tolerance, msg=name)


@functools.cache
def one_process(case: str) -> dict:
    with tempfile.TemporaryDirectory() as place:
        return run_case(case, False, Path(place), 1)


@pytest.mark.parametrize("zero", STAGES_OF_ZERO)
@pytest.mark.parametrize(("case", "caching"), RUNS)
def test_two_processes_train_as_one(zero, case, caching):
    ranks, one = [results[zero, case, caching] for results in two_processes()], one_process(case)
    assert_same_training(ranks, one)
    for name in (name for name in one["eval"] if name.endswith(("loss", "@1"))):
        assert ranks[0]["eval"][name] == pytest.approx(one["eval"][name], rel=1e-4), name


@pytest.mark.parametrize("zero", STAGES_OF_ZERO)
@pytest.mark.parametrize("caching", [False, True], ids=["plain", "cached"])
def test_stage_0(tmp_path, zero, caching):
    ranks, one = [results[zero, "stage-0", caching] for results in two_processes()], stage_0(False, tmp_path, 1)
    assert_same_training(ranks, one)
    torch.testing.assert_close(ranks[0]["texts"], one["texts"], rtol=1e-5, atol=1e-5)
    saved = load_file(folder() / str(zero) / f"stage-0 {caching}" / "adapter" / "adapter_model.safetensors")
    for name, value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero", STAGES_OF_ZERO)
def test_accumulated_gradients(tmp_path, zero):
    assert_same_training([results[zero, "accumulated"] for results in two_processes()], accumulated(tmp_path, 1))


@pytest.mark.parametrize("zero", STAGES_OF_ZERO)
def test_peft_adapters(tmp_path, zero):
    assert_same_training([results[zero, "peft"] for results in two_processes()], with_peft(tmp_path, 1))
    saved, expected = (
        load_file(place / "adapter" / "adapter_model.safetensors")
        for place in (folder() / str(zero) / "peft", tmp_path)
    )
    assert saved.keys() == expected.keys() and saved["base_model.model.logit_scale"].shape == ()
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("zero", STAGES_OF_ZERO)
def test_half_precision_is_computed_from_float32_weights(tmp_path, zero):
    """As in one process: what is rounded differs a little from two batches of three rows to one of six."""
    ranks, one = [results[zero, "bf16"] for results in two_processes()], half_precision(tmp_path, 1)
    assert {value.dtype for value in ranks[0]["state"].values() if value.is_floating_point()} == {torch.float32}
    assert_same_training(ranks, one, tolerance=1e-2)


@pytest.mark.parametrize("zero", STAGES_OF_ZERO)
@pytest.mark.parametrize(("case", "caching"), RESUMED)
def test_interrupted_and_resumed_is_uninterrupted(zero, case, caching):
    for results in two_processes():
        assert_same_bits(results[zero, case, caching]["resumed"], results[zero, case, caching]["state"])


@pytest.mark.parametrize("zero", STAGES_OF_ZERO)
def test_the_logit_scale_is_bounded(tmp_path, zero):
    expected = clamped(tmp_path, 1)
    assert expected[1] == pytest.approx(100)
    assert two_processes()[0][zero, "clamped"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("zero", STAGES_OF_ZERO)
def test_gradients_that_are_not_finite_change_no_weight(zero):
    for results in two_processes():
        found = results[zero, "not finite"]
        assert "step 1: the gradient is not finite" in found["said"]
        assert_same_bits(found["after"], found["before"])


class RunsCode:
    def __reduce__(self):
        return print, ("this ran",)


def accelerator(zero_stage: int = 2, **config) -> SimpleNamespace:
    plugin = SimpleNamespace(zero_stage=zero_stage, deepspeed_config={"gradient_clipping": "auto", **config})
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(deepspeed_plugin=plugin),
        mixed_precision="no",
    )


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    torch.save(RunsCode(), tmp_path / "state.pt")
    with zero_settings(accelerator(), []), pytest.raises(pickle.UnpicklingError):
        TorchCheckpointEngine().load(str(tmp_path / "state.pt"))
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("engine", "settings", "message"),
    [
        (accelerator(3), {}, "ZeRO 3 takes the weights apart .* use FSDP2"),
        (accelerator(0), {}, "zero_stage: 0 shares nothing out: use DDP"),
        (accelerator(), {"fp16": True}, "fp16=True is not supported under DeepSpeed"),
        (accelerator(optimizer={"type": "Adam"}), {}, "DeepSpeed's optimizer would replace the trainer's"),
        (accelerator(scheduler={"type": "WarmupLR"}), {}, "DeepSpeed's scheduler would replace the trainer's"),
    ],
)
def test_refused(engine, settings, message):
    arguments = SimpleNamespace(**{"fp16": False, "max_grad_norm": 1.0, **settings})
    check_zero(accelerator(), SimpleNamespace(fp16=False, max_grad_norm=1.0))
    with pytest.raises(ValueError, match=message):
        check_zero(engine, arguments)


def test_clipping_that_would_be_left_out_is_refused():
    engine = accelerator()
    del engine.state.deepspeed_plugin.deepspeed_config["gradient_clipping"]
    with pytest.raises(ValueError, match="max_grad_norm=1.0 would be ignored"):
        check_zero(engine, SimpleNamespace(fp16=False, max_grad_norm=1.0))
    check_zero(engine, SimpleNamespace(fp16=False, max_grad_norm=0.0))


def test_deepspeed_without_a_gpu_is_refused(monkeypatch):
    """accelerate's CPU mode would run DDP without a word; without that mode every process would take itself for the only one."""
    arguments = SimpleNamespace(fp16=False, max_grad_norm=1.0)
    ddp = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=2)
    check_zero(ddp, arguments)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for engine in (ddp, SimpleNamespace(**vars(accelerator()), num_processes=2)):
        with pytest.raises(ValueError, match="only where it finds a GPU"):
            check_zero(engine, arguments)
