"""A trainer takes the embeddings of its model's LLM, and of a teacher, and says what differs in others."""

import copy
from types import SimpleNamespace

import pytest
import torch

from modeling_proclip import ProCLIPModel
from tests.trainers.tiny_encoders import tiny_clip, tiny_proclip
from tests.trainers.tiny_training import inheritance_trainer, picture_rows, tuning_trainer
from trainers.data import OnTheFlyStore, TextEmbeddingStore
from trainers.text_store.layout import warn_once


CAPTIONS_OF_ROWS = [caption for row in picture_rows(8) for caption in row["text"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An LLM in a folder, a pair with it, its processor, and stores of the same texts by several encoders, all of one width."""
    folder = tmp_path_factory.mktemp("made")

    def pair(name, seed=0, **config):
        model, processor = tiny_proclip(seed=seed, **config)
        model.text_model.save_pretrained(folder / name)
        model.config.text_model_name_or_path = str(folder / name)
        return model, processor

    def store(name, model, processor, **kwargs):
        return TextEmbeddingStore.build(CAPTIONS_OF_ROWS, model, processor, folder / name, progress=False, **kwargs)

    model, processor = pair("llm")
    model.save_pretrained(folder / "lean", lean=True)
    half = copy.deepcopy(model)
    half.text_model.to(torch.bfloat16)
    relu = copy.deepcopy(model)
    relu.text_model.config.hidden_act = "relu"
    clip, tokenizer = tiny_clip()
    return SimpleNamespace(
        model=model,
        lean=folder / "lean",
        processor=processor,
        right=store("right", model, processor),
        half=store("half", half, processor),
        other_llm=store("other-llm", *pair("other", seed=1)),
        activation=store("activation", relu, processor),
        pooling=store("pooling", *pair("pooled", text_pooling="last_token")),
        template=store("template", model, tiny_proclip(template="{text}")[1]),
        teacher=store("teacher", clip, tokenizer),
    )


@pytest.mark.parametrize("without_llm", [False, True])
@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("right", None),
        ("half", None),
        ("other_llm", r"weights_sha256 is '\w+' there and '\w+' here; it was made by '.*other', and this model's LLM is '.*llm'"),
        ("activation", "config.hidden_act is 'relu' there and 'silu' here"),
        ("pooling", "pooling is 'last_token' there and 'mean' here"),
        ("template", "prompt_template is '{text}' there and '<|start_header_id|>"),
        ("teacher", "the text encoder None and not by this model's LLM: it is a teacher_store"),
    ],
)  # fmt: skip
def test_a_text_store_of_another_encoder_is_refused(made, tmp_path, which, message, without_llm):
    model = (
        ProCLIPModel.from_pretrained(made.lean, load_text_model=False) if without_llm else copy.deepcopy(made.model)
    )
    arguments = {"rows": picture_rows(8), "text_store": getattr(made, which), "processing_class": made.processor}
    if message is None:
        tuning_trainer(tmp_path, model, **arguments)
    else:
        with pytest.raises(ValueError, match="text_store /.* was made by .*" + message.replace("|", r"\|")):
            tuning_trainer(tmp_path, model, **arguments)


def test_the_stores_of_stage_1_cannot_be_exchanged(made, tmp_path):
    rows = [{"text": row["text"]} for row in picture_rows(8)]
    model = ProCLIPModel.from_pretrained(made.lean, load_text_model=False)
    inheritance_trainer(tmp_path, model, rows, text_store=made.right, teacher_store=made.teacher)
    with pytest.raises(ValueError, match="teacher_store .* was made by the LLM .*: it is a text_store"):
        inheritance_trainer(tmp_path, model, rows, text_store=made.right, teacher_store=made.right)
    on_the_fly = OnTheFlyStore(made.other_llm, tiny_proclip(seed=1)[0], made.processor)
    with pytest.raises(ValueError, match="text_store .* weights_sha256 is"):
        inheritance_trainer(tmp_path, model, rows, text_store=on_the_fly, teacher_store=made.teacher)


def test_what_cannot_be_compared_is_said_once(made, tmp_path, caplog):
    caplog.set_level("WARNING", "trainers")
    warn_once.cache_clear()
    model = copy.deepcopy(made.model)
    model.text_model, model.config.text_model_sha256 = None, None
    old = copy.copy(made.right)
    old.fingerprint = {
        k: v for k, v in old.fingerprint.items() if k not in ("config", "tokenizer", "encoding", "versions")
    }
    for _ in range(2):
        tuning_trainer(tmp_path, model, rows=picture_rows(8), text_store=old, processing_class=made.processor)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("trainers.text_store")]
    assert len(said) == 2
    assert "does not record the hash of its LLM" in said[0] and "did not record config, tokenizer" in said[1]


def test_every_stage_reads_texts_embedded_in_the_same_way(made, tmp_path):
    """Also where no processor says which way is right."""
    model = ProCLIPModel.from_pretrained(made.lean, load_text_model=False)
    rows = [{"text": row["text"]} for row in picture_rows(8)]
    stage_1 = {"text_store": made.template, "teacher_store": made.teacher, "max_steps": 1}
    inheritance_trainer(tmp_path / "1", model, rows, **stage_1).train()
    assert model.config.training[0]["text_encoder"] == {
        "pooling": "mean",
        "prompt_template": "{text}",
        "instruction": None,
    }
    tuning_trainer(tmp_path / "2", model, rows=picture_rows(8), text_store=made.template)
    with pytest.raises(
        ValueError,
        match=r"trained with before \(representation inheritance\): prompt_template is '<.*' there and '{text}' here",
    ):
        tuning_trainer(tmp_path / "2", model, rows=picture_rows(8), text_store=made.right)


def test_a_teacher_of_another_name_is_said(made, tmp_path, caplog):
    caplog.set_level("WARNING", "trainers")
    warn_once.cache_clear()
    model = ProCLIPModel.from_pretrained(made.lean, load_text_model=False)
    rows = [{"text": row["text"]} for row in picture_rows(8)]
    teacher = copy.copy(made.teacher)
    for teacher_name, vision, said in (("a/clip", "a/clip", 0), (None, "a/clip", 0), ("a/clip", "b/clip", 1)):
        teacher.fingerprint = {**teacher.fingerprint, "model": teacher_name}
        model.config.vision_model_name_or_path = vision
        inheritance_trainer(tmp_path, model, rows, text_store=made.right, teacher_store=teacher)
        assert (
            sum("was made by 'a/clip', and this model's image encoder" in r.getMessage() for r in caplog.records)
            == said
        )
