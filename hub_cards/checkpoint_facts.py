"""What a checkpoint's folder says of itself: its configuration, its tensors' headers, the cards of what it was made from."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from modeling_proclip.conversion.json_files import read_json

from .scrubbing import scrub


logger = logging.get_logger(__name__)
_Value = TypeVar("_Value")

PARTS = {
    "vision_model": "image encoder",
    "visual_projection": "image encoder",
    "text_model": "LLM",
    "text_adapter": "adapter",
}


@dataclass
class StageRecord:
    """What a trainer recorded of one stage of its training, see `trainers.base.training_record`. `batch_size` counts the rows of a step over all
    processes, and `num_rows` is None for a stream; `data` has "source", "split" and "revision", where they are known.
    """

    stage: str
    trainer: str
    steps: int
    num_epochs: int | float
    batch_size: int
    num_processes: int
    num_rows: int | None
    settings: dict[str, Any]
    final: dict[str, Any]
    versions: dict[str, str]
    data: dict[str, Any] | None = None


@dataclass
class CheckpointFacts:
    """The state of a ProCLIP checkpoint on the disk.

    Attributes:
        config, processor: Content of `config.json` and `processor_config.json`; the latter is empty if there is no processor.
        num_parameters: Number of parameters of "image encoder", "LLM" and "adapter", for those whose tensors are in the files.
        num_bytes, dtypes: Size of all safetensors files, and the dtypes in them as safetensors names them ("F32", "BF16").
        training: A record of each stage of its training; empty where nothing is recorded.
    """

    folder: Path
    config: dict[str, Any]
    processor: dict[str, Any]
    num_parameters: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0
    dtypes: list[str] = field(default_factory=list)
    training: list[StageRecord] = field(default_factory=list)

    @property
    def lean(self) -> bool:
        return bool(self.config.get("lean"))

    @property
    def loads_text(self) -> bool:
        """Whether the folder, or what it names, is enough to embed texts: the LLM is inside or named, and there is a processor."""
        return bool(self.processor) and (not self.lean or self.config.get("text_model_name_or_path") is not None)

    @property
    def base_models(self) -> dict[str, str]:
        """Names of what the towers were loaded from, under "vision" and "text": Hub names or folders, as far as they are recorded."""
        names = {
            "vision": self.config.get("vision_model_name_or_path"),
            "text": self.config.get("text_model_name_or_path"),
        }
        return {tower: name for tower, name in names.items() if name}


def read_facts(folder: str | Path) -> CheckpointFacts:
    """Read a ProCLIP checkpoint's folder without loading a weight. ValueError names the file that is missing or damaged."""
    folder = Path(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if config is None or config.get("model_type") != "proclip":
        kind = (
            "it has no config.json"
            if config is None
            else f"its config.json is of model_type {config.get('model_type')!r}"
        )
        raise ValueError(f"{folder} is no ProCLIP checkpoint: {kind}. Write one with model.save_pretrained")
    processor = folder / "processor_config.json"
    checkpoint = CheckpointFacts(folder, config, read_json(processor) if processor.is_file() else {})
    checkpoint.training = read_training(config.get("training"), folder / "config.json")
    dtypes = set()
    for file in sorted(folder.glob("model*.safetensors")):
        checkpoint.num_bytes += file.stat().st_size
        for name, tensor in read_header(file).items():
            dtypes.add(tensor["dtype"])
            part = PARTS.get(name.split(".")[0])
            if part is not None:
                checkpoint.num_parameters[part] = checkpoint.num_parameters.get(part, 0) + math.prod(tensor["shape"])
    checkpoint.dtypes = sorted(dtypes)
    return checkpoint


def read_training(records: Any, file: Path) -> list[StageRecord]:
    """The records of training that `file` holds; ValueError that names it if they are none."""
    return checked(list[StageRecord], records or [], f"{file}: the record of the training")


def checked(kind: type[_Value], value: Any, what: str) -> _Value:
    """`value` as a `kind`, dataclasses in it too. ValueError that begins with `what` and names the first field that does not fit."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{what}, {place}: {first['msg']}") from error


def own_weights(folder: str | Path) -> set[str]:
    """Hashes that an evaluation of this checkpoint can name (`own_weights_sha256`): one for each dtype that it may have been loaded in."""
    import torch  # a card without results needs none of it
    from safetensors.torch import load_file

    from modeling_proclip import ProCLIPModel
    from modeling_proclip.identity import own_weights_sha256

    state = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        state.update({name: tensor for name, tensor in load_file(file).items() if not name.startswith("text_model.")})

    def loaded_in(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        kept = ProCLIPModel._keep_in_fp32_modules_strict
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() and name.split(".")[-1] not in kept else tensor
            for name, tensor in state.items()
        }

    in_dtypes = [state, *(loaded_in(dtype) for dtype in (torch.bfloat16, torch.float16))]
    return {own_weights_sha256(tensors) for tensors in in_dtypes}


def is_hub_name(name: str) -> bool:
    """Whether `name` reads as a repository `owner/name` on the Hub and is no folder here: only such a name is of use to others."""
    return is_repo_id(name) and name.count("/") == 1 and not Path(name).exists()


def is_repo_id(name: str) -> bool:
    """Whether a repository on the Hub could be called `name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def shown_name(name: str) -> str:
    """A name on the Hub as it is; a local folder by the last part of its path."""
    return name if is_hub_name(name) else Path(scrub(name)).name


def base_card(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """Metadata of a base model's card, from its folder or the Hub's local cache; nothing is fetched. Empty if there is none."""
    folder = Path(name_or_path)
    if folder.is_dir():
        file: Any = folder / "README.md"
    elif is_hub_name(name_or_path):
        file = try_to_load_from_cache(name_or_path, "README.md", revision=revision)
    else:
        return {}
    if not isinstance(file, (str, Path)) or not Path(file).is_file():
        return {}
    try:
        return metadata_load(file) or {}
    except Exception as error:  # YAML's own errors: of somebody else's card nothing depends
        logger.warning(
            f"The card of {name_or_path} cannot be read, so nothing is taken from it: {' '.join(str(error).split())}"
        )
        return {}


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """ "dtype" and "shape" of the tensors of a safetensors file, by name, without reading them. ValueError names a damaged file."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            stored = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {name: {"dtype": part.get_dtype(), "shape": part.get_shape()} for name, part in stored.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} is not a safetensors file, or is cut short ({error}): save the checkpoint again"
        ) from error
