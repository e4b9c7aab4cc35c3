"""Checkpoints: complete or not, unchanged or not, which are resumed from and which are deleted."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from tests.trainers.tiny_training import (
    assert_same_bits,
    inheritance_trainer,
    picture_rows,
    tiny_model,
    training_state,
    tuning_trainer,
)
from trainers.base import checkpoints
from trainers.base.checkpoints import (
    MANIFEST,
    CheckpointError,
    last_complete_checkpoint,
    last_written_checkpoint,
    list_checkpoints,
    verify,
)


# Twelve steps, a checkpoint after every third; dropout makes the result depend on the random state too.
SETTINGS = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a run that was not interrupted, and the state in which it ended."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = tuning_trainer(folder, tiny_model(dropout=0.3), **SETTINGS)
    trainer.train()
    return folder, training_state(trainer)


def resume(folder: Path, checkpoint: bool | str = True) -> dict[str, torch.Tensor]:
    trainer = tuning_trainer(folder, tiny_model(dropout=0.3), **SETTINGS)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 12
    return training_state(trainer)


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[: len(data) * 2 // 3])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        data[len(data) * 3 // 5] ^= 0x20
        file.write_bytes(data)


FILES = (
    "config.json ema_teacher.safetensors model.safetensors optimizer.pt rng_state.pth scheduler.pt trainer_state.json"
).split()


def test_a_checkpoint_holds_these_files_and_no_pickle_of_the_arguments(whole):
    assert sorted(file.name for file in (whole[0] / "checkpoint-6").iterdir()) == sorted([*FILES, MANIFEST])


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "bit"])
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_damaged_file_is_named(whole, tmp_path, name, how):
    shutil.copytree(whole[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    damage(tmp_path / "checkpoint-6" / name, how)
    if (name, how) == (MANIFEST, "missing"):
        return  # as before there were manifests: see below
    with pytest.raises(CheckpointError, match=f"checkpoint-6/{name} (is missing|was damaged after it was written)"):
        verify(tmp_path / "checkpoint-6")


def test_the_checkpoint_before_a_damaged_one_is_taken(whole, tmp_path, caplog):
    for step in (3, 6, 9):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damage(tmp_path / "checkpoint-9" / "optimizer.pt", "bit")
    (tmp_path / "checkpoint-6" / "rng_state.pth").unlink()
    assert_same_bits(resume(tmp_path), whole[1])
    assert "checkpoint-9/optimizer.pt was damaged after it was written: its SHA-256 is another one" in caplog.text
    assert "checkpoint-6/rng_state.pth is missing; looking for the checkpoint before it" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-99"):
        resume(tmp_path, str(tmp_path / "checkpoint-99"))


def test_a_named_checkpoint_that_is_damaged_is_refused(whole, tmp_path):
    for step in (3, 6):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damage(tmp_path / "checkpoint-6" / "scheduler.pt", "cut")
    with pytest.raises(CheckpointError, match=r"checkpoint-6/scheduler.pt was damaged .* bytes were written and"):
        resume(tmp_path, str(tmp_path / "checkpoint-6"))


def test_a_checkpoint_without_a_manifest_is_resumed_with_a_warning(whole, tmp_path, caplog):
    shutil.copytree(whole[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / MANIFEST).unlink()
    assert_same_bits(resume(tmp_path), whole[1])
    assert "checkpoint-6 was written without a manifest, so its files cannot be verified" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "ema_teacher.safetensors"])
def test_a_checkpoint_without_a_manifest_must_be_whole(whole, tmp_path, name):
    shutil.copytree(whole[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    for file in (MANIFEST, name):
        (tmp_path / "checkpoint-6" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name.split('.')[0]}.* is missing"):
        resume(tmp_path)


def test_weights_alone_are_not_resumed_from(tmp_path):
    tuning_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True).train()
    with pytest.raises(FileNotFoundError, match="scheduler.pt is missing.*save_only_model=True"):
        tuning_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_only_folders_named_by_a_step_are_checkpoints(tmp_path):
    for name in ("checkpoint-2.bak", "checkpoint-2 (copy)", "checkpoint-", "checkpoint-010", "checkpoint-², old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert list_checkpoints(tmp_path) == []
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    inheritance_trainer(tmp_path, **settings).train()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-4"]
    assert len(list(tmp_path.iterdir())) == 7, "what only looks like a checkpoint is not deleted"
    assert inheritance_trainer(tmp_path, **settings).train(resume_from_checkpoint=True).global_step == 4


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_is_kept(tmp_path, limit):
    (tmp_path / "checkpoint-1.bak").mkdir()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    settings |= {"metric_for_best_model": "loss", "load_best_model_at_end": True, "save_total_limit": limit}
    trainer = tuning_trainer(tmp_path, eval_dataset=picture_rows(6), learning_rate=1.0, **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4", "else this would not show that it is kept"
    kept = [best] if limit == 1 else [best, tmp_path / "checkpoint-4"]
    assert list_checkpoints(tmp_path) == kept and (tmp_path / "checkpoint-1.bak").is_dir()
    assert trainer.args.save_total_limit == limit


def test_the_newest_by_time_are_kept_where_an_earlier_run_left_later_steps(tmp_path):
    inheritance_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4).train()
    inheritance_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_one_that_was_not_written_to_its_end_is_passed_over(tmp_path, caplog):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = inheritance_trainer(tmp_path, **settings)
    complete, trainer_complete = checkpoints.complete, []

    def die_at_four(folder: Path) -> None:
        trainer_complete.append(folder.name)
        complete(folder) if folder.name == "checkpoint-2" else 1 / 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "complete", die_at_four)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    assert trainer_complete == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()
    assert last_written_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    damage(tmp_path / "checkpoint-2" / MANIFEST, "cut")
    assert last_written_checkpoint(tmp_path) == tmp_path / "checkpoint-2", "resuming says what is wrong with it"
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert last_written_checkpoint(tmp_path) is None
    assert "checkpoint-4 was not written to its end" in caplog.text


def test_a_finished_run_makes_no_further_step(tmp_path):
    # Four steps are one epoch and a third: Trainer would begin the second epoch again.
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    rows = picture_rows(18)
    first = tuning_trainer(tmp_path, tiny_model(dropout=0.3), rows, **settings)
    first.train()
    (tmp_path / "checkpoint-4" / "a note").write_text("by hand")
    second = tuning_trainer(tmp_path, tiny_model(dropout=0.3), rows, **settings)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    assert_same_bits(training_state(second), training_state(first))
    assert (tmp_path / "checkpoint-4" / "a note").exists(), "the checkpoint was not written again"
    record = second.model.config.training[-1]
    assert record["steps"] == 4 and record["final"]["loss"] == first.model.config.training[-1]["final"]["loss"]
    assert not any(log.get("train_loss") == 0 for log in second.state.log_history)
    # With more steps to go it goes on.
    longer = tuning_trainer(tmp_path, tiny_model(dropout=0.3), rows, **{**settings, "max_steps": 5})
    assert longer.train(resume_from_checkpoint=True).global_step == 5


def test_the_manifest_says_what_was_written(tmp_path):
    folder = tmp_path / "checkpoint-1"
    checkpoints.begin(folder)
    assert json.loads((folder / MANIFEST).read_text())["files"] is None
    (folder / "inner").mkdir()
    (folder / "inner" / "a.bin").write_bytes(b"abc")
    (folder / "b.bin").write_bytes(b"")
    checkpoints.complete(folder)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert list(files) == ["b.bin", "inner/a.bin"]
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files["inner/a.bin"] == {"size": 3, "sha256": expected}
    verify(folder)
    checkpoints.begin(folder)
    assert [file.name for file in folder.iterdir()] == [MANIFEST]
    with pytest.raises(CheckpointError, match="was not written to its end"):
        verify(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, None),
        ({"num_processes": 3, "batch_size": 4}, None),  # as many rows a step
        (
            {"num_processes": 3},
            r"written on 2 x 6 rows a step .* this run has 3 x 6: .* Change per_device_train_batch_size",
        ),
        ({"batch_size": 12}, "this run has 2 x 12"),
        ({"engine": "FSDP"}, "written without FSDP or DeepSpeed, and this run is under FSDP"),
    ],
)
def test_a_run_of_another_kind_is_refused(tmp_path, settings, message, caplog):
    """Else Transformers would count the rows that were read in batches of the present size."""
    state = TrainerState(train_batch_size=6, global_step=3)
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        (tmp_path / name).touch()
    run = {"num_processes": 2, "batch_size": 6, "engine": None, **settings}
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        checkpoints.check_resumable(tmp_path, **run)
    assert ("dropout, is drawn anew" in caplog.text) == (run["num_processes"] == 3 and message is None)


@pytest.mark.parametrize(
    ("settings", "left_out", "message"),
    [
        ({}, None, None),
        ({"engine": None}, None, "written under DeepSpeed, and this run is without FSDP or DeepSpeed"),
        (
            {"num_processes": 3, "batch_size": 4},
            None,
            "written on 2 processes, and DeepSpeed resumes on as many, not on 3",
        ),
        ({"batch_size": 12}, None, "this run has 2 x 12"),
        ({}, "scheduler.pt", "scheduler.pt is missing"),
    ],
)
def test_a_run_of_another_kind_than_deepspeeds_is_refused(tmp_path, settings, left_out, message):
    TrainerState(train_batch_size=6, global_step=3).save_to_json(str(tmp_path / "trainer_state.json"))
    (tmp_path / "global_step3").mkdir()
    parts = [f"global_step3/zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(2)]
    for name in {"scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", *parts} - {left_out}:
        (tmp_path / name).touch()
    run = {"num_processes": 2, "batch_size": 6, "engine": "DeepSpeed", **settings}
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        checkpoints.check_resumable(tmp_path, **run)
