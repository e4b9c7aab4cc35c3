"""What a search finds, and how text, image, negative text, filters and words work together."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from tests.trainers.search.conftest import write_photos
from trainers.search import build
from trainers.search.build import index_folder
from trainers.search.export import export_index
from trainers.search.query import Question, describe, embed_image, embed_text, search
from trainers.search.table import ImageIndex


@pytest.fixture(scope="module")
def index(encoder, tmp_path_factory) -> ImageIndex:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return index_folder(folder.parent / "photos.index", folder, "tiny", encoder)[0]


def naive(index: ImageIndex, embedding: torch.Tensor) -> list[tuple[str, float]]:
    rows = index.rows(index.images, ["path", "embedding"]).to_pylist()
    scores = [(row["path"], float(torch.tensor(row["embedding"]) @ embedding)) for row in rows]
    return sorted(scores, key=lambda pair: -pair[1])


@pytest.mark.parametrize("text", ["a red fox", "狐狸 on the boat", "a " * 60])
def test_results_are_those_of_the_naive_search(index, encoder, text):
    embedding = Question(text).embedding(encoder)
    found = search(index, embedding, top=4)
    expected = naive(index, embedding)[:4]
    assert [row["path"] for row in found] == [path for path, _ in expected]
    np.testing.assert_allclose([row["score"] for row in found], [score for _, score in expected], atol=1e-5)


def test_an_image_finds_itself(index, encoder):
    found = search(index, Question(image=index.folder / "second/gray.png").embedding(encoder), top=1)
    assert found[0]["path"] == "second/gray.png" and found[0]["score"] == pytest.approx(1, abs=1e-5)


def test_text_image_and_negative_are_weighted(encoder, index):
    image = index.folder / "first/red.png"
    t, i, n = embed_text(encoder, "a fox"), embed_image(encoder, image), embed_text(encoder, "a boat")
    question = Question("a fox", image, negative="a boat", image_weight=0.3)
    torch.testing.assert_close(question.embedding(encoder), F.normalize(0.7 * t + 0.3 * i - 0.5 * n, dim=-1))
    torch.testing.assert_close(Question("a fox").embedding(encoder), t)
    with pytest.raises(ValueError, match="nothing to search for"):
        Question()
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        Question("a fox", image, image_weight=2)


def test_conditions(index, encoder):
    embedding = Question("a fox").embedding(encoder)
    found = search(index, embedding, where="width >= 15 AND path LIKE 'first/%'")
    assert {row["path"] for row in found} == {"first/white.png", "first/black.png"}
    assert search(index, embedding, where="taken >= '2025-01-01'") == []
    for condition in ("colour = 'red'", "width >", "1; DROP TABLE images"):
        with pytest.raises(ValueError, match="is not a condition that the index understands") as error:
            search(index, embedding, where=condition)
        assert "\n" not in str(error.value)
    assert len(index) == 10


def test_words_raise_what_they_name(index, encoder):
    embedding = Question("a fox").embedding(encoder)
    order = [path for path, _ in naive(index, embedding)]
    last = next(path for path in reversed(order))
    found = search(index, embedding, top=3, words=last.split("/")[1].removesuffix(".png"))
    assert last in [row["path"] for row in found] and last not in order[:3]


def test_an_embedding_of_another_size(index):
    with pytest.raises(ValueError, match=r"shape \(7,\), but those of .* have shape \(16,\)"):
        search(index, torch.ones(7))


def test_large_indexes_are_searched_approximately(photos, encoder, tmp_path, monkeypatch):
    exact, _ = index_folder(tmp_path / "exact.index", photos, "tiny", encoder)
    assert describe(exact, exact=False).startswith("exact: the query is compared with all 10 embeddings")
    monkeypatch.setattr(build, "APPROXIMATE_FROM", 10)
    index, _ = index_folder(tmp_path / "approximate.index", photos, "tiny", encoder)
    embedding = Question("a fox").embedding(encoder)
    assert describe(index, exact=False).startswith("approximate: 10 embeddings of 8 bits")
    assert describe(index, exact=True).startswith("exact")
    paths = [row["path"] for row in search(exact, embedding, top=3)]
    assert [row["path"] for row in search(index, embedding, top=3)] == paths
    assert [row["path"] for row in search(index, embedding, top=3, exact=True)] == paths


def test_export_holds_every_image(index, tmp_path):
    export_index(index, tmp_path / "photos.parquet")
    table = pq.read_table(tmp_path / "photos.parquet")
    assert table.num_rows == 10 and "thumbnail" not in table.column_names
    rows = {row["path"]: row["embedding"] for row in index.rows(index.images, ["path", "embedding"]).to_pylist()}
    assert dict(zip(table["path"].to_pylist(), table["embedding"].to_pylist())) == rows


@pytest.mark.parametrize("damage", ["missing", "garbage", "other"])
def test_what_is_no_index(tmp_path, damage):
    path = tmp_path / "photos.index"
    if damage != "missing":
        path.mkdir()
        (path / "index.json").write_text({"garbage": "{", "other": '{"format": 99}'}[damage])
    error, message = {
        "missing": (FileNotFoundError, "is not an index of images: make one with `proclip index"),
        "garbage": (ValueError, "index.json is damaged"),
        "other": (ValueError, "not an index of this release"),
    }[damage]
    with pytest.raises(error, match=message):
        ImageIndex(path)
