"""Files that may not be read, or that are exchanged while a folder is read."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainers.search import folder as folder_module
from trainers.search.folder import Folder, printable


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything, and so is somebody else meanwhile."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that other users may enter, as those of pytest they may not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        for file in ("open.png", "closed.png", "closed/in.png", "listed only/in.png"):
            path = Path(name, file)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"content")
        modes = {"closed.png": 0, "closed": 0, "listed only": 0o444}
        for file, mode in modes.items():
            os.chmod(Path(name, file), mode)
        yield Path(name)
        for file in modes:
            os.chmod(Path(name, file), 0o755)


def test_what_may_not_be_read_is_named(root):
    folder = Folder(root)
    with as_nobody():
        files = {file.path: file for file in folder.files()}
        assert set(files) == {"open.png", "closed.png"}
        assert folder.read(files["open.png"]) == b"content"
        with pytest.raises(PermissionError):
            folder.read(files["closed.png"])
    assert sorted(folder.unlisted) == [("closed", "Permission denied"), ("listed only/in.png", "Permission denied")]


def test_a_file_that_becomes_a_link_is_not_followed(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    root = tmp_path / "photos"
    root.mkdir()
    (root / "a.png").write_bytes(b"content")
    folder = Folder(root)
    (file,) = folder.files()
    (root / "a.png").unlink()
    (root / "a.png").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        folder.read(file)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"content")
    folder = Folder(tmp_path)
    (file,) = folder.files()
    monkeypatch.setattr(folder_module, "MAX_FILE_BYTES", 6)
    with pytest.raises(OSError, match="it has 7 bytes, more than 6"):
        folder.read(file)


def test_names_are_printed_on_one_line():
    assert printable("Übung 狐狸 🦊.png") == "Übung 狐狸 🦊.png"
    assert printable("a\nb\x1b[2J\udcfc.png") == r"a\nb\x1b[2J\udcfc.png"
