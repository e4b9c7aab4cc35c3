"""Strict reading of YAML into dataclasses: unknown and missing keys and wrong types are refused, and the message says where."""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml


def build(cls: type, content: Any, where: str) -> Any:
    """The dataclass `cls` from a mapping read from `where`; dataclasses in it too. Fields with `in_file=False` in their metadata are no keys.

    Raises:
        ValueError: If a key is unknown or missing, or a value is of another type; names the place and the key.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("in_file", True)}
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    check_keys(content, set(fields), required, where)
    hints = typing.get_type_hints(cls)
    return cls(**{name: _value(hints[name], value, f"{where}, {name}") for name, value in content.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        for choice in arguments:
            if _fits(choice, value):
                return _value(choice, value, where)
    elif _fits(hint, value):
        if origin is list:
            return [_value(arguments[0], item, where) for item in value]
        return value
    wanted = " or ".join(map(repr, arguments)) if origin is typing.Literal else str(getattr(hint, "__name__", hint))
    raise ValueError(
        f"{where}: expected {wanted}, got {value!r:.80} (text that YAML could read as something else needs quotes)"
    )


def _fits(hint: Any, value: Any) -> bool:
    if hint is type(None):
        return value is None
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(arguments[0], key) and _fits(arguments[1], item) for key, item in value.items()
        )
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def check_keys(content: Any, known: set[str], required: set[str], where: str) -> None:
    """ValueError unless `content` is a mapping with all `required` keys and none but the `known` ones; proposes the nearest."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected keys with values, found {type(content).__name__} {content!r:.80}")
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
    missing = sorted(required - set(content))
    if missing:
        raise ValueError(f"{where}: {missing[0]!r} is missing")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. ValueError that names the file if there is none or it holds something else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys with values, found {type(content).__name__}")
    return content
