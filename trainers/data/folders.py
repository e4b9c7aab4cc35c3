"""What lies in a folder of data: its files without those of the system, the splits that they belong to, and the captions beside images."""

import fnmatch
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.storage.paths import path_inside
from trainers.storage.yaml_files import parse_yaml

from .text_lines import parse_json, read_lines


logger = logging.getLogger(__name__)

# Endings of the images that Pillow reads and people keep.
IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"),
    *(".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"),
)
CAPTIONS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

# The names of splits, with those that the Hub takes for the same.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_HEADER = re.compile(r"---\r?\n(.*?\r?\n)---\r?\n", re.DOTALL)  # of a README.md on the Hub
_NO_DATA = ("thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found")


def list_files(folder: str | Path) -> list[str]:
    """The files of `folder` and all folders in it, relative to it, in the order of their paths; without hidden ones (`._a.jpg`, `.DS_Store`),
    `__MACOSX` and the like. Links out of the folder are left out with a warning. ValueError if a name is not UTF-8.
    """
    found, root = list[str](), os.path.realpath(folder)
    for parent, folders, names in os.walk(folder):
        for name in list(folders):
            if name.startswith((".", "__")) or name.lower() in _NO_DATA:
                folders.remove(name)
            elif os.path.islink(os.path.join(parent, name)):
                target = os.path.realpath(os.path.join(parent, name))
                if not target.startswith(root + os.sep):
                    logger.warning(
                        "%s is a link to %s, out of the folder, and is not read", os.path.join(parent, name), target
                    )
        for name in names:
            path = os.path.join(parent, name)
            if name.startswith((".", "__")) or name.lower() in _NO_DATA:
                continue
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the name of {path!r} is not UTF-8: rename the file") from error
            if os.path.isfile(path):
                found.append(os.path.relpath(path, folder))
            else:
                logger.warning("%s is not a file (a pipe, a device or a broken link) and is not read", path)
    return sorted(found)


def check_inside(folder: Path, file: str) -> None:
    """ValueError if a file with rows is a link out of its folder: a folder from somebody else would be read together with files of the user's."""
    try:
        path_inside(folder, file)
    except ValueError as error:
        raise ValueError(f"{error}, as it is a link: name the file itself, or a pattern of files") from error


def is_image(file: str) -> bool:
    """Whether the ending of `file` is one of `IMAGES`."""
    return file.lower().endswith(IMAGES)


def split_name(split: str) -> str:
    """The name under which `SPLITS` has `split`, or itself."""
    return next((name for name, words in SPLITS.items() if split in words), split)


def split_of(file: str, *, names: bool) -> str | None:
    """The split that a relative path tells by the first of its folders that is called after one or, with `names`, by its own name."""
    *folders, name = Path(file.lower()).parts
    for folder in folders:
        for split, words in SPLITS.items():
            if re.fullmatch(rf"({'|'.join(words)})[-_]?\d*", folder):
                return split
    for split, words in SPLITS.items() if names else ():
        if re.search(rf"(^|[-._ \d])({'|'.join(words)})([-._ \d]|$)", name):
            return split
    return None


def files_of_split(files: Sequence[str], split: str, where: str, *, names: bool) -> list[str]:
    """Those of `files`, relative paths, that belong to `split`; "val" and "validation" mean the same, and so on, see `SPLITS`.

    A folder called `train`, `val`, `validation2017` and so on is a split with all that is in it, and with `names` so is a file whose name has such
    a word (`cc3m-train-0001.tar`). Where nothing tells, all is "train". Of other names, a folder at the top is a split. ValueError says which splits
    there are.
    """
    wanted = split_name(split)
    if wanted not in SPLITS:
        below = [file for file in files if file.startswith(split + os.sep)]
        if below:
            return below
    by_split: dict[str | None, list[str]] = defaultdict(list)
    for file in files:
        by_split[split_of(file, names=names)].append(file)
    rest = by_split.pop(None, [])
    if rest and "train" not in by_split:
        by_split["train"] = rest
    elif rest and wanted in by_split:
        logger.warning("%s: %s files such as %s are in no split and are not read", where, f"{len(rest):,}", rest[0])
    known = [name for name in SPLITS if name in by_split]
    if wanted not in known:
        only = (
            ", because nothing in it is called after a split"
            if by_split.get("train") is rest and known == ["train"]
            else ""
        )
        raise ValueError(f"{where} has no split {split!r}; it has {', '.join(known) or 'none'}{only}")
    return by_split[wanted]


def declared_files(folder: Path, config: str | None, split: str) -> list[str] | None:
    """The patterns of files that the folder's README.md states for `split`, as data sets on the Hub do; None if it states nothing. ValueError if what it
    states cannot be read, or it has no such configuration or split.
    """
    readme = folder / "README.md"
    header = _HEADER.match("".join(read_lines(readme))) if readme.is_file() else None
    if header is None or "configs" not in header[1]:
        return None
    stated = parse_yaml(header[1], str(readme))
    entries = stated.get("configs") if isinstance(stated, dict) else None
    by_config = {}
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("config_name"), str) and entry.get("data_files"):
            by_config[entry["config_name"]] = _by_split(entry["data_files"], readme)
    if not by_config:
        return None
    config = config or ("default" if "default" in by_config else next(iter(by_config)))
    if config not in by_config:
        raise ValueError(f"{folder} has no configuration {config!r}; it has {', '.join(map(repr, by_config))}")
    if split not in by_config[config]:
        raise ValueError(f"{folder} has no split {split!r}; its README.md states {', '.join(by_config[config])}")
    return by_config[config][split]


def _by_split(files: Any, readme: Path) -> dict[str, list[str]]:
    """Split -> patterns, from any of the ways in which a README.md states them."""
    if isinstance(files, list) and all(isinstance(entry, dict) for entry in files):
        pairs = [(entry.get("split"), entry.get("path")) for entry in files]
    else:
        pairs = list(files.items()) if isinstance(files, dict) else [("train", files)]
    patterns = {}
    for split, some in pairs:
        some = [some] if isinstance(some, str) else some
        if not isinstance(split, str) or not isinstance(some, list) or not all(isinstance(file, str) for file in some):
            raise ValueError(f"{readme}: data_files must name files by split, and these do not")
        patterns[split] = some
    return patterns


def matching_files(files: Sequence[str], patterns: Sequence[str], where: str) -> list[str]:
    """Those of `files`, relative paths, that fit a pattern: `*` is part of a name, `**` any folders. FileNotFoundError if none does.

    Only what was found in the folder is matched, so that a pattern from somebody else reaches nothing else and takes no long time.
    """
    found = [file for file in files if any(_fits(Path(file).parts, Path(pattern).parts) for pattern in patterns)]
    if not found:
        raise FileNotFoundError(f"{where}: no file in it fits the pattern {', '.join(patterns)}")
    return found


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a pattern. The places in the pattern that can be reached are followed name by name."""
    reached = {0}
    for name in names:
        reached = _without_folders(reached, pattern)
        after = {place for place in reached if place < len(pattern) and pattern[place] == "**"}
        after |= {place + 1 for place in reached if place < len(pattern) and fnmatch.fnmatchcase(name, pattern[place])}
        reached = after
    return len(pattern) in _without_folders(reached, pattern)


def _without_folders(places: set[int], pattern: Sequence[str]) -> set[int]:
    """`places`, and those behind a `**` that stands for no folder."""
    places = set(places)
    for place in range(len(pattern)):
        if place in places and pattern[place] == "**":
            places.add(place + 1)
    return places


def captions_beside(images: Sequence[str], files: Sequence[str], where: str) -> dict[str, list[str | None]]:
    """What lies beside `images`, `a.txt` or `a.jpg.txt` beside `a.jpg`: columns "image", "text" (the file with captions, `.txt` or else `.caption`) and
    "json".

    A column that would be empty is left out. Captions beside which there is no image of a kind that is read are counted in a warning.
    """
    by_stem: dict[str, dict[str, str]] = defaultdict(dict)
    for file in files:
        stem, ending = os.path.splitext(file)
        by_stem[stem].setdefault(ending.lower(), file)
    beside = [by_stem[os.path.splitext(image)[0]] | by_stem.get(image, {}) for image in images]
    columns: dict[str, list[str | None]] = {
        "image": list(images),
        "text": [next((some[ending] for ending in CAPTIONS if ending in some), None) for some in beside],
        "json": [some.get(".json") for some in beside],
    }
    all_images = {file for file in files if is_image(file)}
    alone = [
        some
        for name, some in by_stem.items()
        if some.keys() & set(CAPTIONS) and not some.keys() & set(IMAGES) and name not in all_images
    ]
    if alone and any(columns["text"]):
        endings = Counter(ending for some in alone for ending in some if ending not in (*CAPTIONS, ".json"))
        kinds = ", ".join(f"{count:,} {ending or 'without an ending'}" for ending, count in endings.most_common(5))
        logger.warning(
            "%s: %s captions such as %s are not read, because no image of a known kind lies beside them%s",
            where,
            f"{len(alone):,}",
            next(file for ending, file in alone[0].items() if ending in CAPTIONS),
            f", but {kinds}" if kinds else "",
        )
    return {name: values for name, values in columns.items() if any(values)}


def read_beside(file: str | Path) -> Any:
    """What a file beside an image holds: the lines of a text, or the object of a JSON file. ValueError if it cannot be read; names it."""
    lines = list(read_lines(file))
    if str(file).lower().endswith(".json"):
        return parse_json("".join(lines), str(file))
    return [line.rstrip("\r\n") for line in lines]


def labels_of(images: Sequence[str], all_images: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """The folder that each of `images` lies in, and all such names in order, where folders are classes: several, at one depth. Else None."""
    names = sorted({os.path.basename(os.path.dirname(image)) for image in all_images})
    if len(names) < 2 or len({image.count(os.sep) for image in all_images}) > 1:
        return None
    return [os.path.basename(os.path.dirname(image)) for image in images], names
