"""Where a checkpoint is: on the disk, or on the Hub."""

import os
import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from .checkpoint import ConversionError


WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "pytorch_model*.bin")


def find_source(source: str | os.PathLike, revision: str | None) -> Path:
    """
    The file or folder that `source` names: a path, or `owner/name`, `owner/name/file.pt` or `owner/name/folder` on the Hub.

    Raises:
        ConversionError: If it is neither here nor there.
    """
    path = Path(source)
    if path.exists():
        return path
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([^/].*))?", source) if isinstance(source, str) else None
    if match is None or source.startswith(("./", "../")):
        raise ConversionError(f"{source} is neither a file nor a folder.")
    repository, inside = match.groups()
    try:
        if inside is None:
            return Path(snapshot_download(repository, revision=revision, allow_patterns=list(PATTERNS)))
        if inside.endswith(WEIGHTS):
            return Path(hf_hub_download(repository, inside, revision=revision))
        patterns = [f"{inside}/{pattern}" for pattern in PATTERNS]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns)) / inside
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ConversionError(f"{source} is neither here nor on the Hub ({reason}).") from error
