"""The schema of a recipe: its keys, their types and defaults. `docs/recipes.md` explains them to users."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt
from transformers import TrainingArguments

from trainers.caption_contrastive.config import CaptionContrastiveConfig
from trainers.caption_contrastive.masked_next_token import MaskedNextTokenConfig
from trainers.contrastive_tuning.config import PUBLISHED_BATCH, ContrastiveTuningConfig, batch_invariant_weights
from trainers.data.pairs import PairSource
from trainers.inheritance.config import RepresentationInheritanceConfig
from trainers.storage.object_stores import check_address, is_address
from trainers.storage.yaml_files import build, check_fields, nearest

from .files import RecipeError, read_recipe


# The stages in the order in which they run, each from the previous one's result.
CONFIG_OF = {
    "masked_next_token": MaskedNextTokenConfig,
    "caption_contrastive": CaptionContrastiveConfig,
    "inheritance": RepresentationInheritanceConfig,
    "contrastive_tuning": ContrastiveTuningConfig,
}

# Fields of the trainers' settings that a recipe sets elsewhere, and where.
ELSEWHERE = {
    "output_dir": "set output_dir at the top of the recipe",
    "seed": "set seed at the top of the recipe",
    "data_seed": "set seed at the top of the recipe",
    "bf16": "set precision at the top of the recipe",
    "fp16": "set precision at the top of the recipe",
    "per_device_train_batch_size": "set global_batch_size, and device_batch_size if a device cannot hold its share at once",
    "gradient_caching_batch_size": "set device_batch_size, which turns gradient caching on where it is needed",
    "gradient_accumulation_steps": "set device_batch_size: gradient caching does exactly what accumulation does wrongly here",
    "hub_token": "recipes are shared, so tokens do not belong in them: log in by `hf auth login`, or set HF_TOKEN",
    "resume_from_checkpoint": "an interrupted stage is always resumed",
    "use_cpu": "hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU",
}


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The two encoders and what joins them.

    Attributes:
        vision: folder or Hub name of the CLIP, SigLIP or ProCLIP checkpoint that gives the image encoder.
        vision_revision: its commit, tag or branch.
        text: folder or Hub name of the LLM. Convert a checkpoint that needs remote code first (`proclip convert`).
        text_revision: its commit, tag or branch.
        teacher: folder or Hub name of the CLIP or SigLIP whose text encoder teaches stage 1; by default `vision`.
        teacher_revision: its commit, tag or branch; by default `vision_revision`.
        image_processor: folder or Hub name of the image processor; by default that of `vision`.
        image_processor_revision: its commit, tag or branch; by default `vision_revision` if it is that of `vision`, else "main".
        prompt_template: template around every text, which must hold `{text}`; by default that of the LLM's chat template.
        instruction: text before every text, inside the template.
        max_length: most tokens of a text (512 in LLM2CLIP's and ProCLIP's code).
        attn_implementation: attention of both encoders; by default Transformers' choice.
        config: fields of `ProCLIPConfig`, such as `adapter_num_layers`.
    """

    vision: str
    vision_revision: str = "main"
    text: str
    text_revision: str = "main"
    teacher: str | None = None
    teacher_revision: str | None = None
    image_processor: str | None = None
    image_processor_revision: str | None = None
    prompt_template: str | None = None
    instruction: str | None = None
    max_length: PositiveInt = 512
    attn_implementation: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for part in ("vision", "text", "teacher", "image_processor"):
            if is_address(getattr(self, part) or ""):  # not repeated, as it may hold credentials
                raise ValueError(
                    f"{part} must be a folder of this machine or a name on the Hub, not an address: download it"
                )

    def place_of(self, part: str) -> tuple[str, str]:
        """Folder or Hub name, and revision, of "vision", "text", "teacher" or "image_processor"."""
        name, revision = getattr(self, part), getattr(self, f"{part}_revision")
        if name is None:
            return self.vision, revision or self.vision_revision
        return name, revision or "main"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The training data.

    Attributes:
        train: images with captions.
        texts: captions for stage 1; by default those of `train`.
        captions: two or more captions of an image in every row, for stage 0; by default those of `train`.
        plain_texts: rows of a query and a document, mixed into stage 0.
        masked_texts: texts for masked next-token prediction; by default the captions of stage 0.
        eval: held-out images with captions, for stages with an `eval_strategy`.
        num_pairs: rows of `train`, where they cannot be counted (a stream) or need not be (`--dry-run`).
        num_texts, num_captions, num_masked_texts: rows of `texts`, `captions` and `masked_texts`, likewise.
        captions_per_pair: estimated number of different captions of an image, for the estimated size of the text stores.
    """

    train: PairSource
    texts: PairSource | None = None
    captions: PairSource | None = None
    plain_texts: PairSource | None = None
    masked_texts: PairSource | None = None
    eval: PairSource | None = None
    num_pairs: PositiveInt | None = None
    num_texts: PositiveInt | None = None
    num_captions: PositiveInt | None = None
    num_masked_texts: PositiveInt | None = None
    captions_per_pair: PositiveInt = 2


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """A text store, built before the first stage that reads it.

    Attributes:
        path: its folder; by default within `output_dir`. A path outside lets several recipes share one store. At an address in an object
            store (`s3://bucket/store`) it is read, and must hold all texts.
        dtype: dtype of the stored embeddings.
    """

    path: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self):
        check_address(self.path or "")


@dataclass(frozen=True, kw_only=True)
class LLMStoreSettings(StoreSettings):
    """The LLM's text store.

    Attributes:
        on_the_fly: embed texts during training instead of all of them before, for more texts than the disk can hold. The LLM then stays in
            memory and reads every batch. 10,000 training texts and the held-out texts are stored all the same.
    """

    on_the_fly: bool = False


@dataclass(frozen=True, kw_only=True)
class TextStores:
    """The two text stores.

    Attributes:
        llm: the LLM's embeddings, before the adapter.
        teacher: CLIP's own text embeddings, for stage 1.
        token_budget: most padded tokens in a batch; the default depends on the device.
    """

    llm: LLMStoreSettings = field(default_factory=LLMStoreSettings)
    teacher: StoreSettings = field(default_factory=StoreSettings)
    token_budget: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage.

    Attributes:
        global_batch_size: rows of one optimizer step, over all processes.
        device_batch_size: most rows that a device takes at once; a larger share of the global batch goes through it in parts, by gradient
            caching, which is exact. By default a device takes its whole share.
        published_lambda: `contrastive_tuning` only: the papers' one weight on sums over `published_batch_size` pairs, from which `lambda_ins`
            and `lambda_struct` are derived.
        published_batch_size: pairs a device in the published setting.
        arguments: fields of the stage's trainer config.
    """

    global_batch_size: PositiveInt
    device_batch_size: PositiveInt | None = None
    published_lambda: float | None = None
    published_batch_size: PositiveInt = PUBLISHED_BATCH
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole curriculum. Relative paths in it are relative to the directory that `proclip train` is started in.

    Attributes:
        output_dir: gets a folder for every stage, the text stores and the resolved recipe.
        seed: seed of the adapter, the captions that are drawn, the order of the rows and dropout.
        precision: what encoders compute in while they train and embed; weights and their updates are float32. "auto": bfloat16 where the
            device multiplies it natively, else float32.
        model, data, text_stores: see there.
        stages: `masked_next_token`, `caption_contrastive`, `inheritance`, `contrastive_tuning`: any of them, run in this order.
    """

    output_dir: str
    seed: NonNegativeInt = 0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    model: ModelSettings
    data: DataSettings
    text_stores: TextStores = field(default_factory=TextStores)
    stages: dict[str, StageSettings]

    def __post_init__(self):
        if is_address(self.output_dir):
            raise ValueError(
                "output_dir must be a folder of this machine, whose files are locked and changed in place; upload it afterwards"
            )

    def as_dict(self) -> dict[str, Any]:
        """The recipe as YAML has it: with every default of the schema, a stage's `arguments` beside its other keys."""
        values = asdict(self)
        for name, stage in values["stages"].items():
            arguments = stage.pop("arguments")
            if name != "contrastive_tuning":
                del stage["published_lambda"], stage["published_batch_size"]
            values["stages"][name] = {**stage, **arguments}
        return values


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe. Nothing that it names is opened. `overrides` are settings `key=value` that override the file's; see [`read_recipe`].
    RecipeError names the file and the key's path.
    """
    try:
        return _checked(read_recipe(path, overrides), str(path))
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _checked(settings: Mapping[str, Any], where: str) -> Recipe:
    stages = settings.get("stages")
    if not isinstance(stages, Mapping) or not any(stage is not None for stage in stages.values()):
        raise ValueError(f"{where}: stages: name at least one of {', '.join(CONFIG_OF)}")
    for name in stages:
        if name not in CONFIG_OF:
            raise ValueError(f"{where}: stages.{name}: unknown stage; {nearest(name, CONFIG_OF)}")
    recipe = build(Recipe, {**settings, "stages": {}}, where)
    built = {
        name: _stage(name, stages[name], f"{where}: stages.{name}")
        for name in CONFIG_OF
        if stages.get(name) is not None
    }
    return replace(recipe, stages=built)


def _stage(name: str, values: Any, path: str) -> StageSettings:
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: must be a mapping, got {values!r:.80}")
    ours = [key for key in StageSettings.__dataclass_fields__ if key != "arguments"]
    if name != "contrastive_tuning":
        ours = [key for key in ours if not key.startswith("published_")]
    arguments = {key: value for key, value in values.items() if key not in ours}
    for key, remedy in ELSEWHERE.items():
        if key in arguments:
            raise ValueError(f"{path}.{key}: {remedy}")
    check_fields(CONFIG_OF[name], arguments, path, known=ours)
    stage = build(StageSettings, {key: values[key] for key in ours if key in values}, path)
    if name == "masked_next_token" and stage.device_batch_size is not None:
        raise ValueError(f"{path}.device_batch_size: this stage has no gradient caching; lower global_batch_size")
    if arguments.get("max_steps") == 0 or arguments.get("num_train_epochs", 1) <= 0:
        raise ValueError(f"{path}: max_steps or num_train_epochs is 0, which trains nothing: leave the stage out")
    if stage.published_lambda is not None:
        for key in ("lambda_ins", "lambda_struct"):
            if key in arguments:
                raise ValueError(f"{path}.{key}: follows from published_lambda; give one or the other")
        if arguments.get("reduction", "mean") != "mean":
            raise ValueError(f"{path}.reduction: published_lambda is converted for means; leave it out")
    return replace(stage, arguments=arguments)


def derived_arguments(name: str, stage: StageSettings, num_processes: int) -> dict[str, Any]:
    """The trainer settings of a stage that follow from its global batch, the number of processes, which must share it evenly, and the published lambda."""
    if stage.global_batch_size % num_processes:
        raise RecipeError(
            f"stages.{name}.global_batch_size: {stage.global_batch_size} rows cannot be shared evenly by {num_processes} processes"
        )
    share = stage.global_batch_size // num_processes
    derived: dict[str, Any] = {"per_device_train_batch_size": share}
    if stage.device_batch_size is not None and share > stage.device_batch_size:
        derived["gradient_caching_batch_size"] = stage.device_batch_size
    if stage.published_lambda is not None:
        weights = batch_invariant_weights(stage.published_lambda, stage.published_batch_size)
        derived["lambda_ins"], derived["lambda_struct"] = weights
    return derived


def in_terms_of_recipes(error: Exception) -> str:
    """The message of `error`, with the place of every trainer's setting in it that a recipe sets under another name."""
    message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    places = {
        remedy: name
        for name, remedy in ELSEWHERE.items()
        if name not in Recipe.__dataclass_fields__ and re.search(rf"\b{name}\b", message)
    }
    return message + "".join(f" (In a recipe, for {name}: {remedy}.)" for remedy, name in places.items())


def own_fields(arguments: TrainingArguments) -> dict[str, Any]:
    """The fields that this package adds to `TrainingArguments` or gives another default, with their values."""
    ours = [kind for kind in reversed(type(arguments).__mro__) if issubclass(kind, TrainingArguments)][1:]
    return {name: getattr(arguments, name) for kind in ours for name in kind.__annotations__}
