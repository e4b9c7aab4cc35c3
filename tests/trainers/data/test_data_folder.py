"""What a row may name: a file in the data's folder, and an image on the web only where the user has asked for it; nothing runs and nobody is called."""

import json
import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from tests.trainers.tiny_pairs import picture, picture_bytes
from trainers.data import PairSource, open_pairs, remote_images
from trainers.data.data_folder import DataFolder, HubFiles
from trainers.evaluation.data.manifest import Data, Manifest
from trainers.evaluation.data.sources import open_data
from trainers.evaluation.scoring.embedding import image_bytes as evaluated_bytes
from trainers.evaluation.scoring.tasks import prepare_task


@pytest.fixture
def server():
    """A web server on loopback, with what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name, _, argument = self.path.strip("/").partition("/")
            if name == "redirect":
                self.send_response(302)
                self.send_header(
                    "Location", f"http://{self.headers['Host']}/image" if argument == "here" else argument
                )
                self.end_headers()
                return
            body = {"image": picture_bytes(7), "huge": bytes(3 << 20), "short": picture_bytes(7)[:20]}.get(name)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"") + (50 if name == "short" else 0)))
            self.end_headers()
            self.wfile.write(body or b"")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", asked
    http.shutdown()


def table(folder: Path, names: list, ending: str = "jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"image": name, "text": f"text {i}"} for i, name in enumerate(names)]
    file = folder / f"rows.{ending}"
    if ending == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif ending == "csv":
        file.write_text("image,text\n" + "".join(f'"{row["image"]}",{row["text"]}\n' for row in rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def outside(folder: Path, url: str) -> dict[str, str]:
    """Names that reach something else than a file of the folder `data`."""
    picture(3).save(folder / "private.png")
    (folder / "data").mkdir()
    (folder / "data/link.png").symlink_to(folder / "private.png")
    (folder / "data/folder").symlink_to(folder)
    os.mkfifo(folder / "data/pipe.png")
    (folder / "data/spec.json").write_text('{"version": 1, "refs": {"x": "y"}}')
    return {
        "http": f"{url}/image",
        "HTTP": f"HTTP{url[4:]}/image",
        "chain": f"simplecache::{url}/image",
        "reference": f"reference://x::{url}/spec.json",
        "reference beside the data": f"reference://x::file://{folder}/data/spec.json",
        "zip": f"zip://a.png::{url}/a.zip",
        "ftp": "ftp://127.0.0.1/a.png",
        "file": f"file://{folder}/private.png",
        "file in the folder": f"file://{folder}/data/spec.json",
        "absolute": str(folder / "private.png"),
        "above": "../private.png",
        "above by a folder": "folder/private.png",
        "link": "link.png",
        "pipe": "pipe.png",
        "device": "/dev/zero",
        "folder": "folder",
        "itself": ".",
        "nothing": "nowhere.png",
        "zero": "a\0b.png",
        "long": "a" * 5000,
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "struct", "saved"])
def test_rows_reach_nothing_outside(tmp_path, server, monkeypatch, kind):
    url, asked = server
    names = list(outside(tmp_path, url).values())
    if kind in ("struct", "saved"):
        # Not by `datasets`, which would read the files to put them into the rows.
        features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
        rows = pyarrow.Table.from_pylist(
            [{"image": {"path": name}, "text": "a"} for name in names], features.arrow_schema
        )
        file = tmp_path / "data" / "rows.parquet"
        pyarrow.parquet.write_table(rows, file)
        if kind == "saved":
            saved = datasets.Dataset(rows.replace_schema_metadata())
            assert saved.features["image"] == {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
            file = tmp_path / "data" / "saved"
            saved.save_to_disk(file)
    else:
        names = [name for name in names if kind != "csv" or "\0" not in name]
        file = table(tmp_path / "data", names, kind)
    monkeypatch.setattr(fsspec, "open", lambda *args, **kwargs: 1 / 0)
    source = PairSource(source=str(file), max_broken_fraction=1.0)
    assert list(open_pairs(replace(source, streaming=True))) == []
    rows = open_pairs(source)
    with pytest.raises(
        ValueError, match=f"{len(names)} broken images and 0 rows without a caption among {len(names)} rows"
    ):
        rows[0]
    data = Data(source=str(file), split="train")
    columns = {"image": "image"}
    task = prepare_task(
        manifest := Manifest(name="m", title="m", kind="cka", group="own", data=data, columns=columns),
        open_data(manifest),
    )
    for number in range(len(names)):
        with pytest.raises((ValueError, OSError), match="benchmark m, .*: the image in column 'image'"):
            evaluated_bytes(task, "image", number)
    assert not asked


def test_an_absolute_name_inside_and_an_image_folder_of_ones_own(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    picture(5).save(images / "5.png")
    for names, fields in (
        (["5.png"], {"image_folder": str(images)}),
        (["images/5.png"], {"image_folder": str(images)}),
        ([f"{images}/5.png"], {"image_folder": str(images)}),
        (["../images/5.png"], {"image_folder": str(images)}),
    ):
        rows = open_pairs(PairSource(source=str(table(tmp_path / "data", names)), **fields))
        assert rows[0]["image"].getpixel((0, 0))[0] == 5
    file = table(images, [f"{images}/5.png", "./5.png"])
    assert open_pairs(PairSource(source=str(file)))[1]["image"].getpixel((0, 0))[0] == 5
    with pytest.raises(ValueError, match="lies outside of .*Repair"):
        open_pairs(PairSource(source=str(table(tmp_path / "data", [f"{images}/5.png"]))))[0]
    with pytest.raises(FileNotFoundError, match="image_folder: there is no folder .*nowhere"):
        open_pairs(PairSource(source=str(file), image_folder="nowhere"))


def test_files_of_the_hubs_cache_are_links_within_it(tmp_path):
    """A snapshot that was fetched is a folder of links to `blobs` beside it."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "123").write_bytes(picture_bytes(4))
    (snapshot / "4.png").symlink_to("../../blobs/123")
    assert DataFolder.of(snapshot).find("4.png") == snapshot / "4.png"
    (tmp_path / "other").write_bytes(b"")
    (snapshot / "5.png").symlink_to("../../other")
    with pytest.raises(ValueError, match="lies outside of"):
        DataFolder.of(snapshot).find("5.png")


@pytest.mark.parametrize("streaming", [False, True])
def test_images_on_the_web_where_they_are_asked_for(tmp_path, server, streaming):
    url, asked = server
    file = table(tmp_path, [f"{url}/image", f"{url}/redirect/here"])
    rows = open_pairs(PairSource(source=str(file), remote_images=True, streaming=streaming))
    shown = list(rows) if streaming else [rows[i] for i in range(2)]
    assert [row["image"].getpixel((0, 0))[0] for row in shown] == [7, 7]
    assert sorted(asked) == ["/image", "/image", "/redirect/here"], "one request each"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nothing", "could not be fetched: HTTP Error 404"),
        ("/huge", "has more than 2 MiB"),
        ("/short", "ended|IncompleteRead"),
        ("/redirect/file:///etc/passwd", "Redirection to url 'file:///etc/passwd' is not allowed"),
        ("/redirect/ftp://127.0.0.1/a", "only http and https are followed"),
        ("/redirect/data:,x", "Redirection to url 'data:,x' is not allowed"),
    ],
)
def test_a_bad_address_is_one_request(tmp_path, server, monkeypatch, path, message):
    url, asked = server
    monkeypatch.setattr(remote_images, "_MOST_BYTES", 2 << 20)
    file = table(tmp_path, [url + path])
    rows = open_pairs(PairSource(source=str(file), remote_images=True, max_broken_fraction=1.0))
    for _ in range(2):
        with pytest.raises(ValueError, match="1000 rows in turn are broken: .* The first: rows.jsonl, line 1: "):
            rows[0]
    assert len(asked) == 1, "a broken row is not read again, for whatever row it should stand in"
    assert (
        message.partition("|")[0] in rows.skipped().examples[0]
        or message.rpartition("|")[2] in rows.skipped().examples[0]
    )


def test_other_addresses_stay_closed_where_the_web_is_open(tmp_path, server):
    url, asked = server
    for situation, name in outside(tmp_path, url).items():
        if situation not in ("http", "HTTP"):
            with pytest.raises((ValueError, OSError)):
                DataFolder.of(tmp_path / "data").find(name)
            with pytest.raises((ValueError, OSError)):
                DataFolder(tmp_path / "data", (tmp_path / "data",), remote=True).find(name)
    assert not asked


def test_names_of_a_dataset_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.png").write_bytes(b"a")
    opened = []

    class Opened:
        def __init__(self, name, mode):
            opened.append(name)

        def __enter__(self):
            return (tmp_path / "hub" / "a.png").open("rb")

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(fsspec, "open", Opened)
    files = HubFiles("owner/name")
    assert files.find(str(tmp_path / "hub" / "a.png")) == tmp_path / "hub" / "a.png"
    assert files.find("hf://datasets/owner/name@abc/a.png") == b"a"
    assert files.find("zip://a.png::hf://datasets/owner/name@abc/a.zip") == b"a"
    assert len(opened) == 2
    for name in (
        "hf://datasets/owner/other@abc/a.png",
        "hf://datasets/owner/name2/a.png",
        "reference://x::hf://datasets/owner/name@abc/a.json",
        "http://example.org/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "a.png",
        "../a.png",
    ):
        with pytest.raises(ValueError, match="lies outside of the dataset owner/name"):
            files.find(name)
    assert len(opened) == 2
