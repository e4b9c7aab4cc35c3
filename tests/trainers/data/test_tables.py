"""Tables of every kind: captions stay text to the letter, and what would be lost or changed is refused by file and line, in all three commands."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.trainers.tiny_pairs import picture
from trainers.data import PairSource, open_pairs
from trainers.data.text_files import read_texts
from trainers.evaluation.data.manifest import own_images
from trainers.evaluation.data.sources import open_data
from trainers.evaluation.scoring.tasks import prepare_task


def by_number(file: Path, split: str) -> list[str]:
    rows = open_pairs(PairSource(source=str(file), text_columns="caption", split=split))
    return [text for i in range(len(rows)) for text in rows[i]["text"]]


def streamed(file: Path, split: str) -> list[str]:
    source = PairSource(
        source=str(file),
        text_columns="caption",
        split=split,
        streaming=True,
        shuffle_buffer_size=1,
        max_broken_fraction=0,
    )
    return [text for row in open_pairs(source) for text in row["text"]]


def evaluated(file: Path, split: str) -> list[str]:
    manifest = own_images(file.parent, file, "image", "caption")
    return prepare_task(manifest, open_data(manifest)).texts


# What the three commands read the captions of a file with.
READERS = {
    "train, by number": by_number,
    "train, streaming": streamed,
    "embed": lambda file, split: list(read_texts(file, "caption", split)),
    "evaluate": evaluated,
}


def with_images(folder: Path, count: int = 4) -> Path:
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
    return folder


def table(captions: list[str], delimiter: str = ",", ending: str = "\n") -> str:
    rows = [("image", "caption"), *((f"{i}.png", caption) for i, caption in enumerate(captions))]
    return "".join(delimiter.join(row) + ending for row in rows)


def objects(captions: list[str], **more) -> list[dict]:
    return [{"image": f"{i}.png", "caption": caption, **more} for i, caption in enumerate(captions)]


def coco(captions: list[str]) -> str:
    images = [{"id": 7 * i, "file_name": f"{i}.png"} for i in range(len(captions))]
    annotations = [{"id": i, "image_id": 7 * i, "caption": caption} for i, caption in enumerate(captions)]
    return json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations[::-1]})


def karpathy(captions: list[str], split: str = "test", **more) -> str:
    images = [
        {"filename": f"{i}.png", "split": split, "sentences": [{"raw": caption, "tokens": []}], **more}
        for i, caption in enumerate(captions)
    ]
    unused = {"filename": "0.png", "split": "restval", "sentences": [{"raw": "of another split"}]}
    return json.dumps({"dataset": "flickr30k", "images": [*images, unused]})


WORDS = ["NA", "null", "None", "nan"]
NUMBERS = ["007", "12", "1e5", "3.10"]
DATES = [f"2024-01-0{i}T10:00:00" for i in range(1, 5)]
TEXTS = ["a fox", "ein Übungsfuchs", "狐狸 🦊", "a 5\" nail, it's 50%"]

FILES = {
    "csv": lambda some: ("a.csv", table([f'"{text.replace(chr(34), chr(34) * 2)}"' for text in some])),
    "csv from pandas": lambda some: (
        "a.csv",
        ",image,caption\n" + "".join(f'{i},{i}.png,"{t.replace(chr(34), chr(34) * 2)}"\n' for i, t in enumerate(some)),
    ),
    "CSV of Windows": lambda some: ("A.CSV", table([text.replace(",", " ") for text in some], ",", "\r\n")),
    "semicolons": lambda some: ("a.csv", table(some, ";")),
    "bars": lambda some: ("results.csv", table(some, "| ")),
    "tabs": lambda some: ("a.tsv", table(some, "\t")),
    "TABS": lambda some: ("A.TSV", table(some, "\t")),
    "mark": lambda some: ("a.tsv", "\ufeff" + table(some, "\t")),
    "json lines": lambda some: ("a.jsonl", "".join(json.dumps(row) + "\n" for row in objects(some))),
    "JSON LINES": lambda some: (
        "A.JSONL",
        "\ufeff" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in objects(some)),
    ),
    "json": lambda some: ("a.json", json.dumps(objects(some))),
    "numbered json": lambda some: ("a.json", json.dumps({str(i): row for i, row in enumerate(objects(some))})),
    "lines as json": lambda some: ("a.json", "\n".join(json.dumps(row) for row in objects(some))),
    "lists": lambda some: ("a.json", json.dumps([{**row, "caption": [row["caption"]]} for row in objects(some)])),
    "coco": lambda some: ("captions_val2017.json", coco(some)),
    "karpathy": lambda some: ("dataset_flickr30k.json", karpathy(some)),
    "token": lambda some: ("results_20130124.token", "".join(f"{i}.png#{i}\t{text}\n" for i, text in enumerate(some))),
    "Kaggle's Flickr8k": lambda some: ("captions.txt", table([text.replace(",", " ") for text in some])),
    "Flickr8k": lambda some: ("Flickr8k.token.txt", "".join(f"{i}.png#0\t{text}\r\n" for i, text in enumerate(some))),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("captions", [WORDS, NUMBERS, DATES, TEXTS], ids=["words", "numbers", "dates", "texts"])
def test_captions_are_text_to_the_letter(tmp_path, kind, captions):
    name, content = FILES[kind](captions)
    file = with_images(tmp_path) / name
    file.write_bytes(content.encode())
    expected = (
        [text.replace(",", " ") for text in captions] if kind in ("CSV of Windows", "Kaggle's Flickr8k") else captions
    )
    for reader, read in READERS.items():
        assert read(file, "test" if kind == "karpathy" else "train") == expected, reader


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "dictionary", "list", "list of dictionary", "list_view"]
)
@pytest.mark.parametrize("ending", ["parquet", "arrow", "arrow file"])
def test_texts_in_arrow_however_they_are_stored(tmp_path, kind, ending):
    texts = pyarrow.array(TEXTS)
    if kind == "dictionary":
        texts = texts.dictionary_encode()
    elif kind.startswith("list"):
        words = pyarrow.dictionary(pyarrow.int32(), pyarrow.string()) if "dictionary" in kind else pyarrow.string()
        many = pyarrow.list_view if kind == "list_view" else pyarrow.list_
        texts = pyarrow.array([[text] for text in TEXTS], many(words))
    else:
        texts = texts.cast(kind)
    unused = pyarrow.array(
        [[("a", 1)]] * 4, pyarrow.map_(pyarrow.string(), pyarrow.int32())
    )  # of a type that `datasets` lacks
    rows = pyarrow.table({"image": [f"{i}.png" for i in range(4)], "caption": texts, "unused": unused})
    file = with_images(tmp_path) / f"A.{ending.split()[0].upper()}"
    if ending == "parquet" and kind == "list_view":
        return  # older releases do not write it
    if ending == "parquet":
        pyarrow.parquet.write_table(rows, file)
    else:
        write = pyarrow.ipc.new_file if ending == "arrow file" else pyarrow.ipc.new_stream
        with write(str(file), rows.schema) as writer:
            writer.write_table(rows, max_chunksize=3)
    for reader, read in READERS.items():
        assert read(file, "train") == TEXTS, reader


def test_quoted_texts_of_several_lines(tmp_path):
    file = with_images(tmp_path) / "a.csv"
    file.write_bytes(b'image,caption\r\n0.png,"one,\r\ntwo ""three"""\r\n\r\n1.png,"four"\r\n')
    for reader, read in READERS.items():
        assert read(file, "train") == ['one,\r\ntwo "three"', "four"], reader


REFUSED = {
    "unquoted comma": (
        "a.csv",
        "image,caption\n0.png,a fox\n1.png,a cat, black\n",
        "a.csv, line 3: 3 fields where the header",
    ),
    "too few fields": (
        "a.csv",
        "image,caption\n0.png,a fox\n1.png\n",
        "a.csv, line 3: 1 fields where the header names 2",
    ),
    "after a quoted line break": (
        "a.csv",
        'image,caption\n0.png,"a\nfox"\n1.png,a,b\n',
        "a.csv, line 4: 3 fields where the header names 2",
    ),
    "open quote": (
        "a.csv",
        'image,caption\n0.png,a\n1.png,"b\n2.png,c\n',
        "a.csv, line 3: a quote opens that is never closed",
    ),
    "quote opens later in the row": (
        "a.csv",
        'caption,image\n"a\nfox","0.png\n',
        "a.csv, line 3: a quote opens that is never closed",
    ),
    "open quote before a long file": (
        "a.csv",
        'image,caption\n0.png,"a\n' + "1.png,b\n" * 20_000,
        "a.csv, line 2: a quote opens that is never closed",
    ),
    "text behind a quote": ("a.csv", 'image,caption\n0.png,"a" fox\n', "a.csv, line 2: "),
    "two columns of one name": (
        "a.csv",
        "image,caption,caption\n0.png,a,b\n",
        "a.csv, line 1: the column 'caption' is named twice",
    ),
    "no names": ("a.csv", ",,\n0.png,a,b\n", "a.csv, line 1 names no columns"),
    "a column without a name": (
        "a.csv",
        "image,caption,\n0.png,a, b\n",
        "a.csv, line 2: ' b' is in column 3, which has no name",
    ),
    "empty": ("a.csv", "\n\n", "a.csv is empty"),
    "UTF-16": (
        "a.csv",
        table(TEXTS).encode("utf-16"),
        "a.csv is not encoded as UTF-8: line 1 begins with the mark of UTF-16. Convert it: iconv -f UTF-16",
    ),
    "UTF-16 without a mark": (
        "a.csv",
        table(["a"]).encode("utf-16-le"),
        "a.csv is not encoded as UTF-8: line 1 holds a zero byte",
    ),
    "UTF-16 the other way": (
        "a.tsv",
        table(["a"], "\t").encode("utf-16-be"),
        "a.tsv is not encoded as UTF-8: line 1 holds a zero byte. Convert it: iconv -f UTF-16BE",
    ),
    "Windows-1252": (
        "a.csv",
        b"image,caption\n0.png,a fox\n1.png,a caf\xe9\n",
        "a.csv is not encoded as UTF-8: line 3, byte 12 is 0xE9. Convert it: iconv -f WINDOWS-1252 -t UTF-8",
    ),
    "an encoding that is not known": (
        "a.csv",
        "image,caption\n0.png,a fox\n1.png,一只红色的狐狸\n".encode("gb18030"),
        "(WINDOWS-1252 is Western Europe's: give the encoding that it was saved in)",
    ),
    "gzip": ("a.csv", gzip.compress(table(TEXTS).encode()), "a.csv is not text but a gzip archive: unpack it"),
    "a spreadsheet": (
        "a.csv",
        b"PK\x03\x04" + bytes(range(256)),
        "a.csv is not text but a zip archive or a spreadsheet",
    ),
    "Windows-1252 in lines": (
        "a.jsonl",
        b'{"image": "0.png", "caption": "caf\xe9"}\n',
        "a.jsonl is not encoded as UTF-8: line 1, byte 35",
    ),
    "Windows-1252 in JSON": (
        "a.json",
        b'[{"image": "0.png", "caption": "caf\xe9"}]\n',
        "a.json is not encoded as UTF-8: line 1, byte 36",
    ),
    "Windows-1252 in tokens": ("a.token", b"0.png#0\tcaf\xe9\n", "a.token is not encoded as UTF-8: line 1, byte 12"),
    "cut JSON line": ("a.jsonl", '{"image": "0.png", "caption": "a"}\n{"image": "1.p', "a.jsonl, line 2 is no JSON"),
    "cut JSON": ("a.json", '[{"image": "0.png", "caption": "a"}, {"im', "a.json is no JSON"),
    "a key twice": (
        "a.jsonl",
        '{"image": "0.png", "caption": "a", "caption": "b"}',
        "a.jsonl, line 1 is no JSON: the key 'caption' is there twice",
    ),
    "a number": ("a.jsonl", '{"image": "0.png", "caption": 7}', "a.jsonl, line 1"),
    "no number": ("a.jsonl", '{"image": "0.png", "caption": NaN}', "a.jsonl, line 1"),
    "a date in Parquet": ("a.parquet", {"image": ["0.png"], "caption": [7.5]}, "a.parquet, row 1"),
    "half a character": (
        "a.jsonl",
        '{"image": "0.png", "caption": "\\ud83d"}',
        "a.jsonl, line 1 holds half of a surrogate pair",
    ),
    "deep JSON": ("a.json", "[" * 200_000, "a.json is nested too deep"),
    "a row that is no object": ("a.json", "[7]", "a.json, row 1: expected an object or a text, found int 7"),
    "instances of COCO": (
        "a.json",
        json.dumps({"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "bbox": []}]}),
        "a.json: annotation 1 has no caption: take the file captions_*.json",
    ),
    "an annotation of no image": (
        "a.json",
        json.dumps({"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 2, "caption": "a"}]}),
        "a.json: annotation 1 is of the image 2, which is not among the images",
    ),
    "Karpathy's without a split": (
        "a.json",
        json.dumps({"images": [{"filename": "0.png", "sentences": [{"raw": "a"}]}]}),
        "a.json, image 1 is not made as Karpathy's",
    ),
    "a line that is no token": (
        "a.token",
        "0.png#0\ta fox\n1.png a cat\n",
        "a.token, line 2: expected IMAGE#NUMBER, a tab and a caption",
    ),
    "no Parquet": ("a.parquet", "image,caption\n", "a.parquet is no Parquet file, or was cut short"),
    "two columns in Parquet": ("a.parquet", None, "a.parquet has two columns 'caption'"),
    "no Arrow": ("a.arrow", "image,caption\n", "a.arrow has no end: it was cut short"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("situation", REFUSED)
def test_what_would_be_lost_is_refused_by_file_and_line(tmp_path, situation, reader):
    name, content, message = REFUSED[situation]
    file = with_images(tmp_path) / name
    if content is None:
        names = ["image", "caption", "caption"]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["0.png"])] * 3, names), file)
    elif isinstance(content, dict):
        datasets.Dataset.from_dict(content).to_parquet(file)
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        READERS[reader](file, "test" if "Karpathy" in situation else "train")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "page"])
def test_damaged_parquet_is_named(tmp_path, damage):
    rows = {"caption": TEXTS, "image": [f"{i}.png" for i in range(4)]}
    file = with_images(tmp_path) / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows), file, compression="gzip")
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        data[30:60] = bytes(30)
    file.write_bytes(data)
    for read in READERS.values():
        with pytest.raises(ValueError, match=r"a\.parquet"):
            read(file, "train")


def test_arrow_that_was_cut_between_batches_is_named(tmp_path):
    """A reader of Arrow takes the batches that are there for the whole."""
    rows = pyarrow.table({"image": [f"{i}.png" for i in range(4)], "caption": TEXTS})
    file = with_images(tmp_path) / "a.arrow"
    ends = []
    with open(file, "wb") as sink, pyarrow.ipc.new_stream(sink, rows.schema) as writer:
        for batch in rows.to_batches(max_chunksize=2):
            writer.write_batch(batch)
            sink.flush()
            ends.append(file.stat().st_size)
    file.write_bytes(file.read_bytes()[: ends[0]])
    for read in READERS.values():
        with pytest.raises(ValueError, match=r"a\.arrow has no end: it was cut short"):
            read(file, "train")
    saved = tmp_path / "saved"
    datasets.Dataset(rows).save_to_disk(saved)
    (arrow,) = saved.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"\.arrow has no end: it was cut short"):
        open_pairs(PairSource(source=str(saved), text_columns="caption"))
