"""Both stages on streams: what they read, killed and resumed to the same bits, on one process and on two."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import CLIPImageProcessorPil, TrainerCallback

from tests.trainers.alignment.test_trainer import assert_same_bits, training_state
from tests.trainers.processes import run_processes
from tests.trainers.tiny_pairs import captions, write_webdataset
from tests.trainers.tiny_training import DIM, LLM_DIM, TinyStore, inheritance_trainer, tiny_model, tuning_trainer
from trainers.base.streams import check_evaluated_streams
from trainers.data import PairSource, open_pairs


ROWS = 40
TEXTS = [text for number in range(ROWS) for text in captions(number)]
STORES = {"text_store": TinyStore(LLM_DIM, 1, TEXTS), "teacher_store": TinyStore(DIM, 2, TEXTS)}


def make_source(folder: Path) -> PairSource:
    """40 pictures in 5 shards; that of row 9 is broken."""
    if not folder.exists():
        write_webdataset(folder, [8] * 5, {9: b"broken"})
    return PairSource(
        source=str(folder), image_column="png", text_columns="json.captions", streaming=True, shuffle_buffer_size=6
    )


def make_trainer(stage: str, folder: Path, source: PairSource, **settings):
    settings = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 5,
        "learning_rate": 1e-3,
        **settings,
    }
    model, rows = tiny_model(dropout=0.3), open_pairs(source, seed=7, images=stage == "stage-2")
    if stage == "stage-1":
        trainer = inheritance_trainer(folder, model, rows, **STORES, **settings)
    else:
        processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        trainer = tuning_trainer(
            folder, model, rows, text_store=STORES["text_store"], processing_class=processor, **settings
        )
    trainer.add_callback(KeepBatches(trainer))
    return trainer


class KeepBatches(TrainerCallback):
    """What the loader gave, by its embeddings of texts."""

    def __init__(self, trainer):
        self.batches, collate = [], trainer.data_collator
        trainer.kept = self.batches

        def keep(rows):
            self.batches.append([row["text"] for row in rows])
            return collate(rows)

        trainer.data_collator = keep


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("stage-1", {}),
        ("stage-1", {"gradient_accumulation_steps": 2, "lambda_struct": 0.0}),
        ("stage-2", {}),
        ("stage-2", {"gradient_caching_batch_size": 2}),
    ],
    ids=["stage-1", "stage-1 accumulated", "stage-2", "stage-2 cached"],
)
def test_resumed_on_a_stream_is_as_never_stopped(tmp_path, stage, settings):
    source = make_source(tmp_path / "shards")
    whole = make_trainer(stage, tmp_path / "whole", source, **settings)
    whole.train()
    resumed = make_trainer(stage, tmp_path / "whole", source, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    per_step = settings.get("gradient_accumulation_steps", 1)
    assert resumed.kept == whole.kept[5 * per_step :], "no batch is read twice"
    assert_same_bits(training_state(resumed), training_state(whole))
    assert resumed.state.epoch == whole.state.epoch == 1 and resumed.state.global_step == 12
    epochs = [[log["epoch"] for log in trainer.state.log_history if "loss" in log] for trainer in (whole, resumed)]
    assert epochs[0] == epochs[1]


def test_an_epoch_of_a_stream_has_every_row(tmp_path, caplog):
    trainer = make_trainer("stage-2", tmp_path / "out", make_source(tmp_path / "shards"), max_steps=20)
    trainer.train()
    shown = [text.split()[-1] for batch in trainer.kept for text in batch]
    good = sorted(str(number) for number in range(ROWS) if number != 9)
    assert sorted(shown[:39]) == sorted(shown[39:78]) == good
    assert "process 0 passed over 2 broken images and 0 rows without a caption among 82 rows" in caplog.text
    assert trainer.model.config.training[-1]["num_rows"] is None


def test_data_workers_feed_the_trainer(tmp_path):
    source = make_source(tmp_path / "shards")
    settings = {"dataloader_num_workers": 2, "max_steps": 6, "save_steps": 3}
    whole = make_trainer("stage-2", tmp_path / "whole", source, **settings)
    whole.train()
    resumed = make_trainer("stage-2", tmp_path / "whole", source, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_bits(training_state(resumed), training_state(whole))


def test_what_does_not_go_with_a_stream_is_refused(tmp_path, monkeypatch):
    source = make_source(tmp_path / "shards")
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer("stage-2", tmp_path / "out", source, max_steps=-1)

    class Other(IterableDataset):
        def __iter__(self):
            yield {"text": "a"}

    with pytest.raises(ValueError, match="is a stream .*PairSource"):
        inheritance_trainer(tmp_path / "out", rows=Other())
    with pytest.raises(ValueError, match="eval_dataset is a stream, and one is read from a PairSource"):
        inheritance_trainer(tmp_path / "out", eval_dataset={"a": Other()})
    with pytest.raises(ValueError, match="eval_dataset is a stream, and this stage evaluates on rows by number"):
        check_evaluated_streams(open_pairs(source), are_read=False)
    trainer = make_trainer("stage-2", tmp_path / "out", source, max_steps=5)
    trainer.train()
    (tmp_path / "out" / "checkpoint-5" / "stream_0.json").unlink()
    with pytest.raises(FileNotFoundError, match="stream_0.json is missing"):
        make_trainer("stage-2", tmp_path / "out", source).train(str(tmp_path / "out" / "checkpoint-5"))
    monkeypatch.setitem(STORES, "text_store", TinyStore(LLM_DIM, 1, ["another text"]))
    with pytest.raises(KeyError, match="caption"):
        make_trainer("stage-2", tmp_path / "out", source)


def evaluation_of(stage: str, folder: Path, source: PairSource, **settings) -> dict[str, float]:
    """The metrics of an evaluation on `source`, of which a stage evaluates on all rows."""
    trainer = make_trainer(stage, folder, make_source(folder / "shards"), eval_dataset=source, **settings)
    metrics = trainer.evaluate()
    return {
        name: value
        for name, value in metrics.items()
        if not name.endswith(("runtime", "_per_second", "preparation_time"))
    }


@pytest.mark.parametrize("stage, workers", [("stage-1", 0), ("stage-1", 2), ("stage-2", 0), ("stage-2", 2)])
def test_an_evaluation_on_a_stream_is_that_on_rows_by_number(tmp_path, stage, workers):
    write_webdataset(tmp_path / "held-out", [8, 8, 7])  # 23 rows: the last batch is smaller
    source = replace(make_source(tmp_path / "shards"), source=str(tmp_path / "held-out"))
    settings = {"per_device_eval_batch_size": 5, "dataloader_num_workers": workers}
    images = stage == "stage-2"
    by_number = open_pairs(replace(source, streaming=False), images=images)
    expected = evaluation_of(stage, tmp_path, by_number, **settings)
    assert evaluation_of(stage, tmp_path, open_pairs(source, images=images), **settings) == pytest.approx(
        expected, rel=1e-6
    )
    assert expected["eval_loss"] > 0 and ("eval_i2t_r@1" in expected) == images


def test_an_evaluation_on_a_stream_leaves_the_training_as_it_is(tmp_path):
    """On several streams, in one of which a whole batch is broken."""
    source = make_source(tmp_path / "shards")
    write_webdataset(tmp_path / "held-out", [8], dict.fromkeys((2, 3), b"broken"))
    broken = replace(source, source=str(tmp_path / "held-out"), max_broken_fraction=0.5)
    settings = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 2}
    plain = make_trainer("stage-2", tmp_path / "plain", source)
    plain.train()
    both = {"a": open_pairs(source), "b": open_pairs(broken)}
    evaluated = make_trainer("stage-2", tmp_path / "evaluated", source, eval_dataset=both, **settings)
    evaluated.train()
    assert_same_bits(training_state(evaluated), training_state(plain))
    for name in ("eval_a_loss", "eval_b_loss"):
        losses = [log[name] for log in evaluated.state.log_history if name in log]
        assert len(losses) == 3 and all(0 < loss < math.inf for loss in losses)


def test_an_evaluation_without_a_good_row_is_refused(tmp_path):
    write_webdataset(tmp_path / "held-out", [3], dict.fromkeys(range(3), b"broken"))
    source = replace(make_source(tmp_path / "shards"), source=str(tmp_path / "held-out"), max_broken_fraction=1.0)
    with pytest.raises(ValueError, match="held-out holds no good row to evaluate on"):
        evaluation_of("stage-2", tmp_path, open_pairs(source))


def test_resuming_with_another_number_of_data_workers_is_refused(tmp_path):
    source = make_source(tmp_path / "shards")
    make_trainer("stage-1", tmp_path / "out", source, max_steps=5).train()
    other = make_trainer("stage-1", tmp_path / "out", source, dataloader_num_workers=2)
    with pytest.raises(ValueError, match="num_workers = 0, but now num_workers = 2: which rows are still to be read"):
        other.train(resume_from_checkpoint=True)


def _rank(rank: int, world_size: int, folder: Path) -> None:
    source = make_source(folder / "shards")
    whole = make_trainer("stage-2", folder / "whole", source)
    whole.train()
    resumed = make_trainer("stage-2", folder / "whole", source)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-5"))
    assert resumed.kept == whole.kept[5:]
    assert_same_bits(training_state(resumed), training_state(whole))
    with pytest.raises(ValueError, match="num_processes = 1, but now num_processes = 2: which rows"):
        make_trainer("stage-2", folder / "one", source).train(resume_from_checkpoint=str(folder / "one/checkpoint-5"))
    metrics = {
        stage: evaluation_of(stage, folder, held_out(folder, stage), per_device_eval_batch_size=3)
        for stage in ("stage-1", "stage-2")
    }
    (folder / f"evaluated-{rank}.json").write_text(json.dumps(metrics))
    (folder / f"{rank}.json").write_text(json.dumps(whole.kept))
    torch.save(training_state(whole), folder / f"{rank}.pt")
    os._exit(0)  # as in test_distributed.py


def held_out(folder: Path, stage: str):
    """A stream of 16 rows, of which 3, 4 and 5 have broken images: on two processes, one has a whole batch of these."""
    if not (folder / "held-out").exists():
        write_webdataset(folder / "held-out", [7, 9], dict.fromkeys((3, 4, 5), b"broken"))
    source = replace(make_source(folder / "shards"), source=str(folder / "held-out"), max_broken_fraction=0.5)
    return open_pairs(source, images=stage == "stage-2")


def test_two_processes_share_a_stream(tmp_path):
    make_source(tmp_path / "shards")
    alone = {
        stage: evaluation_of(stage, tmp_path, held_out(tmp_path, stage), per_device_eval_batch_size=6)
        for stage in ("stage-1", "stage-2")
    }
    make_trainer("stage-2", tmp_path / "one", make_source(tmp_path / "shards"), max_steps=5).train()
    run_processes(_rank, 2, tmp_path)
    shown = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    numbers = [[text.split()[-1] for batch in batches for text in batch] for batches in shown]
    assert [len(batches) for batches in shown] == [12, 12]
    first = [set(of_rank[:18]) for of_rank in numbers]  # 40 rows, one of them broken: at least 19 in each one's epoch
    assert len(first[0]) == len(first[1]) == 18 and not first[0] & first[1]
    assert_same_bits(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)))
    for rank in (0, 1):
        evaluated = json.loads((tmp_path / f"evaluated-{rank}.json").read_text())
        for stage, expected in alone.items():
            assert evaluated[stage] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="num_processes = 2, but now num_processes = 1: which rows"):
        trainer = make_trainer("stage-2", tmp_path / "whole", make_source(tmp_path / "shards"))
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
