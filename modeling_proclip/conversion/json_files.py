"""JSON files of checkpoints, which may be damaged or hostile: one error names the file, soon."""

import json
from pathlib import Path
from typing import Any

from .errors import ConversionError, first_line


MAX_BYTES = 100 * 2**20  # the largest real ones are the indexes and training records of a few MB


def read_json(file: Path, kind: type = dict) -> Any:
    """
    What a JSON file holds: an object, or a list with `kind=list`.

    Raises:
        ConversionError: If there is no such file, or it holds anything else, is nested too deeply or is larger than 100 MiB.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{file} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(content, kind):
        raise ConversionError(f"{file} holds no JSON {'object' if kind is dict else kind.__name__}.")
    return content
