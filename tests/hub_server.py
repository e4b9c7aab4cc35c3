"""A stand-in for the Hugging Face Hub on loopback, for the real client: repositories, commits, large files, downloads, and faults on demand.

It speaks what `huggingface_hub` asks of the Hub when it creates, fills, reads and deletes model and dataset repositories, and counts the
bytes it is sent. Large files travel by the Git LFS protocol (one PUT a file, or parts), not by Xet, which has no server to run on
loopback: clients are started with `HF_HUB_DISABLE_XET=1`. See [`HubServer.environment`].
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import constants


TOKEN = "hf_" + "S" * 34  # may write as alice
READ_TOKEN = "hf_" + "R" * 34  # alice too, but may only read
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".arrow", ".parquet", ".png", ".jpg")
LFS_SIZE = 10 * 2**20
BLOCK = 2**16


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    sha256: str
    size: int
    oid: str  # as git names it: of the content, or of the pointer to a large file
    lfs: bool


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    parent: str | None
    message: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """Commits, and the names of some of them."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        oid = secrets.token_hex(20)
        self.commits[oid] = Commit(oid, parent, message, files)
        self.branches[branch] = oid
        return self.commits[oid]


@dataclass
class Fault:
    """
    What goes wrong with the next `times` requests that match: a status, or a connection that ends after some bytes of the body, or that
    stops there (`reached` is set) until `release` is.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    drop_after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "said the stand-in"
    stall_after: int | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Request:
    """A request, the bytes of its body that arrived, and those of a file that were sent in answer."""

    method: str
    path: str
    num_bytes: int
    status: int | None
    num_bytes_sent: int = 0


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


def git_oid(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The file that git keeps in place of a large one."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class HubError(Exception):
    """An answer that is no success, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


class Dropped(Exception):
    """The connection is to be cut."""


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
KIND = r"/api/(?P<kind>model|dataset)s/"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", KIND + NAME, "info"),
    ("GET", KIND + NAME + r"/revision/(?P<revision>[^/]+)", "info"),
    ("GET", KIND + NAME + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("POST", KIND + NAME + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", KIND + NAME + r"/refs", "refs"),
    ("GET", KIND + NAME + r"/commits/(?P<revision>[^/]+)", "commits"),
    ("POST", KIND + NAME + r"/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", KIND + NAME + r"/tag/(?P<revision>[^/]+)", "create_tag"),
    ("PUT", KIND + NAME + r"/settings", "settings"),
    ("POST", KIND + NAME + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", KIND + NAME + r"/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", r"/(?:(?P<kind>dataset)s/)?" + NAME + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", r"/lfs/complete/(?P<sha256>\w{64})", "lfs_complete"),
    ("GET", r"/(?:(?P<kind>dataset)s/)?" + NAME + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("HEAD", r"/(?:(?P<kind>dataset)s/)?" + NAME + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    """One connection. A route's method takes the route's groups and returns what becomes the JSON answer."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        self.received, self.sent, self.status = 0, 0, None
        self.fault = self.hub.take_fault(self.command, self.route)
        try:
            if self.command == "PUT" and (match := re.fullmatch(r"/lfs/(\w{64})(?:/(\d+))?", self.route)):
                self._lfs_put(match[1], match[2])
            else:
                body = b"".join(self._body())
                if self.fault and self.fault.status:
                    raise HubError(self.fault.status, self.fault.message, **self.fault.headers)
                self._dispatch(body)
        except HubError as error:
            names = {"X-Error-Code": error.code, "X-Error-Message": error.message, **error.headers}
            self._answer(
                error.status, json.dumps({"error": error.message}).encode(), {k: v for k, v in names.items() if v}
            )
        except (Dropped, ConnectionError):
            self.close_connection = True
            self.connection.close()
        finally:
            with self.hub.lock:
                self.hub.requests.append(Request(self.command, self.route, self.received, self.status, self.sent))

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

    def _dispatch(self, body: bytes) -> None:
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and method == self.command:
                groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                with self.hub.lock:
                    answer = getattr(self, "_" + action)(body, **groups)
                if answer is not None:
                    self._answer(200, json.dumps(answer).encode())
                elif self.status is None:
                    self._send_blob()
                return
        raise HubError(404, f"no such page: {self.command} {self.route}")

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

    # Routes

    def _whoami(self, body: bytes) -> Any:
        if self._user() is None:
            raise HubError(401, "Invalid username or password.")
        return {"type": "user", "name": "alice", "fullname": "Alice", "orgs": [], "auth": {"type": "access_token"}}

    def _create(self, body: bytes) -> Any:
        user = self._user(write=True)
        wanted = json.loads(body)
        name, kind = f"{wanted.get('organization') or user}/{wanted['name']}", wanted.get("type") or "model"
        self._check_namespace(name, user)
        if (kind, name) in self.hub.repositories:
            self._answer(
                409,
                json.dumps({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}).encode(),
            )
            return None
        # huggingface_hub 2 says "visibility", and 1 says "private".
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = self.hub.repositories[kind, name] = Repository(private)
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS)
        repository.commit("main", "initial commit", {".gitattributes": self.hub.store(attributes.encode())})
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": name, "private": private}

    def _delete(self, body: bytes) -> Any:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or self._user(write=True)}/{wanted['name']}"
        self._repository(name, wanted.get("type") or "model", write=True)
        del self.hub.repositories[wanted.get("type") or "model", name]
        return {}

    def _validate_yaml(self, body: bytes) -> Any:
        """What the Hub documents that it looks at (hub-docs, modelcard.md): YAML, and the required fields of `model-index`."""
        content = json.loads(body)["content"]
        if not content.startswith("---\n") or "\n---" not in content[4:]:
            raise HubError(400, "empty or missing yaml metadata in repo card")
        try:
            metadata = yaml.safe_load(content[4 : content.index("\n---", 4)])
            for model in metadata.get("model-index", []):
                for result in model["results"]:
                    _ = result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]
                    _ = [(metric["type"], metric["value"]) for metric in result["metrics"]]
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise HubError(400, f"invalid metadata in repo card: {error!r}") from error
        return {"errors": [], "warnings": []}

    def _info(self, body: bytes, kind: str, name: str, revision: str = "main") -> Any:
        repository = self._repository(name, kind)
        commit = self._find(repository, revision)
        siblings = [{"rfilename": path, "size": blob.size, "blobId": blob.oid} for path, blob in commit.files.items()]
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        names = {"_id": "0" * 24, "id": name, "modelId": name, "sha": commit.oid, "author": name.split("/")[0]}
        counts = {"downloads": 0, "likes": 0, "tags": [], "lastModified": now, "createdAt": now}
        return {
            **names,
            **counts,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "siblings": siblings,
        }

    def _tree(self, body: bytes, kind: str, name: str, revision: str, path: str = "") -> Any:
        files = self._find(self._repository(name, kind), revision).files
        below = {p: blob for p, blob in files.items() if not path or p.startswith(path.rstrip("/") + "/")}
        if path and not below:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        folders = folders_of(below) - folders_of([path + "/file"])
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            depth = path.count("/") + 1 if path else 0
            folders = {p for p in folders if p.count("/") == depth}
            below = {p: blob for p, blob in below.items() if p.count("/") == depth}
        return [describe_folder(p) for p in sorted(folders)] + [describe(p, blob) for p, blob in sorted(below.items())]

    def _paths_info(self, body: bytes, kind: str, name: str, revision: str) -> Any:
        files = self._find(self._repository(name, kind), revision).files
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        found = [describe(path, files[path]) for path in wanted if path in files]
        return found + [describe_folder(path) for path in wanted if path in folders_of(files)]

    def _refs(self, body: bytes, kind: str, name: str) -> Any:
        repository = self._repository(name, kind)

        def entries(prefix: str, names: dict[str, str]) -> list[dict]:
            return [{"name": n, "ref": f"refs/{prefix}/{n}", "targetCommit": oid} for n, oid in names.items()]

        return {
            "branches": entries("heads", repository.branches),
            "tags": entries("tags", repository.tags),
            "converts": [],
        }

    def _commits(self, body: bytes, kind: str, name: str, revision: str) -> Any:
        repository = self._repository(name, kind)
        commit: Commit | None = self._find(repository, revision)
        found = []
        while commit is not None:
            found.append({"id": commit.oid, "title": commit.message, "message": "", "authors": [{"user": "alice"}]})
            found[-1]["date"] = "2026-01-01T00:00:00.000Z"
            commit = repository.commits.get(commit.parent or "")
        return found

    def _create_branch(self, body: bytes, kind: str, name: str, branch: str) -> Any:
        repository = self._repository(name, kind, write=True)
        if branch in repository.branches:
            raise HubError(409, "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        repository.branches[branch] = self._find(repository, start).oid
        return {}

    def _create_tag(self, body: bytes, kind: str, name: str, revision: str) -> Any:
        repository = self._repository(name, kind, write=True)
        repository.tags[json.loads(body)["tag"]] = self._find(repository, revision).oid
        return {}

    def _settings(self, body: bytes, kind: str, name: str) -> Any:
        wanted = json.loads(body)
        self._repository(name, kind, write=True).private = wanted.get("visibility") == "private" or bool(
            wanted.get("private")
        )
        return {}

    def _preupload(self, body: bytes, kind: str, name: str, revision: str) -> Any:
        files = self._find(self._repository(name, kind, write=True), revision).files
        answer = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LFS_ENDINGS) or file["size"] >= LFS_SIZE
            entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if blob := files.get(file["path"]):
                entry["oid"] = blob.sha256 if blob.lfs else blob.oid
            answer.append(entry)
        return {"files": answer}

    def _lfs_batch(self, body: bytes, name: str, kind: str = "model") -> Any:
        self._repository(name, kind, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            sha256, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": sha256, "size": size}
            if not self.hub.blob_path(sha256).exists():
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{sha256}"}
                if self.hub.part_size and size > self.hub.part_size:
                    num_parts = -(-size // self.hub.part_size)
                    parts = {str(i + 1): f"{self.hub.url}/lfs/{sha256}/{i + 1}" for i in range(num_parts)}
                    header = {"chunk_size": str(self.hub.part_size), **parts}
                    upload = {"href": f"{self.hub.url}/lfs/complete/{sha256}", "header": header}
                entry["actions"] = {"upload": upload}
            objects.append(entry)
        return {"transfer": "multipart" if self.hub.part_size else "basic", "objects": objects}

    def _lfs_put(self, sha256: str, part: str | None) -> None:
        """A large file or a part of one, written as it comes."""
        digest, target = hashlib.sha256(), self.hub.blob_path(sha256)
        partial = target.with_name(f"{target.name}.{part or 'whole'}.{threading.get_ident()}")
        try:
            with partial.open("wb") as stream:
                for block in self._body():
                    stream.write(block)
                    digest.update(block)
            if self.fault and self.fault.status:
                raise HubError(self.fault.status, self.fault.message, **self.fault.headers)
            if part is None:
                if digest.hexdigest() != sha256:
                    raise HubError(400, "The content is not what its name says")
                partial.replace(target)
            else:
                partial.replace(target.with_name(f"{sha256}.part{part}"))
        finally:
            partial.unlink(missing_ok=True)
        self._answer(200, b"", {"ETag": digest.hexdigest()})

    def _lfs_complete(self, body: bytes, sha256: str) -> Any:
        target = self.hub.blob_path(sha256)
        content = b"".join(
            target.with_name(f"{sha256}.part{part['partNumber']}").read_bytes() for part in json.loads(body)["parts"]
        )
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HubError(400, "The parts are not what their name says")
        target.write_bytes(content)
        return {}

    def _commit(self, body: bytes, kind: str, name: str, revision: str) -> Any:
        repository = self._repository(name, kind, write=True)
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = self._find(repository, revision)
        files, message = dict(head.files), ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif operation["key"] == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if not self.hub.blob_path(value["oid"]).exists():
                    raise HubError(400, f"The large file of {value['path']} was never uploaded")
                files[value["path"]] = self.hub.blob(value["oid"], value["size"])
            elif operation["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise HubError(400, f"unknown operation {operation['key']}")
        commit = repository.commit(revision, message, files)
        return {
            "commitUrl": f"{self.hub.url}/{name}/commit/{commit.oid}",
            "commitOid": commit.oid,
            "pullRequestUrl": None,
        }

    def _resolve(self, body: bytes, name: str, revision: str, path: str, kind: str = "model") -> None:
        commit = self._find(self._repository(name, kind), revision)
        blob = commit.files.get(path)
        if blob is None:
            headers = {"X-Repo-Commit": commit.oid}
            raise HubError(404, f"{path} does not exist", "EntryNotFound", **headers)
        self.sending = commit, blob

    def _send_blob(self) -> None:
        """The file that `_resolve` found: whole, or the range asked for, outside the lock."""
        commit, blob = self.sending
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


def folders_of(paths: Iterable[str]) -> set[str]:
    """All folders that hold files of these paths."""
    return {str(folder) for path in paths for folder in PurePosixPath(path).parents} - {"."}


def describe_folder(path: str) -> dict[str, Any]:
    """A folder's entry of a tree."""
    return {"type": "directory", "oid": git_oid(path.encode()), "size": 0, "path": path}


def describe(path: str, blob: Blob) -> dict[str, Any]:
    """An entry of a tree, as the Hub lists it."""
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.lfs:
        size = len(pointer(blob.sha256, blob.size))
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": size}
    return entry
