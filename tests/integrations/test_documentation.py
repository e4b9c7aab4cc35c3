"""The examples of the README that use others' libraries, and all of docs/integrations.md, run."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.modeling_proclip import tiny


REPOSITORY = Path(__file__).parents[2]
QUICKSTART = "quickstart-output/proclip"


def blocks(file: str) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / file).read_text(encoding="utf-8"), flags=re.DOTALL)


def save_tiny(folder: Path) -> None:
    tiny.model().save_pretrained(folder)
    tiny.processor(prompt_template=tiny.LLAMA3, max_length=40).save_pretrained(folder)


@pytest.mark.parametrize("library", ["transformers.pipeline(", "SentenceTransformer("])
def test_three_lines_of_the_readme(tmp_path, monkeypatch, capsys, library):
    (block,) = (block for block in blocks("README.md") if library in block)
    assert QUICKSTART in block and len(block.splitlines()) == 3
    save_tiny(tmp_path / "proclip")
    monkeypatch.chdir(REPOSITORY)
    exec(block.replace(QUICKSTART, str(tmp_path / "proclip")), {})
    printed = capsys.readouterr().out
    if "pipeline" in library:
        scores = [float(score) for score in re.findall(r"'score': ([\d.e-]+)", printed)]
        assert len(scores) == 2 and sum(scores) == pytest.approx(1)
    else:
        assert len(re.findall(r"-?\d\.\d+", printed)) == 2 and printed.startswith("tensor([[")


def test_all_examples_of_the_integrations_page(tmp_path, monkeypatch):
    """One after the other, in one process, as a reader would try them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    save_tiny(tmp_path / "my-proclip")
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(8)]
    pictures[0].save("picture.png")
    names = {"pictures": pictures, "captions": [f"a picture of {number} cats" for number in range(8)]}
    for block in blocks("docs/integrations.md"):
        exec(block, names)
    assert np.linalg.norm(names["text_embeds"], axis=-1) == pytest.approx([1, 1], abs=1e-5)
    for written in (
        "my-tuned-proclip/modules.json",
        "my-adapter/adapter_model.safetensors",
        "my-merged-proclip/config.json",
    ):
        assert Path(written).is_file(), written
    assert "| image encoder, openai/clip-vit-large-patch14 | mit |" in Path("my-proclip/README.md").read_text()
