"""Stage 1: what is trained, on which loss, with which settings, and what is refused."""

import logging

import pytest
import torch
from datasets import Dataset

from tests.trainers.tiny_training import (
    CAPTIONS,
    DIM,
    LLM_DIM,
    TEACHER_STORE,
    TEXT_STORE,
    TinyStore,
    changed_parameters,
    copy_state,
    inheritance_trainer,
    naive_distillation,
    text_rows,
    tiny_model,
)
from trainers import RepresentationInheritanceConfig


def unit_pair(model, texts):
    student = model(llm_embeds=TEXT_STORE.lookup(texts)).text_embeds.detach()
    teacher = TEACHER_STORE.lookup(texts)
    return student, teacher / teacher.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("load_text_model", [False, True])
def test_trains_the_adapter_and_nothing_else(tmp_path, load_text_model):
    model = tiny_model(load_text_model=load_text_model)
    text_model, before = model.text_model, copy_state(model)
    inheritance_trainer(tmp_path, model, max_steps=3).train()
    assert model.text_model is text_model
    assert changed_parameters(before, model) == {f"text_adapter.{name}" for name in model.text_adapter.state_dict()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == changed_parameters(before, model)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("distance", ["squared", "smooth_l1"])
def test_first_loss_by_hand(tmp_path, reduction, distance):
    rows = [{"text": captions[0]} for captions in CAPTIONS[:6]]  # one batch, in whatever order
    trainer = inheritance_trainer(tmp_path, rows=rows, max_steps=1, reduction=reduction, structure_distance=distance)
    expected = naive_distillation(*unit_pair(trainer.model, [row["text"] for row in rows]), trainer.args)
    trainer.train()
    log = trainer.state.log_history[0]
    torch.testing.assert_close(torch.tensor(log["loss"]), expected, atol=1e-5, rtol=1e-5)
    weights = trainer.args.lambda_ins, trainer.args.lambda_struct
    parts = log["instance_loss"], log["structure_loss"]
    assert sum(w * part for w, part in zip(weights, parts, strict=True)) == pytest.approx(log["loss"], rel=1e-5)
    assert log["grad_norm"] > 0


def test_logged_parts_are_means_over_the_steps(tmp_path):
    each = inheritance_trainer(tmp_path, max_steps=4, logging_steps=1)
    each.train()
    every_second = inheritance_trainer(tmp_path, max_steps=4, logging_steps=2)
    every_second.train()
    for name in ("loss", "instance_loss", "structure_loss"):
        single = [log[name] for log in each.state.log_history if name in log]
        double = [log[name] for log in every_second.state.log_history if name in log]
        assert double == pytest.approx([(single[0] + single[1]) / 2, (single[2] + single[3]) / 2], rel=1e-5)


def test_learns_the_teacher(tmp_path):
    rows = [{"text": captions[0]} for captions in CAPTIONS]
    trainer = inheritance_trainer(tmp_path, rows=rows, eval_dataset=rows, lambda_struct=1.0, num_train_epochs=40)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 10


def test_eval_loss_reads_the_first_caption_and_all_batches(tmp_path):
    trainer = inheritance_trainer(tmp_path, eval_dataset=text_rows(12))
    metrics = trainer.evaluate()
    losses = []
    for start in (0, 6):
        student, teacher = unit_pair(trainer.model, [captions[0] for captions in CAPTIONS[start : start + 6]])
        losses.append(naive_distillation(student, teacher, trainer.args))
    assert metrics["eval_loss"] == pytest.approx(float(sum(losses)) / 2, rel=1e-5)
    assert {"eval_instance_loss", "eval_structure_loss"} <= metrics.keys()


def test_evaluation_does_not_mix_with_the_training_log(tmp_path):
    settings = {"max_steps": 4, "logging_steps": 4, "eval_steps": 1, "eval_dataset": text_rows(12)}
    with_eval = inheritance_trainer(tmp_path, eval_strategy="steps", **settings)
    with_eval.train()
    without = inheritance_trainer(tmp_path, max_steps=4, logging_steps=4)
    without.train()
    logs = [next(log for log in t.state.log_history if "loss" in log) for t in (with_eval, without)]
    assert logs[0]["instance_loss"] == logs[1]["instance_loss"]


def test_rows_of_a_datasets_dataset(tmp_path):
    model, same = tiny_model(), tiny_model()
    inheritance_trainer(tmp_path, model, rows=Dataset.from_list(text_rows()), max_steps=3).train()
    inheritance_trainer(tmp_path, same, max_steps=3).train()
    assert changed_parameters(copy_state(model), same) == set()


def test_an_input_that_standardises_gets_the_statistics_of_the_store(tmp_path, caplog):
    model = tiny_model(adapter_input_norm="standardize")
    with caplog.at_level(logging.INFO):
        inheritance_trainer(tmp_path, model, max_steps=1).train()
    assert "input statistics were unset" in caplog.text
    mean, std = TEXT_STORE.statistics()
    assert torch.equal(model.text_adapter.input_mean, mean.float())
    assert torch.equal(model.text_adapter.input_std, std.float())
    caplog.clear()
    inheritance_trainer(tmp_path, model, text_store=TinyStore(LLM_DIM, 9), max_steps=1)
    assert torch.equal(model.text_adapter.input_mean, mean.float()) and not caplog.text


@pytest.mark.parametrize("distance", ["squared", "smooth_l1"])
def test_weights_of_the_published_balance(distance):
    """What the docstring says of 1 and 63.5: N times that loss is L_ins + L_struct of the paper at N = 128."""
    generator = torch.Generator().manual_seed(0)
    pair = [torch.nn.functional.normalize(torch.randn(128, 16, generator=generator), dim=-1) for _ in range(2)]
    args = {"use_cpu": True, "structure_distance": distance}
    published = RepresentationInheritanceConfig("x", reduction="sum", **args)
    assert (published.lambda_ins, published.lambda_struct) == (1, 1)
    balanced = RepresentationInheritanceConfig("x", lambda_struct=63.5, **args)
    assert float(naive_distillation(*pair, balanced)) * 128 == pytest.approx(
        float(naive_distillation(*pair, published))
    )


def test_defaults():
    args = RepresentationInheritanceConfig("x", use_cpu=True)
    assert (args.lambda_ins, args.lambda_struct) == (1, 8)
    assert (args.learning_rate, args.weight_decay, args.num_train_epochs) == (1e-5, 0.05, 4)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert args.per_device_train_batch_size == 128 and args.lr_scheduler_type == "cosine" and "adamw" in args.optim


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": "max"}, "reduction must be one of 'mean', 'sum', got 'max'"),
        ({"structure_distance": "l1"}, "structure_distance must be one of 'squared', 'smooth_l1'"),
        ({"lambda_ins": -1.0}, "lambda_ins must not be negative"),
        ({"lambda_ins": 0.0, "lambda_struct": 0.0}, "nothing to train on"),
        ({"remove_unused_columns": True}, "leave it False"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2.*Raise per_device_train_batch_size"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RepresentationInheritanceConfig("x", use_cpu=True, **settings)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_gradients_without_the_structure_loss_are_those_of_the_joined_batch(tmp_path, reduction):
    logs, models = [], (tiny_model(), tiny_model())
    for model, steps in zip(models, (1, 2), strict=True):
        settings = {"per_device_train_batch_size": 6 // steps, "gradient_accumulation_steps": steps}
        settings |= {"lambda_struct": 0.0, "reduction": reduction, "max_steps": 1}
        trainer = inheritance_trainer(tmp_path, model, **settings)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-5)
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"text_store": TinyStore(LLM_DIM + 1, 0)},
            ValueError,
            "text_store holds embeddings of size 13, but .* needs 12",
        ),
        (
            {"teacher_store": TinyStore(DIM - 1, 0)},
            ValueError,
            "teacher_store holds embeddings of size 7, but .* needs 8",
        ),
        ({"text_store": TinyStore(LLM_DIM, 0, ["other"])}, KeyError, "caption"),
        ({"rows": text_rows(5)}, ValueError, "train_dataset has 5 rows, fewer than one batch of 6"),
        ({"compute_metrics": len}, ValueError, "compute_metrics would not be called.*TrainerCallback"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        inheritance_trainer(tmp_path, **settings)


def test_a_text_that_is_missing_later_is_named(tmp_path):
    rows = text_rows(11) + [{"text": "nobody stored this"}]
    with pytest.raises(KeyError, match="nobody stored this"):
        inheritance_trainer(tmp_path, rows=rows, num_train_epochs=1).train()
