"""Folders of models that may be damaged, or come from somebody else: one error names the folder, soon."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedConfig

from modeling_proclip.conversion.json_files import check_numbers, read_config


_WITHOUT_A_NAME = (json.JSONDecodeError, UnicodeDecodeError)  # errors that do not say which file they are about


@contextmanager
def loading_from(*places: tuple[str | Path, str | None]) -> Iterator[None]:
    """In this context models, tokenizers and processors are loaded from `places`: folders or names on the Hub, each with its revision.

    Raises:
        OSError, ImportError: As the library does.
        ValueError: If nothing can be loaded from there; names the places and the reason. A configuration from which no model could be built soon
            (a billion layers) is refused before anything is built.
    """
    for name, revision in places:
        file = Path(name, "config.json")
        if file.exists():
            read_config(file)
        elif not file.parent.exists():
            check_numbers(PreTrainedConfig.get_config_dict(str(name), revision=revision)[0], file)
    try:
        yield
    except Exception as error:  # damaged files fail in many ways: SafetensorError, RuntimeError, the tokenizers' own
        if isinstance(error, (OSError, ValueError, ImportError)) and not isinstance(error, _WITHOUT_A_NAME):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "ignore_mismatched_sizes" in reason:
            reason = "its weights do not have the shapes that config.json says, so they do not belong together"
        where = " with ".join(str(name) for name, _ in places)
        raise ValueError(f"{where} cannot be loaded: {reason}") from error
