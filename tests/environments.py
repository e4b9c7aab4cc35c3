"""Environments as users have them: the built wheel in one, Transformers without this package in another. No network is needed."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("modeling_proclip", "trainers", "hub_cards")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `command` in `cwd` with `environment` added; its output is text, and it can ask nothing."""
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def build_wheel(folder: Path) -> Path:
    """The wheel, built from a copy: a `build` folder of the checkout would bring back files that are deleted since."""
    source = folder / "source"
    source.mkdir()
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for package in (*PACKAGES, "tests"):
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index")
    built = run(*pip, "--wheel-dir", folder, source, cwd=folder)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


def environment_without_the_package(folder: Path) -> Path:
    """The Python of a new environment that sees what is installed beside this package, but not this package.

    A path in a .pth file is only searched; the .pth file there that an editable install leaves is not read.
    """
    made = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert made.returncode == 0, made.stderr
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "installed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = f"from importlib.util import find_spec; print([name for name in {PACKAGES} if find_spec(name)])"
    seen = run(python, "-c", code, cwd=folder.parent, PYTHONPATH="")
    assert seen.stdout.strip() == "[]", seen.stdout + seen.stderr
    return python


def environment_with(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment in which `wheel` is installed, by pip and with its commands, beside what is installed here."""
    python = environment_without_the_package(folder)
    done = run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder.parent
    )
    assert done.returncode == 0, done.stderr
    return python
