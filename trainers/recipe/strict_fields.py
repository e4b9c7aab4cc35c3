"""Dataclasses from YAML: unknown keys and wrong types are refused, with the key's path and the nearest known name."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from .files import RecipeError


_T = TypeVar("_T")

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def build(kind: type[_T], values: Any, path: str) -> _T:
    """
    The dataclass `kind` with the fields `values`.

    Raises:
        RecipeError: If `values` is no mapping, has a key that is no field, lacks one without a default, or has a value of another type; or if
            `kind` itself refuses a value. Begins with `path` and the key.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{path}: must be a mapping, got {_shown(values)}")
    check_fields(kind, values, path)
    hints = typing.get_type_hints(kind)
    missing = [f.name for f in fields(kind) if f.name not in values and f.default is f.default_factory is MISSING]  # type: ignore[arg-type]
    if missing:
        raise RecipeError(f"{_join(path, missing[0])}: is missing")
    built = {name: _build_value(hints[name], value, _join(path, name)) for name, value in values.items()}
    try:
        return kind(**built)
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{path}: {error}") from error


def check_fields(kind: type, values: Mapping[Any, Any], path: str, *, known: Iterable[str] = ()) -> None:
    """
    Check that `values` has keys and types of the dataclass `kind`.

    Args:
        kind: a dataclass.
        values: names of its fields to their values.
        path: of `values` in the recipe, for messages.
        known: more names to propose for a key that is misspelled.

    Raises:
        RecipeError: Names the key and the remedy.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.init]
    for name, value in values.items():
        if name not in names:
            raise RecipeError(f"{_join(path, name)}: unknown key; {nearest(name, [*names, *known])}")
        if not _fits(value, hints[name]):
            raise RecipeError(f"{_join(path, name)}: must be {_described(hints[name])}, got {_shown(value)}")


def nearest(name: Any, known: Sequence[str]) -> str:
    """What to say about an unknown `name`: the known one that is nearest, or all of them."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"


def _join(path: str, name: Any) -> str:
    return f"{path}{'' if path.endswith(': ') else '.'}{name}"


def _build_value(hint: Any, value: Any, path: str) -> Any:
    nested = [option for option in _options(hint) if is_dataclass(option)]
    return build(nested[0], value, path) if nested and value is not None else value  # type: ignore[arg-type]


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_one(value, option) for option in _options(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if hint in (int, float):  # true is an int in Python, and 1 a number in YAML
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if is_dataclass(hint):
        return isinstance(value, Mapping)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(item, arguments[1]) for item in value.values())
    return isinstance(value, hint if origin is None else origin)


def _described(hint: Any) -> str:
    parts = []
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            parts += [repr(choice) for choice in typing.get_args(option)]
        elif typing.get_origin(option) in (list, Sequence):
            parts.append("a list")
        elif is_dataclass(option) or option is dict or typing.get_origin(option) is dict:
            parts.append("a mapping")
        elif option in _NAMES:
            parts.append(_NAMES[option])
    return " or ".join(dict.fromkeys(parts))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return f"{str(value).lower()} (YAML reads no, off and yes as truth values: put text in quotes)"
    if isinstance(value, str):
        return f"the text {value!r}"
    return "null" if value is None else repr(value)
