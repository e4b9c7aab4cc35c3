"""Checks before a training begins: what is trained, and whether the stores of embeddings fit."""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import datasets
import torch
from torch import nn

from modeling_proclip import ProCLIPModel
from trainers.data import TextEmbeddingStore
from trainers.data.captions import DrawnCaptions, captions_of
from trainers.data.languages import BalancedLanguages
from trainers.data.pair_rows import PairRows
from trainers.data.pair_stream import PairStream
from trainers.display.progress import Progress
from trainers.text_store.keys import text_keys


logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 10_000
_HALF = (torch.float16, torch.bfloat16)


def train_only(model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Freeze all of `model` but the `trained` parameters, and convert those in half precision to float32, with a warning.

    Half precision would lose updates as small as the learning rate's to rounding: bfloat16 has 8 bits, so a weight of 1 does not
    change by less than 0.002. bfloat16 weights with a float32 copy in the optimizer would not lose them, but save next to nothing
    against float32 weights under autocast (docs/training_at_scale.md).
    """
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    half = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.dtype in _HALF]
    before = sorted({str(parameter.dtype) for parameter in half})
    # Statistics and position tables too, of all modules that hold something trained.
    holders = [module for module in model.modules() if any(p.requires_grad for p in module.parameters())]
    buffers = [buffer for module in holders for buffer in module.buffers(recurse=False) if buffer.dtype in _HALF]
    for tensor in (*half, *buffers):
        tensor.data = tensor.data.float()
    if half:
        logger.warning(
            f"{len(half)} of the parameters to be trained were {', '.join(before)}: they are converted to float32, trained and saved in "
            "float32, or small updates would be lost to rounding. bf16=True computes in bfloat16 all the same. What loading rounded stays "
            "rounded: load a float32 checkpoint with dtype=torch.float32."
        )


def proclip_of(model: nn.Module) -> ProCLIPModel:
    """The model itself, of one with PEFT adapters."""
    return model if isinstance(model, ProCLIPModel) else model.get_base_model()


def trained_with_peft(model: nn.Module, freeze_vision: bool) -> list[nn.Parameter]:
    """What stage 2 trains of a model with PEFT adapters: the adapters, and what its configuration saves with them. ValueError if the model would not
    save its logit scale, or an adapter is where this stage trains nothing.
    """
    from .peft_model import ProCLIPPeftModel  # peft is an extra

    if not isinstance(model, ProCLIPPeftModel):
        raise ValueError(
            f"a {type(model).__name__} would lose the logit scale when it is saved: make the model by "
            "trainers.alignment.peft_model.ProCLIPPeftModel(base, peft_config)"
        )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in trained:
        if ".text_model." in name:
            raise ValueError(
                f"{name} would not be trained: this stage reads the LLM's embeddings from the text store. Name modules of vision_model in "
                "target_modules"
            )
        if freeze_vision and (".vision_model." in name or ".visual_projection." in name):
            raise ValueError(
                f"{name} is to be trained, but freeze_vision (method='lit') says that the image encoder is not"
            )
    return list(trained.values())


def check_store(
    name: str, store: Any, size: int, rows: DrawnCaptions | PairStream, remedy: str, reader: str = "text"
) -> None:
    """Look a caption of `rows` up. Raises KeyError if the store does not have it, ValueError if its embeddings are not of `size`."""
    if isinstance(rows, DrawnCaptions):
        caption = captions_of(rows[0], "row 0", reader)[0]
    else:
        caption = rows.first_caption(reader)
    found = store.lookup([caption]).shape[1]
    if found != size:
        raise ValueError(f"{name} holds embeddings of size {found}, but this model needs {size}: {remedy}")


def check_texts(name: str, store: Any, dataset: Any, reader: str = "text", *, progress: bool = True) -> None:
    """Check that all captions of `dataset` are in `store`, by their keys alone, so that a training does not fail hours later at a missing one. KeyError
    names the first that are missing.

    Lists, datasets of the `datasets` library and [`PairRows`] are checked, without decoding images. Others are not, as their images would have
    to be decoded, and neither is a store that is no [`TextEmbeddingStore`]. `progress` says whether this process shows how far it is.
    """
    captions = _captions(dataset, reader)
    if captions is None or not isinstance(store, TextEmbeddingStore):
        return
    missing: dict[str, None] = {}
    with Progress(f"looking captions up in the {name}", len(dataset), "rows", shown=progress) as bar:
        for rows in iter(lambda: list(islice(captions, _ROWS_AT_A_TIME)), []):
            texts = [caption for of_row in rows for caption in of_row]
            found = store.find(text_keys(texts)) >= 0
            missing |= dict.fromkeys(text for text, there in zip(texts, found, strict=True) if not there)
            bar.advance(len(rows))
    if missing:
        raise KeyError(f"{name}: {store.missing_message(list(missing))}")


def _captions(dataset: Any, reader: str) -> Iterator[list[str]] | None:
    """The captions of each row for `reader`, "text" or "teacher_text", or None if reading them would decode images."""
    if isinstance(dataset, BalancedLanguages):
        return _captions(dataset.rows, reader)
    if isinstance(dataset, PairRows):
        return dataset.captions(reader)
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom" and "text" in dataset.column_names:
        # Not with set_transform, which needs the images too and may change the captions.
        dataset = dataset.select_columns([name for name in ("text", "teacher_text") if name in dataset.column_names])
    elif not isinstance(dataset, list):
        return None
    return (captions_of(row, f"row {i}", reader) for i, row in enumerate(dataset))
