"""Recipe files: recipes that build on others, and settings from the command line."""

import posixpath
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainers.storage.file_cache import cached_files
from trainers.storage.object_stores import is_address, list_remote
from trainers.storage.yaml_files import parse_yaml, read_yaml


class RecipeError(ValueError):
    """A recipe that cannot be used, or an output directory that is not this recipe's; says where and why."""


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Merge the settings of a recipe file, of the recipes that it builds on, and of the command line. Nothing is checked yet.

    `path` may be an address in an object store (`s3://bucket/recipe.yaml`).

    `base: other.yaml` (relative to the recipe's own file), or a list of such, names recipes to build on. A later base overrides an earlier
    one, the recipe overrides its bases, and `overrides` override the recipe: `key=value` with a dotted key, such as `data.train.source=/data/cc3m`, whose
    value is read as YAML. Mappings are merged key by key; any other value, a list too, is replaced. A stage that is `null` is left out.
    """
    settings = _read_with_base(str(path), ())
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not all(key.split(".")):
            raise RecipeError(
                f"{override!r} is not a setting: write key=value, as in seed=1 or data.train.source=/data/cc3m"
            )
        change: Any = parse_yaml(value, f"the setting {override!r}")
        for part in reversed(key.split(".")):
            change = {part: change}
        settings = _join(settings, change)
    return settings


def _read_with_base(path: str, readers: tuple[str, ...]) -> dict[str, Any]:
    resolved = path if is_address(path) else str(Path(path).resolve())
    if resolved in readers:
        raise RecipeError(f"{path}: this recipe builds on itself, by way of {', '.join(readers)}")
    try:
        settings = _read_remote(path) if is_address(path) else read_yaml(path)
    except FileNotFoundError as error:
        source = f", which {readers[-1]} builds on" if readers else ""
        raise RecipeError(f"there is no recipe {path}{source}") from error
    if not isinstance(settings, Mapping) or not settings:
        raise RecipeError(f"{path}: a recipe is a mapping with keys such as output_dir, model, data and stages")
    settings = dict(settings)
    bases = settings.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"{path}: base: must be the path of a recipe, or a list of them, got {bases!r}")
    joined: dict[str, Any] = {}
    for base in bases:
        joined = _join(joined, _read_with_base(_beside(path, base), (*readers, resolved)))
    return _join(joined, settings)


def _read_remote(url: str) -> Any:
    files = list_remote(url)
    if [file.url for file in files] != [url]:
        raise ValueError(f"{url} is a folder or a pattern, not a recipe")
    with cached_files(url, files) as cached:
        try:
            return read_yaml(cached.folder / files[0].name)
        except ValueError as error:
            raise ValueError(str(error).replace(str(cached.folder / files[0].name), url)) from error


def _beside(path: str, base: str) -> str:
    """The recipe that the one at `path` calls `base`."""
    if is_address(base) or not is_address(path):
        return base if is_address(base) else str(Path(path).parent / base)
    protocol, _, rest = path.partition("://")
    # As of the root of a disk, so that ".." does not lead out of the bucket, and never a file of this machine.
    return f"{protocol}://{posixpath.normpath(posixpath.join('/', posixpath.dirname(rest), base.lstrip('/'))).lstrip('/')}"


def _join(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(base)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(joined.get(key), Mapping)
        joined[key] = _join(joined[key], value) if both else value
    return joined
