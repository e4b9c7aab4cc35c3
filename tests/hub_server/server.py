"""The stand-in itself: its state, and what the tests do with it."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import transformers.utils.hub
from huggingface_hub import constants

from .connection import TOKEN
from .faults import Fault, Request
from .handler import Handler
from .repositories import Blob, Repository, git_oid, pointer


class HubServer:
    """The state of the stand-in: `url`, `repositories` by (type, name), `requests` as they came, `faults` still to come."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.part_size: int | None = None  # large files are sent in parts of so many bytes
        self.lock = threading.RLock()
        server = self

        class BoundHandler(Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    # For the tests

    def environment(self, folder: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables of a process whose Hub this is, with its caches in `folder`."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder),
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_MODULES_CACHE": str(folder / "modules"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return {**variables, "HF_TOKEN": token} if token else variables

    def patch(self, monkeypatch: Any, folder: Path, token: str | None = TOKEN) -> None:
        """The same for this process, whose client is imported already."""
        for name, value in self.environment(folder, token).items():
            monkeypatch.setenv(name, value)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        values = {"ENDPOINT": self.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        values["HUGGINGFACE_CO_URL_TEMPLATE"] = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        values |= {"HF_TOKEN_PATH": str(folder / "token"), "HF_HUB_CACHE": str(folder / "hub")}
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        # Transformers keeps a client with the address that it had at its first use, maybe another test's.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)

    def fail(self, method: str, path: str, status: int, times: int = 1, **headers: str) -> Fault:
        """Answer the next requests whose path holds the regular expression `path` with `status`."""
        return self._add(
            Fault(method, path, times, status, headers={k.replace("_", "-"): v for k, v in headers.items()})
        )

    def drop(self, method: str, path: str, after: int, times: int = 1) -> Fault:
        """End the connection after `after` bytes of the body: of the request's if it is one with a body, else of the answer's."""
        return self._add(Fault(method, path, times, drop_after=after))

    def stall(self, method: str, path: str, after: int) -> Fault:
        """Read no more of a request's body after `after` bytes; the fault's events tell and end it."""
        return self._add(Fault(method, path, stall_after=after))

    def _add(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def bytes_received(self, path: str = "") -> int:
        """Bytes of request bodies that arrived, of requests whose path holds the regular expression `path`."""
        return sum(request.num_bytes for request in self.requests if re.search(path, request.path))

    def bytes_sent(self, path: str) -> int:
        """Bytes of files that were sent, for requests whose path holds the regular expression `path`."""
        return sum(request.num_bytes_sent for request in self.requests if re.search(path, request.path))

    def count(self, method: str, path: str) -> int:
        """Requests so far whose path holds the regular expression `path`."""
        return sum(request.method == method and bool(re.search(path, request.path)) for request in self.requests)

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, Blob]:
        """The files of a repository."""
        commit = self.repositories[kind, name].find(revision)
        return {} if commit is None else commit.files

    def read(self, name: str, path: str, revision: str = "main", kind: str = "model") -> bytes:
        """The content of a file."""
        return self.blob_path(self.files(name, revision, kind)[path].sha256).read_bytes()

    # For the handler

    def blob_path(self, sha256: str) -> Path:
        return self.folder / sha256

    def store(self, content: bytes, lfs: bool = False) -> Blob:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blob_path(sha256).write_bytes(content)
        return self.blob(sha256, len(content)) if lfs else Blob(sha256, len(content), git_oid(content), False)

    def blob(self, sha256: str, size: int) -> Blob:
        """A large file that was uploaded."""
        return Blob(sha256, size, git_oid(pointer(sha256, size)), True)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def hub_server(folder: Path) -> Iterator[HubServer]:
    """A running [`HubServer`] whose blobs lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    server = HubServer(folder)
    thread = threading.Thread(target=server._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._http.shutdown()
        server._http.server_close()
        thread.join()
