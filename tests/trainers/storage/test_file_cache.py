"""The cache of files: downloaded once, never used in part, bounded, and shared by processes."""

import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from trainers.storage import file_cache
from trainers.storage.file_cache import cache_folder, cache_size, cached_files
from trainers.storage.object_stores import RemoteFile, list_remote


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """The names that are downloaded, from a store whose files are `size` times their version."""
    done: list[str] = []

    def download(file, target):
        done.append(file.name)
        target.write_bytes(file.version.encode() * file.size)

    monkeypatch.setattr(file_cache, "download", download)
    monkeypatch.setenv("PROCLIP_CACHE", str(tmp_path / "cache"))
    return done


def made(name: str, size: int = 10, version: str = "v") -> RemoteFile:
    return RemoteFile(f"s3://bucket/{name}", size, version)


def read(*files: RemoteFile, url: str = "") -> list[bytes]:
    with cached_files(url or files[0].url, files) as cached:
        return [(cached.folder / file.name).read_bytes() for file in files]


def entries() -> set[str]:
    return {file_cache._read_record(file.parent)["url"][-1] for file in cache_folder().glob("*/entry.json")}


def test_a_file_is_downloaded_once_and_another_version_again(downloads):
    assert read(made("a")) == read(made("a")) == [b"v" * 10] and downloads == ["a"]
    assert read(made("a", version="w")) == [b"w" * 10] and downloads == ["a", "a"]
    # A folder that has grown, and lost a file: what is there in the same version stays.
    read(made("a"), made("b"), url="s3://bucket/")
    downloads.clear()
    with cached_files("s3://bucket/", [made("b"), made("c")]) as cached:
        assert sorted(os.listdir(cached.folder)) == ["b", "c"]
    assert downloads == ["c"]


def test_what_is_not_whole_is_never_used(downloads, monkeypatch):
    def killed(file, target):
        target.write_bytes(b"v" * 9)
        raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(file_cache, "download", killed)
        with pytest.raises(KeyboardInterrupt):
            read(made("a"))
    (folder,) = cache_folder().glob("*/files")
    (folder / "a.tmp").write_bytes(b"v" * 9)  # as a power cut leaves it
    assert read(made("a")) == [b"v" * 10] and sorted(os.listdir(folder)) == ["a"]
    (folder / "a").write_bytes(b"v" * 4)
    assert read(made("a")) == [b"v" * 10]
    (folder.parent / "entry.json").write_text("{")
    assert read(made("a")) == [b"v" * 10] and downloads == ["a"] * 3


def test_the_least_recently_used_is_evicted_and_nothing_that_is_read(downloads, monkeypatch):
    monkeypatch.setenv("PROCLIP_CACHE_SIZE", "30")
    for name in "abc":
        read(made(name))
        time.sleep(0.01)
    read(made("a"))
    read(made("d"))
    assert entries() == {"a", "c", "d"} and downloads == ["a", "b", "c", "d"]
    with cached_files("s3://bucket/a", [made("a")]) as held:
        read(made("e"))
        read(made("f"))
        assert entries() == {"a", "e", "f"} and (held.folder / "a").exists()
        with pytest.raises(OSError, match="s3://bucket/g has 0.00 GB.*PROCLIP_CACHE_SIZE"):
            read(made("g", size=21))
    read(made("g", size=21))
    assert entries() == {"g"}
    with pytest.raises(OSError, match=r"do not fit into the cache .*: its limit is 0.00 GB\. Set"):
        read(made("h", size=31))
    assert entries() == {"g"}  # no eviction would have made room


def test_an_eviction_that_is_killed_leaves_nothing_uncounted(downloads, monkeypatch):
    monkeypatch.setenv("PROCLIP_CACHE_SIZE", "10")
    read(made("a"))
    rmtree = file_cache.shutil.rmtree

    def killed_afterwards(*args, **options):
        rmtree(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(file_cache.shutil, "rmtree", killed_afterwards)
        with pytest.raises(KeyboardInterrupt):
            read(made("b"))
    assert entries() == {"a"}
    read(made("b"))
    assert entries() == {"b"} and read(made("a")) == [b"v" * 10]


@pytest.mark.parametrize(
    "text, size", [("5000", 5000), ("20 GB", 20 * 10**9), ("1.5TB", 1500 * 10**9), ("3 b", 3), ("", 100 * 10**9)]
)
def test_the_limit_is_a_size(monkeypatch, text, size):
    monkeypatch.setenv("PROCLIP_CACHE_SIZE", text)
    assert cache_size() == size


def test_a_limit_that_is_no_size_is_refused(monkeypatch):
    monkeypatch.setenv("PROCLIP_CACHE_SIZE", "half")
    with pytest.raises(ValueError, match="PROCLIP_CACHE_SIZE must be .* got 'half'"):
        cache_size()


def _read_all(url: str, start, counts) -> None:
    count, download = [], file_cache.download
    file_cache.download = lambda file, target: (count.append(1), download(file, target))
    files = list_remote(url)
    start.wait(60)
    with cached_files(url, files) as cached:
        assert all((cached.folder / file.name).stat().st_size == file.size for file in files)
    counts.put(len(count))


def test_two_processes_download_each_file_once(bucket):
    for number in range(12):
        bucket.system.pipe_file(f"{bucket.url}/folder/{number}", os.urandom(100_000))
    forked = multiprocessing.get_context("fork")  # as data workers are
    start, counts = forked.Barrier(2), forked.Queue()
    readers = [forked.Process(target=_read_all, args=(f"{bucket.url}/folder", start, counts)) for _ in range(2)]
    for reader in readers:
        reader.start()
    assert sorted(counts.get(timeout=60) for _ in readers) == [0, 12]
    for reader in readers:
        reader.join(60)


def test_on_windows_everything_is_imported_and_the_cache_refuses():
    """Without what Python lacks there. Libraries are imported first: what they import on which system is their affair."""
    code = """
import os, sys
import datasets, filelock, fsspec.asyn, torch, transformers, typer.rich_utils
del os.register_at_fork
sys.modules["fcntl"], sys.platform = None, "win32"
import trainers.cli, trainers.data
from trainers.storage.file_cache import CachedFiles
try:
    CachedFiles("s3://bucket/a.parquet")
except OSError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "s3://bucket/a.parquet cannot be read on Windows" in result.stdout, result.stderr
