"""No stage goes on after a loss or a gradient that is NaN or infinite, and none saves such weights."""

import os

import pytest
import torch
from safetensors.torch import load_file

from tests.modeling_proclip import tiny
from tests.trainers import tiny_llm
from tests.trainers.base.test_distributed import run_on_ranks
from tests.trainers.tiny_training import (
    CAPTIONS,
    LLM_DIM,
    TEXT_STORE,
    TinyStore,
    copy_state,
    inheritance_trainer,
    picture_rows,
    tiny_model,
    tuning_trainer,
)
from trainers import MaskedNextTokenConfig, MaskedNextTokenTrainer
from trainers.alignment.collators import ContrastiveTuningCollator
from trainers.base.checkpoints import list_checkpoints
from trainers.base.finite import WithTexts, all_finite


SAVED = {"save_strategy": "steps", "save_steps": 1}


def rows_with(value: float, row: int = 5) -> list[dict]:
    rows = picture_rows()
    rows[row]["pixel_values"][0, 0, 0] = value
    return rows


def broken_store() -> TinyStore:
    store = TinyStore(LLM_DIM, 1)
    store.embeds[15:18] = float("inf")  # all captions of row 5
    return store


def overflowing_model():
    model = tiny_model()
    model.logit_scale.data.fill_(1000.0)
    return model


def masked_trainer(folder, **settings):
    args = MaskedNextTokenConfig(str(folder), **{**tiny_llm.SETTINGS, **settings})
    rows = [{"text": text} for row in tiny_llm.ROWS for text in row["text"]]
    return MaskedNextTokenTrainer(tiny_llm.causal_llm(), args, rows, processing_class=tiny.tokenizer())


ROW_5 = r"in row [0-5] \('(caption 5|a longer caption of 5|5 in a few words)'\) of process 0's batch"
CASES = {
    "a pixel": (
        lambda f: tuning_trainer(f, rows=rows_with(float("nan")), **SAVED),
        f"loss is nan; pixel_values .*{ROW_5}",
    ),
    "a pixel, cached": (
        lambda f: tuning_trainer(f, rows=rows_with(float("inf")), gradient_caching_batch_size=2, **SAVED),
        f"loss is nan; pixel_values holds NaN or infinity {ROW_5}",
    ),
    "a stored embedding": (
        lambda f: inheritance_trainer(f, text_store=broken_store(), **SAVED),
        f"loss is nan; llm_embeds holds NaN or infinity {ROW_5}",
    ),
    "stage 2's learning rate": (
        lambda f: tuning_trainer(f, learning_rate=1e6, num_train_epochs=2, **SAVED),
        r"step 2: the loss is nan; the batch of process 0 is row 0 \('.*the gradient is not finite in logit_scale, .*Lower learning_rate",
    ),
    "stage 2's, cached": (
        lambda f: tuning_trainer(f, learning_rate=1e6, gradient_caching_batch_size=2, **SAVED),
        "step 2: the loss is nan; .* and [0-9]+ other parameters",
    ),
    "the logit scale": (lambda f: tuning_trainer(f, overflowing_model(), **SAVED), "step 1: the loss is nan"),
    "stage 1's learning rate": (
        lambda f: inheritance_trainer(f, learning_rate=1e30, **SAVED),
        "step 2: the loss is nan.*the gradient is not finite in text_adapter.blocks.0",
    ),
    "stage 0's learning rate": (
        lambda f: tiny_llm.trainer(f, learning_rate=1e30, **SAVED),
        r"step 2: the loss is nan.*row 0 \('.*the gradient is not finite in base_model.model.layers.0.*lora_A",
    ),
    "stage 0's, cached": (
        lambda f: tiny_llm.trainer(f, learning_rate=1e30, gradient_caching_batch_size=4, **SAVED),
        "step 2: the loss is nan",
    ),
    "masked tokens": (lambda f: masked_trainer(f, learning_rate=1e30, **SAVED), "step 2: the loss is nan.*lora_A"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_training_stops_and_says_where(tmp_path, case):
    make, message = CASES[case]
    trainer = make(tmp_path)
    with pytest.raises(ValueError, match=message) as stopped:
        trainer.train()
    assert "\n" not in str(stopped.value) and "step" in str(stopped.value)
    assert all(
        bool(torch.isfinite(log["loss"] if isinstance(log["loss"], torch.Tensor) else torch.tensor(log["loss"])))
        for log in trainer.state.log_history
        if "loss" in log
    )
    for checkpoint in list_checkpoints(tmp_path):
        for file in checkpoint.glob("*.safetensors"):
            assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())


def test_the_weights_are_those_before_the_step(tmp_path):
    model = tiny_model()
    before = copy_state(model)
    rows = rows_with(float("nan"), row=0)[:6]
    with pytest.raises(ValueError, match="step 1: "):
        tuning_trainer(tmp_path, model, rows).train()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_that_overflow_in_the_last_step_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="^after step 1: text_adapter.* holds NaN or infinity"):
        inheritance_trainer(tmp_path / "a", max_steps=1, learning_rate=1e39).train()
    trainer = inheritance_trainer(tmp_path / "b", max_steps=1, learning_rate=1e39, **SAVED)
    with pytest.raises(ValueError, match="checkpoint-1 was not written: text_adapter"):
        trainer.train()
    with pytest.raises(ValueError, match="model was not written: text_adapter"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists() and not list((tmp_path / "b").glob("*"))


def test_evaluation_names_the_row(tmp_path):
    rows = rows_with(float("nan"), row=2)[:6]
    trainer = tuning_trainer(tmp_path, eval_dataset=rows, eval_strategy="steps", eval_steps=2, max_steps=4)
    with pytest.raises(
        ValueError, match=r"evaluation after step 2: the loss is nan; pixel_values .* in row 2 \('caption 2'\)"
    ):
        trainer.train()
    rows = [{"text": text} for text in CAPTIONS[:6]]
    with pytest.raises(ValueError, match=r"llm_embeds holds NaN or infinity in row 5 \('caption 5'\)"):
        inheritance_trainer(tmp_path, text_store=broken_store(), eval_dataset=rows).evaluate()


def test_stage_0s_evaluation_names_the_row(tmp_path):
    trainer = tiny_llm.trainer(tmp_path)
    embed = trainer.embed_texts

    def overflowing(texts):
        embeds = embed(texts)
        embeds[texts.index(tiny_llm.ROWS[3]["text"][1])] = float("inf")
        return embeds

    trainer.embed_texts = overflowing
    with pytest.raises(
        ValueError,
        match="evaluation after step 0: the loss is nan; embeddings .* in row 3 .'a red fox.. of process 0's batch. Look at these rows.$",
    ):
        trainer.evaluate(tiny_llm.ROWS[:6])


def test_a_row_without_a_caption_is_named_before_its_text_is_kept():
    collate = WithTexts(ContrastiveTuningCollator(TEXT_STORE), "text")
    with pytest.raises(ValueError, match='row 0 of the batch has no column "text"'):
        collate([{"pixel_values": torch.zeros(3, 8, 8)}])


def on_rank(rank: int, world_size: int) -> dict:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    messages = []
    for settings in ({}, {"gradient_caching_batch_size": 2}):
        trainer = tuning_trainer("unused", rows=rows_with(float("nan")), per_device_train_batch_size=3, **settings)
        with pytest.raises(ValueError) as error:
            trainer.train()
        messages.append(str(error.value))
    return {"messages": messages}


def test_all_processes_stop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranks = [rank["messages"] for rank in run_on_ranks(on_rank, 2, tmp_path)]
    for messages in zip(*ranks, strict=True):
        assert messages[0] == messages[1], "in the same step, for the same reason"
        assert "pixel_values holds NaN or infinity" in messages[0], "one of them had the row"


def scaled_trainer(folder, scale: float, **settings):
    """Gradients that are scaled as float16's are, with float32 on the CPU."""
    trainer = tuning_trainer(folder, optim="adamw_torch", max_grad_norm=0.0, **settings)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def test_gradients_that_overflow_by_their_scale_are_skipped(tmp_path):
    trainer = scaled_trainer(tmp_path, 2.0**127, num_train_epochs=10)
    trainer.train()
    assert trainer.state.global_step == 40
    assert 0 < trainer.accelerator.scaler.get_scale() < 2.0**127
    assert trainer.lr_scheduler.last_epoch < 40, "some steps were skipped"
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())


def test_gradients_that_overflow_at_any_scale_stop_the_training(tmp_path):
    trainer = scaled_trainer(tmp_path, 2.0**4, num_train_epochs=10)
    trainer.model.visual_projection.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ValueError, match="step 18: float16's gradients overflow at any loss scale"):
        trainer.train()


def test_one_number_for_all_gradients():
    gradients = [torch.ones(3), torch.zeros(2, 2)]
    assert all_finite(torch.tensor(1.0), gradients) and all_finite(torch.tensor(1.0), [])
    assert not all_finite(torch.tensor(float("inf")), gradients)
    assert not all_finite(torch.tensor(1.0), [*gradients, torch.tensor([float("nan")])])
    assert not all_finite(torch.tensor(1.0), [torch.tensor([3e38, 3e38])]), "a norm that float32 does not hold"
