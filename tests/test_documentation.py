"""What the README and the pages say of themselves: length, links, the quickstart's numbers, the date of the lock files."""

import json
import re
import subprocess

import pytest

from tests.environments import REPOSITORY


PUBLISHED_CODE = {"train.py", "run_supervised.py", "your_script.py"}  # of the papers, and of users
MODELS = {
    "clip": "CLIP",
    "lit": "LiT",
    "llm2clip": "LLM2CLIP",
    "proclip-stage1": "ProCLIP, stage 1",
    "proclip": "ProCLIP",
}


def read(file: str) -> str:
    return (REPOSITORY / file).read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(read("README.md").split()) <= 900


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(file):
    """Those between the pages of docs/ are checked by `make docs`."""
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", read(file)) if not target.startswith("https://")]
    for target in targets:
        assert (REPOSITORY / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("file", ["README.md", "docs/quickstart.md"])
def test_the_table_is_that_of_the_published_results(file):
    lines = read(file).splitlines()
    for row in json.loads(read("docs/quickstart_results.json"))["rows"]:
        others = [value for language, value in row["zero_shot_by_language"].items() if language != "en"]
        values = [
            row["zero_shot_seen"],
            row["zero_shot_unseen"],
            row["i2t_r@1"],
            row["t2i_r@1"],
            sum(others) / len(others),
        ]
        cells = [MODELS[row["model"]], *(f"{100 * value:.1f}" for value in values), row["budget"]]
        assert sum([cell.strip() for cell in line.strip("|").split("|")] == cells for line in lines) == 1, cells


def test_the_readme_has_the_date_of_the_lock_files():
    dates = [re.search(r"20\d\d-\d\d-\d\d", read(f"locks/{name}.txt"))[0] for name in ("quickstart", "test")]
    assert max(dates) in read("README.md")


@pytest.mark.parametrize(
    "file",
    [
        "README.md",
        "CONTRIBUTING.md",
        *sorted(str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "docs").rglob("*.md")),
    ],
)
def test_python_files_that_a_page_names_exist(file):
    ours = [f"/{path.relative_to(REPOSITORY)}" for path in REPOSITORY.glob("[a-z]*/**/*.py")]
    named = set(re.findall(r"`(?:python )?([\w./]+\.py)", read(file))) - PUBLISHED_CODE
    missing = sorted(name for name in named if not any(path.endswith(f"/{name}") for path in ours))
    assert not missing


def test_contributing_lists_every_room():
    rooms = {path.stem for path in (REPOSITORY / "trainers").iterdir() if re.match(r"[a-z]", path.name)} - {"py"}
    assert not [room for room in rooms if room not in read("CONTRIBUTING.md")]


def test_the_tests_that_the_makefile_names_are_there():
    printed = subprocess.run(
        ["make", "--dry-run", "test-oldest"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout
    named = re.findall(r"tests/\S+\.py", printed)
    assert named and [name for name in named if not (REPOSITORY / name).exists()] == []
