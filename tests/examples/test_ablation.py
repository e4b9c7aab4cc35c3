"""What the ablation runs, and that it goes on where it was stopped; the numbers themselves are in docs/ablation_results.json."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from trainers.openmoji.task import SIZES
from trainers.quickstart.run import TUNING


ROOT = Path(__file__).parents[2]
FULL = SIZES["full"]


@pytest.fixture(scope="module")
def ablation():
    spec = importlib.util.spec_from_file_location("ablation", ROOT / "examples" / "ablation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_5_adds_one_loss_in_every_row(ablation):
    runs = {run.name: run for run in ablation.table_5(FULL)}
    l_ins, l_struct, l_info, proclip = (runs[name] for name in ("l_ins", "l_struct", "l_info", "proclip"))
    assert l_ins.settings == {**l_struct.settings, "lambda_struct": 0.0} and l_ins.steps == l_struct.steps
    assert l_info.start == proclip.start == "l_struct" and l_info.steps == proclip.steps
    assert l_info.settings["method"] == "llm2clip"  # L_info alone
    weights = {"method": "proclip", "lambda_ins": pytest.approx(0.2048), "lambda_struct": pytest.approx(52.3264)}
    assert proclip.settings == {**TUNING, **weights}


def test_table_7_scales_both_weights(ablation):
    for run, factor in zip(ablation.table_7(FULL), (0.5, 1.5, 2.5), strict=True):
        assert run.settings["lambda_ins"] == pytest.approx(factor * 0.2048)
        assert run.settings["lambda_struct"] == pytest.approx(factor * 52.3264)


def test_the_sweep_sees_as_many_pairs_with_every_batch(ablation):
    runs = ablation.batch_sweep(FULL)
    assert len(runs) == 5 * 3 - 2  # with the usual batch, two of the three are in Table 5
    for run in runs:
        batch = run.settings["per_device_train_batch_size"]
        assert abs(run.steps * batch - FULL.tuning_steps * TUNING["per_device_train_batch_size"]) <= batch / 2
        assert ("lambda_ins" in run.settings) == run.name.endswith("mean")
        assert (run.settings.get("reduction") == "sum") == run.name.endswith("sum")
    assert ablation.batches(SIZES["small"]) == [64, 128]  # 160 pictures


class FakeSeed:
    """Counts the runs, and dies in one of them."""

    done: list = []
    dies_in = None

    def __init__(self, folder, size, seed):
        self.seed = seed

    def execute(self, run, keep):
        if run.name == self.dies_in:
            raise KeyboardInterrupt
        self.done.append((self.seed, run.name, keep))
        return {"run": asdict(run), "zero_shot_unseen": 0.5 + self.seed / 10}

    def gradient_shares(self):
        self.done.append((self.seed, "gradients", False))
        return {"gradient_share": {}}


def test_a_stopped_command_goes_on_with_the_run_it_was_at(ablation, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "Seed", FakeSeed)
    monkeypatch.setattr(FakeSeed, "done", [])
    plan = [(seed, run) for seed in (0, 1) for run in ablation.table_5(FULL)] + [(0, None)]
    console = Console(file=open("/dev/null", "w"))
    monkeypatch.setattr(FakeSeed, "dies_in", "proclip")
    with pytest.raises(KeyboardInterrupt):
        ablation.train(console, tmp_path, FULL, plan)
    (tmp_path / "rows" / "seed-0-proclip.json.partial").write_text("{")  # as kill -9 may leave it
    monkeypatch.setattr(FakeSeed, "dies_in", None)
    ablation.train(console, tmp_path, FULL, plan)
    ablation.train(console, tmp_path, FULL, plan)
    names = [run.name for run in ablation.table_5(FULL)]
    assert [done[:2] for done in FakeSeed.done] == [(seed, name) for seed in (0, 1) for name in names] + [
        (0, "gradients")
    ]
    # What others start from, and what the gradients are measured at, is kept.
    assert {name for _, name, keep in FakeSeed.done if keep} == {"l_struct", "l_info"}


def test_a_row_of_other_settings_is_run_again(ablation, tmp_path):
    run = ablation.table_5(FULL)[1]
    ablation.write_json(tmp_path / "row.json", {"run": asdict(run)})
    assert ablation.read_row(tmp_path / "row.json", asdict(run)) is not None
    assert ablation.read_row(tmp_path / "row.json", {**asdict(run), "steps": run.steps + 1}) is None
    assert ablation.read_row(tmp_path / "other.json", None) is None


def test_mean_and_spread(ablation):
    row = dict.fromkeys(ablation.COLUMNS, 0.2)
    rows = {(0, "a"): row, (1, "a"): {**row, "drift": 0.4}, (0, "b"): row}
    first, second = ablation.summarise(rows, ["a", "b", "c"], ["A", "B", "C"])
    assert first["seeds"] == [0, 1] and first["title"] == "A"
    assert first["drift"] == {"mean": pytest.approx(0.3), "std": pytest.approx(0.02**0.5)}  # of the sample
    assert second["drift"] == {"mean": 0.2, "std": None}


def test_the_committed_results_are_of_this_plan(ablation):
    results = json.loads((ROOT / "docs" / "ablation_results.json").read_text())
    runs = {
        run.name: run for table in (ablation.table_5, ablation.table_7, ablation.batch_sweep) for run in table(FULL)
    }
    assert results["runs"]
    for row in results["runs"]:
        assert row["run"] == json.loads(json.dumps(asdict(runs[row["run"]["name"]])))
    for table in ("table_5", "table_7"):
        assert all(len(entry["seeds"]) >= 3 for entry in results[table])
