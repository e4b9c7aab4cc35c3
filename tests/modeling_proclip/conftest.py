"""Fixtures of several test modules: a checkpoint, an LLM on disk, a pair with it, and the pair's checkpoint without it."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from modeling_proclip import ProCLIPModel
from tests.modeling_proclip import tiny


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny.model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def llm(tmp_path) -> Path:
    torch.manual_seed(1)
    LlamaModel(LlamaConfig(**tiny.TEXT)).save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


@pytest.fixture
def pair(llm) -> ProCLIPModel:
    torch.manual_seed(2)
    return ProCLIPModel.from_vision_text_pretrained(tiny.clip(), llm, adapter_num_layers=1)


@pytest.fixture
def lean(pair, tmp_path) -> Path:
    pair.save_pretrained(tmp_path / "lean", lean=True)
    return tmp_path / "lean"
