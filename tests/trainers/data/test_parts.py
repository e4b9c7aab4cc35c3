"""Texts that are read in parts."""

import builtins
import itertools
import json
import pickle
import tarfile
from io import BytesIO

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.trainers.tiny_encoders import make_texts
from trainers.data.text_files import divide_texts, read_texts


TEXTS = [f"{text} 狐狸 {'long ' * (number % 7)}" for number, text in enumerate(make_texts(60))]


def write(folder, kind):
    """`TEXTS` in one or several files of a kind, and the path to read."""
    if kind == "lines":
        (folder / "a.txt").write_text("\ufeff" + "\n".join(TEXTS), encoding="utf-8")
        return folder / "a.txt"
    if kind == "windows lines":
        (folder / "a.txt").write_bytes("\r\n".join(TEXTS + [""]).encode())
        return folder / "a.txt"
    if kind == "json lines in folders":
        for number, begin in enumerate(range(0, 60, 20)):
            path = folder / f"{number}" / "part.jsonl"
            path.parent.mkdir()
            rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS[begin : begin + 20]]
            path.write_text("\n".join(rows), encoding="utf-8")
        return folder
    if kind == "parquet":
        for number, begin in enumerate(range(0, 60, 30)):
            table = pyarrow.table({"id": list(range(30)), "text": TEXTS[begin : begin + 30]})
            pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=7)
        return folder
    if kind == "csv":
        for number, begin in enumerate(range(0, 60, 20)):
            datasets.Dataset.from_dict({"text": TEXTS[begin : begin + 20]}).to_csv(folder / f"{number}.csv")
        return folder
    if kind == "webdataset":
        for number, begin in enumerate(range(0, 60, 15)):
            with tarfile.open(folder / f"{number}.tar", "w") as tar:
                for row in range(begin, begin + 15):
                    for field, data in (("jpg", b"no image"), ("txt", TEXTS[row].encode())):
                        member = tarfile.TarInfo(f"{row:03}.{field}")
                        member.size = len(data)
                        tar.addfile(member, BytesIO(data))
        return f"{folder}/*.tar"
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return folder / "saved"


KINDS = ["lines", "windows lines", "json lines in folders", "parquet", "csv", "webdataset", "saved"]
CUT = ["lines", "windows lines", "json lines in folders", "saved"]  # anywhere


def column_of(kind):
    return "txt" if kind == "webdataset" else None


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_the_whole_in_its_order(tmp_path, kind):
    path = write(tmp_path, kind)
    whole = list(read_texts(path, column_of(kind)))
    assert whole == (TEXTS if kind != "csv" else whole) and len(whole) == 60
    divided = pickle.loads(pickle.dumps(divide_texts(path, column_of(kind))))
    for count in (1, 2, 5, 16, 59, 200):
        parts = [list(divided.part(index, count)) for index in range(count)]
        assert list(itertools.chain(*parts)) == whole, count
        if kind in CUT and count <= 5:
            assert max(map(len, parts)) <= 60 / count * 1.5, "of about one size"
    most = {"csv": 3, "webdataset": 4, "saved": 60}.get(kind)
    assert divided.most_parts() == most
    assert most is None or sum(bool(list(divided.part(index, 100))) for index in range(100)) == most


def test_a_row_group_is_read_once(tmp_path):
    divided = divide_texts(write(tmp_path, "parquet"))
    sizes = [len(list(divided.part(index, 9))) for index in range(9)]
    assert sum(sizes) == 60 and all(size % 7 in (0, 2) for size in sizes), "whole row groups of 7, the last of 2"
    assert max(sizes) <= 14


def test_a_part_opens_its_own_files_only(tmp_path, monkeypatch):
    opened, real = set(), builtins.open

    def watched(file, *args, **kwargs):
        opened.add(str(file))
        return real(file, *args, **kwargs)

    path = write(tmp_path, "webdataset")
    divided = divide_texts(path, "txt")
    monkeypatch.setattr(builtins, "open", watched)
    assert list(divided.part(2, 4)) == TEXTS[30:45]
    assert [file for file in opened if file.endswith(".tar")] == [str(tmp_path / "2.tar")]


def test_a_file_in_an_object_store_is_downloaded_by_the_part_that_has_it(tmp_path, bucket):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("\n".join(TEXTS[number * 15 : number * 15 + 15]))
        bucket.system.pipe_file(f"{bucket.url}/texts/{number}.txt", (tmp_path / f"{number}.txt").read_bytes())
    divided = divide_texts(f"{bucket.url}/texts")
    assert divided.most_parts() == 4 and list(divided.part(0, 4)) == TEXTS[:15]
    assert list(bucket.entries()) == ["texts/0.txt"]
    parts = [list(divided.part(index, 8)) for index in range(8)]
    assert list(itertools.chain(*parts)) == TEXTS and sorted(map(len, parts)) == [0] * 4 + [15] * 4


def test_bytes_of_other_parts_are_not_read(tmp_path):
    """What is damaged in one part does not disturb another, and is named where it is."""
    lines = "\n".join(TEXTS * 20).encode()
    (tmp_path / "a.txt").write_bytes(lines + b"\nM\xfcnchen")
    divided = divide_texts(tmp_path / "a.txt")
    first = list(itertools.chain(*(divided.part(index, 4) for index in range(3))))
    assert first == (TEXTS * 20)[: len(first)] and 850 < len(first) < 950
    with pytest.raises(ValueError, match=r"a.txt is not encoded as UTF-8: line 1201, byte 2 is 0xFC"):
        list(divided.part(3, 4))


def test_a_place_in_a_part_is_named_by_its_byte(tmp_path):
    rows = [json.dumps({"text": text}) for text in TEXTS * 4]
    rows[-1] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"a.jsonl, line \d+ from byte \d+ is no JSON"):
        list(divide_texts(tmp_path / "a.jsonl").part(2, 3))


def test_few_broken_rows_of_a_small_part_are_borne(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    rows[3]["text"] = None
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    divided = divide_texts(tmp_path / "a.jsonl")
    assert sum(len(list(divided.part(index, 6))) for index in range(6)) == 59


def test_sources_are_told_apart(tmp_path):
    path = write(tmp_path, "json lines in folders")
    identity = divide_texts(path).identity()
    assert (
        identity["column"] == "text"
        and identity["split"] == "train"
        and list(identity["bytes"])
        == [
            "0/part.jsonl",
            "1/part.jsonl",
            "2/part.jsonl",
        ]
    )
    (tmp_path / "1" / "part.jsonl").write_text("{}")
    assert divide_texts(path).identity() != identity


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_an_empty_file_of_lines_is_read_as_one_without_texts(tmp_path, place, count):
    for number in range(3):
        rows = "" if number == place else json.dumps({"caption": f"text {number}"}) + "\n"
        (tmp_path / f"{number}.jsonl").write_text(rows)
    divided = divide_texts(tmp_path)
    expected = [f"text {number}" for number in range(3) if number != place]
    assert [text for index in range(count) for text in divided.part(index, count)] == expected
    assert list(read_texts(tmp_path)) == expected


@pytest.mark.parametrize("place", [0, 2])
def test_an_empty_file_that_cannot_be_empty_is_refused(tmp_path, place):
    for number in range(3):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / f"{number}.parquet")
    (tmp_path / f"{place}.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{place}.parquet is no Parquet file"):
        divided = divide_texts(tmp_path)
        [list(divided.part(index, 7)) for index in range(7)]


def test_a_first_line_of_any_length_is_a_text(tmp_path):
    texts = ["long " * 100_000, "short"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    assert list(read_texts(tmp_path / "a.txt")) == texts
