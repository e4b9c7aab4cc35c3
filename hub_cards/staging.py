"""A checkpoint's folder as it is to lie on the Hub: checked, complete, and without what belongs to nobody else."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

from modeling_proclip import ProCLIPConfig, ProCLIPModel
from modeling_proclip.conversion.json_files import read_json
from modeling_proclip.conversion.output import MAX_SHARD_BYTES, PlannedTensor, sketch_tensors, write_tensors
from modeling_proclip.conversion.stored_tensors import StoredTensor, read_tensors
from modeling_proclip.identity import weights_sha256
from modeling_proclip.lean_checkpoint import check_text_config, record_text_model, recorded_text_model

from .checkpoint_facts import is_hub_name
from .model import PLACEHOLDER, model_card
from .remote_code import AUTO_MAP, PROCESSOR_AUTO_MAP, code_files
from .rendering import is_untouched
from .validity import check_card


WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# Everything else stays behind: optimizers and random states (pickles), locks, .env files, code that is not this package's.
SENT = (
    "config.json",
    *PROCESSOR,
    "LICENSE*",
    "NOTICE*",
    "results.json",
    "modules.json",  # of sentence-transformers, with its modules' folders
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "[0-9]_*/*.json",
    "[0-9]_*/*.safetensors",
)
PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".gif", ".webp")  # sent where the card shows them


class PublishError(ValueError):
    """What is to be published is not complete, or the Hub did not take it. The message says what to do."""


@dataclass
class Staged:
    """
    A folder whose every file is to be sent.

    Attributes:
        folder: Where it lies.
        lean: Whether the LLM stays out.
        files: Names in the repository and their bytes.
        left_out: Names in the source that are not sent.
        notes: What the person should know.
        text_model_bytes: Size of the LLM that a lean checkpoint names in place of holding it, in the dtype that it runs in.
    """

    folder: Path
    lean: bool
    files: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    text_model_bytes: int = 0


def stage(
    source: Path,
    folder: Path,
    repo_id: str,
    *,
    lean: bool | None = None,
    max_shard_bytes: int | None = None,
    with_code: bool = True,
    with_processor: bool = True,
    text_model: str | None = None,
    text_model_revision: str | None = None,
    card: Mapping[str, Any] | None = None,
    sketch: bool = False,
) -> Staged:
    """
    Check the checkpoint in `source` and lay it out in `folder`, which must be empty, as `repo_id` is to hold it.

    Checked are the configuration's keys, that the weights are safetensors with every tensor of the model in its shape and no other, and
    that tokenizer and image processor load and fit the towers. Weights that stay as they are become links.

    Args:
        lean: Leave the LLM out, or put it in; by default as `source` is.
        max_shard_bytes: Split the weights into files of at most so many bytes; by default they are as in `source`.
        with_code: Add the code that loads the checkpoint without this package.
        with_processor: Refuse a checkpoint without tokenizer and image processor.
        text_model, text_model_revision: Name on the Hub of the LLM of a lean checkpoint that names a folder. Its weights are compared.
        card: What [`model_card`] is to say beside what the checkpoint holds: the card is rendered with it, whatever card there is.
        sketch: Lay out weights in name and size only, without reading them.

    Raises:
        PublishError: Naming file, field or tensor and the remedy.
    """
    settings = _read_config(source)
    config = ProCLIPConfig.from_pretrained(source)
    tensors = _read_weights(source)
    _check_tensors(source, config, tensors)
    was_lean, staged = config.lean, Staged(folder, config.lean if lean is None else lean)
    _check_processor(source, config, staged, with_processor)
    if text_model is not None:
        _rename_text_model(config, text_model, text_model_revision, staged.lean)
    planned = _plan(config, tensors, staged.lean, sketch)
    _check_text_model(config, staged)

    config.lean = staged.lean
    for key in ("lean", "text_model_name_or_path", "text_model_revision", "text_model_sha256"):
        settings[key] = getattr(config, key)
    for key in ("vision_model_name_or_path", "text_model_name_or_path"):
        if settings.get(key) and not is_hub_name(settings[key]):
            settings[key] = None
    settings = _without_folders(settings)
    _copy_files(source, folder)
    write_json(folder / "config.json", settings, AUTO_MAP if with_code else {})
    if (source / "processor_config.json").is_file():
        processor_settings = read_json(source / "processor_config.json")
        write_json(folder / "processor_config.json", processor_settings, PROCESSOR_AUTO_MAP if with_code else {})
    if with_code:
        for file in code_files():
            shutil.copyfile(file, folder / file.name)
    if staged.lean == was_lean and max_shard_bytes is None:
        index = source / WEIGHT_FILES[1]
        for file in {tensor.file for tensor in tensors.values()} | ({index} if index.is_file() else set()):
            (folder / file.name).symlink_to(file.resolve())
    else:
        (sketch_tensors if sketch else write_tensors)(folder, planned, max_shard_bytes or MAX_SHARD_BYTES)
    _write_card(source, folder, repo_id, card)
    if staged.lean != was_lean and card is None and (source / "README.md").is_file():
        staged.notes.append("README.md is sent as it is: see that it says nothing of the LLM that is no longer so.")

    staged.files = file_sizes(folder)
    read = {tensor.file.name for tensor in tensors.values()} | {WEIGHT_FILES[1]}
    staged.left_out = sorted(set(file_sizes(source)) - set(staged.files) - read)
    if staged.lean and config.text_model_name_or_path is not None:
        with torch.device("meta"):
            llm = AutoModel.from_config(config.text_config, dtype=config.text_config.dtype)
        staged.text_model_bytes = sum(t.numel() * t.element_size() for t in llm.state_dict().values())
    return staged


def _read_config(source: Path) -> dict[str, Any]:
    if not source.is_dir():
        raise PublishError(f"{source} is no folder: name the one that model.save_pretrained wrote.")
    if not (source / "config.json").is_file():
        adapter = (source / "adapter_config.json").is_file()
        kind = "is a PEFT adapter, which its model pushes (push_to_hub)" if adapter else "has no config.json"
        raise PublishError(f"{source} {kind}: name the folder that model.save_pretrained wrote.")
    settings = read_json(source / "config.json")
    if settings.get("model_type") != "proclip":
        raise PublishError(
            f"{source} holds a model of type {settings.get('model_type')!r} and no ProCLIP checkpoint. It needs no code of this package: send "
            f"it with `hf upload OWNER/NAME {source}`."
        )
    return settings


def _read_weights(source: Path) -> dict[str, StoredTensor]:
    found = [name for name in WEIGHT_FILES if (source / name).is_file()]
    if not found:
        raise PublishError(
            f"{source} has no model.safetensors, in shards or not: load it and save it with model.save_pretrained. Pickles are not published."
        )
    if len(found) > 1:
        raise PublishError(f"{source} holds both {' and '.join(found)}: which weights are meant? Remove the others.")
    return read_tensors(source)


def _check_tensors(source: Path, config: ProCLIPConfig, tensors: dict[str, StoredTensor]) -> None:
    with torch.device("meta"):
        model = ProCLIPModel(config, load_text_model=not config.lean)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = set(shapes) - set(tensors) - set(model.all_tied_weights_keys)
    for names, what in (
        (missing, "lacks tensor"),
        (set(tensors) - set(shapes), "holds a tensor that its model has not,"),
    ):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise PublishError(
                f"{source} {what} {min(names)!r}{others}: config.json and weights do not belong together."
            )
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise PublishError(
                f"{tensor.file}: tensor {name!r} has shape {tensor.shape}, and config.json says {shapes[name]}: they do not belong together."
            )


@torch.no_grad()
def _check_processor(source: Path, config: ProCLIPConfig, staged: Staged, needed: bool) -> None:
    """Load the processor and let it read a picture and a text: it must be of the towers that it is saved beside."""
    reads_texts = not staged.lean or config.text_model_name_or_path is not None
    name = "processor_config.json" if reads_texts else "preprocessor_config.json"
    if not (source / "processor_config.json").is_file() and not (source / "preprocessor_config.json").is_file():
        if needed:
            raise PublishError(
                f"{source} has no processor, so nobody could use it: processor.save_pretrained({str(source)!r})."
            )
        return
    if reads_texts and not (source / "tokenizer.json").is_file():
        raise PublishError(
            f"{source} has no tokenizer.json: save the whole processor there, processor.save_pretrained({str(source)!r})."
        )
    try:
        processor = (AutoProcessor if reads_texts else AutoImageProcessor).from_pretrained(source)
        picture = {"images": Image.new("RGB", (64, 48)), "return_tensors": "pt"}
        features = processor(text="a", **picture) if reads_texts else processor(**picture)
    except Exception as error:  # a damaged file makes each part of the library fail in its own way
        raise PublishError(
            f"{source / name}: the processor does not load ({type(error).__name__}: {error})."
        ) from error
    size, wanted = features["pixel_values"].shape[-1], getattr(config.vision_config, "image_size", None)
    if isinstance(wanted, int) and features["pixel_values"].ndim == 4 and size != wanted:
        raise PublishError(f"{source / name} makes pictures of {size} pixels, and the image encoder takes {wanted}.")
    if reads_texts and len(processor.tokenizer) > config.text_config.vocab_size:
        raise PublishError(
            f"{source / 'tokenizer.json'} has {len(processor.tokenizer)} tokens, and the LLM {config.text_config.vocab_size}: it is another "
            "LLM's tokenizer."
        )
    if not reads_texts:
        staged.notes.append("No LLM is named: it loads with load_text_model=False, or with text_model=...")


def _rename_text_model(config: ProCLIPConfig, name: str, revision: str | None, lean: bool) -> None:
    if not lean:
        raise PublishError(
            "text_model names the LLM of a lean checkpoint; this one holds its LLM: leave text_model out."
        )
    if not is_hub_name(name):
        raise PublishError(f"text_model {name!r} is no name on the Hub (owner/name), where others could find it.")
    commit = HfApi().model_info(name, revision=revision).sha
    found = weights_sha256(name, commit)
    if config.text_model_sha256 not in (None, found):
        raise PublishError(
            f"The checkpoint was made with an LLM whose weights have SHA-256 {config.text_model_sha256}, but {name!r} has {found}."
        )
    check_text_config(config, name, commit)
    config.text_model_name_or_path, config.text_model_revision, config.text_model_sha256 = name, commit, found


def _check_text_model(config: ProCLIPConfig, staged: Staged) -> None:
    name = config.text_model_name_or_path
    if not staged.lean or name is None:
        return
    if not is_hub_name(name):
        raise PublishError(
            f"A lean checkpoint names its LLM, and this one names a folder of this machine, {name!r}. Name the same LLM on the Hub "
            "(--text-model OWNER/NAME; `hf upload` sends one that is not there yet), or send the LLM too (--full)."
        )
    if config.text_model_sha256 is None:
        staged.notes.append(f"The checkpoint does not record the hash of {name}: it cannot tell it from another LLM.")


def _plan(config: ProCLIPConfig, tensors: dict[str, StoredTensor], lean: bool, sketch: bool) -> list[PlannedTensor]:
    """The tensors to write if the weights are written anew. Taking the LLM out makes sure first that its name stands for it."""
    prefix = "text_model."
    planned = [PlannedTensor(name, tensor.dtype, tensor.shape, tensor.read) for name, tensor in tensors.items()]
    if lean and not config.lean:
        if config.text_model_name_or_path is None:
            raise PublishError(
                "A lean checkpoint names its LLM, and this one has no name for it: name it (--text-model), or send it (--full)."
            )
        if not sketch:
            llm = {
                name.removeprefix(prefix): tensor.load() for name, tensor in tensors.items() if name.startswith(prefix)
            }
            record_text_model(config, llm, lean=True)
        planned = [tensor for tensor in planned if not tensor.name.startswith(prefix)]
    elif config.lean and not lean:
        with torch.device("meta"):
            shapes = AutoModel.from_config(config.text_config, dtype=config.text_config.dtype).state_dict()

        @cache
        def llm_state() -> dict[str, torch.Tensor]:
            return recorded_text_model(config, None, config.text_config.dtype, {}).state_dict()

        def llm_tensor(name: str) -> torch.Tensor:
            return llm_state()[name]

        planned += [
            PlannedTensor(prefix + name, tensor.dtype, tuple(tensor.shape), partial(llm_tensor, name))
            for name, tensor in shapes.items()
        ]
    return sorted(planned, key=lambda tensor: tensor.name)


def _write_card(source: Path, folder: Path, repo_id: str, card: Mapping[str, Any] | None) -> None:
    file = source / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else None
    if card is not None or text is None or is_untouched(text):
        try:
            made = model_card(folder, **{"repo_id": repo_id, "weights_in": source, **(card or {})})
        except (TypeError, ValueError, OSError) as error:
            raise PublishError(f"The card of {source} cannot be made: {error}") from error
        made.save(folder / "README.md")
        return
    (folder / "README.md").write_text(text.replace(PLACEHOLDER, repo_id), encoding="utf-8")
    try:
        check_card(ModelCard.load(folder / "README.md"))
    except Exception as error:  # YAML's own errors, and those of the metadata
        reason = " ".join(str(error).split())
        raise PublishError(f"{source / 'README.md'}: the Hub would refuse its metadata: {reason}") from error
    for name in set(re.findall(r"\]\(([^)\s:#]+)\)", text)):
        linked = (source / name).resolve()
        if linked.suffix in PICTURES and linked.is_file() and linked.is_relative_to(source.resolve()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(linked, folder / name)


def _without_folders(value: Any) -> Any:
    """Of a path of this machine, which is of no use to others and none of their business, the last part."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items() if key != "_name_or_path"}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def write_json(file: Path, settings: dict[str, Any], auto_map: dict[str, str]) -> None:
    """Write a configuration that names the code of `auto_map`, or none where that is empty."""
    settings = {key: value for key, value in settings.items() if key != "auto_map"}
    settings |= {"auto_map": auto_map} if auto_map else {}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_files(source: Path, folder: Path) -> None:
    for name in _matching(source, SENT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    # A pattern's * stays within a folder's name.
    return [
        name
        for name in file_sizes(folder)
        if any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)
    ]


def file_sizes(folder: Path) -> dict[str, int]:
    """Names of all files in `folder` and below, and their bytes."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
