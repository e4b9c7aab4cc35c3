"""A checkpoint as it is sent to the Hub: checked, complete, and without anything private."""

import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModel

from modeling_proclip import ProCLIPConfig
from modeling_proclip.conversion.code_references import without_code
from modeling_proclip.conversion.json_files import read_config
from modeling_proclip.conversion.output import MAX_SHARD_BYTES, PlannedTensor, sketch_tensors, write_tensors
from modeling_proclip.conversion.rules import build_config
from modeling_proclip.conversion.stored_tensors import StoredTensor, read_tensors
from modeling_proclip.lean_checkpoint import record_text_model, recorded_text_model

from .checkpoint_checks import building_from, check_processor, check_tensors, check_text_model, rename_text_model
from .checkpoint_facts import is_hub_name, read_training
from .errors import PublishError
from .measurements import shown_source
from .model import PLACEHOLDER, model_card
from .remote_code import AUTO_MAP, PROCESSOR_AUTO_MAP, code_files
from .rendering import is_untouched
from .scrubbing import scrub
from .sent_files import PROCESSOR_FILES, SETTINGS, OutgoingFiles, Staged, read_text
from .validity import check_card


WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS = re.compile(r"(adapter_)?model\.safetensors|model-\d{5}-of-\d{5}\.safetensors")


def stage(
    source: Path,
    folder: Path,
    repo_id: str,
    *,
    lean: bool | None = None,
    max_shard_bytes: int | None = None,
    with_code: bool = True,
    needs_processor: bool = True,
    text_model: str | None = None,
    text_model_revision: str | None = None,
    card: Mapping[str, Any] | None = None,
    sketch: bool = False,
) -> Staged:
    """Check the checkpoint in `source` and lay it out in the empty `folder` as `repo_id` is to hold it. The arguments are those of [`publish`].

    Checked are the configuration, that the weights are safetensors with every tensor of the model in its shape, finite, and no other, and
    that tokenizer and image processor load and fit the towers. Weights that stay as they are become links. Costs one pass over the weights.

    Args:
        max_shard_bytes: Split the weights into files of at most so many bytes; by default they are as in `source`.
        sketch: Where weights would be rewritten, only make files of their names and sizes.

    Raises:
        PublishError: Naming file, field or tensor and the remedy.
    """
    outgoing = OutgoingFiles(source, folder)
    settings = _read_settings(outgoing)
    read_training(settings.get("training"), source / "config.json")
    config = build_config(ProCLIPConfig.from_dict, config_dict=without_code(settings))
    tensors = _read_all_weights(outgoing)
    check_tensors(source, config, tensors)
    was_lean, lean = config.lean, config.lean if lean is None else lean
    for name in SETTINGS:
        outgoing.copy_settings(name, PROCESSOR_AUTO_MAP if with_code and name == PROCESSOR_FILES[0] else None)
    outgoing.copy_tokenizer()
    reads_texts = not lean or (text_model or config.text_model_name_or_path) is not None
    check_processor(outgoing, config, reads_texts, needed=needs_processor)
    outgoing.copy_legal_files()
    outgoing.copy_results()
    outgoing.copy_modules()
    if text_model is not None:
        rename_text_model(config, text_model, text_model_revision, lean)
    planned = _plan(source, config, tensors, lean, sketch)
    if lean:
        check_text_model(config, outgoing)

    outgoing.write_settings(
        "config.json", _settings_for_others(settings, config, lean), AUTO_MAP if with_code else None
    )
    if with_code:
        for file in code_files():
            shutil.copyfile(file, folder / file.name)
    if lean == was_lean and max_shard_bytes is None:
        for file in {tensor.file for tensor in tensors.values()}:
            (folder / file.name).symlink_to(file.resolve())
        outgoing.copy_settings(WEIGHTS_INDEX)
    else:
        (sketch_tensors if sketch else write_tensors)(folder, planned, max_shard_bytes or MAX_SHARD_BYTES)
    _write_or_check_card(outgoing, repo_id, card)
    if lean != was_lean and card is None and (source / "README.md").is_file():
        outgoing.notes.append("README.md is sent as it is: check what it says about the LLM.")

    staged = outgoing.staged(lean, used={tensor.file.name for tensor in tensors.values()} | {WEIGHTS_INDEX})
    if lean and config.text_model_name_or_path is not None:
        with building_from(source / "config.json"):
            llm = AutoModel.from_config(config.text_config, dtype=config.text_config.dtype)
        staged.text_model_bytes = sum(t.numel() * t.element_size() for t in llm.state_dict().values())
    return staged


def _read_settings(outgoing: OutgoingFiles) -> dict[str, Any]:
    source = outgoing.source
    if not source.is_dir():
        raise PublishError(f"{source} is no folder: name the one that model.save_pretrained wrote.")
    file = outgoing.find("config.json")
    if file is None:
        raise PublishError(f"{source} has no config.json: name the folder that model.save_pretrained wrote.")
    settings = read_config(file)
    if settings.get("model_type") != "proclip":
        raise PublishError(
            f"{source} holds a model of type {settings.get('model_type')!r} and no ProCLIP checkpoint. It needs no code of this package: send "
            f"it with `hf upload OWNER/NAME {source}`."
        )
    return settings


def _read_all_weights(outgoing: OutgoingFiles) -> dict[str, StoredTensor]:
    source = outgoing.source
    found = [name for name in (WEIGHTS_FILE, WEIGHTS_INDEX) if outgoing.find(name)]
    if not found:
        raise PublishError(
            f"{source} has no model.safetensors, in shards or not: load it and save it with model.save_pretrained. Pickles are not published."
        )
    if len(found) > 1:
        raise PublishError(f"{source} holds both {' and '.join(found)}: which weights are meant? Remove the others.")
    return read_weights(outgoing, source)


def read_weights(outgoing: OutgoingFiles, place: Path) -> dict[str, StoredTensor]:
    """The tensors in `place`, a file or folder, whose files may be sent as they are.

    Raises:
        PublishError: If a file is a link out of the folder, has another name than weights have, or says more in its header than it must.
        ConversionError: If one is damaged, or holds NaN or infinity.
    """
    tensors = read_tensors(place)
    for file in {tensor.file for tensor in tensors.values()}:
        if not _WEIGHTS.fullmatch(file.name):
            raise PublishError(f"{file}: weights are called model.safetensors, or model-00001-of-00002.safetensors.")
        outgoing.find(file.name)
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
        if scrub(metadata) != metadata:
            raise PublishError(f"{file}: its header holds local paths or tokens: save it again with save_pretrained.")
    for tensor in tensors.values():
        tensor.read()
    return tensors


def _settings_for_others(settings: dict[str, Any], config: ProCLIPConfig, lean: bool) -> dict[str, Any]:
    """`config.json` as it is sent: with the LLM's name on the Hub, and no folder of this machine."""
    settings = {**settings, "lean": lean}
    for key in ("text_model_name_or_path", "text_model_revision", "text_model_sha256"):
        settings[key] = getattr(config, key)
    for key in ("vision_model_name_or_path", "text_model_name_or_path"):
        if settings.get(key) and not is_hub_name(settings[key]):
            settings[key] = None
    for part in (settings, settings["vision_config"], settings["text_config"]):
        part.pop("_name_or_path", None)
    for record in config.training or []:
        if data := record.get("data"):
            data["source"] = shown_source(data)
    return {**settings, "training": config.training}


def _plan(
    source: Path, config: ProCLIPConfig, tensors: dict[str, StoredTensor], lean: bool, sketch: bool
) -> list[PlannedTensor]:
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
        with building_from(source / "config.json"):
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


def _write_or_check_card(outgoing: OutgoingFiles, repo_id: str, card: Mapping[str, Any] | None) -> None:
    file = outgoing.find("README.md")
    text = None if file is None else read_text(file)
    if card is not None or text is None or is_untouched(text):
        write_card(outgoing, model_card, {"repo_id": repo_id, "weights_in": outgoing.source, **(card or {})})
        return
    outgoing.write_text("README.md", text.replace(PLACEHOLDER, repo_id))
    try:
        check_card(ModelCard.load(outgoing.folder / "README.md"))
    except Exception as error:  # YAML's own errors, and those of the metadata
        reason = " ".join(str(error).split())
        raise PublishError(f"{file}: the Hub would refuse its metadata: {reason}") from error
    outgoing.copy_images(text)


def write_card(outgoing: OutgoingFiles, card: Callable[..., ModelCard], arguments: Mapping[str, Any]) -> None:
    """Write the README.md that `card` renders from what is laid out. PublishError if it cannot be rendered."""
    try:
        outgoing.write_text("README.md", card(outgoing.folder, **arguments).content)
    except (TypeError, ValueError, OSError) as error:
        raise PublishError(f"The card of {outgoing.source} cannot be made: {error}") from error
