"""What a checkpoint must be before it is sent: whole, with a processor of its own, and with an LLM that others can find."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from modeling_proclip import ProCLIPConfig, ProCLIPModel
from modeling_proclip.conversion.errors import first_line
from modeling_proclip.conversion.json_files import check_numbers, read_json
from modeling_proclip.conversion.stored_tensors import StoredTensor
from modeling_proclip.identity import weights_sha256
from modeling_proclip.lean_checkpoint import check_text_config

from .checkpoint_facts import is_hub_name
from .errors import PublishError
from .sent_files import PROCESSOR_FILES, OutgoingFiles


@contextmanager
def building_from(file: Path) -> Iterator[None]:
    """Build models without memory for their weights. PublishError if the configuration in `file` makes none."""
    try:
        with torch.device("meta"):
            yield
    except Exception as error:  # a damaged configuration makes each model fail in its own way
        raise PublishError(f"{file}: no model can be built from it: {first_line(error)}") from error


def check_tensors(source: Path, config: ProCLIPConfig, tensors: dict[str, StoredTensor]) -> None:
    """Refuse weights that are not those of the model of `config`, by name and shape."""
    with building_from(source / "config.json"):
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
def check_processor(outgoing: OutgoingFiles, config: ProCLIPConfig, reads_texts: bool, needed: bool) -> None:
    """Load the processor as it is sent and let it read an image and a text: it must be of the towers that it is saved beside."""
    source, folder = outgoing.source, outgoing.folder
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        if needed:
            raise PublishError(
                f"{source} has no processor, so nobody could use it: processor.save_pretrained({str(source)!r})."
            )
        return
    if reads_texts and not (folder / "tokenizer.json").is_file():
        raise PublishError(
            f"{source} has no tokenizer.json: save the whole processor there, processor.save_pretrained({str(source)!r})."
        )
    file = source / PROCESSOR_FILES[0 if reads_texts else 1]
    try:
        for name in PROCESSOR_FILES:
            if (folder / name).is_file():
                check_numbers(read_json(folder / name), source / name)
        loader = AutoProcessor if reads_texts else AutoImageProcessor
        processor = loader.from_pretrained(folder, trust_remote_code=False)
        image = {"images": Image.new("RGB", (64, 48)), "return_tensors": "pt"}
        features = processor(text="a", **image) if reads_texts else processor(**image)
    except Exception as error:  # a damaged file makes each part of the library fail in its own way
        reason = " ".join(str(error).replace(str(folder), str(source)).split())
        raise PublishError(f"{file}: the processor does not load ({type(error).__name__}: {reason}).") from error
    size, wanted = features["pixel_values"].shape[-1], getattr(config.vision_config, "image_size", None)
    if isinstance(wanted, int) and features["pixel_values"].ndim == 4 and size != wanted:
        raise PublishError(f"{file} makes images of {size} pixels, and the image encoder takes {wanted}.")
    if reads_texts and len(processor.tokenizer) > config.text_config.vocab_size:
        raise PublishError(
            f"{source / 'tokenizer.json'} has {len(processor.tokenizer)} tokens, and the LLM {config.text_config.vocab_size}: it is another "
            "LLM's tokenizer."
        )
    if not reads_texts:
        outgoing.notes.append("No LLM is named: it loads with load_text_model=False, or with text_model=...")


def rename_text_model(config: ProCLIPConfig, name: str, revision: str | None, lean: bool) -> None:
    """Let a lean checkpoint name its LLM on the Hub, where it named a folder: the same weights, by their hash, at their commit."""
    if not lean:
        raise PublishError(
            "text_model names the LLM of a lean checkpoint; this one holds its LLM: leave text_model out."
        )
    if not is_hub_name(name):
        raise PublishError(f"text_model {name!r} is not a name on the Hub (owner/name), where others could find it.")
    commit = HfApi().model_info(name, revision=revision).sha
    found = weights_sha256(name, commit)
    if config.text_model_sha256 not in (None, found):
        raise PublishError(
            f"The checkpoint was made with an LLM whose weights have SHA-256 {config.text_model_sha256}, but {name!r} has {found}."
        )
    check_text_config(config, name, commit)
    config.text_model_name_or_path, config.text_model_revision, config.text_model_sha256 = name, commit, found


def check_text_model(config: ProCLIPConfig, outgoing: OutgoingFiles) -> None:
    """Refuse a lean checkpoint whose LLM lies in a folder of this machine, where nobody else finds it."""
    name = config.text_model_name_or_path
    if name is None:
        return
    if not is_hub_name(name):
        raise PublishError(
            f"A lean checkpoint names its LLM, and this one names a folder of this machine, {name!r}. Name the same LLM on the Hub "
            "(--text-model OWNER/NAME; `hf upload` sends one that is not there yet), or send the LLM too (--full)."
        )
    if config.text_model_sha256 is None:
        outgoing.notes.append(
            f"The checkpoint does not record the hash of {name}: it cannot tell it from another LLM."
        )
