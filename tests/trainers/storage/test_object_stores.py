"""What is said of addresses that cannot be read, and downloads that are cut off or overtaken by another version."""

import errno
import os
from pathlib import Path

import fsspec
import pytest
import s3fs
from huggingface_hub import HfApi

from tests.hub_server import TOKEN, hub_server
from tests.object_server import SECRET
from trainers.storage import object_stores
from trainers.storage.file_cache import cached_files
from trainers.storage.object_stores import download, is_address, list_remote


@pytest.mark.parametrize(
    "place, error, message",
    [
        ("s3://nobody-has-this-bucket/a", FileNotFoundError, "there is nothing at s3://nobody-has-this-bucket/a"),
        ("BUCKET/nothing", FileNotFoundError, "there is nothing at BUCKET/nothing"),
        ("BUCKET/*.gz", FileNotFoundError, "there are no files at BUCKET/\\*.gz"),
        ("gs://bucket/a.tar", ImportError, "gs://bucket/a.tar cannot be read: .*install gcsfs"),
        ("no-such://a", ValueError, "no-such:// is not a protocol that fsspec knows"),
        (f"s3://me:{SECRET}@bucket/a.tar", ValueError, "an address of s3:// holds a user name, a password"),
        (f"https://host/a.tar?X-Amz-Signature={SECRET}", ValueError, "an address of https:// holds .* or a query"),
        ("zip://a.txt::s3://bucket/a.zip", ValueError, "archives are not opened"),
        ("file:///etc/passwd", ValueError, "named by their paths"),
    ],
)
def test_one_line_says_why_an_address_cannot_be_read(bucket, place, error, message):
    with pytest.raises(error, match=message.replace("BUCKET", bucket.url)) as raised:
        list_remote(place.replace("BUCKET", bucket.url))
    assert len(str(raised.value).splitlines()) == 1 and SECRET not in str(raised.value)


@pytest.fixture
def other_clients():
    """The clients of this test are its own: they keep the variables with which they were made."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def test_missing_credentials_and_no_network_are_named(bucket, other_clients, monkeypatch):
    with monkeypatch.context() as none:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            none.delenv(name)
        none.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(OSError, match=f"{bucket.url}/a cannot be read .*credentials"):
            list_remote(f"{bucket.url}/a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(OSError, match=f"{bucket.url}/a cannot be read .*Could not connect.*Check the network"):
        list_remote(f"{bucket.url}/a")


def test_files_patterns_and_folders_are_listed_under_the_scheme_that_was_written(bucket):
    for name in ("a/2.tar", "a/1.tar", "a/b/3.txt"):
        bucket.system.pipe_file(f"{bucket.url}/{name}", name.encode())
    names = lambda place: [file.url.removeprefix(f"{bucket.url}/") for file in list_remote(f"{bucket.url}/{place}")]  # noqa: E731
    assert names("a") == names("a/") == names("a/**") == ["a/1.tar", "a/2.tar", "a/b/3.txt"]
    assert names("a/*.tar") == ["a/1.tar", "a/2.tar"] and names("a/1.tar") == ["a/1.tar"]
    (file,) = list_remote(f"{bucket.url}/a/1.tar")
    bucket.system.pipe_file(file.url, b"other")
    (other,) = list_remote(file.url)  # not from a list that is remembered
    assert (file.size, file.name) == (7, "1.tar") and other.version != file.version
    fsspec.filesystem("memory").pipe_file("/folder/a.txt", b"abc")
    (of_memory,) = list_remote("memory://folder")
    assert (of_memory.url, of_memory.size) == ("memory://folder/a.txt", 3)
    assert is_address("s3://a") and not is_address("a/b") and not is_address("owner/name")


def cut_downloads(monkeypatch, times: int) -> list[int]:
    """Let the next downloads end early; returns a list that grows by each download."""
    system, downloads = fsspec.filesystem("s3"), []
    whole = system.get_file

    def get_file(url, target):
        downloads.append(1)
        whole(url, target)
        if len(downloads) <= times:
            with open(target, "rb+") as file:
                file.truncate(2)

    monkeypatch.setattr(system, "get_file", get_file)
    return downloads


def test_a_download_that_is_cut_off_is_repeated_and_then_an_error(bucket, tmp_path, monkeypatch, caplog):
    bucket.system.pipe_file(f"{bucket.url}/a.txt", b"content")
    (file,) = list_remote(f"{bucket.url}/a.txt")
    with monkeypatch.context() as some:
        downloads = cut_downloads(some, 2)
        download(file, tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"content" and len(downloads) == 3
    assert caplog.text.count("was cut off after 2 of 7 bytes: trying again") == 2
    cut_downloads(monkeypatch, 3)
    with pytest.raises(OSError, match=f"{file.url} was cut off after 2 of 7 bytes"):
        download(file, tmp_path / "b.txt")


def test_a_full_disk_is_said_of_the_cache_and_not_tried_again(bucket, monkeypatch, caplog):
    bucket.system.pipe_file(f"{bucket.url}/a.txt", b"content")
    files = list_remote(f"{bucket.url}/a.txt")

    def get_file(url, target):
        Path(target).write_bytes(b"con")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fsspec.filesystem("s3"), "get_file", get_file)
    with pytest.raises(
        OSError, match=f"{files[0].url} cannot be written there .*PROCLIP_CACHE.*{bucket.cache}"
    ) as error:
        cached_files(files[0].url, files)
    assert error.value.errno == errno.ENOSPC and "trying again" not in caplog.text
    assert not list(bucket.cache.rglob("a.txt*")), "what was written in part is gone"


@pytest.mark.parametrize("content", [b"another", b"a longer one"])
def test_another_version_in_its_place_is_an_error(bucket, tmp_path, content):
    bucket.system.pipe_file(f"{bucket.url}/a.txt", b"content")
    (file,) = list_remote(f"{bucket.url}/a.txt")
    bucket.system.pipe_file(file.url, content)
    with pytest.raises(ValueError, match=f"{file.url} has changed since it was listed: it had 7 bytes and version"):
        download(file, tmp_path / "a.txt")
    bucket.system.rm(file.url)
    with pytest.raises(FileNotFoundError, match=f"nothing at {file.url}"):
        download(file, tmp_path / "a.txt")


def test_a_server_that_tells_no_version_is_refused(monkeypatch):
    system = fsspec.filesystem("memory")
    system.pipe_file("/plain/a.txt", b"abc")
    monkeypatch.setattr(object_stores, "_VERSIONS", ("ETag",))
    with pytest.raises(ValueError, match="memory://plain/a.txt: its server does not tell size and version"):
        list_remote("memory://plain")


def test_files_of_a_dataset_on_the_hub(tmp_path, monkeypatch):
    with hub_server(tmp_path / "server") as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        api = HfApi(endpoint=hub.url, token=TOKEN)
        api.create_repo("alice/texts", repo_type="dataset")
        api.upload_file(
            path_or_fileobj=b"a fox\n", path_in_repo="data/a.txt", repo_id="alice/texts", repo_type="dataset"
        )
        (file,) = list_remote("hf://datasets/alice/texts/data")
        assert (file.url, file.size) == ("hf://datasets/alice/texts/data/a.txt", 6)
        monkeypatch.setenv("PROCLIP_CACHE", str(tmp_path / "cache"))
        with cached_files(file.url, [file]) as cached:
            assert (cached.folder / "a.txt").read_bytes() == b"a fox\n"
        # At a commit too, which a later one does not change.
        commit = api.dataset_info("alice/texts").sha
        api.delete_file("data/a.txt", "alice/texts", repo_type="dataset")
        (kept,) = list_remote(f"hf://datasets/alice/texts@{commit}/data")
        assert (kept.name, kept.version) == (file.name, file.version)
        with pytest.raises(FileNotFoundError, match="there is nothing at hf://datasets/alice/texts/data"):
            list_remote("hf://datasets/alice/texts/data")
