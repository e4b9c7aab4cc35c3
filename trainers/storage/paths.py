"""Paths that come from data: each must stay inside the folder it belongs to."""

import os
from pathlib import Path


def path_inside(folder: str | Path, name: str) -> Path:
    """The path of the file or folder that data calls `name`, seen from `folder`. ValueError if it leaves `folder`, by "..", an absolute path or a link."""
    if "\0" in name:
        raise ValueError(f"{name!r:.80} is not the name of a file")
    path = Path(folder) / name
    try:
        found = os.path.realpath(path)
    except OSError as error:  # a loop of links, or a name that is too long
        raise ValueError(f"{name!r:.80} cannot be followed ({error.strerror})") from error
    if not any(Path(found).is_relative_to(root) for root in _roots(Path(os.path.realpath(folder)))):
        raise ValueError(f"{name!r:.200} lies outside of {folder}")
    return path


def _roots(folder: Path) -> list[Path]:
    """`folder`, and where the Hub's cache keeps the files that a snapshot is made of links to."""
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    return [folder] if snapshots is None else [folder, snapshots.parent / "blobs"]
