"""Cross-lingual inheritance: a row may name what the teacher reads in place of its captions."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from tests.trainers.fake_encoder import FakeEncoder
from tests.trainers.tiny_recipe import settings, write_parts, write_recipe
from tests.trainers.tiny_training import DIM, LLM_DIM, TinyStore, inheritance_trainer, naive_distillation
from trainers.alignment.checks import check_texts
from trainers.alignment.collators import InheritanceCollator
from trainers.data import PairSource, TextEmbeddingStore, iter_texts, open_pairs
from trainers.data.captions import DrawnCaptions
from trainers.data.stream_loader import StreamLoader
from trainers.recipe.curriculum import Curriculum
from trainers.recipe.schema import load_recipe


ENGLISH = [f"apple {i}" for i in range(6)]
GERMAN = [f"Apfel {i}" for i in range(6)]
ROWS = [{"text": german, "teacher_text": english} for german, english in zip(GERMAN, ENGLISH, strict=True)]
# Neither store has the texts that only the other's encoder reads.
TEXT_STORE, TEACHER_STORE = TinyStore(LLM_DIM, 1, GERMAN), TinyStore(DIM, 2, ENGLISH)


def test_the_teacher_reads_its_text_and_other_rows_as_ever():
    text_store, teacher_store = TinyStore(LLM_DIM, 1, GERMAN + ENGLISH), TinyStore(DIM, 2, ENGLISH)
    rows = [ROWS[2], {"text": ENGLISH[1]}, {"text": [GERMAN[0], GERMAN[1]], "teacher_text": [ENGLISH[4], ENGLISH[0]]}]
    rows.append({"text": ENGLISH[5], "teacher_text": None})
    batch = InheritanceCollator(text_store, teacher_store)(rows)
    assert torch.equal(batch["llm_embeds"], text_store.lookup([GERMAN[2], ENGLISH[1], GERMAN[0], ENGLISH[5]]))
    assert torch.equal(batch["teacher_embeds"], teacher_store.lookup([ENGLISH[2], ENGLISH[1], ENGLISH[4], ENGLISH[5]]))


def test_both_texts_are_drawn_independently_by_seed_epoch_and_row():
    rows = [{"text": GERMAN, "teacher_text": ENGLISH}] * 30 + [{"text": ENGLISH}]
    drawn = DrawnCaptions(rows, 0)
    first = [drawn[i] for i in range(len(rows))]
    assert first == [DrawnCaptions(rows, 0)[i] for i in range(len(rows))]
    assert all(row["text"] in GERMAN and row["teacher_text"] in ENGLISH for row in first[:-1])
    pairs = {(GERMAN.index(row["text"]), ENGLISH.index(row["teacher_text"])) for row in first[:-1]}
    assert len(pairs) > 10 and any(a != b for a, b in pairs)
    assert first[-1].keys() == {"text"}


def test_first_loss_by_hand(tmp_path):
    trainer = inheritance_trainer(
        tmp_path, rows=ROWS, text_store=TEXT_STORE, teacher_store=TEACHER_STORE, eval_dataset=ROWS, max_steps=1
    )
    student = trainer.model(llm_embeds=TEXT_STORE.embeds).text_embeds.detach()
    teacher = torch.nn.functional.normalize(TEACHER_STORE.embeds, dim=-1)
    expected = float(naive_distillation(student, teacher, trainer.args))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_each_store_is_checked_for_what_its_encoder_reads(tmp_path, kind, monkeypatch):
    encoder = FakeEncoder(monkeypatch)
    check_texts("text_store", encoder.build(GERMAN, tmp_path / "llm"), kind(ROWS))
    teacher_store = encoder.build(ENGLISH[:-1], tmp_path / "teacher")
    check_texts("teacher_store", teacher_store, kind(ROWS[:-1]), "teacher_text")
    with pytest.raises(KeyError, match="teacher_store.*apple 5"):
        check_texts("teacher_store", teacher_store, kind(ROWS), "teacher_text")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file of which the last two rows have nothing for the teacher alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"de": row["text"], "en": row["teacher_text"]} for row in ROWS[:4]]
    rows += [{"de": ENGLISH[4], "en": None}, {"de": ENGLISH[5], "en": " "}]
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PairSource(source=str(path), text_columns="de", teacher_text_columns="en")


def test_columns_of_a_file(source):
    rows = open_pairs(source, images=False)
    assert [rows[i] for i in range(6)] == [
        {"text": [text], "teacher_text": [teacher]}
        for text, teacher in zip([*GERMAN[:4], *ENGLISH[4:]], ENGLISH, strict=True)
    ]
    assert list(iter_texts(source)) == [*GERMAN[:4], *ENGLISH[4:]]
    assert list(iter_texts(source, "teacher_text")) == ENGLISH
    assert open_pairs(replace(source, teacher_text_columns=None), images=False)[0] == {"text": [GERMAN[0]]}
    with pytest.raises(ValueError, match=r"no column 'fr' for the texts that the teacher reads.* columns are de, en"):
        open_pairs(replace(source, teacher_text_columns=["en", "fr"]), images=False)
    with pytest.raises(ValueError, match="teacher_text_columns must be a column's name or a list"):
        replace(source, teacher_text_columns=[])


def test_a_stream_of_them(source):
    stream = open_pairs(replace(source, streaming=True), images=False)
    assert stream.first_caption() == GERMAN[0] and stream.first_caption("teacher_text") == ENGLISH[0]
    batches = iter(StreamLoader(stream, 6, collate=list))
    shown = {row["text"]: row["teacher_text"] for row in next(batches)}
    assert shown == dict(zip([*GERMAN[:4], *ENGLISH[4:]], ENGLISH, strict=True))


def test_a_recipe_whose_teacher_reads_other_columns(tmp_path):
    write_parts(tmp_path)
    texts = [json.loads(line)["caption"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    rows = [{"caption": text, "english": f"the {i}th in English"} for i, text in enumerate(texts)]
    (tmp_path / "translations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = settings(tmp_path)
    content["data"]["texts"] = {
        "source": str(tmp_path / "translations.jsonl"), "text_columns": "caption", "teacher_text_columns": "english"
    }  # fmt: skip
    del content["stages"]["contrastive_tuning"]
    Curriculum(load_recipe(write_recipe(tmp_path / "recipe.yaml", content))).run()
    stores = {which: TextEmbeddingStore(tmp_path / "out" / "text-stores" / which) for which in ("llm", "teacher")}
    assert len(stores["llm"].lookup([row["caption"] for row in rows])) == len(rows)
    assert len(stores["teacher"].lookup([row["english"] for row in rows])) == len(rows)
    with pytest.raises(KeyError):
        stores["teacher"].lookup([rows[0]["caption"]])
