"""The card of a converted checkpoint."""

from collections.abc import Mapping, Sequence

from huggingface_hub import ModelCard, ModelCardData

from .rendering import render


def converted_card(source: str, facts: Mapping[str, str], notes: Sequence[str]) -> ModelCard:
    """The card that `proclip convert` writes. It names no licence and no result: those are the source's to state.

    Args:
        source: Name of the file or folder that was converted.
        facts: What was found in it, by name.
        notes: Remarks for the user.
    """
    metadata = ModelCardData(library_name="transformers", tags=["proclip", "llm2clip", "clip"])
    return render(
        ModelCard,
        "converted_card.md",
        metadata,
        source=source,
        facts=dict(facts),
        notes=list(notes),
        is_llm="LLM" in facts and "tower" not in facts,
        named_llm="LLM" in facts,
    )
