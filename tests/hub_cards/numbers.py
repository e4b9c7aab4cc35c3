"""The numbers that a text states, and those that its sources hold."""

import json
import re
from pathlib import Path
from typing import Any


# A number that stands alone: not part of a word such as ViT-L14 or of a version such as 5.23.0 (which is taken whole).
NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*(?:e[+-]?\d+)?(?![\w])")


def stated(text: str) -> set[str]:
    """Every number of a text as it is written, thousands separators removed."""
    return {re.sub(r",(?=\d{3})", "", number) for number in NUMBER.findall(text)}


def held(value: Any) -> set[str]:
    """Every number that a JSON value holds, as it is and to four decimals; also those inside its strings."""
    if isinstance(value, dict):
        return set().union(*(held(key) | held(item) for key, item in value.items()), set())
    if isinstance(value, list):
        return set().union(*map(held, value), set())
    if isinstance(value, str):
        return stated(value)
    if isinstance(value, bool) or value is None:
        return set()
    return {str(value), f"{value:.4f}"}


def held_by_file(file: Path) -> set[str]:
    return held(json.loads(file.read_text()))
