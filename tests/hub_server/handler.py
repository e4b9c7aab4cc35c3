"""The stand-in's routes: which method answers what, and those that files do not come by."""

import json
import re
from datetime import datetime, timezone
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .faults import Dropped, HubError, Request
from .repositories import Blob, Commit, Repository, describe, describe_folder, folders_of
from .uploads import LFS_ENDINGS, Uploads


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


class Handler(Uploads):
    """One connection. A route's method takes the route's groups and returns what becomes the JSON answer."""

    found: tuple[Commit, Blob]  # by `_resolve`, to be sent

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
                    self._send_blob(*self.found)  # outside the lock
                return
        raise HubError(404, f"no such page: {self.command} {self.route}")

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

    def _resolve(self, body: bytes, name: str, revision: str, path: str, kind: str = "model") -> None:
        commit = self._find(self._repository(name, kind), revision)
        blob = commit.files.get(path)
        if blob is None:
            headers = {"X-Repo-Commit": commit.oid}
            raise HubError(404, f"{path} does not exist", "EntryNotFound", **headers)
        self.found = commit, blob
