"""The five tasks of docs/five_tasks.md run on tiny models as they are written, each in ten lines at most."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from typer.testing import CliRunner

from modeling_proclip import ProCLIPModel
from tests import golden
from tests.environments import REPOSITORY
from tests.trainers.tiny_recipe import write_users_folder
from trainers.cli import app


def task(title: str) -> list[tuple[str, str]]:
    """The blocks of a task: their language and code."""
    page = (REPOSITORY / "docs" / "five_tasks.md").read_text(encoding="utf-8")
    return re.findall(r"```(\w+)\n(.*?)```", page.split(f"\n## {title}\n")[1].split("\n## ")[0], flags=re.DOTALL)


def run(title: str, replace: dict[str, str] | None = None, skip: tuple[str, ...] = ()) -> str:
    """Run a task's commands and Python code, and return what the commands print."""
    printed = ""
    for language, code in task(title):
        for old, new in (replace or {}).items():
            code = code.replace(old, new)
        if language == "yaml":
            Path("mine.yaml").write_text(code, encoding="utf-8")
        elif language == "python":
            exec(code, {})
        else:
            for line in code.splitlines():
                if not line.startswith(skip):
                    command, *arguments = shlex.split(line)
                    assert command == "proclip"
                    result = CliRunner().invoke(app, arguments)
                    assert result.exit_code == 0, result.output
                    printed += result.stdout
    return printed


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    """An empty folder to work in, with `clip`, `llm`, `my-proclip` and `photos` as the page names them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    write_users_folder(tmp_path)


def test_each_task_has_ten_lines_at_most():
    page = (REPOSITORY / "docs" / "five_tasks.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", page, flags=re.MULTILINE)
    lines = {title: sum(len(code.splitlines()) for _, code in task(title)) for title in titles}
    assert sum(0 < count <= 10 for count in lines.values()) == 5 and max(lines.values()) <= 10, lines


def test_search_my_photos():
    printed = run("Search my photos").splitlines()
    assert printed[0].startswith("photos.index: 24 images; embedded: 24")
    assert len(printed) == 1 + 3 + 3 and printed[4] == " 1.0000  1.png"


def test_classify_in_my_language(capsys):
    run("Classify in my language", {"gemma3-output/proclip": "my-proclip"}, skip=("proclip quickstart",))
    assert "'score': " in capsys.readouterr().out


def test_align_a_new_llm():
    settings = {"256": "8", "128": "8", "200": "2", "max_steps: 20}": "max_steps: 2}"}
    assert all(old in "".join(code for _, code in task("Align a new LLM")) for old in settings)
    assert "the model is in" in run("Align a new LLM", settings)
    ProCLIPModel.from_pretrained("runs/mine/contrastive_tuning/model")


def test_load_a_published_checkpoint():
    torch.save(golden.load("g2_llm2clip_vit").params, "published.pt")
    source = "VisionXLab/ProCLIP/proclip/30m/L14.pt"
    run("Load a published checkpoint", {source: "published.pt --head-width 8"})
    assert type(AutoModel.from_pretrained("ProCLIP-L14", load_text_model=False)) is ProCLIPModel


def test_publish_mine():
    """Without the login and without what is sent, which tests/test_clean_environment.py does with a stand-in Hub."""
    printed = run("Publish mine", {"my-proclip\n": "my-proclip --dry-run\n"}, skip=("hf ",))
    assert printed.count("would send") > 2
