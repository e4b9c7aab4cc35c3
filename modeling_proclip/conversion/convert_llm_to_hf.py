"""LLM folders that need remote code, as plain bidirectional models: LLM2CLIP's caption-contrastive LLMs (`LlamaEncoderModel`, `LlamaBiModel`)
and LLM2Vec's, whose base model gets its LoRA adapters merged in order.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from .code_references import without_code
from .errors import ConversionError
from .json_files import read_config, read_json
from .rules import Rule, Rules, build_config, check, count_layers
from .stored_tensors import StoredTensor, read_tensors


EMBEDDINGS = "embed_tokens.weight"
_MAX_ALPHA = 1e6  # real ones are below 1,000
# Beside the base model's tensors: the language-modelling head.
IGNORED = (r"(model\.)?lm_head\.weight",)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def is_llm(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the tensors are those of an LLM by itself."""
    return any(name in tensors for name in (EMBEDDINGS, f"model.{EMBEDDINGS}"))


def convert_llm(
    folder: Path, tensors: Mapping[str, StoredTensor], lora_adapters: Iterable[Path]
) -> tuple[PreTrainedConfig, dict[str, StoredTensor], Rules, list[str]]:
    """The LLM in `folder`, with the PEFT adapters in the folders `lora_adapters` merged in this order.

    Returns:
        The configuration, which says `is_causal: false` and names no remote code; all tensors, the adapters' included; the rules of the
        base model's tensors; and the published names that are not needed.
    """
    values = read_config(folder / "config.json")
    prefix = "model." if f"model.{EMBEDDINGS}" in tensors else ""
    num_layers = count_layers(tensors, f"{prefix}layers.")
    if values.get("num_hidden_layers") != num_layers:
        raise ConversionError(
            f"{folder / 'config.json'} names {values.get('num_hidden_layers')!r} layers, and the weights have {num_layers}."
        )
    config, shapes = _plain_config(folder / "config.json", values)
    rules = {name: Rule((f"{prefix}{name}",)) for name in shapes}
    everything = dict(tensors)
    for i, adapter in enumerate(lora_adapters):
        rules = _merged(rules, everything, adapter, f"adapter {i}: ")
    left = check(rules, everything, shapes, IGNORED)
    return config, everything, rules, left


def _plain_config(file: Path, values: Mapping[str, Any]) -> tuple[PreTrainedConfig, dict[str, tuple[int, ...]]]:
    """The configuration without its remote code, and the shapes of the base model's tensors."""
    plain = {
        key: value for key, value in without_code(values).items() if key not in ("architectures", "_name_or_path")
    }
    if not isinstance(plain.get("model_type"), str):
        raise ConversionError(f"{file} has no model_type.")
    config = build_config(AutoConfig.for_model, **plain)
    config.is_causal = False
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except Exception as error:  # a corrupt configuration can fail anywhere
        raise ConversionError(f"No model can be built from {file}: {type(error).__name__}: {error}") from error
    config = model.config
    config.architectures = [type(model).__name__]
    return config, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _merged(rules: Rules, tensors: dict[str, StoredTensor], adapter: Path, label: str) -> Rules:
    """The rules with one LoRA adapter merged into them; its tensors join `tensors`."""
    settings = read_json(adapter / "adapter_config.json")
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        raise ConversionError(f"{adapter} is no LoRA adapter without biases, and cannot be merged.")
    if unknown := [key for key in ("use_dora", "fan_in_fan_out", "alpha_pattern") if settings.get(key)]:
        raise ConversionError(f"{adapter} has {unknown[0]} in its adapter_config.json: merge it with PEFT.")
    alpha, root = settings.get("lora_alpha"), bool(settings.get("use_rslora"))
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not -_MAX_ALPHA < alpha < _MAX_ALPHA:
        raise ConversionError(
            f"{adapter / 'adapter_config.json'}: lora_alpha is {alpha!r}, and should be a number such as 16."
        )
    file = next((f for f in ("adapter_model.safetensors", "adapter_model.bin") if (adapter / f).is_file()), None)
    if file is None:
        raise ConversionError(f"{adapter} holds no adapter_model.safetensors.")
    stored = {label + name: tensor for name, tensor in read_tensors(adapter / file).items()}
    if not any(name.endswith(".lora_A.weight") for name in stored):
        raise ConversionError(f"{adapter / file} holds no LoRA weights.")
    tensors |= stored
    merged = dict(rules)
    for name in stored:
        # PEFT names what it wraps, which is the base model or a causal LM around it.
        match = re.fullmatch(re.escape(label) + r"base_model\.model\.(?:model\.)?(.+)\.lora_A\.weight", name)
        if match and f"{match[1]}.weight" in merged:
            base = merged[f"{match[1]}.weight"]
            if 0 in stored[name].shape:
                raise ConversionError(f"{stored[name].file}: tensor {stored[name].name!r} has rank 0.")
            up = name.replace(".lora_A.", ".lora_B.")
            merged[f"{match[1]}.weight"] = Rule((*base.sources, name, up), _add_low_rank(base, float(alpha), root))
    return merged


def _add_low_rank(base: Rule, alpha: float, root: bool):
    def transform(*stored: torch.Tensor) -> torch.Tensor:
        weight, down, up = base.transform(*stored[:-2]), stored[-2].float(), stored[-1].float()
        rank = down.shape[0]
        return (weight.float() + alpha / (rank**0.5 if root else rank) * (up @ down)).to(weight.dtype)

    return transform
