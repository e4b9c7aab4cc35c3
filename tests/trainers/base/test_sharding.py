"""Training under FSDP2 on two and three processes against one process: losses, gradients, checkpoints, resuming."""

import functools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import load_peft_weights
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import AutoModel

from modeling_proclip import ProCLIPModel
from tests.trainers import tiny_llm
from tests.trainers.alignment import test_equivalence as equivalence
from tests.trainers.fsdp_on_cpu import choose_fsdp
from tests.trainers.processes import run_processes
from tests.trainers.tiny_training import assert_same_bits, picture_rows, training_state, tuning_trainer
from trainers.base.sharding import check_engine, separate_scalars
from trainers.contrastive_tuning.ema_teacher import EMATeacher


PIXELS = picture_rows(1)[0]["pixel_values"][None]
TEXTS = ["one", "a longer text", "and one more"]


# On each number of processes, with and without gradient caching. Three processes also resume what two wrote.
RUNS = {
    2: [
        ("stage-1", False),
        ("stage-1", True),
        ("stage-2", False),
        ("stage-2", True),
        ("stage-2 nested uneven", True),
        ("sigmoid uneven as published", False),
        ("lit uneven", True),
    ],
    3: [("stage-1", False), ("stage-2", True)],
}
RESUMED = RUNS[3]


def resume(case: str, caching: bool, folder: Path, world_size: int) -> dict[str, torch.Tensor]:
    trainer = equivalence.make_trainer(case, caching, folder, world_size)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    return training_state(trainer)


def half_precision_loss(folder: Path, rows: int) -> float:
    """The first loss of stage 2, computed in bfloat16."""
    trainer = tuning_trainer(folder, rows=picture_rows(), per_device_train_batch_size=rows, max_steps=1, bf16=True)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def save_and_merge(folder: Path) -> dict:
    """A model of stage 2 and an LLM of stage 0 as they are saved, and what they embed; the refusal of weights that are not finite."""
    trainer = tuning_trainer(
        folder, rows=picture_rows(), eval_dataset=picture_rows(6), eval_on_start=True, max_steps=2
    )
    with pytest.raises(ValueError, match="cannot be evaluated before: call train.. first"):
        trainer.evaluate()
    trainer.train()
    trainer.save_model(str(folder / "model"))
    trainer.save_state(folder)
    with torch.no_grad():
        image_embeds = trainer.model(pixel_values=PIXELS).image_embeds
        teacher_embeds = trainer.ema.embed(pixel_values=PIXELS)
    half = half_precision_loss(folder / "bf16", 6 // trainer.args.world_size)
    tuned = tiny_llm.trainer(folder / "stage-0", max_steps=2, per_device_train_batch_size=6)
    tuned.train()
    process = tuned.args.process_index
    text_embeds = tuned.embed_texts(TEXTS[process:])  # another number on each process
    metrics = tuned.evaluate(tiny_llm.ROWS[:1])  # and here one has none
    tuned.save_model(str(folder / "adapter"))
    merged = tuned.merge()
    if process == 0:
        merged.save_pretrained(folder / "llm")
    trainer.model.reshard()
    if process == 1:
        trainer.model.text_adapter.projection.weight.to_local().data.fill_(float("nan"))
    with pytest.raises(
        ValueError, match="broken was not written: text_adapter.projection.weight holds NaN or infinity"
    ):
        trainer.save_model(str(folder / "broken"))
    return {
        "image_embeds": image_embeds,
        "teacher_embeds": teacher_embeds,
        "text_embeds": text_embeds,
        "eval_loss": metrics["eval_loss"],
        "half_precision_loss": half,
    }


def _rank(rank: int, world_size: int, folder: Path) -> None:
    choose_fsdp()
    results: dict = {}
    for caching in (False, True):
        results["stage-0", caching] = equivalence.run_stage_0(caching, folder / "stage-0", world_size)
    for case, caching in RUNS[world_size]:
        of_case = folder / f"{case} {caching}"
        results[case, caching] = equivalence.run_case(case, caching, of_case / str(world_size), world_size)
        if (case, caching) in RESUMED:
            results[case, caching]["resumed"] = resume(case, caching, of_case / "2", world_size)
    if world_size == 2:
        results["saved"] = save_and_merge(folder / "saved")
    torch.save(results, folder / f"{world_size} {rank}.pt")


@functools.cache
def several_processes(world_size: int, folder: Path) -> list[dict]:
    """What every process has found."""
    # As `accelerate launch` sets them for recipes/accelerate/fsdp2.yaml.
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    run_processes(_rank, world_size, folder, **variables)
    return [torch.load(folder / f"{world_size} {rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture
def found(folder):
    """What every process of two, and of three, has found."""
    return {world_size: several_processes(world_size, folder) for world_size in RUNS}


@pytest.mark.parametrize(
    ("world_size", "case", "caching"), [(world_size, *run) for world_size, runs in RUNS.items() for run in runs]
)
def test_sharded_training_is_that_of_one_process(found, world_size, case, caching):
    ranks = [results[case, caching] for results in found[world_size]]
    for rank in ranks:
        assert_same_bits(rank["state"], ranks[0]["state"])
        assert rank["eval"].keys() == ranks[0]["eval"].keys()
    equivalence.assert_same_training(ranks[0], equivalence.one_process(case), equivalence.num_steps(case))


@pytest.mark.parametrize("world_size", list(RUNS))
@pytest.mark.parametrize("caching", [False, True], ids=["plain", "cached"])
def test_stage_0(tmp_path, found, world_size, caching):
    one = equivalence.run_stage_0(False, tmp_path, 1)
    expected = torch.cat([gradient.flatten() for gradient in one["gradients"].values()])
    for results in found[world_size]:
        actual = results["stage-0", caching]
        gradients = torch.cat([actual["gradients"][name].flatten() for name in one["gradients"]])
        assert (gradients - expected).norm() < 1e-5 * expected.norm()
    assert found[world_size][0]["stage-0", caching]["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize(("case", "caching"), RESUMED)
def test_resumed_in_the_middle_of_an_epoch(found, case, caching):
    """On as many processes: the same bits. On three, from what two wrote: the same rows, so the same weights but for rounding."""
    uninterrupted = found[2][0][case, caching]["state"]
    assert_same_bits(found[2][0][case, caching]["resumed"], uninterrupted)
    for name, value in found[3][0][case, caching]["resumed"].items():
        torch.testing.assert_close(value, uninterrupted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_what_is_saved_is_whole(folder, found):
    """A model, its EMA teacher and a tuned LLM, saved by two processes, give one process the embeddings that they gave the two."""
    first, second = (results["saved"] for results in found[2])
    saved = folder / "saved"
    model = ProCLIPModel.from_pretrained(saved / "model", load_text_model=False).eval()
    assert model.config.architectures == ["ProCLIPModel"] and model.logit_scale.shape == ()
    teacher = EMATeacher(model, 0.5)
    teacher.load(saved)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=PIXELS).image_embeds, first["image_embeds"])
    torch.testing.assert_close(teacher.embed(pixel_values=PIXELS), first["teacher_embeds"])
    merged = tiny_llm.trainer(
        saved / "one", model=AutoModel.from_pretrained(saved / "llm")
    )  # with a LoRA that does nothing yet
    torch.testing.assert_close(merged.embed_texts(TEXTS), first["text_embeds"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second["text_embeds"], first["text_embeds"][1:], rtol=1e-4, atol=1e-5)
    adapter = load_peft_weights(str(saved / "adapter"))
    assert adapter and all(torch.is_tensor(tensor) and tensor.ndim == 2 for tensor in adapter.values())
    assert not (saved / "broken").exists()


def test_half_precision_is_that_of_one_process(tmp_path, found):
    loss, in_float32 = half_precision_loss(tmp_path, 6), equivalence.one_process("stage-2")["logs"][0]["loss"]
    assert abs(loss - in_float32) > 1e-3 * loss
    assert found[2][0]["saved"]["half_precision_loss"] == pytest.approx(loss, rel=1e-4)


SETTINGS = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": StateDictType.SHARDED_STATE_DICT}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({}, None),
        ({"fsdp_version": 1}, "set fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading .* set it to false"),
        ({"state_dict_type": StateDictType.FULL_STATE_DICT}, "fsdp_state_dict_type .* set it to SHARDED_STATE_DICT"),
    ],
)
def test_settings_that_are_refused(setting, message):
    plugin = SimpleNamespace(**{**SETTINGS, **setting})
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_engine(accelerator)


def test_scalars_have_groups_of_their_own():
    model = nn.Module()
    model.scale, model.weight = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(2))
    model.bias = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.AdamW(
        [{"params": [model.scale, model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 1.0}]
    )
    separate_scalars(optimizer, model)
    assert [(group["lr"], group["params"]) for group in optimizer.param_groups] == [
        (0.5, [model.weight]),
        (0.5, [model.scale]),
        (1.0, [model.bias]),
    ]
