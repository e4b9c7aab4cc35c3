"""The card of a text store, for those who share one as a data set."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from .checkpoint_facts import shown_name
from .citations import CITATIONS
from .rendering import Markdown, render
from .scrubbing import scrub


# The Hub's names of sizes, and the number of rows that each ends before.
_SIZES = {
    "n<1K": 10**3,
    "1K<n<10K": 10**4,
    "10K<n<100K": 10**5,
    "100K<n<1M": 10**6,
    "1M<n<10M": 10**7,
    "10M<n<100M": 10**8,
    "100M<n<1B": 10**9,
}


def text_store_card(
    store: Any,
    *,
    repo_id: str | None = None,
    texts: str | None = None,
    license: str = "unknown",
    languages: Sequence[str] = (),
) -> DatasetCard:
    """Render the card of a text store from its files: how many embeddings, of what size, by which LLM, template and pooling.

    Args:
        store: A `TextEmbeddingStore`.
        repo_id: Name on the Hub that the card's snippet downloads it by; by default the snippet names a folder.
        texts: Where the texts came from, in words or as a name on the Hub. The store does not know.
        license: Licence of the embeddings, one of the Hub's identifiers: as a rule that of the texts.
        languages: ISO 639 codes of the texts' languages.

    Raises:
        ValueError: If the licence or a language code is none of the Hub's.
    """
    data = DatasetCardData(
        pretty_name=repo_id.split("/")[-1] if repo_id else store.path.name,
        license=license,
        language=list(languages) or None,
        size_categories=next((name for name, end in _SIZES.items() if len(store) < end), "n>1T"),
        task_categories=["feature-extraction"],
        tags=["proclip", "text-embeddings", "safetensors"],
    )
    model = store.fingerprint["model"]
    return render(
        DatasetCard,
        "text_store_card.md",
        data,
        title=data.pretty_name,
        license=license,
        store=store,
        repo_id=repo_id,
        num_texts=len(store),
        dtype=str(store.dtype).removeprefix("torch."),
        model="unknown" if model is None else shown_name(model),
        fingerprint=store.fingerprint,
        texts=None if texts is None else scrub(texts),
        citation=Markdown(CITATIONS["proclip"]),
    )
