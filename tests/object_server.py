"""A stand-in for S3 on loopback (moto's server), for the real client, and a bucket of it for a test."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import s3fs
from moto.server import ThreadedMotoServer


SECRET = "not-to-be-shown"


@contextmanager
def object_server() -> Iterator[str]:
    """The address of a running server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


class Bucket:
    """A new bucket, which this process and those that it starts read with a cache of their own.

    Attributes:
        url: its address.
        system: its files, to change them behind the back of what reads them.
        cache: the folder of the cache.
    """

    def __init__(self, server: str, cache: Path, monkeypatch: Any):
        self.cache = cache
        variables = {
            "AWS_ENDPOINT_URL": server,
            "AWS_ACCESS_KEY_ID": "a-user",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "PROCLIP_CACHE": str(cache),
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        self.system = s3fs.S3FileSystem()
        self.url = f"s3://bucket-{uuid4().hex}"
        self.system.mkdir(self.url)

    def put(self, path: Path, name: str) -> str:
        """The address of a copy of a file or folder."""
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        for file in files:
            inside = "" if path.is_file() else f"/{file.relative_to(path)}"
            self.system.pipe_file(f"{self.url}/{name}{inside}", file.read_bytes())
        return f"{self.url}/{name}"

    def entries(self) -> dict[str, set[str]]:
        """The names of the files in each entry of the cache, by address without the bucket."""
        records = [json.loads(file.read_text()) for file in self.cache.glob("*/entry.json")]
        return {record["url"].removeprefix(f"{self.url}/"): set(record["files"]) for record in records}
