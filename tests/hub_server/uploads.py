"""How files come to the stand-in: what is large, Git LFS, and commits."""

import base64
import hashlib
import json
import threading
from typing import Any

from .connection import Connection
from .faults import HubError


LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".arrow", ".parquet", ".png", ".jpg")
LFS_SIZE = 10 * 2**20


class Uploads(Connection):
    """Routes by which files come; see [`Handler`]."""

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
