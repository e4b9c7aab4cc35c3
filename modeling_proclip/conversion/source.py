"""Where a checkpoint is: on the disk, or on the Hub."""

import os
import re
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download

from .errors import ConversionError
from .stored_tensors import INDEXES


WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
# What a folder is converted from; never code.
FOLDER_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "pytorch_model*.bin")


def find_source(source: str | os.PathLike, revision: str | None) -> Path:
    """The file or folder that `source` names: a path, or `owner/name`, `owner/name/file.pt` or `owner/name/folder` on the Hub. A folder without
    weights under their usual names stands for the one file of weights in it.
    """
    path = Path(source)
    if path.exists() and revision is not None:
        raise ConversionError(f"revision is for a source on the Hub, and {source} is here: leave it out.")
    if path.is_dir():
        inside = _file_of([file.name for file in path.iterdir()], str(path))
        return path / inside if inside else path
    if path.exists():
        return path
    if isinstance(source, str) and "://" in source:
        raise ConversionError(
            f"{source} is an address: name the repository on the Hub, owner/name, or a file or folder here."
        )
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([^/].*))?", source) if isinstance(source, str) else None
    if match is None or source.startswith(("./", "../")):
        raise ConversionError(f"{source} is neither a file nor a folder.")
    try:
        return _download(match[1], match[2] or "", revision)
    except ConversionError:
        raise
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ConversionError(f"{source} is neither here nor on the Hub ({reason}).") from error


def _download(repository: str, inside: str, revision: str | None) -> Path:
    if inside.endswith(WEIGHT_SUFFIXES):
        return Path(hf_hub_download(repository, inside, revision=revision))
    folder = f"{inside.rstrip('/')}/" if inside else ""
    names = [n.removeprefix(folder) for n in list_repo_files(repository, revision=revision) if n.startswith(folder)]
    if file := _file_of(names, f"{repository}/{inside}".rstrip("/")):
        return Path(hf_hub_download(repository, folder + file, revision=revision))
    wanted = [folder + n for n in names if "/" not in n and any(fnmatch(n, pattern) for pattern in FOLDER_PATTERNS)]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted)) / inside


def _file_of(names: list[str], where: str) -> str | None:
    """The only file of weights, where none has its usual name; `None` where one has."""
    usual = {*INDEXES, *INDEXES.values(), "adapter_config.json"}
    files = sorted(name for name in names if name.endswith(WEIGHT_SUFFIXES))
    if usual & set(names) or not files:
        return None
    if len(files) > 1:
        raise ConversionError(f"{where} holds several checkpoints, so name one: {', '.join(files)}.")
    return files[0]
