"""Columns and splits of tables: nested ones, missing ones, Karpathy's splits, and images named as seen from the table."""

import json

import datasets
import pytest

from tests.trainers.data.test_tables import READERS, TEXTS, by_number, karpathy, streamed, with_images
from tests.trainers.tiny_pairs import picture
from trainers.data import PairSource, iter_texts, open_pairs
from trainers.data.tables import TableFile
from trainers.data.text_files import read_texts
from trainers.evaluation.data.manifest import own_images
from trainers.evaluation.data.sources import open_data
from trainers.evaluation.scoring.tasks import prepare_task


def test_a_split_of_karpathys_file(tmp_path):
    images = [("0.png", "train"), ("1.png", "restval"), ("2.png", "val"), ("3.png", "test")]
    rows = [{"filename": name, "split": split, "sentences": [{"raw": split}]} for name, split in images]
    file = with_images(tmp_path) / "dataset_coco.json"
    file.write_text(json.dumps({"images": rows, "dataset": "coco"}))
    for read in (by_number, streamed, READERS["embed"]):
        assert read(file, "train") == ["train"] and read(file, "val") == ["val"]
        assert read(file, "train+restval") == ["train", "restval"]
        for split in ("validation", "train+rest"):
            with pytest.raises(
                ValueError, match=r"dataset_coco.json has no images of the split .*; it has train, restval, val, test"
            ):
                read(file, split)


def test_images_of_coco_by_the_folder_of_their_split(tmp_path):
    """COCO as it is unpacked: Karpathy's file has a folder of its own, and names `val2014/COCO_val2014_1.jpg`."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2014").mkdir()
    file = tmp_path / "annotations" / "dataset_coco.json"
    file.write_text(karpathy(["a fox", "a cat"], filepath="val2014"))
    with_images(tmp_path / "val2014", 2)
    for folder in (tmp_path, tmp_path / "val2014"):
        source = PairSource(source=str(file), split="test", text_columns="caption", image_folder=str(folder))
        rows = open_pairs(source)
        assert [rows[i]["text"] for i in range(2)] == [["a fox"], ["a cat"]]
        assert rows[1]["image"].getpixel((0, 0)) == picture(1).getpixel((0, 0))
    with pytest.raises(ValueError, match=r"2 broken .* there is no file|1 broken .* there is no file"):
        open_pairs(PairSource(source=str(file), split="test", text_columns="caption"))[0]


def test_plain_texts_have_the_column_text(tmp_path):
    contents = {
        "a.txt": "a fox\n\n b\u2028c \n",
        "a.json": '["a fox", " b\\u2028c "]',
        "a.jsonl": '"a fox"\n" b\\u2028c "\n',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        source = PairSource(source=str(tmp_path / name))
        assert list(read_texts(tmp_path / name)) == list(iter_texts(source)) == ["a fox", " b\u2028c "]
        assert open_pairs(source, images=False)[1] == {"text": [" b\u2028c "]}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_misspelt_nested_column_is_refused_with_the_nearest(tmp_path, streaming):
    rows = [{"image": f"{i}.png", "json": {"caption": TEXTS[i], "url": "x"}} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.json", "a.parquet"):
        source = PairSource(source=str(tmp_path / name), text_columns="json.captoin", streaming=streaming)
        with pytest.raises(
            ValueError, match=rf"{name} has no column 'json.captoin' .*; did you mean 'json.caption'\?"
        ):
            open_pairs(source, images=False)
    with pytest.raises(
        ValueError, match=r"no column 'jsn.caption' .*; its columns are image, json; did you mean 'json'\?"
    ):
        open_pairs(PairSource(source=str(tmp_path / "a.json"), text_columns="jsn.caption"), images=False)


def test_a_column_reaches_into_objects_and_lists(tmp_path):
    """As of ShareGPT4V's and LLaVA's files."""
    talk = [[{"value": "Describe it."}, {"value": text}] for text in TEXTS]
    rows = [{"image": f"{i}.png", "conversations": some, "a.b": "dot"} for i, some in enumerate(talk)]
    file = with_images(tmp_path) / "a.json"
    file.write_text(json.dumps(rows))
    column = "conversations.1.value"
    assert list(read_texts(file, column)) == TEXTS
    opened = open_pairs(PairSource(source=str(file), text_columns=[column, "a.b"]))
    assert [opened[i]["text"] for i in range(4)] == [[text, "dot"] for text in TEXTS]
    manifest = own_images(tmp_path, file, "image", column)
    assert prepare_task(manifest, open_data(manifest)).texts == TEXTS
    with pytest.raises(ValueError, match=r"did you mean 'conversations.1.value'\?"):
        read_texts(file, "conversations.1.valu")


def test_a_file_that_lacks_a_column_of_the_others_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n0.png,a\n")
    (tmp_path / "b.csv").write_text("image,captions\n1.png,b\n")
    with pytest.raises(
        ValueError, match=r"b.csv has no column 'caption', which .*a.csv has; its columns are image, captions"
    ):
        open_pairs(PairSource(source=str(tmp_path / "*.csv"), text_columns="caption"))


def test_tables_in_several_folders_name_images_as_seen_from_their_own(tmp_path):
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        with_images(folder, 2)
        (folder / "rows.csv").write_text(f"image,caption\n1.png,{name} 1\n")
    picture(9).save(tmp_path / "b" / "1.png")
    rows = open_pairs(PairSource(source=str(tmp_path / "*" / "rows.csv"), text_columns="caption"))
    shown = [(rows[i]["text"], rows[i]["image"].getpixel((0, 0))[0]) for i in range(2)]
    assert shown == [(["a 1"], 1), (["b 1"], 9)]


def test_the_columns_of_a_table(tmp_path):
    (tmp_path / "a.csv").write_text(",image,caption\n0,0.png,a\n")
    assert TableFile(str(tmp_path / "a.csv")).columns() == ["image", "caption"]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"b": 2}\n')
    assert TableFile(str(tmp_path / "a.jsonl")).columns() == ["a", "b"]
    assert TableFile(str(tmp_path / "a.jsonl")).num_rows() == 2
