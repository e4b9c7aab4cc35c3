"""Benchmarks as data: what a manifest says, how it is read, and which manifests and suites come with the package.

A manifest is a YAML file that states where a benchmark's data lies, in which columns and how much of it, and how it is scored. Everything
in it is checked against the data before a number comes out (`trainers.evaluation.data.sources`). A suite is a list of benchmarks.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import PositiveInt

from trainers.storage.object_stores import is_address
from trainers.storage.paths import path_inside
from trainers.storage.yaml_files import NOT_IN_FILE, build, check_keys, read_yaml


# kind -> the columns that it must name; "fine_grained" has two forms, see `PAIR_COLUMNS`
COLUMNS: dict[str, set[str]] = {
    "retrieval": {"image", "captions"},
    "zero_shot": {"image", "label"},
    "caption_retrieval": {"captions"},
    "linear_probe": {"image", "label"},
    "fine_grained": {"image", "caption", "negative"},
    "cka": {"image"},
}

# kind -> the metrics that it computes; the first is the one that represents it unless the manifest says otherwise
METRICS: dict[str, tuple[str, ...]] = {
    "retrieval": ("mean_r@1", *(f"{way}_r@{k}" for k in (1, 5, 10) for way in ("i2t", "t2i"))),
    "zero_shot": ("top1", "top5", "mean_per_class"),
    "caption_retrieval": (
        "mean_r@1",
        *(f"{way}_r@{k}" for k in (1, 5, 10) for way in ("first_to_second", "second_to_first")),
    ),
    "fine_grained": ("accuracy",),
    "linear_probe": ("accuracy", "mean_per_class"),
    "cka": ("cka_debiased", "cka"),
}

# Columns and metrics of fine-grained benchmarks, which have two images and two texts a row.
PAIR_COLUMNS = {"image_1", "image_2", "caption_1", "caption_2"}
PAIR_METRICS = ("text_score", "image_score", "group_score")

# A benchmark's name is also the name of files that the evaluation writes.
_NAME = re.compile(r"[\w][\w .+-]{0,99}")

_FOLDER = Path(__file__).parent
MANIFESTS = _FOLDER / "manifests"
SUITES = _FOLDER / "suites"
RESOURCES = _FOLDER / "resources"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the rows are and how many there must be.

    Files that the manifest names lie inside the source: a manifest from somebody else reaches nothing else on this computer. ValueError if the source
    is an address such as `s3://...`.

    Attributes:
        source: dataset on the Hub, or a local file or folder; for "openmoji", the packages that the data is made of.
        split: its split.
        config: its configuration, if it has several.
        revision: commit on the Hub. None takes the newest and records which that was.
        files: for the layout "table", a pattern of the split's files in the source, where other files lie beside them (`test/*.tar`).
        num_items: rows. A source with another number is refused. None, for your own data, checks nothing.
        num_captions: captions in all rows together, likewise.
        layout: "table" (any layout that training reads, or a dataset on the Hub: rows with columns), "caption_file" (a file whose rows name images in a folder),
            "caption_folder" (images in `image/`, a text file of the same name for each in `caption/`), "mmvp" (that of MMVP-VLM) or
            "openmoji" (drawn here, from the packages of the quickstart; `config` says which part).
        caption_file: for the layout "caption_file", the .csv, .tsv, .json, .jsonl or .parquet file, in the source's folder. The columns
            may then be paths into a row, such as `conversations.1.value`.
        image_folder: for the layout "caption_file", where in the source's folder the images' names begin.
        where: column -> value: take only the rows that have it.
        first: take only so many rows, the first.
        own_captions: in place of `caption_file`, a file that the user names on the command line, wherever it lies; not written in a file.
    """

    source: str
    split: str = "test"
    config: str | None = None
    revision: str | None = None
    files: str | None = None
    num_items: int | None = None
    num_captions: int | None = None
    layout: Literal["table", "caption_file", "caption_folder", "mmvp", "openmoji"] = "table"
    caption_file: str | None = None
    image_folder: str = ""
    where: dict[str, str] = field(default_factory=dict)
    first: PositiveInt | None = None
    own_captions: Annotated[Path | None, NOT_IN_FILE] = None

    def __post_init__(self):
        if is_address(self.source):
            raise ValueError(
                "source must be a dataset on the Hub, or a file or folder here, and not an address: a manifest from somebody else reaches no "
                "other server"
            )


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of a zero-shot benchmark.

    Attributes:
        count: how many there are. Labels are whole numbers from 0 up to it, or names among `names`.
        names: a list; "feature", the names that the label column itself carries; "source:FILE", the lines of a file beside the data; or
            "resource:FILE", the lines of a file of this package.
        pick: places in `names` of the classes that this benchmark has (ImageNet-A has 200 of ImageNet's 1,000), in the order of its labels.
        edit: pairs [regular expression, replacement], applied to every name in this order.
    """

    count: int
    names: str | list[str]
    pick: list[int] | None = None
    edit: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A benchmark.

    Attributes:
        name: unique; the name of the task in the results and of the files with its items: letters, digits, spaces and . _ + -.
        title: for people.
        kind: "retrieval", "zero_shot", "fine_grained", "caption_retrieval", "linear_probe", or "cka", which compares a model's image encoder
            with the baseline's and is left out without one.
        group: under which heading results are shown, such as "long_retrieval" or "robustness".
        data: where the rows are.
        train: for a linear probe, where the rows to train on are; `data` has those to test on. A limit draws from `data` only.
        columns: what the columns of the data are called. retrieval: `image`, `captions`; zero_shot: `image`, `label`; caption_retrieval:
            `captions`; fine_grained: `image`, `caption`, `negative` (one image, a right and a wrong text) or `image_1`, `image_2`,
            `caption_1`, `caption_2` (two images, and the text of each), and perhaps `category`.
        metric: the one that stands for the benchmark in tables; by default the first of `METRICS`.
        classes: classes of a zero-shot benchmark or a linear probe.
        prompts: prompts of a zero-shot benchmark, each with `{}` where the class name goes: a list, or "resource:FILE". Of a fine-grained one, at
            most one: the frame of every text.
        caption_separator: splits one string into several captions.
        max_captions: take only so many captions of an image, the first.
        variants: each makes a benchmark of its own; `{variant}` in name, title, source, split, config, caption_file and columns stands
            for it. A list, or for every variant what `num_items` and `num_captions` are.
        facts: which of the above was read where; what could not be checked says so.
        protocol: what else somebody must know who compares the number.
        variant_of: for a variant, the name without it (`xm3600` of `xm3600-ar`); not written in a file.
    """

    name: str
    title: str
    kind: Literal["retrieval", "zero_shot", "fine_grained", "caption_retrieval", "linear_probe", "cka"]
    data: Data
    columns: dict[str, str]
    group: str
    train: Data | None = None
    metric: str | None = None
    classes: Classes | None = None
    prompts: str | list[str] | None = None
    caption_separator: str | None = None
    max_captions: PositiveInt | None = None
    variants: list[str] | dict[str, dict[Literal["num_items", "num_captions"], int]] | None = None
    facts: str = ""
    protocol: str = ""
    variant_of: Annotated[str | None, NOT_IN_FILE] = None

    @property
    def compares_pairs(self) -> bool:
        """Whether a row is two images with a text each."""
        return self.kind == "fine_grained" and "image_1" in self.columns

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that can stand for the benchmark."""
        return PAIR_METRICS if self.compares_pairs else METRICS[self.kind]

    @property
    def primary_metric(self) -> str:
        return self.metric or METRICS[self.kind][0]

    @property
    def prompt_templates(self) -> list[str]:
        """The prompts themselves; `["{}"]` where there are none."""
        if isinstance(self.prompts, str):
            return resource_lines(self.prompts.removeprefix("resource:"))
        return self.prompts or ["{}"]


@dataclass(frozen=True, kw_only=True)
class _SuiteFile:
    """What a suite's file holds."""

    name: str
    title: str = ""
    tasks: list[str | dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A list of benchmarks; see [`load_suite`]."""

    name: str
    title: str = ""
    tasks: list[Manifest]


def resource_lines(name: str) -> list[str]:
    """The lines of a file in `resources/`. ValueError if there is none of that name."""
    path = RESOURCES / name
    if path not in RESOURCES.iterdir():
        raise ValueError(
            f"there is no resource {name!r}; there are {', '.join(sorted(p.name for p in RESOURCES.iterdir()))}"
        )
    return path.read_text(encoding="utf-8").splitlines()


def manifest_names() -> list[str]:
    """Names of the manifests that come with the package."""
    return sorted(path.stem for path in MANIFESTS.glob("*.yaml"))


def suite_names() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_manifest(name_or_path: str | Path) -> list[Manifest]:
    """The benchmarks of one manifest: one, or one for each of its variants. ValueError names the file, the key and the remedy."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = MANIFESTS / f"{name_or_path}.yaml"
        if not path.is_file():
            _unknown("benchmark", str(name_or_path), manifest_names())
    return parse_manifest(read_yaml(path), str(path))


def load_suite(name_or_path: str | Path) -> Suite:
    """A suite, from the package by its name or from a YAML file; the name of a single benchmark stands for a suite of it alone.

    A suite file has `name`, perhaps `title`, and `tasks`: names of the package's benchmarks, paths of manifests (seen from the file), or
    whole manifests. ValueError if there is none, a key is unknown, or two tasks have one name.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if str(name_or_path) in manifest_names():
            return Suite(name=str(name_or_path), tasks=load_manifest(name_or_path))
        path = SUITES / f"{name_or_path}.yaml"
        if not path.is_file():
            _unknown("suite", str(name_or_path), suite_names() + manifest_names())
    content = read_yaml(path)
    if isinstance(content, dict) and "kind" in content:
        manifests = parse_manifest(content, str(path))
        return Suite(name=path.stem, tasks=manifests)
    suite = build(_SuiteFile, content, str(path))
    if not suite.tasks:
        raise ValueError(f"{path}: tasks: name at least one benchmark")
    tasks: list[Manifest] = []
    for number, task in enumerate(suite.tasks, 1):
        if isinstance(task, dict):
            tasks += parse_manifest(task, f"{path}, task {number}")
        elif task.endswith((".yaml", ".yml")):
            tasks += load_manifest(_beside(path, task, f"{path}, task {number}"))
        else:
            tasks += load_manifest(task)
    return Suite(name=suite.name, title=suite.title, tasks=check_unique(tasks))


def own_images(images: Path, captions: Path, image_column: str, caption_column: str) -> Manifest:
    """The benchmark that a folder of images and a file of their captions make: retrieval, both ways. FileNotFoundError if one is not there."""
    if not images.is_dir():
        raise FileNotFoundError(f"there is no folder {images}")
    if not captions.is_file():
        raise FileNotFoundError(f"there is no file {captions}")
    data = Data(source=str(images), layout="caption_file", own_captions=captions)
    columns = {"image": image_column, "captions": caption_column}
    name = images.resolve().name
    if not _NAME.fullmatch(name):
        name = "own images"
    return Manifest(name=name, title=images.resolve().name, kind="retrieval", group="own", data=data, columns=columns)


def _beside(file: Path, name: str, where: str) -> Path:
    """The path `name`, seen from the folder of `file`. ValueError if it lies elsewhere."""
    try:
        return path_inside(file.parent, name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; copy the manifest there") from error


def check_unique(tasks: list[Manifest]) -> list[Manifest]:
    """`tasks`; ValueError if two share a name, because each has one place in the results."""
    names = [task.name for task in tasks]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"several tasks are called {sorted(twice)[0]!r}: each needs a name of its own")
    return tasks


def parse_manifest(content: Any, where: str) -> list[Manifest]:
    """The benchmarks that the mapping `content`, read from `where`, describes. ValueError as for [`load_manifest`]."""
    manifest = build(Manifest, content, where)
    _check(manifest, where)
    if manifest.variants is None:
        return [_check_name(manifest, where)]
    if not manifest.variants or "{variant}" not in manifest.name:
        raise ValueError(f"{where}: variants must not be empty, and need a name with {{variant}} in it")
    counts = manifest.variants if isinstance(manifest.variants, dict) else dict.fromkeys(manifest.variants, {})
    return [_check_name(_fill(manifest, variant, own), where) for variant, own in counts.items()]


def _check_name(manifest: Manifest, where: str) -> Manifest:
    if not _NAME.fullmatch(manifest.name):
        raise ValueError(
            f"{where}: name must be at most 100 letters, digits, spaces and . _ + -, the first one a letter or digit, because files are "
            f"called by it; got {manifest.name!r:.120}"
        )
    return manifest


def _fill(manifest: Manifest, variant: str, counts: Mapping[Any, int]) -> Manifest:
    def fill(value: Any) -> Any:
        return value.replace("{variant}", variant) if isinstance(value, str) else value

    def fill_data(data: Data) -> Data:
        names = ("source", "split", "config", "caption_file")
        return dataclasses.replace(data, **{name: fill(getattr(data, name)) for name in names})

    own_counts: dict[str, Any] = dict(counts)
    data = dataclasses.replace(fill_data(manifest.data), **own_counts)
    columns = {key: fill(value) for key, value in manifest.columns.items()}
    family = manifest.name.replace("{variant}", "").strip("-")
    return dataclasses.replace(
        manifest,
        name=fill(manifest.name),
        title=fill(manifest.title),
        data=data,
        train=None if manifest.train is None else fill_data(manifest.train),
        columns=columns,
        variants=None,
        variant_of=family,
    )


def _check(manifest: Manifest, where: str) -> None:
    required = PAIR_COLUMNS if manifest.compares_pairs else COLUMNS[manifest.kind]
    optional = {"category"} if manifest.kind == "fine_grained" else set()
    check_keys(manifest.columns, required, optional, f"{where}: columns")
    if manifest.primary_metric not in manifest.metrics:
        raise ValueError(
            f"{where}: with these columns, metric must be one of {', '.join(manifest.metrics)}, got {manifest.metric!r}"
        )
    if (manifest.kind in ("zero_shot", "linear_probe")) != (manifest.classes is not None):
        raise ValueError(f"{where}: classes belong to zero_shot and linear_probe, which need them")
    if (manifest.kind == "linear_probe") != (manifest.train is not None):
        raise ValueError(f"{where}: train belongs to linear_probe, which needs it")
    templates = manifest.prompt_templates
    if manifest.kind not in ("zero_shot", "fine_grained") and manifest.prompts is not None:
        raise ValueError(f"{where}: {manifest.kind} has no prompts")
    if manifest.kind == "fine_grained" and len(templates) != 1:
        raise ValueError(f"{where}: fine_grained takes one prompt, the frame of every text, got {len(templates)}")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"{where}: a prompt must hold {{}} once, got {template!r}")
    classes = manifest.classes
    if classes is not None:
        if classes.count < 2:
            raise ValueError(f"{where}: zero-shot needs at least 2 classes, got count: {classes.count}")
        if isinstance(classes.names, str) and not (
            classes.names == "feature" or classes.names.startswith(("source:", "resource:"))
        ):
            raise ValueError(
                f"{where}: names must be a list, feature, source:FILE or resource:FILE, got {classes.names!r}"
            )
        if classes.pick is not None and len(set(classes.pick)) != classes.count:
            raise ValueError(f"{where}: pick must hold {classes.count} different places, got {len(set(classes.pick))}")
        if any(len(pair) != 2 for pair in classes.edit):
            raise ValueError(f"{where}: edit must be a list of pairs [regular expression, replacement]")
    if (manifest.data.layout == "caption_file") != (manifest.data.caption_file is not None):
        raise ValueError(f"{where}: caption_file belongs to the layout caption_file, which needs it")


def _unknown(what: str, name: str, known: list[str]) -> None:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    raise ValueError(f"there is no {what} {name!r}; {hint} A path must end in .yaml")
