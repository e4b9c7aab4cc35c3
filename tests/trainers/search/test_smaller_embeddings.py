"""An index of shorter or quantised embeddings: what it holds, what is found in it, and what is refused."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.trainers.search.conftest import write_photos
from trainers.compute.quantization import Quantization
from trainers.search import build
from trainers.search.build import index_folder
from trainers.search.export import export_index
from trainers.search.query import Question, describe, embed_image, search
from trainers.search.table import SETTINGS_FILE, ImageIndex


SETTINGS = {
    "shorter": (5, "float32"),
    "int8": (16, "int8"),
    "binary": (16, "binary"),
    "shorter int8": (5, "int8"),
    "shorter binary": (11, "binary"),
}


@pytest.fixture(scope="module")
def photos_of_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


@pytest.fixture(scope="module", params=list(SETTINGS))
def index(request, photos_of_module, encoder, tmp_path_factory) -> ImageIndex:
    dim, precision = SETTINGS[request.param]
    path = tmp_path_factory.mktemp("index") / "photos.index"
    index, _ = index_folder(path, photos_of_module, "tiny", encoder, truncate_dim=dim, precision=precision)
    assert (index.dim, index.precision) == (dim, precision)
    return index


def naive(index: ImageIndex, encoder, question: torch.Tensor) -> list[tuple[str, float]]:
    """Every image embedded by itself, cut, brought to unit length, stored, read, and compared."""
    paths = index.rows(index.images, ["path"])["path"].to_pylist()
    embeds = torch.stack(
        [F.normalize(embed_image(encoder, index.folder / path)[: index.dim], dim=0) for path in paths]
    )
    quantization = Quantization.calibrated(index.precision, embeds)
    found = F.normalize(quantization.decode(quantization.encode(embeds)), dim=1) @ question
    return sorted(zip(paths, found.tolist()), key=lambda pair: -pair[1])


@pytest.mark.parametrize("exact", [False, True])
def test_results_are_those_of_the_naive_search(index, encoder, exact):
    question = Question("a red fox", index.folder / "first/red.png").embedding(encoder, index.dim)
    assert question.shape == (index.dim,)
    found = search(index, question, top=10, exact=exact, columns=["path", "width"])
    expected = dict(naive(index, encoder, question))
    assert {row["path"] for row in found} == set(expected)
    scores = [row["score"] for row in found]
    assert scores == sorted(scores, reverse=True)
    # Batches of another size round otherwise, which may move a value to the next of 255 steps.
    atol = 2e-3 if index.precision == "int8" else 1e-5
    np.testing.assert_allclose(scores, [expected[row["path"]] for row in found], atol=atol)


def test_conditions_and_words(index, encoder):
    question = Question("a fox").embedding(encoder, index.dim)
    found = search(index, question, where="width >= 15 AND path LIKE 'first/%'")
    assert {row["path"] for row in found} == {"first/white.png", "first/black.png"}
    assert search(index, question, where="width > 1000") == []
    with pytest.raises(ValueError, match="is not a condition that the index understands"):
        search(index, question, where="colour = 'red'")
    *_, last = (row["path"] for row in search(index, question, top=10))
    found = search(index, question, top=3, words=last.split("/")[1].removesuffix(".png"))
    assert last in [row["path"] for row in found]
    assert found[0]["score"] <= 2 / 61


def test_a_second_run_keeps_size_and_precision(index, encoder, photos_of_module):
    again, summary = index_folder(index.path, photos_of_module, "tiny", encoder)
    assert (again.dim, again.precision, summary.unchanged) == (index.dim, index.precision, 10)
    for other in ({"truncate_dim": 7}, {"precision": {"binary": "int8"}.get(index.precision, "binary")}):
        with pytest.raises(
            ValueError, match=f"holds embeddings of {index.dim} dimensions in {index.precision}, not of"
        ):
            index_folder(index.path, photos_of_module, "tiny", encoder, **other)


def test_export_says_how_to_read_it(index, tmp_path):
    export_index(index, tmp_path / "photos.parquet")
    table = pq.read_table(tmp_path / "photos.parquet")
    codes = np.array(table["embedding"].to_pylist())
    stored = index.rows(index.images, ["path", "embedding"]).to_pylist()
    assert dict(zip(table["path"].to_pylist(), codes.tolist())) == {row["path"]: row["embedding"] for row in stored}
    if index.precision == "float32":
        assert not table.schema.metadata
        return
    quantization = Quantization.from_dict(json.loads(table.schema.metadata[b"quantization"]))
    assert (quantization.precision, quantization.dim) == (index.precision, index.dim)
    assert quantization.decode(table["embedding"].combine_chunks().flatten().to_numpy().reshape(10, -1)).shape == (
        10,
        index.dim,
    )


def test_more_dimensions_than_the_model_has(photos, encoder, tmp_path):
    with pytest.raises(ValueError, match="truncate_dim=17, but the embeddings of tiny have 16 dimensions"):
        index_folder(tmp_path / "photos.index", photos, "tiny", encoder, truncate_dim=17)
    assert not (tmp_path / "photos.index" / SETTINGS_FILE).exists()


def test_the_ranges_follow_a_folder_that_was_too_small(photos, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "MIN_CALIBRATED", 12)
    path = tmp_path / "photos.index"
    first, _ = index_folder(path, photos, "tiny", encoder, precision="int8")
    assert first.settings["num_calibrated"] == 10
    for number in range(5):
        Image.new("RGB", (9, 9), (50 * number, 99, 7)).save(photos / f"{number}.png")
    second, summary = index_folder(path, photos, "tiny", encoder)
    assert (summary.total, summary.embedded, second.settings["num_calibrated"]) == (15, 15, 15)
    fresh, _ = index_folder(tmp_path / "fresh.index", photos, "tiny", encoder, precision="int8")
    stored = [
        sorted((row["path"], row["embedding"]) for row in one.rows(one.images, ["path", "embedding"]).to_pylist())
        for one in (second, fresh)
    ]
    assert stored[0] == stored[1]
    Image.new("RGB", (9, 9), "pink").save(photos / "pink.png")
    third, summary = index_folder(path, photos, "tiny", encoder)
    assert (summary.embedded, summary.unchanged, third.settings["ranges"]) == (1, 15, second.settings["ranges"])


def test_an_index_of_an_earlier_release(photos, encoder, tmp_path):
    """It says nothing of precision, and holds float32."""
    path = tmp_path / "photos.index"
    index_folder(path, photos, "tiny", encoder)
    settings = json.loads((path / SETTINGS_FILE).read_text())
    for name in ("precision", "ranges", "num_calibrated"):
        del settings[name]
    (path / SETTINGS_FILE).write_text(json.dumps(settings))
    index, summary = index_folder(path, photos, "tiny", encoder)
    assert (index.precision, summary.unchanged) == ("float32", 10)
    assert len(search(index, Question("a fox").embedding(encoder), top=3)) == 3


def test_binary_embeddings_have_an_approximate_index(photos, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "APPROXIMATE_FROM", 5)
    index, _ = index_folder(tmp_path / "binary.index", photos, "tiny", encoder, precision="binary")
    assert describe(index, exact=False).startswith("approximate: 10 embeddings of 1 bit")
    assert describe(index, exact=True).startswith("exact: the signs of the query")
    question = Question("a fox").embedding(encoder)
    approximate, exact = (search(index, question, top=3, exact=exact) for exact in (False, True))
    assert approximate == exact
    index, _ = index_folder(tmp_path / "int8.index", photos, "tiny", encoder, precision="int8")
    assert describe(index, exact=False) == "exact: the query is compared with all 10 embeddings"
