"""Settings that name code to run: what is converted or published must name none but this package's."""

import json
import re
from pathlib import Path
from typing import Any

from .json_files import read_json


# Classes and functions of Python files, here or in other repositories, that `trust_remote_code=True` fetches and runs.
_CODE = {"auto_map", "custom_pipelines", "trust_remote_code"}
# Kernels of the Hub (`owner/name`), which are code too: Transformers fetches one that a configuration names.
_IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation\w*|use_kernels|kernel_config")


# Too large to be worth reading, and never settings.
_DATA = ("tokenizer.json", "vocab.json", "model.safetensors.index.json")


def remove_code(folder: Path) -> None:
    """Take the keys that name code out of every JSON file of settings in `folder`."""
    for file in folder.glob("*.json"):
        settings = None if file.name in _DATA else read_json(file, (dict, list))
        if settings != without_code(settings):
            file.write_text(json.dumps(without_code(settings), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def without_code(settings: Any) -> Any:
    """A JSON value without the keys that name code, at any depth; see [`code_names`]."""
    if isinstance(settings, dict):
        return {key: without_code(part) for key, part in settings.items() if not _names_code(key, part)}
    return [without_code(part) for part in settings] if isinstance(settings, list) else settings


def code_names(settings: Any) -> list[str]:
    """What code a JSON value names, such as "owner/name--file.Class", in the order of its keys."""
    if isinstance(settings, dict):
        named = [_strings(part) if _names_code(key, part) else code_names(part) for key, part in settings.items()]
    else:
        named = [code_names(part) for part in settings] if isinstance(settings, list) else []
    return [name for names in named for name in names]


def _names_code(key: str, value: Any) -> bool:
    return key in _CODE or (
        _IMPLEMENTATIONS.fullmatch(key) is not None and any("/" in name for name in _strings(value))
    )


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [name for part in parts for name in _strings(part)]
