"""Settings in YAML files, checked key by key against dataclasses: recipes, manifests and suites of benchmarks, and what a card is to say.

Such files come from other people too: one of hostile size or depth, or that is no file at all, is refused in one line and soon, as are an
unknown key, a missing one and a value of another type.
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError


T = TypeVar("T")

MAX_BYTES = 2**18  # PyYAML takes some seconds for as many
MAX_DEPTH = 50

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

# What pydantic's types of errors ask for, in the words of YAML.
_WANTED = {
    "bool_type": "true or false",
    "dataclass_type": "a mapping",
    "dict_type": "a mapping",
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "list_type": "a list",
    "none_required": "null",
    "string_type": "text",
}
_UNKNOWN = "unexpected_keyword_argument"


# Reading


class _Loader(yaml.SafeLoader):
    """YAML as people read it: 4e-4 is a number (YAML 1.1 takes it for text), 2024-01-01 is text, and a key that is given twice is an error. Aliases
    are refused: a few lines of them stand for as many values as one likes, or for one that holds itself.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, problem = self.peek_event(), None
        if isinstance(event, yaml.AliasEvent):
            problem = f"*{event.anchor} is an alias, and aliases are not read: write out what it stands for"
        self.depth += 1
        if self.depth > MAX_DEPTH:
            problem = f"it is nested more than {MAX_DEPTH} levels deep"
        if problem is not None:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.2's floats. PyYAML wants a dot in front of the exponent. The last resolver is asked last, so whole numbers stay integers.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str) or key in mapping:
            problem = "is given twice" if isinstance(key, str) else "is not text: put it in quotes"
            problem = f"the key {key!r:.80} {problem}"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file. FileNotFoundError if there is none; ValueError if it is no file (a folder, a named pipe), larger than `MAX_BYTES`, not encoded
    as UTF-8, or as for [`parse_yaml`].
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file that can be read")
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES:,} bytes, the most that is read of a file of settings")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not encoded as UTF-8: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. ValueError begins with `where` and names the line if it is not YAML, gives a key twice or one that is not text, has an alias,
    or is nested more than `MAX_DEPTH` deep.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{where}{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # control characters; numbers and dates that there are not
        raise ValueError(f"{where}: {str(error).splitlines()[0]}") from error


# Checking


def _refuse(value: Any) -> Any:
    raise PydanticCustomError(_UNKNOWN, "it is not written in a file")


# Marks a field of a dataclass that is no key of the file: `variant_of: Annotated[str | None, NOT_IN_FILE] = None`.
NOT_IN_FILE = BeforeValidator(_refuse)


def build(kind: type[T], values: Any, where: str) -> T:
    """The dataclass `kind` with the fields `values`, as [`read_yaml`] gives them, dataclasses in it too.

    Raises:
        ValueError: Begins with `where`, such as the file, and names the key's path and what was found, if a key is unknown (proposes the nearest) or
            missing, a value is of another type, or a dataclass refuses its fields.
    """
    # A dataclass by itself takes no configuration, but one in a list takes the list's.
    return _validate(list[kind], [values], where, kind, 1)[0]  # type: ignore[valid-type]


def check_fields(kind: type, values: Mapping[str, Any], where: str, *, known: Iterable[str] = ()) -> None:
    """Check that `values` has keys and types of the dataclass `kind`, without making one. ValueError as [`build`]; `known` are more names to propose for a key
    that is misspelled.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.init]
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{join(where, name)}: unknown key; {nearest(name, [*names, *known])}")
        _validate(hints[name], value, join(where, name), hints[name], 0)


def check_keys(values: Mapping[str, Any], required: Iterable[str], optional: Iterable[str], where: str) -> None:
    """ValueError, as [`build`], unless `values` has all `required` keys and beside them only `optional` ones."""
    known = [*required, *optional]
    for name in values:
        if name not in known:
            raise ValueError(f"{join(where, name)}: unknown key; {nearest(name, known)}")
    for name in sorted(set(required) - set(values)):
        raise ValueError(f"{join(where, name)}: is missing")


def nearest(name: Any, known: Iterable[str]) -> str:
    """What to say about an unknown `name`: the known one that is nearest, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def join(where: str, name: str | int) -> str:
    """The path of a key: "recipe.yaml: seed", then "recipe.yaml: model.vision", "recipe.yaml: columns[0]"."""
    if isinstance(name, int):
        return f"{where}[{name}]"
    return f"{where}{'.' if ': ' in where else ': '}{name}"


def _validate(hint: Any, values: Any, where: str, kind: Any, skipped: int) -> Any:
    try:
        text = json.dumps(values)  # strict types of JSON take a mapping for a dataclass, and 1 for a float
        return TypeAdapter(hint, config=_STRICT).validate_json(text)
    except TypeError as error:
        raise ValueError(f"{where}: holds a value that is none of text, number, list and mapping ({error})") from error
    except ValidationError as error:
        raise ValueError(_message(error, values, where, kind, skipped)) from error


def _message(error: ValidationError, values: Any, where: str, kind: Any, skipped: int) -> str:
    """One line for one mistake: an unknown key if there is one, as a missing one may be meant by it, else the first."""
    found = [(_path(problem["loc"], values, problem["type"]), problem) for problem in error.errors()]
    found.sort(key=lambda item: item[1]["type"] != _UNKNOWN)
    # The choice of a union that reaches deepest into the value tells most.
    deepest = max(len(path) for path, _ in found if path[: skipped + 1] == found[0][0][: skipped + 1])
    path, first = next((path, problem) for path, problem in found if len(path) == deepest)
    for name in path[skipped:]:
        where = join(where, name)
    if first["type"] == _UNKNOWN:
        known = _fields_at(kind, path[skipped:-1])
        return f"{where}: unknown key; {nearest(path[-1], [name for name in known if name != path[-1]])}"
    if first["type"].startswith("missing"):
        return f"{where}: is missing"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    wanted = dict.fromkeys(_wanted(problem) for other, problem in found if other == path)
    return f"{where}: must be {' or '.join(wanted)}, got {_shown(first['input'])}"


def _path(loc: Sequence[str | int], values: Any, kind: str) -> list[Any]:
    """The keys and places in `values` that lead to a mistake: pydantic's, without the names of a union's choices."""
    path: list[Any] = []
    for i, part in enumerate(loc):
        if isinstance(values, dict) and part in values or isinstance(values, list) and isinstance(part, int):
            path.append(part)
            values = values[part]  # type: ignore[index]
        elif i == len(loc) - 1 and kind.startswith("missing"):
            path.append(part)
    return path


def _fields_at(kind: Any, path: Sequence[Any]) -> list[str]:
    """The names of the fields of the dataclass at `path` within the dataclass `kind`."""
    for name in path:
        kind = _part(kind, name)
    return [field.name for option in _options(kind) if is_dataclass(option) for field in fields(option)]


def _part(kind: Any, name: Any) -> Any:
    """The type of the field or item `name` of a value of type `kind`."""
    for option in _options(kind):
        if is_dataclass(option):
            return typing.get_type_hints(option)[name]
        if typing.get_args(option):
            return typing.get_args(option)[-1]  # of a list's or mapping's values
    raise TypeError(f"{kind} has no parts")


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _wanted(problem: Any) -> str:
    if problem["type"] in _WANTED:
        return _WANTED[problem["type"]]
    return problem["msg"].removeprefix("Input should be ").replace("valid dictionary", "mapping")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return f"{str(value).lower()} (YAML reads no, off and yes as truth values: put text in quotes)"
    if isinstance(value, str):
        return f"the text {value!r:.80}"
    return "null" if value is None else f"{value!r:.80}"
