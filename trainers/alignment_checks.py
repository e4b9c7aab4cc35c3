"""What is made sure of before a training begins: what is trained, and that the stores of embeddings fit."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from modeling_proclip import ProCLIPModel

from .collators import DrawnCaptions
from .data.pair_stream import PairStream


logger = logging.getLogger(__name__)


def train_only(model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """
    Freeze all of `model` but the `trained` parameters.

    Raises:
        ValueError: If one of these is in half precision, where steps as small as the learning rate's are lost to rounding.
    """
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is to be trained but is {parameter.dtype}: the small steps of training would be lost to rounding. Load the model with "
                "dtype=torch.float32 (or dtype={'vision_config': torch.float32, 'text_config': ...}) or call .float() on it; bf16=True in "
                "the trainer's arguments computes in half precision all the same."
            )


def proclip_of(model: nn.Module) -> ProCLIPModel:
    """The model itself, of one with PEFT adapters."""
    return model if isinstance(model, ProCLIPModel) else model.get_base_model()


def trained_with_peft(model: nn.Module, freeze_vision: bool) -> list[nn.Parameter]:
    """
    What stage 2 trains of a model with PEFT adapters: the adapters, and what its configuration saves with them.

    Raises:
        ValueError: If the model would not save its logit scale, or an adapter is where this stage trains nothing.
    """
    from .peft_model import ProCLIPPeftModel  # peft is an extra

    if not isinstance(model, ProCLIPPeftModel):
        raise ValueError(
            f"a {type(model).__name__} would lose the logit scale when it is saved: make the model by "
            "trainers.peft_model.ProCLIPPeftModel(base, peft_config)"
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


def check_store(name: str, store: Any, size: int, rows: DrawnCaptions | PairStream, remedy: str) -> None:
    """Look a caption of `rows` up. Raises KeyError if the store does not have it, ValueError if its embeddings are not of `size`."""
    caption = rows[0]["text"] if isinstance(rows, DrawnCaptions) else rows.first_caption()
    found = store.lookup([caption]).shape[1]
    if found != size:
        raise ValueError(f"{name} holds embeddings of size {found}, but this model needs {size}: {remedy}")


def set_input_statistics(model: ProCLIPModel, text_store: Any) -> None:
    """Give an adapter that standardises its input and was not told how yet the mean and deviation of the text store."""
    adapter = model.text_adapter
    if model.config.adapter_input_norm != "standardize" or adapter.input_mean.any() or (adapter.input_std != 1).any():
        return
    adapter.set_input_statistics(*text_store.statistics())
    logger.warning("The adapter's input statistics were unset; they are now those of the text store.")
