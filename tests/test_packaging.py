"""The wheel as users get it: what is in it, and that it works where there is no checkout. Takes about 20 s, without a network."""

import email
import email.message
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.environments import PACKAGES, REPOSITORY, run
from trainers import cli


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    """What the wheel says of itself."""
    names = zipfile.ZipFile(wheel).namelist()
    (name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(zipfile.ZipFile(wheel).read(name))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target)
    done = run(*pip, wheel, cwd=target)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def python(installed, tmp_path):
    """`python(*arguments)` runs Python in an empty folder, with the installed wheel in front of everything else."""

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return run(sys.executable, *arguments, cwd=tmp_path, PYTHONPATH=str(installed), **environment)

    return call


def test_wheel_holds_three_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    (metadata,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {*PACKAGES, metadata}
    assert not [name for name in names if "test" in Path(name).name]


def test_wheel_holds_every_file_of_the_packages(wheel):
    # Catches a sub-package without __init__.py, and assets or templates that package_data forgets.
    files = (path for package in PACKAGES for path in (REPOSITORY / package).rglob("*") if path.is_file())
    expected = {str(path.relative_to(REPOSITORY)) for path in files if "__pycache__" not in path.parts}
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_wheel_carries_license_and_notice(wheel):
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in name}
    assert {"LICENSE", "NOTICE"} <= names


def test_readme_describes_the_wheel(metadata):
    # setuptools only warns of a README that it does not find.
    assert metadata.get_payload().startswith((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()[0])


def test_extras_that_error_messages_name_exist(metadata):
    assert set(cli.EXTRA_OF.values()) <= set(metadata.get_all("Provides-Extra"))


def locked(name: str) -> dict[str, Version]:
    """The releases in a lock file that are for this Python and platform."""
    text = re.sub(r" \\\n(    --hash=\S+( \\\n)?)+", "\n", (REPOSITORY / "locks" / name).read_text())
    requirements = [Requirement(line) for line in text.splitlines() if re.match("[a-z0-9]", line)]
    ours = (one for one in requirements if one.marker is None or one.marker.evaluate())
    return {canonicalize_name(one.name): Version(str(one.specifier).removeprefix("==")) for one in ours}


def wanted(metadata, *extras: str) -> list[Requirement]:
    """What the package asks for with these extras, but for itself and torch, which comes in many builds and is in no lock."""
    requirements = map(Requirement, metadata.get_all("Requires-Dist"))
    asked = (
        one for one in requirements if not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in extras)
    )
    return [one for one in asked if one.name not in ("torch", "proclip-transformers")]


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_locks_hold_what_the_package_asks_for(metadata, name):
    """`make lock` has been run since the requirements changed."""
    releases = locked("quickstart.txt") | (locked("test.txt") if name == "test" else {})
    extras = [
        "quickstart",
        "evaluation",
        "peft",
        "sentence-transformers",
        "search",
        *(["test", "dev"] if name == "test" else []),
    ]
    for requirement in wanted(metadata, *extras):
        assert releases[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_oldest_lock_holds_the_lower_bounds(metadata):
    releases = locked("oldest.txt")
    lowest: dict[str, list[Version]] = {}
    for requirement in wanted(metadata, "peft"):
        bounds = (Version(one.version) for one in requirement.specifier if one.operator in (">=", "=="))
        lowest.setdefault(canonicalize_name(requirement.name), []).extend(bounds)
    assert {name: releases[name] for name in lowest} == {name: max(bounds) for name, bounds in lowest.items()}


def test_the_lock_of_the_documentation_holds_what_was_asked_for():
    lines = (REPOSITORY / "locks" / "docs.in").read_text().splitlines()
    releases = locked("docs.txt")
    for requirement in (Requirement(line.split("#")[0]) for line in lines if re.match("[a-z]", line)):
        if requirement.marker is None or requirement.marker.evaluate():
            assert releases[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_packages_import_outside_the_checkout(python, installed):
    done = python(
        "-c", "import modeling_proclip, trainers, hub_cards as h; print(modeling_proclip, trainers, h, sep='\\n')"
    )
    assert done.returncode == 0, done.stderr
    for package, line in zip(PACKAGES, done.stdout.splitlines(), strict=True):
        assert str(installed / package / "__init__.py") in line


def test_console_command_is_installed(python, installed, wheel):
    done = python(str(installed / "bin" / "proclip"), "--version")
    assert done.returncode == 0, done.stderr
    _, version, *_ = wheel.name.split("-")
    assert done.stdout.startswith(f"proclip-transformers {version}, torch ")


def test_module_answers_like_the_command(python):
    done = python("-m", "trainers.cli", "--help")
    assert done.returncode == 0, done.stderr
    assert "--version" in done.stdout


def test_command_line_starts_without_torch(python):
    # `proclip --help` has to answer at once; these take seconds to import.
    code = "import sys, trainers.cli; print([m for m in ('torch', 'transformers', 'datasets', 'matplotlib') if m in sys.modules])"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_metric_modules_load_from_the_wheel_without_a_network(python, installed):
    pytest.importorskip("evaluate")
    code = (
        "import evaluate; from importlib.resources import files\n"
        "folder = files('trainers.evaluation') / 'modules'; print(folder)\n"
        "recall = evaluate.load(str(folder / 'retrieval_recall'), cache_dir='cache')\n"
        "print(recall.compute(predictions=[[1.0, 0.0]], references=[0], image_embeddings=[[2.0, 1.0]], ks=[1]))"
    )
    done = python("-c", code, HF_HUB_OFFLINE="1", HF_HOME="home")
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stdout and "{'i2t_r@1': 1.0, 't2i_r@1': 1.0}" in done.stdout
