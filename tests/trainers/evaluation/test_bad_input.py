"""Data and models that are not as they should be: each a clear error, or a number with what there is to know about it."""

import dataclasses
import io
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.modeling_proclip.test_images import file_of, png
from tests.trainers.evaluation.stand_ins import ColorModel, ColorWorld
from trainers.evaluation.data.manifest import Manifest, parse_manifest
from trainers.evaluation.runner import evaluate
from trainers.evaluation.scoring.metrics import mean_per_class_accuracy, retrieval_ranks, zero_shot_ranks


def save_rows(folder: Path, rows: list[dict], **features) -> str:
    names = list(rows[0]) if rows else list(features)
    kinds = {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string")), **features}
    columns = {name: [row[name] for row in rows] for name in names}
    columns["image"] = [{"bytes": picture, "path": None} for picture in columns["image"]]
    table = datasets.Dataset.from_dict(columns, features=datasets.Features({name: kinds[name] for name in names}))
    path = folder / "data.parquet"
    table.to_parquet(path)
    return str(path)


def retrieval(source: str, **changes) -> Manifest:
    content = {"name": "mine", "title": "Mine", "kind": "retrieval", "group": "own", "data": {"source": source}}
    return parse_manifest({**content, "columns": {"image": "image", "captions": "captions"}, **changes}, "test")[0]


def zero_shot(source: str, names: list[str], **classes) -> Manifest:
    return retrieval(
        source,
        kind="zero_shot",
        columns={"image": "image", "label": "label"},
        classes={"count": len(names), "names": names, **classes},
        prompts=["a {}"],
    )


class Bench:
    def __init__(self, folder: Path):
        self.folder, self.world = folder, ColorWorld()

    def pair(self, text: str, shown: str | None = None, shade: int = 0) -> dict:
        return {"image": self.world.picture(shown or text, shade), "captions": [text]}

    def run(self, manifest: Manifest) -> dict:
        (results,) = evaluate([self.world.encoder()], [manifest], self.folder / "out", progress=False)
        return results["tasks"][0]

    def refused(self, manifest: Manifest, error: type[Exception] = ValueError) -> str:
        with pytest.raises(error) as raised:
            self.run(manifest)
        assert not list(self.folder.glob("out/items/*"))
        return str(raised.value)


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def test_an_empty_set_and_one_image(bench: Bench, tmp_path):
    empty = datasets.Features(image=datasets.Image(), captions=datasets.List(datasets.Value("string")))
    datasets.Dataset.from_dict({"image": [], "captions": []}, features=empty).save_to_disk(tmp_path / "empty")
    assert "empty has no rows" in bench.refused(retrieval(str(tmp_path / "empty")))
    (tmp_path / "captions.csv").write_text("image,captions\n")
    own = retrieval(
        str(tmp_path), data={"source": str(tmp_path), "layout": "caption_file", "caption_file": "captions.csv"}
    )
    assert "has no rows" in bench.refused(own)
    datasets.Dataset.from_dict({"image": [], "captions": []}, features=empty).to_parquet(tmp_path / "empty.parquet")
    assert "mine: " in bench.refused(retrieval(str(tmp_path / "empty.parquet")))
    source = save_rows(tmp_path, [bench.pair("a fox")])
    assert "one row alone is always found" in bench.refused(retrieval(source))


def test_empty_captions_are_named(bench: Bench, tmp_path):
    rows = [bench.pair("a fox"), bench.pair("a boat"), {**bench.pair("a house"), "captions": ["a house", " \n"]}]
    assert "benchmark mine, data.parquet, row 3: a caption is empty" in bench.refused(
        retrieval(save_rows(tmp_path, rows))
    )
    rows[2]["captions"] = []
    assert "benchmark mine, data.parquet, row 3: there is no caption" in bench.refused(
        retrieval(save_rows(tmp_path, rows))
    )
    rows[2]["captions"] = ["a house", None]
    assert "benchmark mine, data.parquet, row 3: a caption is not text, but None" in bench.refused(
        retrieval(save_rows(tmp_path, rows))
    )


def test_corrupt_and_missing_images_are_named(bench: Bench, tmp_path):
    rows = [bench.pair("a fox"), bench.pair("a boat"), bench.pair("a house")]
    rows[1]["image"] = rows[1]["image"][:40]
    message = bench.refused(retrieval(save_rows(tmp_path, rows)))
    assert "benchmark mine, data.parquet, row 2: the image in column 'image' cannot be read" in message
    rows[1]["image"] = b"no picture at all"
    assert "row 2: the image in column 'image' cannot be read" in bench.refused(retrieval(save_rows(tmp_path, rows)))
    table = datasets.Dataset.from_dict({"image": ["0.png", "1.png"], "captions": [["a"], ["b"]]})
    table.to_parquet(tmp_path / "data.parquet")
    (tmp_path / "0.png").write_bytes(bench.world.picture("a"))
    message = bench.refused(retrieval(str(tmp_path / "data.parquet")), FileNotFoundError)
    assert f"row 2: the image in column 'image' (1.png): there is no file {tmp_path / '1.png'}" in message
    (tmp_path / "1.png").write_bytes(bench.world.picture("b"))
    assert bench.run(retrieval(str(tmp_path / "data.parquet")))["value"] == 1.0


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("name", "image", "reason"),
    [
        ("page.jpg", b"<html>not found</html>", "not an image"),
        (
            "comment.png",
            png(8, 8, (b"zTXt", b"k\0\0" + zlib.compress(b"A" * 2_000_000))),
            "Decompressed data too large",
        ),
        ("bomb.png", png(13_370, 13_370), "decompression bomb"),
        ("strip.png", png(30_000, 1), "a strip of 30000 x 1"),
        ("float.tif", file_of(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "floats"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_cannot_be_decoded_is_named_with_its_file(bench: Bench, tmp_path, name, image, reason, listed):
    """A row's image may stand in a list of one, whose images `datasets` would decode by itself."""
    (tmp_path / name).write_bytes(image)
    (tmp_path / "good.png").write_bytes(bench.world.picture("a"))
    files = [str(tmp_path / "good.png"), str(tmp_path / name)]
    kind = datasets.List(datasets.Image()) if listed else datasets.Image()
    features = datasets.Features(image=kind, captions=datasets.List(datasets.Value("string")))
    rows = {"image": [[file] if listed else file for file in files], "captions": [["a"], ["b"]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    message = bench.refused(retrieval(str(tmp_path / "data")))
    assert message.startswith(f"benchmark mine, row 1: the image in column 'image' ({name}) cannot be read (")
    assert reason in message and "\n" not in message


def test_images_of_every_mode_are_read(bench: Bench, tmp_path):
    rows = [bench.pair("a fox"), bench.pair("a boat")]
    for mode, color in (("L", 3), ("RGBA", (1, 2, 3, 0)), ("P", 7), ("I;16", 3000), ("CMYK", (0, 0, 0, 9)), ("1", 1)):
        file = io.BytesIO()
        Image.new(mode, (4, 4), color).save(file, "TIFF" if mode == "CMYK" else "PNG")
        rows.append({"image": file.getvalue(), "captions": [f"mode {mode}"]})
    task = bench.run(retrieval(save_rows(tmp_path, rows)))
    assert task["dataset"]["num_items"] == 8 and task["metrics"]["t2i_r@10"] == 1.0


def test_duplicate_images_tie_and_are_counted(bench: Bench, tmp_path):
    rows = [
        bench.pair("a fox"),
        bench.pair("a second fox", shown="a fox"),
        bench.pair("a boat"),
        bench.pair("a house"),
    ]
    task = bench.run(retrieval(save_rows(tmp_path, rows)))
    # The fox's picture is there twice: its caption ties with the other one. The second fox's caption is found by nobody.
    assert task["metrics"]["t2i_r@1"] <= 3 / 4 and task["metrics"]["i2t_r@1"] == 3 / 4
    assert task["protocol"]["num_repeated_images"] == 1
    (note,) = task["notes"]
    assert note.startswith("1 images are byte for byte another one: they tie")
    rows[1] = bench.pair(
        "a second fox", shown="a fox", shade=9
    )  # other bytes, the same embedding: the tie stays, the count does not
    again = bench.run(retrieval(save_rows(tmp_path, rows)))
    assert again["metrics"] == task["metrics"] and again["protocol"]["num_repeated_images"] == 0


def test_repeated_captions_are_told(bench: Bench, tmp_path):
    rows = [bench.pair("a fox"), bench.pair("a fox", shown="a boat"), bench.pair("a house")]
    task = bench.run(retrieval(save_rows(tmp_path, rows)))
    assert task["notes"][0].startswith("1 captions are word for word another one")
    assert task["metrics"]["i2t_r@1"] == 1 / 3


def test_classes_without_images_and_with_one_name(bench: Bench, tmp_path):
    def row(label: int, shown: str, shade: int = 0) -> dict:
        return {"image": bench.world.picture(f"a {shown}", shade), "label": label}

    rows = [row(0, "cat"), row(0, "dog", 1), row(1, "dog", 2), row(0, "cat", 3), row(0, "cat", 4)]
    source = save_rows(tmp_path, rows, label=datasets.Value("int64"))
    task = bench.run(zero_shot(source, ["cat", "dog", "owl"]))
    assert task["metrics"]["top1"] == 4 / 5
    assert task["metrics"]["mean_per_class"] == (3 / 4 + 1) / 2, "over the two classes that have pictures"
    assert task["protocol"]["num_classes_without_images"] == 1
    assert task["notes"][0].startswith("1 of 3 classes have no images (such as 'owl')")
    task = bench.run(zero_shot(source, ["cat", "dog", "cat"]))
    assert task["metrics"]["top1"] == 1 / 5, "two classes have one name: none of their pictures can be right"
    assert any(note.startswith("1 class names are also another class's") for note in task["notes"])
    with pytest.raises(ValueError, match="at least 2 classes"):
        zero_shot(source, ["cat"])


def test_labels_that_are_no_class_are_named(bench: Bench, tmp_path):
    rows = [{"image": bench.world.picture(f"a {name}"), "label": name} for name in ("cat", "dog", "crow")]
    source = save_rows(tmp_path, rows, label=datasets.Value("string"))
    message = bench.refused(zero_shot(source, ["cat", "dog"]))
    assert "row 3: the label is 'crow', which is neither a whole number below 2 nor the name of a class" in message
    assert bench.run(zero_shot(source, ["cat", "dog", "crow"]))["value"] == 1.0
    for wrong in (2, -1):
        rows = [{**row, "label": number} for row, number in zip(rows, (0, 1, wrong), strict=True)]
        source = save_rows(tmp_path, rows, label=datasets.Value("int64"))
        with pytest.raises(ValueError, match=f"row 3: the label is {wrong}"):
            bench.run(zero_shot(source, ["cat", "dog"]))
    named = zero_shot(source, ["cat", "dog"])
    named = dataclasses.replace(named, classes=dataclasses.replace(named.classes, names="feature"))
    with pytest.raises(ValueError, match="has no class names of its own"):
        bench.run(named)


def test_class_names_from_a_file_beside_the_data(bench: Bench, tmp_path):
    rows = [{"image": bench.world.picture(f"a {name}"), "label": i} for i, name in enumerate(("red cat", "dog"))]
    source = save_rows(tmp_path, rows, label=datasets.Value("int64"))
    manifest = zero_shot(source, ["cat", "dog"])
    classes = dataclasses.replace(manifest.classes, names="source:classnames.txt", edit=[["_", " "]])
    manifest = dataclasses.replace(manifest, classes=classes)
    assert "classnames.txt, which names the classes" in bench.refused(manifest, FileNotFoundError)
    (tmp_path / "classnames.txt").write_text("red_cat\ndog\n")
    assert bench.run(manifest)["value"] == 1.0
    (tmp_path / "classnames.txt").write_text("red_cat\n")
    with pytest.raises(ValueError, match="has 1 classes where the manifest states 2"):
        bench.run(manifest)


@pytest.mark.parametrize("side", ["image", "text"])
def test_embeddings_that_are_not_finite_name_their_item(bench: Bench, tmp_path, side: str):
    class Broken(ColorModel):
        def vectors(self, numbers):
            found = super().vectors(numbers)
            found[[number == bad for number in numbers]] = float("nan")
            return found

        def get_image_features(self, pixel_values):
            found = super().get_image_features(pixel_values)
            return torch.nan_to_num(found) if side == "text" else found

        def get_text_features(self, **tokens):
            found = super().get_text_features(**tokens)
            return torch.nan_to_num(found) if side == "image" else found

    from tests.trainers.evaluation.stand_ins import number_of_tokens

    bench.world.model = Broken()
    bad = number_of_tokens(bench.world.tokenizer("a boat")["input_ids"])
    source = save_rows(tmp_path, [bench.pair("a fox"), bench.pair("a boat"), bench.pair("a house")])
    message = bench.refused(retrieval(source))
    item = (
        "benchmark mine, data.parquet, row 2: the image in column 'image'" if side == "image" else "the text 'a boat'"
    )
    assert f"the embedding of {item} is not finite" in message and "--model-dtype float32" in message


def test_what_was_embedded_before_an_interruption_is_kept(bench: Bench, tmp_path):
    rows = [bench.pair(f"caption {i}") for i in range(10)]
    manifest = retrieval(save_rows(tmp_path, rows))
    embed = ColorModel.get_image_features

    def interrupted(pixel_values: torch.Tensor) -> torch.Tensor:
        if bench.world.model.seen_images >= 6:
            raise KeyboardInterrupt
        return embed(bench.world.model, pixel_values)

    def run() -> None:
        evaluate([bench.world.encoder()], [manifest], tmp_path / "out", progress=False, batch_size=3)

    bench.world.model.get_image_features = interrupted
    with pytest.raises(KeyboardInterrupt):
        run()
    del bench.world.model.get_image_features
    assert bench.world.model.seen_images == 6
    run()
    assert bench.world.model.seen_images == 10


def test_damaged_caches_name_their_file(bench: Bench, tmp_path):
    manifest = retrieval(save_rows(tmp_path, [bench.pair("a fox"), bench.pair("a boat")]))
    bench.run(manifest)
    (shard,) = tmp_path.glob("out/features/images-*/shard-*")
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{shard} is damaged: .* Delete this file and evaluate again"):
        bench.run(manifest)
    shard.unlink()
    assert bench.run(manifest)["value"] == 1.0


def test_sources_of_an_unknown_kind_and_split(bench: Bench, tmp_path):
    (tmp_path / "data.docx").write_text("no table")
    assert "data.docx is of an unknown kind" in bench.refused(retrieval(str(tmp_path / "data.docx")))
    rows = {"image": ["a.png"], "captions": [["a"]]}
    datasets.DatasetDict(valid=datasets.Dataset.from_dict(rows)).save_to_disk(tmp_path / "dict")
    assert "has no split 'test'; it has valid" in bench.refused(retrieval(str(tmp_path / "dict")))
    lone = tmp_path / "lone"
    (lone / "image").mkdir(parents=True)
    (lone / "caption").mkdir()
    (lone / "image" / "1.jpg").write_bytes(b"")
    folders = retrieval(str(lone), data={"source": str(lone), "layout": "caption_folder"})
    assert "under every name, but '1' has only one of them" in bench.refused(folders)


# The rank functions that the engine is built on


def test_ranks_equal_sorting_and_other_libraries():
    from sklearn.metrics import top_k_accuracy_score
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 12, generator=generator)
    own = torch.cat([torch.arange(60), torch.randint(0, 60, (90,), generator=generator)])
    texts = images[own] + 1.2 * torch.randn(150, 12, generator=generator)
    image_ranks, text_ranks = retrieval_ranks(images, texts, own)
    scores = (
        torch.nn.functional.normalize(images.double(), dim=-1)
        @ torch.nn.functional.normalize(texts.double(), dim=-1).T
    )
    for image in range(60):
        order = [int(text) for text in scores[image].argsort(descending=True)]
        first = next(place for place, text in enumerate(order) if own[text] == image)
        assert image_ranks[image] == first, "wrong texts before the first right one"
    assert 0 < int((image_ranks > 0).sum()) < 60 and 0 < int((text_ranks > 0).sum()) < 150
    relevant = own[None, :] == torch.arange(60)[:, None]
    for k in (1, 5, 10):
        ours = float((text_ranks < k).double().mean())
        assert ours == pytest.approx(top_k_accuracy_score(own, scores.T.numpy(), k=k, labels=range(60)), abs=1e-12)
        index = torch.arange(150)[:, None].expand(150, 60).reshape(-1)
        recall = RetrievalRecall(top_k=k)(scores.T.reshape(-1).float(), relevant.T.reshape(-1), indexes=index)
        assert ours == pytest.approx(float(recall), abs=1e-6)
        ours = float((image_ranks < k).double().mean())
        index = torch.arange(60)[:, None].expand(60, 150).reshape(-1)
        hits = RetrievalHitRate(top_k=k)(scores.reshape(-1).float(), relevant.reshape(-1), indexes=index)
        assert ours == pytest.approx(float(hits), abs=1e-6), "one of several captions is enough"


def test_predictions_and_mean_per_class_agree_with_sklearn():
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    generator = torch.Generator().manual_seed(1)
    classes = torch.randn(7, 10, generator=generator)
    labels = torch.randint(0, 6, (80,), generator=generator)  # class 6 has no pictures
    images = classes[labels] + 1.5 * torch.randn(80, 10, generator=generator)
    ranks, predictions = zero_shot_ranks(images, classes, labels)
    assert float((ranks == 0).double().mean()) == pytest.approx(accuracy_score(labels, predictions))
    assert 0.2 < accuracy_score(labels, predictions) < 0.95
    kept = [i for i in range(80) if int(predictions[i]) != 6]
    expected = balanced_accuracy_score(labels[kept], predictions[kept])
    assert mean_per_class_accuracy(ranks[kept] == 0, labels[kept]) == pytest.approx(expected)
    # By hand: class 0 has 1 of 2, class 2 has 3 of 3, class 1 none to have.
    correct = torch.tensor([True, False, True, True, True])
    assert mean_per_class_accuracy(correct, [0, 0, 2, 2, 2]) == 0.75
    with pytest.raises(ValueError, match="of equal length and not empty"):
        mean_per_class_accuracy(correct, [0, 0])


def test_a_tie_is_predicted_as_the_wrong_class():
    classes = torch.eye(3)
    images = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.5], [0.0, 0.0, 1.0]])
    ranks, predictions = zero_shot_ranks(images, classes, [0, 0, 2])
    assert ranks.tolist() == [1, 0, 0] and predictions.tolist() == [1, 0, 2]
