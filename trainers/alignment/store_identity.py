"""Whose embeddings a store holds: of this model's LLM, of another one, or of the teacher."""

from typing import Any

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from modeling_proclip.identity import differences, llm_config_values, state_sha256
from modeling_proclip.lean_checkpoint import text_model_sha256
from modeling_proclip.pretrained_towers import lasting_name
from trainers.data import OnTheFlyStore, TextEmbeddingStore
from trainers.text_store.encoding import OF_TWO_TOWERS, tokenization_values
from trainers.text_store.fingerprint import check_fingerprint
from trainers.text_store.layout import warn_once


# What every stage must have in common. The length at which texts are cut may differ, as it changes long texts only.
_RECORDED = ("pooling", "prompt_template", "instruction")


def check_made_by_llm(name: str, store: Any, model: ProCLIPModel, processor: Any = None) -> None:
    """Compare what made the embeddings of `store` with the LLM of `model`, which need not be loaded, and with `processor` if it is a
    [`ProCLIPProcessor`]. Warns once of what cannot be compared. A store that is none of ours may hold what it likes.

    Raises:
        ValueError: If the store was made by another LLM, with another template or another pooling, or by a text encoder of two towers.
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
    in_memory = {} if model.text_model is None else model.text_model.state_dict()
    if any(tensor.device.type == "meta" for tensor in in_memory.values()):
        in_memory = {}  # offloaded to disk, as it was loaded
    text_config = model.config.text_config if model.text_model is None else model.text_model.config
    here = {"config": llm_config_values(text_config), "pooling": model.config.text_pooling}
    if isinstance(processor, ProCLIPProcessor):
        here |= tokenization_values(model, processor)
    recorded = {there.get("weights_sha256"), there.get("text_model_sha256")}
    weights = state_sha256(in_memory) if in_memory else model.config.text_model_sha256
    if in_memory and weights not in recorded:  # the store's may have been loaded in another dtype
        weights = text_model_sha256(model.config, in_memory)
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
    for record in model.config.training or []:
        earlier = record.get("text_encoder", {})
        changes = list(differences({key: there[key] for key in earlier if key in there}, earlier))
        if changes:
            raise ValueError(
                f"{name} was made in another way than the store that this model was trained with before ({record['stage']}): "
                f"{'; '.join(changes)}. The text adapter would read embeddings that it does not know"
            )


def text_encoder_of(store: Any) -> dict[str, Any] | None:
    """What a training records of how its texts were embedded, for the stages after it; None for a store that does not say."""
    store = _files_of(store)
    return None if store is None else {key: store.fingerprint[key] for key in _RECORDED if key in store.fingerprint}


def check_made_by_teacher(name: str, store: Any, model: ProCLIPModel) -> None:
    """Raises ValueError if `store` holds embeddings of an LLM, which no image encoder was trained with. Warns if it was made by a CLIP of
    another name than the image encoder's.
    """
    store = _files_of(store)
    if store is None:
        return
    teacher, vision = store.fingerprint.get("model"), model.config.vision_model_name_or_path
    if store.fingerprint.get("pooling") != OF_TWO_TOWERS:
        raise ValueError(
            f"{name} {store.path} was made by the LLM {teacher!r} and not by a CLIP's text encoder: it is a text_store. Give the store that "
            "`proclip embed` made with the CLIP whose image encoder this model has"
        )
    if teacher is not None and vision is not None and lasting_name(teacher) != lasting_name(vision):
        warn_once(
            f"{name} {store.path} was made by {teacher!r}, and this model's image encoder is from {vision!r}: texts and images share a space "
            "only if these are the same CLIP"
        )


def _files_of(store: Any) -> TextEmbeddingStore | None:
    """The text store that was written to files and says what made it; None for another object with a `lookup`."""
    if isinstance(store, OnTheFlyStore):
        return store.store
    return store if isinstance(store, TextEmbeddingStore) else None
