"""Shards are read to their end: one that was cut short is named, a broken member is a broken row, and nothing in them is lost without a word."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.trainers.tiny_pairs import picture_bytes
from trainers.data import PairSource, iter_texts, open_pairs
from trainers.data.archives import TarShard
from trainers.data.stream_evaluation import EvaluationBatches
from trainers.data.stream_loader import StreamLoader
from trainers.data.text_files import read_texts


def pack(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def row(number: int, text: bytes | None = None, kind: str = "png", key: str | None = None) -> dict[str, bytes]:
    key = f"{number:05d}" if key is None else key
    return {f"{key}.{kind}": picture_bytes(number), f"{key}.txt": text or f"caption {number}".encode()}


def rows_of(*numbers: int, **options) -> dict[str, bytes]:
    return {name: data for number in numbers for name, data in row(number, **options).items()}


def read(folder: Path, streaming: bool = False, **fields) -> list[tuple[int, list[str]]]:
    """Which image each row shows, and its captions."""
    fields = {"image_column": ["jpg", "png"], "text_columns": "txt", **fields}
    rows = open_pairs(PairSource(source=str(folder), streaming=streaming, shuffle_buffer_size=1, **fields))
    rows = list(rows) if streaming else [rows[i] for i in range(len(rows))]
    return sorted((row["image"].getpixel((0, 0))[0], row["text"]) for row in rows)


both = pytest.mark.parametrize("streaming", [False, True])

CUTS = {
    "at a row's end": lambda members: members[20].offset,
    "in a row, behind its image": lambda members: members[21].offset,
    "in a header": lambda members: members[20].offset + 100,
    "in a member": lambda members: members[20].offset + 700,
    "in a member's padding": lambda members: members[20].offset_data + members[20].size + 1,
    "in the last member": lambda members: members[-1].offset_data + 1,
    "behind the last member": lambda members: members[-1].offset_data + 512,
    "in the mark of the end": lambda members: members[-1].offset_data + 512 + 100,
    "at the beginning": lambda members: 0,
}


@both
@pytest.mark.parametrize("cut", CUTS)
def test_a_shard_that_was_cut_short_is_named(tmp_path, cut, streaming):
    shard = pack(tmp_path / "shards" / "00000.tar", rows_of(*range(20)))
    with tarfile.open(shard) as tar:
        end = CUTS[cut](tar.getmembers())
    shard.write_bytes(shard.read_bytes()[:end])
    pack(tmp_path / "shards" / "00001.tar", rows_of(*range(20, 24)))
    with pytest.raises(ValueError, match=r"00000\.tar cannot be read to its end: .*Fetch or make it again"):
        read(tmp_path / "shards", streaming)
    with pytest.raises(ValueError, match=r"00000\.tar cannot be read to its end"):
        list(read_texts(tmp_path / "shards", "txt"))


@both
@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar"])
def test_compressed_shards_are_read_and_those_that_were_cut_are_named(tmp_path, ending, streaming):
    compress = {".tar.bz2": bz2.compress, ".tar.xz": lzma.compress}.get(ending, gzip.compress)
    plain = pack(tmp_path / "plain.tar", rows_of(*range(6))).read_bytes()
    shard = tmp_path / f"a{ending}"
    shard.write_bytes(compress(plain))
    assert [number for number, _ in read(shard, streaming)] == list(range(6))
    shard.write_bytes(compress(plain)[:-8])
    with pytest.raises(ValueError, match="cannot be read to its end"):
        read(shard, streaming)
    shard.write_bytes(compress(plain[:-10240]))
    with pytest.raises(ValueError, match="cannot be read to its end"):
        read(shard, streaming)


@both
def test_what_is_damaged_within_is_named(tmp_path, streaming):
    shard = pack(tmp_path / "a.tar", rows_of(*range(6)))
    with tarfile.open(shard) as tar:
        header = tar.getmembers()[6].offset
    data = bytearray(shard.read_bytes())
    data[header + 150] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"a\.tar cannot be read to its end: ReadError: the header at byte {header} is damaged"
    ):
        read(shard, streaming)
    data[header : header + 512] = bytes(512)
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar cannot be read to its end: .* more follows behind its end"):
        read(shard, streaming)


@both
def test_archives_that_were_joined_are_refused(tmp_path, streaming):
    parts = [pack(tmp_path / f"{i}.tar", rows_of(i)).read_bytes() for i in range(2)]
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "a.tar").write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match=r"a\.tar .* archives that were joined have to be packed again"):
        read(tmp_path / "joined", streaming)


@both
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_rows_of_every_tar(tmp_path, format, streaming):
    """Long names, other alphabets, folders, hidden files of a Mac, and endings in capitals."""
    long, members = "folder/" + "k" * 90, {}
    for number, key in enumerate([long, "folder/bild", "./a", "/b", "../c"]):
        members |= row(number, key=key, kind="PNG" if number % 2 else "png")
    if format != tarfile.USTAR_FORMAT:
        members |= row(5, "狐狸".encode(), key="f" * 150 + "狐狸")
    members |= {"._a.png": b"\0\5\x16\7", "__MACOSX/a.png": b"\0", ".DS_Store": b"\0", "folder/README": b"no field"}
    shard = pack(tmp_path / "a.tar", members, format=format)
    assert [number for number, _ in read(shard, streaming)] == list(range(5 if format == tarfile.USTAR_FORMAT else 6))
    assert not list(tmp_path.parent.glob("c.*")), "nothing is unpacked"


@both
def test_a_second_kind_of_image_in_a_later_shard(tmp_path, streaming):
    for shard in range(3):
        numbers = range(4 * shard, 4 * shard + 4)
        pack(tmp_path / f"{shard}.tar", rows_of(*numbers, kind="png" if shard else "jpg"))
    assert [number for number, _ in read(tmp_path, streaming)] == list(range(12))
    assert [number for number, _ in read(tmp_path, streaming, image_column=["png", "jpg"])] == list(range(12))
    with pytest.raises(ValueError, match=r"8 broken|broken .* without .* among"):
        read(tmp_path, streaming, image_column="jpg")
    read(tmp_path, streaming, image_column="png", max_broken_fraction=0.5)


BROKEN = {
    "text in another encoding": (
        {"00001.txt": b"caf\xe9"},
        "txt",
        r"\.txt: it is not encoded as UTF-8: byte 4 is 0xE9",
    ),
    "text in UTF-16": ({"00001.txt": "a fox".encode("utf-16")}, "txt", r"\.txt: it is not encoded as UTF-8"),
    "no JSON": ({"00001.json": b'{"caption": '}, "json.caption", r"\.json: it is no JSON"),
    "deep JSON": ({"00001.json": b"[" * 100_000}, "json.caption", r"\.json: it is nested too deep"),
    "empty JSON": ({"00001.json": b""}, "json.caption", r"\.json: it is no JSON"),
}


@both
@pytest.mark.parametrize("situation", BROKEN)
def test_a_broken_member_is_a_broken_row(tmp_path, situation, streaming):
    broken, column, message = BROKEN[situation]
    members = {}
    for number in range(5):
        members |= {**row(number), f"{number:05d}.json": json.dumps({"caption": f"caption {number}"}).encode()}
        if number == 1:
            members |= broken
    pack(tmp_path / "a.tar", members)
    shown = [number for number, _ in read(tmp_path, streaming, text_columns=column, max_broken_fraction=0.2)]
    assert set(shown) == {0, 2, 3, 4}
    source = PairSource(source=str(tmp_path), text_columns=column, max_broken_fraction=0.2)
    assert list(iter_texts(source)) == [f"caption {number}" for number in (0, 2, 3, 4)]
    for fails in (
        lambda: read(tmp_path, streaming, text_columns=column),
        lambda: list(read_texts(tmp_path, column)),
    ):
        with pytest.raises(ValueError, match=rf"0 broken images and 1 rows without .*a\.tar, 00001: {message}"):
            fails()


def _number(rows) -> list[int]:
    return [row["image"].getpixel((0, 0))[0] for row in rows]


def _evaluated(rows) -> dict:
    return {"numbers": torch.tensor(_number(rows))}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_members_broken_in_every_way_are_counted_in_training_and_evaluation_on_a_stream(tmp_path, num_workers):
    """Of 13 rows, 1, 2 and 3 have broken images or none, 4 and 5 texts in other encodings, 6 no text, 7 no image, and 12 a link."""
    members = rows_of(*range(12))
    members |= {"00001.png": b"broken", "00002.png": members["00002.png"][:50], "00004.txt": b"caf\xe9"}
    members |= {"00005.txt": "a fox".encode("utf-16")}
    for name in ("00003.png", "00006.txt", "00007.png"):
        del members[name]
    with tarfile.open(pack(tmp_path / "a.tar", members), "a") as tar:
        link = tarfile.TarInfo("00012.png")
        link.type, link.linkname = tarfile.SYMTYPE, "00000.png"
        tar.addfile(link)
    source = PairSource(
        source=str(tmp_path),
        image_column="png",
        text_columns="txt",
        streaming=True,
        shuffle_buffer_size=3,
        max_broken_fraction=0.9,
    )
    good, stream = [0, 8, 9, 10, 11], open_pairs(source)
    loader = StreamLoader(stream, 1, _number)
    batches = iter(loader)
    assert sorted(next(batches)[0] for _ in good) == good
    next(batches)  # of the next epoch: the first one is read to its end
    skipped = loader.skipped()
    assert skipped.broken_images >= 4 and skipped.without_caption >= 4
    assert skipped.rows == len(good) + 1 + skipped.skipped
    evaluated = DataLoader(EvaluationBatches(stream, 4, _evaluated), batch_size=None, num_workers=num_workers)
    shown = [(batch["numbers"].tolist()[: int(batch["real_rows"])], len(batch["numbers"])) for batch in evaluated]
    assert shown == [([0], 1), ([], 1), ([8, 9, 10, 11], 4), ([], 1)]


def test_links_sparse_and_huge_members_are_broken_rows(tmp_path):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for name, data in row(0).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind in (("1.txt", tarfile.SYMTYPE), ("2.txt", tarfile.LNKTYPE), ("3.txt", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            tar.addfile(member)
    rows = list(TarShard(str(shard), name="a.tar").rows(["txt"]))
    assert [(place, row["txt"]) for place, row in rows] == [
        ("00000", "caption 0"),
        ("1", None),
        ("2", None),
        ("3", None),
    ]
    assert all("it is a link" in row["__broken__"] for _, row in rows[1:])


def test_a_member_that_claims_terabytes_is_no_danger(tmp_path):
    member = tarfile.TarInfo("0.png")
    member.size = 1 << 42
    header = member.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + bytes(20_000))
    with pytest.raises(ValueError, match=r"a\.tar cannot be read to its end"):
        list(TarShard(str(tmp_path / "a.tar")).rows())
    pax = tarfile.TarInfo("PaxHeaders/0.png")
    pax.type, pax.size = tarfile.XHDTYPE, 1 << 42
    (tmp_path / "a.tar").write_bytes(pax.tobuf() + bytes(20_000))
    with pytest.raises(ValueError, match=r"a\.tar cannot be read to its end"):
        list(TarShard(str(tmp_path / "a.tar")).rows())


def test_a_row_with_a_field_twice_is_named(tmp_path):
    pack(tmp_path / "a.tar", [*row(0).items(), ("00000.TXT", b"another")])
    with pytest.raises(ValueError, match=r"a\.tar: the row 00000 has two members \.txt"):
        read(tmp_path)


@both
def test_a_field_that_holds_text_by_another_ending(tmp_path, streaming):
    pack(tmp_path / "a.tar", {"0.png": picture_bytes(0), "0.en": b"a fox", "0.short.de": b"ein Fuchs"})
    assert read(tmp_path, streaming, text_columns=["en"]) == [(0, ["a fox"])]
    assert read(tmp_path, streaming, text_columns=["en", "short.de"]) == [(0, ["a fox", "ein Fuchs"])]
    assert read(tmp_path, streaming, image_column="PNG", text_columns=["EN"]) == [(0, ["a fox"])]
