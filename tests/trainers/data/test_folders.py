"""Folders: their splits stay apart, files of the system are no data, and nothing is left out without a word."""

import json
import os
from pathlib import Path

import datasets
import pytest

from tests.trainers.data.test_archives import pack, rows_of
from tests.trainers.tiny_pairs import picture
from trainers.data import PairSource, open_pairs
from trainers.data.folders import files_of_split, list_files
from trainers.data.text_files import read_texts
from trainers.evaluation.data.manifest import Classes, Data, Manifest
from trainers.evaluation.data.sources import open_data
from trainers.evaluation.scoring.tasks import prepare_task


def texts_of(folder: Path, split: str = "train", streaming: bool = False, **fields) -> list[str]:
    rows = open_pairs(PairSource(source=str(folder), split=split, streaming=streaming, **fields))
    rows = list(rows) if streaming else [rows[i] for i in range(len(rows))]
    return sorted(text for row in rows for text in row["text"])


LAYOUTS = {"beside": {}, "metadata": {}, "one metadata": {}, "shards": {"image_column": "png", "text_columns": "txt"}}
LAYOUTS |= {"named shards": LAYOUTS["shards"]}


def write(root: Path, layout: str, counts: dict[str, int]) -> dict:
    """Rows "SPLIT NUMBER" in folders or files called after splits. Returns the source's further fields."""
    whole, start = [], 0
    for split, count in counts.items():
        folder = root / split
        folder.mkdir(parents=True)
        texts = [f"{split} {i}" for i in range(count)]
        if "shards" in layout:
            members = {}
            for i, text in enumerate(texts):
                members |= rows_of(start + i, text=text.encode())
            path = folder / "0.tar" if layout == "shards" else root / f"cc3m-{split}-0000.tar"
            pack(path, members)
        else:
            for i, text in enumerate(texts):
                picture(start + i).save(folder / f"{i}.png")
                if layout == "beside":
                    (folder / f"{i}.txt").write_text(text)
            rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
            if layout == "metadata":
                (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
            whole += [{**row, "file_name": f"{split}/{row['file_name']}"} for row in rows]
        start += count
    if layout == "one metadata":
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, whole)))
    return LAYOUTS.get(layout, {})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_gives_its_own_rows(tmp_path, layout, streaming):
    fields = write(tmp_path, layout, {"train": 6, "val": 3})
    assert texts_of(tmp_path, "train", streaming, **fields) == [f"train {i}" for i in range(6)]
    for split in ("val", "validation", "dev"):
        assert texts_of(tmp_path, split, streaming, **fields) == [f"val {i}" for i in range(3)]
        assert list(read_texts(tmp_path, fields.get("text_columns"), split)) == [f"val {i}" for i in range(3)]
    for split in ("test", "unseen", "../train", ""):
        with pytest.raises(ValueError, match=r"has no split '.*'; it has train, validation"):
            texts_of(tmp_path, split, streaming, **fields)


@pytest.mark.parametrize("name", ["{}.csv", "captions_{}.csv", "data/{}-00000-of-00001.csv", "{}/rows.csv"])
def test_tables_called_after_splits(tmp_path, name):
    for split in ("train", "val"):
        file = tmp_path / name.format(split)
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"text\n{split} 1\n{split} 2\n")
    for split in ("train", "validation", "val"):
        assert list(read_texts(tmp_path, split=split)) == [f"{split[:5].replace('valid', 'val')} {i}" for i in (1, 2)]
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        read_texts(tmp_path, split="test")
    with pytest.raises(ValueError, match="read as files, whose only split is 'train', not 'validation'"):
        read_texts(tmp_path / name.format("val"), split="validation")


def test_images_beside_a_table_that_is_no_metadata(tmp_path):
    write(tmp_path, "no captions", {"train": 2})
    (tmp_path / "captions.csv").write_text("image,text\ntrain/0.png,a fox\ntrain/1.png,a cat\n")
    with pytest.raises(ValueError, match="holds images but no captions: .* or name the file with the captions"):
        texts_of(tmp_path)
    assert texts_of(tmp_path / "captions.csv") == ["a cat", "a fox"]


@pytest.mark.parametrize("layout", ["metadata", "one metadata", "beside"])
def test_a_folder_at_the_top_is_a_split_too(tmp_path, layout):
    write(tmp_path, layout, {"seen": 3, "unseen": 2})
    assert texts_of(tmp_path, "unseen") == ["unseen 0", "unseen 1"] and len(texts_of(tmp_path)) == 5
    write(tmp_path / "more", layout, {"train": 1, "unseen": 2})
    assert texts_of(tmp_path / "more", "unseen") == ["unseen 0", "unseen 1"]


def test_loose_images_of_one_metadata_are_in_no_split(tmp_path):
    write(tmp_path, "one metadata", {"train": 2, "val": 2})
    picture(1).save(tmp_path / "loose.png")
    file = tmp_path / "metadata.jsonl"
    file.write_text(file.read_text() + "\n" + json.dumps({"file_name": "loose.png", "text": "loose"}))
    file.write_text(file.read_text() + "\n" + json.dumps({"file_name": f"{tmp_path}/train/0.png", "text": "again"}))
    assert texts_of(tmp_path) == ["again", "train 0", "train 1"]
    assert texts_of(tmp_path, "val") == ["val 0", "val 1"]


def test_without_splits_all_is_train(tmp_path):
    write(tmp_path, "beside", {"birds": 2, "foxes": 2})
    assert len(texts_of(tmp_path)) == 4 and texts_of(tmp_path, "foxes") == ["foxes 0", "foxes 1"]
    with pytest.raises(
        ValueError, match="has no split 'test'; it has train, because nothing in it is called after a split"
    ):
        texts_of(tmp_path, "test")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ["data/train-00000-of-1.parquet", "my_train/x", "train/y", "train2017/z"]),
        ("validation", ["a/val/1", "cc3m-validation-0001.tar"]),
        ("test", ["eval/test/1", "test.csv"]),
        ("unseen", ["unseen/train/1"]),
    ],
)
def test_which_split_a_path_belongs_to(split, expected):
    files = [
        *(
            "data/train-00000-of-1.parquet",
            "my_train/x",
            "train/y",
            "train2017/z",
            "a/val/1",
            "cc3m-validation-0001.tar",
        ),
        *("eval/test/1", "test.csv", "unseen/train/1", "constraint.csv", "latest.csv"),
    ]
    if split == "train":
        expected = [file for file in expected if file != "my_train/x"] + ["unseen/train/1"]
    assert sorted(files_of_split(files, split, "here", names=True)) == sorted(expected)


def test_images_of_trains_are_no_split(tmp_path):
    for name in ("train_station", "beach"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "train 1.png")
        (tmp_path / name / "train 1.txt").write_text(name)
    assert texts_of(tmp_path) == ["beach", "train_station"]


def test_loose_files_beside_splits_are_told(tmp_path, caplog):
    write(tmp_path, "beside", {"train": 2, "test": 1})
    picture(1).save(tmp_path / "loose.png")
    assert texts_of(tmp_path) == ["train 0", "train 1"]
    assert "1 files such as loose.png are in no split and are not read" in caplog.text


def test_a_folder_from_a_mac_and_a_camera(tmp_path, caplog):
    picture(0).save(tmp_path / "A.JPG", "JPEG")
    (tmp_path / "A.TXT").write_text("\ufeffa cat", encoding="utf-8")
    picture(1).save(tmp_path / "b.avif", "AVIF")
    (tmp_path / "b.caption").write_text("a dog\na second dog")
    hidden = [
        "._A.JPG",
        "._A.TXT",
        ".DS_Store",
        "Thumbs.db",
        "@eaDir/A.JPG",
        "__MACOSX/c.jpg",
        "__MACOSX/c.txt",
        ".hidden/d.jpg",
    ]
    for name in hidden:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7\xb0")
    for name in ("e.heic", "e.txt", "f.txt"):
        (tmp_path / name).write_text("e")
    assert texts_of(tmp_path) == ["a cat", "a dog", "a second dog"] == list(read_texts(tmp_path))
    assert (
        "2 captions such as e.txt are not read, because no image of a known kind lies beside them, but 1 .heic"
        in caplog.text
    )


def test_captions_beside_images_in_json(tmp_path):
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.json").write_text(json.dumps({"caption": [f"a {i}", f"b {i}"], "url": "x"}))
    assert texts_of(tmp_path, text_columns="json.caption") == ["a 0", "a 1", "b 0", "b 1"]
    assert texts_of(tmp_path, streaming=True, text_columns="json.caption") == ["a 0", "a 1", "b 0", "b 1"]
    with pytest.raises(ValueError, match=r"no column 'text' .*; its columns are image, json"):
        texts_of(tmp_path)
    with pytest.raises(ValueError, match=r"no column 'json.captoin' .*; did you mean 'json.caption'\?"):
        texts_of(tmp_path, text_columns="json.captoin")


def test_captions_with_the_whole_name_of_the_image(tmp_path, caplog):
    for name, text in (("a.jpg", "a fox"), ("a.png", "a cat"), ("b.png", "a dog")):
        picture(1).save(tmp_path / name)
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "b.txt").write_text("another dog")
    assert texts_of(tmp_path) == ["a cat", "a dog", "a fox"] and "are not read" not in caplog.text


def test_what_lies_beside_the_data_is_told(tmp_path, caplog):
    write(tmp_path, "shards", {"train": 2})
    picture(1).save(tmp_path / "preview.png")
    assert texts_of(tmp_path, **LAYOUTS["shards"]) == ["train 0", "train 1"]
    assert "shards are read, and 1 images such as preview.png beside them are not" in caplog.text
    write(tmp_path / "few", "metadata", {"train": 2})
    picture(1).save(tmp_path / "few" / "train" / "more.png")
    assert texts_of(tmp_path / "few") == ["train 0", "train 1"]
    assert "at least 1 of 3 images have no row" in caplog.text


def test_a_saved_split_is_no_other(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    rows.save_to_disk(tmp_path / "plain")
    datasets.Dataset.from_dict({"text": ["a"]}, split="validation").save_to_disk(tmp_path / "named")
    assert list(read_texts(tmp_path / "plain")) == list(read_texts(tmp_path / "named", split="validation")) == ["a"]
    with pytest.raises(ValueError, match="plain has no split 'validation'; it has train"):
        read_texts(tmp_path / "plain", split="validation")
    with pytest.raises(ValueError, match="named has no split 'train'; it has validation"):
        read_texts(tmp_path / "named")


def test_files_of_the_hub_are_files_of_the_dataset(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: 1 / 0)
    for name, file in (
        ("owner/name", "https://example.org/a.csv"),
        ("owner/name", "zip://a.csv::https://example.org/a.zip"),
        ("owner/name", "/etc/passwd"),
        ("owner/name", "../../a.csv"),
        ("json", "secret.json"),
    ):
        for files in (file, [file]):
            with pytest.raises(ValueError, match="is not the name of a file within a dataset owner/name on the Hub"):
                open_pairs(PairSource(source=name, data_files=files))


def test_captions_that_cannot_be_read_are_broken_rows(tmp_path):
    for i, text in enumerate([b"a fox", b"caf\xe9", "a fox".encode("utf-16"), None]):
        picture(i).save(tmp_path / f"{i}.png")
        if text is not None:
            (tmp_path / f"{i}.txt").write_bytes(text)
    (tmp_path.parent / "secret.txt").write_text("a secret")
    (tmp_path / "3.txt").symlink_to(tmp_path.parent / "secret.txt")
    rows = open_pairs(PairSource(source=str(tmp_path), max_broken_fraction=1))
    assert {rows[i]["text"][0] for i in range(4)} == {"a fox"}
    assert rows.skipped().without_caption == 3
    messages = " ".join(rows.skipped().examples)
    assert "1.txt is not encoded as UTF-8: line 1, byte 4 is 0xE9" in messages
    assert "2.txt is not encoded as UTF-8: line 1 begins with the mark of UTF-16" in messages
    assert "'3.txt' lies outside of" in messages or "3.txt" in messages
    with pytest.raises(ValueError, match=r"1\.txt is not encoded as UTF-8"):
        list(read_texts(tmp_path))


@pytest.mark.parametrize("name", ["a.csv", "a.tar", "metadata.csv"])
def test_rows_that_are_a_link_out_of_the_folder_are_refused(tmp_path, name):
    (tmp_path / "private").write_text("file_name,image,text\n0.png,0.png,a secret\n")
    folder = tmp_path / "data"
    folder.mkdir()
    if name == "metadata.csv":
        picture(0).save(folder / "0.png")
    (folder / name).symlink_to(tmp_path / "private")
    for read in (texts_of, lambda path: list(read_texts(path, None))):
        with pytest.raises(ValueError, match=f"'{name}' lies outside of .*data, as it is a link"):
            read(folder)


def test_two_metadata_files_of_one_folder_are_refused(tmp_path):
    write(tmp_path, "metadata", {"train": 2})
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\n0.png,something else\n")
    with pytest.raises(ValueError, match=r"train has several metadata files \(metadata.jsonl, metadata.csv, metadata"):
        texts_of(tmp_path)


def test_images_without_captions_are_said_to_have_none(tmp_path):
    picture(0).save(tmp_path / "0.png")
    for read in (texts_of, lambda path: list(read_texts(path, None))):
        with pytest.raises(ValueError, match="holds images but no captions: put a metadata.jsonl there"):
            read(tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path, caplog):
    write(tmp_path, "beside", {"train": 2})
    os.mkfifo(tmp_path / "train" / "pipe.png")
    os.mkfifo(tmp_path / "train" / "pipe.txt")
    (tmp_path / "outside").symlink_to(tmp_path.parent)
    assert texts_of(tmp_path) == ["train 0", "train 1"]
    assert "pipe.png is not a file (a pipe, a device or a broken link) and is not read" in caplog.text
    assert "outside is a link to" in caplog.text and "out of the folder, and is not read" in caplog.text
    for name in ("a.csv", "a.tar", "a.parquet", "a.txt"):
        os.mkfifo(tmp_path / name)
        for read in (texts_of, lambda path: list(read_texts(path, None))):
            with pytest.raises(ValueError, match="is neither a file nor a folder, but a pipe or a device"):
                read(tmp_path / name)


def test_a_name_that_is_not_utf_8_is_refused(tmp_path):
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))).write_bytes(b"")
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    with pytest.raises(ValueError, match="is not UTF-8: rename the file"):
        texts_of(tmp_path)


def test_metadata_of_every_kind(tmp_path):
    for ending in ("jsonl", "csv", "parquet"):
        folder = tmp_path / ending
        (folder / "deep").mkdir(parents=True)
        picture(1).save(folder / "deep" / "1.png")
        rows = [{"file_name": "deep/1.png", "text": "007"}]
        if ending == "jsonl":
            (folder / "metadata.jsonl").write_text(json.dumps(rows[0]))
        elif ending == "csv":
            (folder / "METADATA.CSV").write_text("file_name;text\ndeep/1.png;007\n")
        else:
            datasets.Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")
        assert texts_of(folder) == ["007"] == list(read_texts(folder))
    (tmp_path / "csv" / "METADATA.CSV").write_text("name,text\ndeep/1.png,007\n")
    with pytest.raises(
        ValueError, match="METADATA.CSV has no column 'file_name' for the images; its columns are name, text"
    ):
        texts_of(tmp_path / "csv")


def test_tables_of_several_kinds_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "README.txt").write_text("about the data")
    assert list(read_texts(tmp_path)) == ["a"]
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    with pytest.raises(ValueError, match=r"holds tables of several kinds \(a.csv, b.jsonl\): name one of them"):
        read_texts(tmp_path)
    datasets.Dataset.from_dict({"text": ["c"]}).to_parquet(tmp_path / "c.parquet")
    assert list(read_texts(tmp_path)) == ["c"]


def test_folders_that_are_classes(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("fox", "cat"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture(i).save(tmp_path / split / name / f"{i}.png")
    manifest = Manifest(
        name="m",
        title="m",
        kind="zero_shot",
        group="own",
        data=Data(source=str(tmp_path)),
        columns={"image": "image", "label": "label"},
        classes=Classes(count=2, names="feature"),
        prompts=["a {}"],
    )
    task = prepare_task(manifest, open_data(manifest))
    assert task.texts == ["a cat", "a fox"] and task.identity[0] == [0, 0, 1, 1]


def test_files_are_listed_in_the_order_of_their_paths(tmp_path):
    for name in ("b/1.png", "a.png", "a/2.png", "a/10.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    whole = sorted(os.path.join(parent, name) for parent, _, names in os.walk(tmp_path) for name in names)
    assert [str(tmp_path / name) for name in list_files(tmp_path)] == whole
