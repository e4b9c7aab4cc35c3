"""One connection to the stand-in: bodies in and answers out, with their faults, and who may do what."""

import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from .faults import Dropped, Fault, HubError
from .repositories import Blob, Commit, Repository


if TYPE_CHECKING:
    from .server import HubServer


TOKEN = "hf_" + "S" * 34  # may write as alice
READ_TOKEN = "hf_" + "R" * 34  # alice too, but may only read
BLOCK = 2**16


class Connection(BaseHTTPRequestHandler):
    """What a request and its answer need.

    Attributes:
        hub: the stand-in.
        fault: what is to go wrong with this request.
        received: bytes of its body so far.
        sent: bytes of a file so far.
        status: of the answer, once there is one.
    """

    hub: "HubServer"
    fault: Fault | None
    received: int
    sent: int
    status: int | None
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _body(self) -> Iterator[bytes]:
        """The request's body in blocks, up to where a fault cuts it."""
        cut = self.fault.drop_after if self.fault and self.command in ("POST", "PUT") else None
        for block in self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self._blocks():
            if cut is not None and self.received + len(block) > cut:
                self.received = cut
                raise Dropped
            stall = self.fault.stall_after if self.fault else None
            if stall is not None and self.received + len(block) > stall:
                self.fault.reached.set()
                self.fault.release.wait(60)
            self.received += len(block)
            yield block

    def _blocks(self) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            block = self.rfile.read(min(BLOCK, left))
            if not block:
                raise Dropped
            left -= len(block)
            yield block

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_blob(self, commit: Commit, blob: Blob) -> None:
        """A file: whole, or the range asked for."""
        etag = blob.sha256 if blob.lfs else blob.oid
        first, last, self.status = 0, blob.size - 1, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last, self.status = int(match[1]), int(match[2] or last), 206
        self.send_response(self.status)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit.oid)
        self.send_header("X-Linked-Size", str(blob.size))
        self.send_header("Accept-Ranges", "bytes")
        if self.status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{blob.size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        left = last - first + 1
        if self.fault and self.fault.drop_after is not None:
            left = min(left, self.fault.drop_after)
        with self.hub.blob_path(blob.sha256).open("rb") as stream:
            stream.seek(first)
            while left:
                block = stream.read(min(BLOCK, left))
                self.wfile.write(block)
                self.sent += len(block)
                left -= len(block)
        if self.fault and self.fault.drop_after is not None:
            self.wfile.flush()
            raise Dropped

    # Who may do what

    def _user(self, write: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in (TOKEN, READ_TOKEN):
            if write and token == READ_TOKEN:
                raise HubError(403, "Your token may only read")
            return "alice"
        if token or write:
            raise HubError(
                401, "Invalid credentials in Authorization header" if token else "Invalid username or password."
            )
        return None

    def _repository(self, name: str, kind: str = "model", write: bool = False) -> Repository:
        user = self._user(write)
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and user is None):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._check_namespace(name, user)
        return repository

    def _check_namespace(self, name: str, user: str | None) -> None:
        if name.split("/")[0] != user:
            raise HubError(
                403, f'You don\'t have the rights to create a model under the namespace "{name.split("/")[0]}"'
            )

    def _find(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit
