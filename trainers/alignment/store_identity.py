"""Whose embeddings a store holds: of this model's LLM, of another one, or of the teacher."""

from typing import Any

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from modeling_proclip.identity import llm_config_values, module_sha256
from modeling_proclip.lean_checkpoint import text_model_sha256
from trainers.data import OnTheFlyStore, TextEmbeddingStore
from trainers.text_store.encoding import OF_TWO_TOWERS, tokenization_values
from trainers.text_store.fingerprint import check_fingerprint
from trainers.text_store.layout import warn_once


def check_made_by_llm(name: str, store: Any, model: ProCLIPModel, processor: Any = None) -> None:
    """
    Compare what made the embeddings of `store` with the LLM of `model`, which need not be loaded, and with `processor` if it is a
    [`ProCLIPProcessor`]. Warns once of what cannot be compared. A store that is none of ours may hold what it likes.

    Raises:
        ValueError: If the store was made by another LLM, with another template or another pooling, or by a text encoder of two towers;
            names what differs.
    """
    store = _files_of(store)
    if store is None:
        return
    there, name = store.fingerprint, f"{name} {store.path}"
    if there.get("pooling") == OF_TWO_TOWERS:
        raise ValueError(
            f"{name} was made by the text encoder {there.get('model')!r} and not by this model's LLM: it is a teacher_store. Give the store "
            "that `proclip embed` made with this model"
        )
    text_config = model.config.text_config if model.text_model is None else model.text_model.config
    here = {"config": llm_config_values(text_config), "pooling": model.config.text_pooling}
    if isinstance(processor, ProCLIPProcessor):
        here |= tokenization_values(model, processor)
    recorded = {there.get("weights_sha256"), there.get("text_model_sha256")}
    weights = model.config.text_model_sha256 if model.text_model is None else module_sha256(model.text_model)
    if weights is not None and weights not in recorded and model.text_model is not None:
        weights = text_model_sha256(
            model.config, model.text_model.state_dict()
        )  # loaded in another dtype than the store's
    if weights is None:
        warn_once(f"this model does not record the hash of its LLM: whether {name} was made by it cannot be checked")
    else:
        here["weights_sha256"] = there.get("weights_sha256") if weights in recorded else weights
    check_fingerprint(
        name,
        {field: there[field] for field in here if field in there},
        here,
        f"it was made by {there.get('model')!r}, and this model's LLM is {model.config.text_model_name_or_path!r}. Build it with this model, "
        "by `proclip embed`",
    )


def check_made_by_teacher(name: str, store: Any) -> None:
    """Raises ValueError if `store` holds embeddings of an LLM, which no image encoder was trained with."""
    store = _files_of(store)
    if store is not None and store.fingerprint.get("pooling") != OF_TWO_TOWERS:
        raise ValueError(
            f"{name} {store.path} was made by the LLM {store.fingerprint.get('model')!r} and not by a CLIP's text encoder: it is a text_store. "
            "Give the store that `proclip embed` made with the CLIP whose image encoder this model has"
        )


def _files_of(store: Any) -> TextEmbeddingStore | None:
    """The text store that was written to files and says what made it; None for another object with a `lookup`."""
    if isinstance(store, OnTheFlyStore):
        return store.store
    return store if isinstance(store, TextEmbeddingStore) else None
