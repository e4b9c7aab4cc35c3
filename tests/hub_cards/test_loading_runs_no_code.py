"""Where the package is imported, loading a repository runs none of its code unless somebody trusts it, and asks nobody: docs/hub.md."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

import modeling_proclip  # noqa: F401 - registers the classes
from tests.hub_cards.publishing import edit


NAMED = {
    "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor"), "evil.Evil")
    | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
}
LOADERS = (AutoConfig, AutoModel, AutoProcessor, AutoImageProcessor, AutoTokenizer)


@pytest.fixture
def evil(copy, monkeypatch) -> Path:
    def asked(*arguments):
        raise AssertionError("nobody is asked")

    monkeypatch.setattr("builtins.input", asked)
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nclass Evil:\n    pass\n")
    towers = json.loads((copy / "config.json").read_text())
    towers = {tower: towers[tower] | NAMED for tower in ("vision_config", "text_config")}
    pipelines = {"zero-shot-image-classification": {"impl": "evil.Evil", "pt": ["AutoModel"]}}
    edit(copy / "config.json", custom_pipelines=pipelines, **towers, **NAMED)
    image_processor = json.loads((copy / "processor_config.json").read_text())["image_processor"]
    edit(copy / "processor_config.json", image_processor=image_processor | NAMED, **NAMED)
    edit(copy / "tokenizer_config.json", **NAMED)
    return copy


@pytest.mark.parametrize("settings", [{}, {"trust_remote_code": False}], ids=str)
def test_nothing_runs_without_trust(evil, settings):
    for loader in LOADERS:
        loader.from_pretrained(evil, **settings)
    with pytest.raises(
        ValueError, match="trust_remote_code"
    ):  # which has no other pipeline than that of the repository
        pipeline("zero-shot-image-classification", model=str(evil), **settings)
    assert not (evil / "ran").exists()


def test_a_tokenizer_s_code_runs_with_trust(evil):
    """What the page warns of; if this fails, the page says too little good of Transformers."""
    with pytest.raises(AttributeError):
        AutoTokenizer.from_pretrained(evil, trust_remote_code=True)
    assert (evil / "ran").exists()
