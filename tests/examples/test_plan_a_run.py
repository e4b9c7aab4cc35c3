"""The tables of docs/how_to/plan_a_run.md are what the script prints, and what it computes is right by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from modeling_proclip import ProCLIPConfig, ProCLIPModel
from tests.environments import REPOSITORY
from trainers import ContrastiveTuningConfig
from trainers.recipe.memory import memory_of
from trainers.text_store.build import bytes_of_text


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("plan_a_run", REPOSITORY / "examples" / "plan_a_run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def test_the_page_has_what_the_script_prints(script):
    page = Path(REPOSITORY / "docs" / "how_to" / "plan_a_run.md").read_text(encoding="utf-8")
    assert page.endswith("\n## The tables\n\n" + script.report(script.read_constants([])) + "\n")


def test_every_constant_is_an_option(script):
    for name in script.CONSTANTS:
        assert getattr(script.read_constants([f"--{name}", "7"]), name.replace("-", "_")) == 7


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_constant_that_makes_no_sense_is_refused(script, capsys, value):
    with pytest.raises(SystemExit):
        script.read_constants([f"--batch={value}"])
    assert f"argument --batch: must be more than 0 and finite, got {value}" in capsys.readouterr().err


@pytest.fixture
def plan(script):
    """Round numbers: 1 PFLOP/s of which half is reached, an image of 1 TFLOP, and a network of 1 GB/s."""
    options = {"matmul-tflops": 1000, "train-share": 0.5, "cached-share": 0.25, "text-share": 0.5}
    options |= {
        "float32-tflops": 1e9,
        "nvlink-gbs": 1,
        "internode-gbs": 0.1,
        "epochs": 2,
        "batch": 1000,
        "micro-batch": 100,
    }
    constants = script.read_constants([part for name, value in options.items() for part in (f"--{name}", str(value))])
    return script.Plan(constants, script.Model(1e12, 1_000_000, 0, 10**9, 1e6))


def test_steps_by_hand(plan):
    # 100 images a device, three passes and the teacher's; 125 or more are cached, with one pass more.
    assert plan.compute_seconds(100, 1) == pytest.approx(100 * 4 * 1e12 / 0.5e15, rel=1e-3)
    assert plan.compute_seconds(1000, 8) == pytest.approx(125 * 5 * 1e12 / 0.25e15, rel=1e-3)
    # A ring sends what it reduces twice, of all but a device's own part.
    assert plan.reduced_bytes(8) == 2 * 7 / 8 * 4e6 and plan.reduced_bytes(1) == 0
    assert plan.gathered_bytes(1000, 8) == 10 * 7 / 8 * 1000 * 768 * 4
    sent = plan.gathered_bytes(1000, 8) + plan.reduced_bytes(8)
    assert plan.network_seconds(1000, 8) == pytest.approx(sent / 1e9)
    assert plan.network_seconds(1000, 64) > 10 * sent / 1e9


def test_hours_by_hand(plan, script):
    step = plan.compute_seconds(1000, 8) + plan.network_seconds(1000, 8)
    assert plan.stage_2_hours(3e6, 8) == pytest.approx(2 * 3000 * step / 3600)
    assert plan.row_bytes() == bytes_of_text(4096, "float16") + bytes_of_text(768, "float16")
    # Of Llama-3-8B's 6.98 billion weights in its layers, two operations for each and a token; attention adds little.
    assert script.text_flops(77) == pytest.approx(2 * 6.98e9 * 77, rel=0.01)
    hours = 1e6 * (script.text_flops(77) + script.TEACHER_FLOPS) / (0.5e15 * 8) / 3600
    assert plan.embedding_hours(1e6, 8) == pytest.approx(hours)


def test_memory_is_that_of_the_dry_run(script, tmp_path):
    plan = script.Plan(script.read_constants([]), script.describe_model())
    text = {"model_type": "llama", "hidden_size": script.LLM_SIZE, "num_hidden_layers": 1, "vocab_size": 8}
    config = ProCLIPConfig(vision_config=script.VISION, text_config=text, projection_dim=script.DIM, dtype="float32")
    with torch.device("meta"):
        model = ProCLIPModel(config, load_text_model=False)
    args = ContrastiveTuningConfig(tmp_path, per_device_train_batch_size=256, use_cpu=True, bf16=True)
    assert plan.memory(256, 1) == pytest.approx(memory_of(model, args, torch.bfloat16).peak, rel=0.01)
    # Cached, a batch eight times as large takes its embeddings and the gradients besides.
    assert plan.memory(2048, 1) - plan.memory(256, 1) < 4 * plan.model.trained + 1e9
