"""`matryoshka_dims`: the loss over the whole embedding and over its prefixes, against a plain computation."""

import logging

import pytest
import torch
from torch.nn import functional as F

from modeling_proclip import ProCLIPConfig
from tests.trainers.tiny_training import (
    DIM,
    TEACHER_STORE,
    TEXT_STORE,
    copy_state,
    inheritance_trainer,
    naive_distillation,
    picture_rows,
    text_rows,
    tiny_model,
    tuning_trainer,
)


DIMS = [5, 2]
BIAS = {"logit_bias_init_value": -3.0}
CASES = {
    "stage-1": (inheritance_trainer, {}, {}),
    "stage-1 as published": (inheritance_trainer, {"reduction": "sum", "structure_distance": "smooth_l1"}, {}),
    "stage-2": (tuning_trainer, {}, {}),
    "sigmoid": (tuning_trainer, {"loss": "sigmoid"}, BIAS),
    "llm2clip": (tuning_trainer, {"method": "llm2clip"}, {}),
    "lit": (tuning_trainer, {"method": "lit"}, {}),
}


def plain_loss(trainer, images: torch.Tensor | None, texts: torch.Tensor, teacher: torch.Tensor | None):
    """The loss of one size: distillation of texts in stage 1 and of images in stage 2, and the contrastive loss."""
    args, n = trainer.args, len(texts)
    if images is None:
        return naive_distillation(texts, teacher, args)
    logits = trainer.model.logit_scale.exp() * images @ texts.T
    if args.loss == "sigmoid":
        signs = 2 * torch.eye(n) - 1
        loss = -F.logsigmoid(signs * (logits + trainer.model.logit_bias)).sum() / n
    else:
        pairs = torch.arange(n)
        loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    return loss if teacher is None else loss + naive_distillation(images, teacher, args)


@pytest.mark.parametrize("case", list(CASES))
def test_the_loss_is_the_sum_over_the_prefixes(tmp_path, case):
    make, settings, config = CASES[case]
    trainer = make(tmp_path, tiny_model(**config), matryoshka_dims=DIMS, **settings)
    model, rows = trainer.model.train(), (text_rows if make is inheritance_trainer else picture_rows)(6)
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()

    captions = [row["text"][0] for row in rows]
    texts = model.get_text_features(llm_embeds=TEXT_STORE.lookup(captions)).pooler_output
    images = teacher = None
    if make is inheritance_trainer:
        teacher = TEACHER_STORE.lookup(captions)
    else:
        images = model.get_image_features(batch["pixel_values"]).pooler_output
        if trainer.ema is not None:
            teacher = trainer.ema.embed(pixel_values=batch["pixel_values"])
    sizes = {
        dim: plain_loss(
            trainer, *(x if x is None else F.normalize(x[:, :dim], dim=1) for x in (images, texts, teacher))
        )
        for dim in (DIM, *DIMS)
    }
    expected = sum(sizes.values())
    of_prefixes = [sizes[dim].item() for dim in DIMS]
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
    parts = trainer._mean_parts("train")
    assert [parts[f"prefix_{dim}_loss"] for dim in DIMS] == pytest.approx(of_prefixes)


@pytest.mark.parametrize("make", [inheritance_trainer, tuning_trainer])
def test_the_whole_size_counts_once(tmp_path, make):
    """So that naming it, or naming nothing else, trains to the same bits as without."""
    states = []
    for dims in (None, [DIM]):
        trainer = make(tmp_path, matryoshka_dims=dims, max_steps=2)
        trainer.train()
        states.append(copy_state(trainer.model))
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_sizes_are_recorded_by_the_stage_that_trained_them(tmp_path, caplog):
    trainer = inheritance_trainer(tmp_path / "one", matryoshka_dims=DIMS, max_steps=1)
    trainer.train()
    trainer.save_model()
    config = ProCLIPConfig.from_pretrained(tmp_path / "one")
    assert config.matryoshka_dims == DIMS and config.training[-1]["settings"]["matryoshka_dims"] == str(DIMS)
    assert {f"prefix_{dim}_loss" for dim in DIMS} <= config.training[-1]["final"].keys()
    with caplog.at_level(logging.WARNING):
        after = tuning_trainer(tmp_path / "two", trainer.model, max_steps=1)
    assert "without matryoshka_dims this stage is not" in caplog.text
    after.train()
    assert after.model.config.matryoshka_dims is None


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ([], "must list the sizes"),
        ([0], "must list the sizes"),
        ([True], "must list the sizes"),
        ([2.5], "must list the sizes"),
        (4, "must list the sizes"),
        ([4, 4], "names a size twice"),
        ([4, DIM + 1], f"this model's embeddings have {DIM} dimensions"),
    ],
)
def test_sizes_that_make_no_sense(tmp_path, dims, message):
    with pytest.raises(ValueError, match=message) as error:
        inheritance_trainer(tmp_path, matryoshka_dims=dims)
    assert "\n" not in str(error.value)
