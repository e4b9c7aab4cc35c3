"""What the text adapter subtracts, divides by and projects out of an LLM embedding before its first layer."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modeling_proclip import ProCLIPModel


logger = logging.getLogger(__name__)


def set_input_statistics(model: ProCLIPModel, text_store: Any) -> None:
    """Set mean and standard deviation of the text store in an adapter that standardises its input and has none yet. ValueError if the adapter also
    projects directions of languages out or has anchors, which do not follow from the store alone.
    """
    adapter = model.text_adapter
    if model.config.adapter_num_anchors and not adapter.anchors.any():
        raise ValueError(
            f"the adapter has {model.config.adapter_num_anchors} anchors, which are not set yet: call "
            "trainers.alignment.input_statistics.set_anchors(model, text_store, texts)"
        )
    if model.config.adapter_input_norm != "standardize" or adapter.input_mean.any() or (adapter.input_std != 1).any():
        return
    if model.config.adapter_language_directions:
        raise ValueError(
            f"the adapter projects out {model.config.adapter_language_directions} language directions, which are not set yet: call "
            "trainers.alignment.input_statistics.fit_input_statistics(model, text_store, texts) with texts of each language"
        )
    adapter.set_input_statistics(*text_store.statistics())
    logger.info("The adapter's input statistics were unset; they are now those of the text store.")


def fit_input_statistics(model: ProCLIPModel, text_store: Any, texts: Mapping[str, Sequence[str]]) -> None:
    """Fit what `adapter_input_norm="standardize"` does to texts of several languages, each of which counts the same.

    Mean and standard deviation are over all languages. With `adapter_language_directions` the directions in which the languages' means differ
    most are projected out of the standardised embeddings ("language information removal"): what is left of a text says less of its language.
    An adapter that was trained behind other statistics has to be trained again.

    Args:
        model: Gets the statistics as buffers of its `text_adapter`, which are saved with it.
        text_store: Embeddings of the model's LLM; only `lookup(list[str]) -> (N, hidden_size)` is used.
        texts: Language -> texts in it, preferably translations of each other: else the means differ by topic as well.

    Raises:
        ValueError: If the adapter does not standardise, a language has no texts, or there are too few languages for the directions: L languages
            have means that differ in at most L - 1.
        KeyError: If a text is not in the store.
    """
    directions = model.config.adapter_language_directions
    for language, of_language in texts.items():
        if not of_language:
            raise ValueError(f"language {language!r} has no texts")
    if len(texts) <= directions:
        raise ValueError(
            f"adapter_language_directions={directions} needs texts in at least {directions + 1} languages, got {len(texts)}"
        )
    embeds = [text_store.lookup(list(of_language)).double() for of_language in texts.values()]
    means = torch.stack([of_language.mean(dim=0) for of_language in embeds])
    mean = means.mean(dim=0)
    std = torch.stack([(of_language - mean).square().mean(dim=0) for of_language in embeds]).mean(dim=0).sqrt()
    adapter = model.text_adapter
    adapter.set_input_statistics(mean, std)
    if directions:
        right = torch.linalg.svd((means - mean) / std, full_matrices=False).Vh
        adapter.language_directions.copy_(right[:directions])


def set_anchors(model: ProCLIPModel, text_store: Any, texts: Sequence[str]) -> None:
    """Set the texts that the adapter pulls others to: its `adapter_num_anchors` anchors.

    Take texts that stage 1 trains on, in the language of CLIP's text encoder, enough to cover everything that is to be distinguished. Each
    costs `4 * hidden_size` bytes in the checkpoint. Call this after the adapter's input statistics are set, which decide what is near.

    Args:
        model: Gets the anchors as a buffer of its `text_adapter`, which is saved with it.
        text_store: Text store of the model's LLM; only `lookup(list[str]) -> (N, hidden_size)` is used.
        texts: As many as the configuration has anchors.

    Raises:
        ValueError: If there are not `adapter_num_anchors` texts.
        KeyError: If a text is not in the store.
    """
    if len(texts) != model.config.adapter_num_anchors:
        raise ValueError(
            f"adapter_num_anchors is {model.config.adapter_num_anchors}, but there are {len(texts)} texts"
        )
    with torch.no_grad():
        model.text_adapter.anchors.copy_(model.text_adapter.normalize(text_store.lookup(list(texts))))
