"""The Python examples of the README and of the pages in docs/ run, page by page, as a reader would try them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from modeling_proclip import ProCLIPModel
from tests.environments import REPOSITORY
from tests.modeling_proclip import tiny
from tests.trainers.tiny_recipe import write_parts
from tests.trainers.tiny_training import TinyStore


CAPTIONS = [f"a drawing of {number} cats" for number in range(8)]


def blocks(file: str) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / file).read_text(encoding="utf-8"), flags=re.DOTALL)


def run_page(file: str, names: dict[str, Any], replace: dict[str, str] | None = None) -> dict[str, Any]:
    """Run the examples of a page one after the other, in one process. Returns what they defined."""
    for block in blocks(file):
        for old, new in (replace or {}).items():
            block = block.replace(old, new)
        exec(block, names)
    return names


@pytest.fixture
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(8)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with the checkpoint `my-proclip`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    tiny.model().save_pretrained("my-proclip")
    tiny.processor(prompt_template=tiny.LLAMA3, max_length=40).save_pretrained("my-proclip")
    return tmp_path


def test_the_ten_lines_of_the_readme(folder, monkeypatch, capsys):
    (block,) = blocks("README.md")
    assert len(block.splitlines()) == 10
    monkeypatch.chdir(REPOSITORY)
    run_page("README.md", {}, {"quickstart-output/proclip": str(folder / "my-proclip")})
    assert capsys.readouterr().out.strip() in ("docs/images/apple.png", "docs/images/ghost.png")


def test_search_my_photos(folder, images, capsys):
    (folder / "photos" / "2026").mkdir(parents=True)
    for number, image in enumerate(images[:6]):
        image.save(folder / "photos" / "2026" / f"{number}.png")
    images[6].save(folder / "photos" / "first.JPG")
    (folder / "photos" / "notes.txt").write_text("no image")
    names = run_page("docs/how_to/search_photos.md", {})
    assert names["image_embeds"].shape == (7, 16)
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 5 and scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(names["scores"].max().item(), abs=1e-3)


def test_smaller_embeddings(folder, images):
    images[0].save("image.png")
    names = run_page("docs/how_to/smaller_embeddings.md", {}, {"truncate_dim=64": "truncate_dim=4"})
    assert names["image_embeds"].shape == (1, 4)


def test_embed_a_large_corpus(folder):
    (folder / "captions").mkdir()
    for number in range(3):
        (folder / "captions" / f"{number}.txt").write_text("\n".join(CAPTIONS[number:]))
    store = run_page("docs/how_to/embed_large_corpora.md", {})["store"]
    assert len(store) == 8 and store.build_summary.num_tasks == 20


def test_align_a_new_llm(folder, images):
    write_parts(folder)
    page, settings = (
        "docs/how_to/align_llm.md",
        "max_steps=2, per_device_train_batch_size=4, report_to='none', learning_rate=",
    )
    replace = {
        "openai/clip-vit-large-patch14": "clip",
        "HuggingFaceTB/SmolLM2-135M-Instruct": "llm",
        "learning_rate=": settings,
    }
    assert all(old in blocks(page)[0] for old in replace)
    rows = [{"image": image, "text": [caption, f"{caption}, seen twice"]} for image, caption in zip(images, CAPTIONS)]
    names = run_page(
        page,
        {"rows": rows},
        {**replace, "cc3m/*.tar": "pairs.parquet", '"jpg"': '"image"', '"txt"': '["short", "long"]'},
    )
    assert ProCLIPModel.from_pretrained("my-proclip").config.adapter_input_norm == "standardize"
    assert len(next(iter(names["rows"]))["text"]) == 2


def test_tune_the_llm(folder):
    write_parts(folder)
    replace = {
        ", ...]": "] * 4",
        "per_device_train_batch_size=2048": "per_device_train_batch_size=4, max_steps=1, report_to='none'",
    }
    assert all(old in blocks("docs/caption_contrastive.md")[0] for old in replace)
    run_page("docs/caption_contrastive.md", {"LLM": "llm"}, replace)
    assert (folder / "stage-0" / "adapter" / "adapter_config.json").is_file()
    ProCLIPModel.from_vision_text_pretrained("clip", "tuned-llm")


def test_other_languages(folder):
    write_parts(folder)
    german = [f"eine Zeichnung von {number} Katzen" for number in range(8)]
    hidden_size = AutoConfig.from_pretrained("llm").hidden_size
    names = {"CLIP": "clip", "captions": CAPTIONS, "english": CAPTIONS, "german": german}
    names["text_store"] = TinyStore(hidden_size, 0, [*CAPTIONS, *german])
    (block,) = (block for block in blocks("docs/how_to/multilingual.md") if "set_anchors" in block)
    exec(block.replace("tuned-llm", "llm"), names)
    adapter = names["model"].text_adapter
    assert adapter.anchors.any() and adapter.language_directions.any() and adapter.input_mean.any()


def test_long_captions(folder):
    names = {"AutoProcessor": AutoProcessor, "model": tiny.model(), "long_caption": "a cat on a mat " * 10}
    page = "docs/how_to/long_captions.md"
    lengths = [
        run_page(page, dict(names), {"max_length=2048": f"max_length={length}"})["inputs"]["input_ids"].shape[1]
        for length in (20, 2048)
    ]
    assert lengths[0] == 20 < lengths[1]


def test_all_examples_of_the_integrations_page(folder, images):
    images[0].save("image.png")
    names = run_page("docs/integrations.md", {"images": images, "captions": CAPTIONS})
    assert np.linalg.norm(names["text_embeds"], axis=-1) == pytest.approx([1, 1], abs=1e-5)
    for written in (
        "my-tuned-proclip/modules.json",
        "my-adapter/adapter_model.safetensors",
        "my-merged-proclip/config.json",
    ):
        assert Path(written).is_file(), written
    assert "| image encoder, openai/clip-vit-large-patch14 | mit |" in Path("my-proclip/README.md").read_text()
