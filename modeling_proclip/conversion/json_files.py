"""JSON files of checkpoints, which may be damaged or hostile: one error names the file, soon."""

import json
import re
from pathlib import Path
from typing import Any

from .errors import ConversionError, first_line


MAX_BYTES = 100 * 2**20  # the largest real ones are the indexes and training records of a few MB

# Real models have less than half as many layers or experts; beyond, building one takes minutes, or all memory.
_MAX_COUNTS = {
    re.compile(r"(\w*_)?n?_?layers?|(\w*_)?experts|depths?", re.IGNORECASE): 1_000,
    re.compile(r"num_\w+|n_heads?", re.IGNORECASE): 100_000,
    re.compile(r"height|width|shortest_edge|longest_edge|\w*image_size|patch_size|crop_size", re.IGNORECASE): 20_000,
}


def read_json(file: Path, kind: type | tuple[type, ...] = dict) -> Any:
    """What a JSON file holds: an object, or a list with `kind=list`. ConversionError if it is nested too deeply or larger than 100 MiB."""
    try:
        if file.exists() and not file.is_file():  # reading a named pipe would wait for ever
            raise ValueError("it is no file")
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{file} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(content, kind):
        raise ConversionError(f"{file} holds no JSON {'object' if kind is dict else 'list'}.")
    return content


def read_config(file: Path) -> dict[str, Any]:
    """[`read_json`] of a model's configuration, refused where no model could be built from it soon; see [`check_numbers`]."""
    return check_numbers(read_json(file), file)


def check_numbers(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """Refuse settings that name a billion layers or pixels: what is built from them would take all memory."""
    for key, value in settings.items():
        if isinstance(value, dict):
            check_numbers(value, file)
        numbers = value if isinstance(value, list) else [value]
        for pattern, most in _MAX_COUNTS.items():
            if pattern.fullmatch(key) and any(isinstance(n, (int, float)) and n > most for n in numbers):
                raise ConversionError(
                    f"{file}: {key} is {value!r:.40}, and no model has more than {most:,}: the file is damaged."
                )
    return settings
