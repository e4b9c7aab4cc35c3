"""Stage 2 and its baselines: what is trained, on which loss, with which settings, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPImageProcessor

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from tests.golden import GOLDEN_DIR
from tests.modeling_proclip import tiny
from tests.trainers.tiny_training import (
    CAPTIONS,
    LLM_DIM,
    TEXT_STORE,
    TinyStore,
    changed_parameters,
    copy_state,
    naive_distillation,
    picture_rows,
    tiny_model,
    tuning_trainer,
)
from trainers import ContrastiveTuningConfig
from trainers.contrastive_tuning.ema_teacher import EMA_FILE


IMAGE_ENCODER = ("vision_model.", "visual_projection.")


def config(**settings) -> ContrastiveTuningConfig:
    return ContrastiveTuningConfig("x", use_cpu=True, **settings)


@pytest.mark.parametrize("method", ["proclip", "llm2clip", "lit"])
def test_what_each_method_trains(tmp_path, method):
    model = tiny_model(load_text_model=method == "proclip")
    before = copy_state(model)
    trainer = tuning_trainer(tmp_path, model, max_steps=3, method=method)
    trainer.train()
    frozen = ("text_model.",) if method != "lit" else ("text_model.", *IMAGE_ENCODER)
    expected = {name for name, _ in model.named_parameters() if not name.startswith(frozen)}
    # A key's bias moves every score of a query alike, and softmax does not see that: its gradient is rounding.
    unseen = {name for name in expected if name.endswith("k_proj.bias")}
    changed = changed_parameters(before, model)
    assert changed | unseen == expected | (changed & unseen) and changed <= expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert (trainer.ema is not None) == (method == "proclip")


def test_a_frozen_image_encoder_is_in_eval_mode(tmp_path):
    model = tiny_model(dropout=0.9)
    pixels = torch.stack([row["pixel_values"] for row in picture_rows(6)])
    expected = model.eval()(pixel_values=pixels).image_embeds
    trainer = tuning_trainer(tmp_path, model, method="lit")
    model.train()
    _, (texts, images) = trainer.compute_loss(model, trainer.data_collator(picture_rows(6)), return_outputs=True)
    assert torch.equal(images, expected)
    assert texts.requires_grad and not images.requires_grad


@pytest.mark.parametrize("method", ["proclip", "lit"])
@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("caching", [None, 2])
def test_images_of_their_own_aspect_ratio(tmp_path, method, processed, caching):
    """SigLIP2 NaFlex takes masks and shapes beside the pixels: the first loss is what `model(**inputs)` gives."""
    torch.manual_seed(0)
    model = ProCLIPModel.from_vision_text_pretrained(tiny.naflex(), tiny.LLAMA_DIR)
    processor, store = tiny.processor(tiny.naflex_image_processor()), TinyStore(32, 1)
    images = [Image.new("RGB", (20 + 9 * i, 30), (40 * i, 5, 5)) for i in range(6)]
    rows = [{"image": image, "text": captions[0]} for image, captions in zip(images, CAPTIONS, strict=False)]
    inputs = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        expected = model(
            **inputs, llm_embeds=store.lookup([row["text"] for row in rows]), return_loss=True
        ).loss.item()
    if processed:
        rows = [
            {"text": row["text"], **{name: side[i] for name, side in inputs.items()}} for i, row in enumerate(rows)
        ]
    settings = {"method": method, "max_steps": 1, "gradient_caching_batch_size": caching}
    trainer = tuning_trainer(tmp_path, model, rows, text_store=store, processing_class=processor, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["info_nce_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("distance", ["squared", "smooth_l1"])
def test_loss_by_hand(tmp_path, reduction, distance):
    rows = picture_rows(6)
    trainer = tuning_trainer(tmp_path, reduction=reduction, structure_distance=distance, ema_decay=0.5)
    model, batch = trainer.model, trainer.data_collator(rows)
    teacher = model(pixel_values=batch["pixel_values"]).image_embeds.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))

    images = normalize(model.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
    texts = normalize(model.get_text_features(llm_embeds=batch["llm_embeds"]).pooler_output, dim=-1)
    logits = model.logit_scale.exp() * images @ texts.T
    info = sum(cross_entropy(side, torch.arange(6)) for side in (logits, logits.T)) / 2
    expected = info + naive_distillation(images, teacher, trainer.args)
    assert expected - info > 1e-5 * info, "a teacher as the student is would hide the second part"
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected, atol=1e-5, rtol=1e-5)


def test_first_step_by_hand(tmp_path):
    """The teacher is the student before the first step, so all of the first loss is InfoNCE."""
    rows = [{**row, "text": row["text"][0]} for row in picture_rows(6)]
    trainer = tuning_trainer(tmp_path, rows=rows, max_steps=1)
    batch = trainer.data_collator(rows)
    expected = trainer.model(**batch, return_loss=True).loss.item()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == log["info_nce_loss"] == pytest.approx(expected, rel=1e-5)
    assert log["instance_loss"] == log["structure_loss"] == 0
    assert log["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5) and log["grad_norm"] > 0


def test_the_share_of_time_spent_waiting_for_data_is_logged(tmp_path, monkeypatch):
    """By a clock that a look at it moves by one second, and reading a row by three."""
    clock = SimpleNamespace(seconds=0)

    def perf_counter() -> int:
        clock.seconds += 1
        return clock.seconds

    class Rows(list):
        def __getitem__(self, index):
            clock.seconds += 3
            return super().__getitem__(index)

    rows = Rows(picture_rows(8))
    trainer = tuning_trainer(tmp_path, rows=rows, per_device_train_batch_size=4, max_steps=2, logging_steps=2)
    monkeypatch.setattr("trainers.base.trainer.time", SimpleNamespace(perf_counter=perf_counter))
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    waiting, computing = 2 * (1 + 4 * 3), 2 * 1  # two steps
    assert log["data_wait"] == pytest.approx(waiting / (waiting + computing), abs=1e-4)


def test_checkpointed_activations_train_the_same(tmp_path):
    models = [tiny_model(), tiny_model()]
    for model, checkpointing in zip(models, (False, True), strict=True):
        settings = {"gradient_checkpointing": checkpointing, "gradient_caching_batch_size": 3, "max_steps": 2}
        tuning_trainer(tmp_path / str(checkpointing), model, **settings).train()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_the_optimizer_is_fused_and_batches_are_pinned(tmp_path):
    """Defaults of Transformers, which speed depends on."""
    trainer = tuning_trainer(tmp_path)
    assert trainer.create_optimizer().defaults["fused"]
    assert ContrastiveTuningConfig.__dataclass_fields__["dataloader_pin_memory"].default is True


def test_mixed_precision_is_the_same_for_student_and_teacher(tmp_path):
    model = tiny_model()
    trainer = tuning_trainer(tmp_path, model, max_steps=2, bf16=True)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["instance_loss"] == first["structure_loss"] == 0, "float32 here and bfloat16 there would differ"
    assert second["instance_loss"] > 0 and {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_teacher_follows_after_every_step(tmp_path):
    model = tiny_model()
    names = [name for name, _ in model.named_parameters() if name.startswith(IMAGE_ENCODER)]
    expected = {name: model.get_parameter(name).detach().clone() for name in names}
    trainer = tuning_trainer(tmp_path, model, max_steps=3, ema_decay=0.75, save_strategy="steps", save_steps=1)
    trainer.train()
    for step in (1, 2, 3):
        student = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        saved = load_file(tmp_path / f"checkpoint-{step}" / EMA_FILE)
        for name in names:
            expected[name] = 0.75 * expected[name] + 0.25 * student[name]
            torch.testing.assert_close(saved[f"module.{name}"], expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("start", "end"), [(math.log(100) + 3, math.log(100)), (-2.0, 0.0)])
def test_logit_scale_is_clamped_after_the_step(tmp_path, start, end):
    trainer = tuning_trainer(tmp_path, tiny_model(logit_scale_init_value=start), max_steps=1)
    trainer.train()
    assert trainer.model.logit_scale.item() == pytest.approx(end, abs=1e-6)


def test_weight_decay_is_for_matrices_only(tmp_path):
    trainer = tuning_trainer(tmp_path)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    parameters = dict(trainer.model.named_parameters())
    assert decayed == {name for name, p in parameters.items() if p.ndim >= 2}
    assert not decayed & {"logit_scale", "vision_model.embeddings.class_embedding"}
    assert {"text_adapter.projection.weight", "visual_projection.weight"} <= decayed
    groups = trainer.create_optimizer().param_groups
    assert {p for group in groups if group["weight_decay"] == 0.05 for p in group["params"]} == {
        parameters[n] for n in decayed
    }


@pytest.mark.parametrize("method", ["proclip", "lit"])
def test_the_adapter_may_have_its_own_learning_rate(tmp_path, method):
    trainer = tuning_trainer(
        tmp_path, method=method, adapter_learning_rate=3e-3, max_steps=2, lr_scheduler_type="constant"
    )
    trainer.train()
    adapter = set(trainer.model.text_adapter.parameters())
    seen = set()
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == (3e-3 if parameter in adapter else 1e-2)
            assert group["weight_decay"] == (0.05 if parameter.ndim >= 2 else 0)
            seen.add(parameter)
    assert seen == {p for p in trainer.model.parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(seen)


def test_eval_loss(tmp_path):
    trainer = tuning_trainer(tmp_path, method="llm2clip", eval_dataset=picture_rows(12))
    metrics = trainer.evaluate()
    batches = [trainer.data_collator(picture_rows()[start : start + 6]) for start in (0, 6)]
    losses = [trainer.model(**batch, return_loss=True).loss.item() for batch in batches]
    expected = pytest.approx(sum(losses) / 2, rel=1e-5)
    assert metrics["eval_loss"] == expected and metrics["eval_info_nce_loss"] == expected


def test_a_checkpoint_loads_without_the_llm_and_carries_the_processor(tmp_path):
    model = tiny_model(load_text_model=True)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN_DIR / "g5_text_pipeline_hf")
    processor = ProCLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8), tokenizer)
    rows = [{"image": Image.new("RGB", (9, 9), (8 * i, 0, 0)), "text": CAPTIONS[i]} for i in range(6)]
    trainer = tuning_trainer(tmp_path, model, rows, processing_class=processor, max_steps=1, save_strategy="epoch")
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    weights = load_file(checkpoint / "model.safetensors")
    assert {name for name in model.state_dict() if not name.startswith("text_model.")} == weights.keys()
    loaded = AutoModel.from_pretrained(checkpoint, load_text_model=False)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in weights.items())
    assert AutoProcessor.from_pretrained(checkpoint).prompt_template == processor.prompt_template
    trainer.save_model(tmp_path / "whole")
    whole = AutoModel.from_pretrained(tmp_path / "whole")
    assert changed_parameters(copy_state(model), whole) == set()
    assert not (tmp_path / "whole" / EMA_FILE).exists()


@pytest.mark.parametrize("method", ["llm2clip", "lit"])
def test_without_self_distillation_no_teacher_is_saved(tmp_path, method):
    tuning_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, method=method).train()
    assert (tmp_path / "checkpoint-1").is_dir() and not (tmp_path / "checkpoint-1" / EMA_FILE).exists()


def test_a_teacher_that_is_not_finite_is_not_saved(tmp_path):
    trainer = tuning_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    next(trainer.ema.averaged.parameters()).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN or infinity|loss is"):
        trainer.train()
    with pytest.raises(ValueError, match=f"{EMA_FILE} was not written: module.*NaN or infinity"):
        trainer.ema.save(tmp_path)


def test_resuming_without_the_teacher_is_one_clear_error(tmp_path):
    tuning_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-1" / EMA_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"checkpoint-1.{EMA_FILE} is missing"):
        tuning_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"text_store": TinyStore(LLM_DIM + 1, 0)},
            ValueError,
            "text_store holds embeddings of size 13, but .* needs 12",
        ),
        ({"text_store": TinyStore(LLM_DIM, 0, ["other"])}, KeyError, "caption"),
        ({"rows": picture_rows(5)}, ValueError, "train_dataset has 5 rows, fewer than one batch of 6"),
        (
            {"rows": picture_rows(13), "dataloader_drop_last": False},
            ValueError,
            "the last batch of 13 rows has one.*leave dataloader_drop_last True",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        tuning_trainer(tmp_path, **settings)


def test_a_frozen_half_precision_image_encoder_stays_so(tmp_path):
    model = tiny_model()
    model.vision_model.to(torch.bfloat16), model.visual_projection.to(torch.bfloat16)
    tuning_trainer(tmp_path, model, method="lit", max_steps=1).train()
    assert {p.dtype for p in (*model.vision_model.parameters(), *model.visual_projection.parameters())} == {
        torch.bfloat16
    }


# SigLIP's sigmoid loss


def test_sigmoid_loss_trains_the_bias_and_leaves_the_scale_unbounded(tmp_path):
    model = tiny_model(logit_bias_init_value=-10.0, logit_scale_init_value=math.log(117))
    rows = [{**row, "text": row["text"][0]} for row in picture_rows(6)]
    trainer = tuning_trainer(tmp_path, model, rows=rows, loss="sigmoid", max_steps=1)
    batch = trainer.data_collator(rows)
    logits = model(**batch).logits_per_image.detach()
    signs = 2 * torch.eye(6) - 1
    expected = -torch.nn.functional.logsigmoid(signs * logits).sum(1).mean().item()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == log["sigmoid_loss"] == pytest.approx(expected, rel=1e-5)
    assert log["logit_bias"] == -10 and log["logit_scale"] == pytest.approx(117, rel=1e-5)
    assert "info_nce_loss" not in log and model.logit_bias.item() != -10
    assert model.logit_scale.exp() > 110


def test_sigmoid_loss_needs_a_bias(tmp_path):
    with pytest.raises(ValueError, match=r"has none: .*logit_bias_init_value=-10\.0"):
        tuning_trainer(tmp_path, loss="sigmoid")
    with pytest.raises(ValueError, match="loss must be 'info_nce' or 'sigmoid', got 'siglip'"):
        config(loss="siglip")
    # The other way round a bias does no harm: it moves all logits alike, and is not trained.
    model = tiny_model(logit_bias_init_value=-10.0)
    tuning_trainer(tmp_path, model, max_steps=1).train()
    assert model.logit_bias.item() == -10 and not model.logit_bias.requires_grad


# Retrieval while training


def test_recall_of_all_captions_while_training(tmp_path):
    """Twenty-two pictures, with three captions each but for one, in batches of six."""
    rows = picture_rows(22)
    rows[3] = {**rows[3], "text": rows[3]["text"][0]}
    trainer = tuning_trainer(tmp_path, eval_dataset=rows, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    model = trainer.model.eval()
    captions = [[row["text"]] if isinstance(row["text"], str) else row["text"] for row in rows]
    of_image = [i for i, of_row in enumerate(captions) for _ in of_row]
    with torch.no_grad():
        images = model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).image_embeds
        texts = model(llm_embeds=TEXT_STORE.lookup(sum(captions, []))).text_embeds
    scores = images @ texts.T
    own = torch.tensor([[i == j for j in of_image] for i in range(22)])
    for k in (1, 5, 10):
        found = own.gather(1, scores.topk(k).indices).any(1)
        text_found = own.T.gather(1, scores.T.topk(k).indices).any(1)
        log = [log for log in trainer.state.log_history if "eval_loss" in log][-1]
        assert log[f"eval_i2t_r@{k}"] == pytest.approx(found.float().mean().item())
        assert log[f"eval_t2i_r@{k}"] == pytest.approx(text_found.float().mean().item())
    assert len(of_image) == 64 and len([log for log in trainer.state.log_history if "eval_loss" in log]) == 2


def test_the_best_checkpoint_by_recall(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = tuning_trainer(
        tmp_path,
        eval_dataset=picture_rows(12),
        metric_for_best_model="i2t_r@1",
        load_best_model_at_end=True,
        **settings,
    )
    trainer.train()
    recalls = [log["eval_i2t_r@1"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.state.best_metric == max(recalls)


def test_tensorboard_gets_everything(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = tuning_trainer(tmp_path, eval_dataset=picture_rows(6), report_to="tensorboard", max_steps=4, **settings)
    trainer.train()
    (folder,) = {file.parent for file in (tmp_path / "board").rglob("events.out.tfevents*")}
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    logged = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for name in (
        "train/loss train/info_nce_loss train/instance_loss train/structure_loss train/logit_scale train/grad_norm "
        "train/learning_rate train/samples_per_second"
    ).split():
        assert [step for step, _ in logged[name]] == [1, 2, 3, 4], name
    for name in "eval/loss eval/info_nce_loss eval/i2t_r@1 eval/t2i_r@10".split():
        assert [step for step, _ in logged[name]] == [2, 4], name
    history = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert [value for _, value in logged["train/loss"]] == pytest.approx(history, rel=1e-6)
    assert min(value for _, value in logged["train/samples_per_second"]) > 0
