"""Cards rendered from what a run measured: a card states no number that its results do not hold."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .measurements import precision
from .rendering import render


# The quickstart's LLMs: title, base model on the Hub, licence of the whole checkpoint. The drawings' licence covers the image encoder, which
# learned from nothing else; Gemma's terms bind as well.
_SMOLLM2: tuple[str, str, dict[str, Any]] = (
    "SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    {"license": "cc-by-sa-4.0"},
)
_GEMMA3_LICENSE: dict[str, Any] = {
    "license": "other",
    "license_name": "cc-by-sa-4.0-and-gemma",
    "license_link": "https://ai.google.dev/gemma/terms",
}
_LANGUAGE_MODELS = {
    "plain": _SMOLLM2,
    "tuned": _SMOLLM2,
    "gemma3": ("Gemma 3 270M", "google/gemma-3-270m", _GEMMA3_LICENSE),
}
METRICS = {
    "zero_shot_seen": ("zero-shot-image-classification", "accuracy", "Top-1, concepts with pictures in the alignment"),
    "zero_shot_unseen": (
        "zero-shot-image-classification",
        "accuracy",
        "Top-1, concepts without pictures in the alignment",
    ),
    "i2t_r@1": ("image-to-text", "recall", "Image-to-text R@1"),
    "t2i_r@1": ("image-to-text", "recall", "Text-to-image R@1"),
}


def quickstart_card(results: Mapping[str, Any]) -> ModelCard:
    """The card of the quickstart's checkpoint.

    Args:
        results: Content of `results.json`; the numbers of the card are those of its rows.

    Returns:
        `ModelCard` whose metadata the Hub accepts, with the results as `model-index`.

    Raises:
        ValueError: If the results have no row of ProCLIP or of the teacher.
    """
    rows = {row["model"]: row for row in results["rows"]}
    if missing := {"clip", "proclip"} - set(rows):
        raise ValueError(f"the results have no row {sorted(missing)[0]!r}")
    evaluations = [
        EvalResult(
            task_type=task,
            dataset_type="openmoji",
            dataset_name=f"OpenMoji pictures, {results['num_concepts']} concepts",
            metric_type=metric,
            metric_name=title,
            metric_value=round(rows["proclip"][key], 4),
        )
        for key, (task, metric, title) in METRICS.items()
    ]
    llm = results.get("llm", "plain")
    llm_title, base_model, license = _LANGUAGE_MODELS[llm]
    metadata = ModelCardData(
        model_name="ProCLIP OpenMoji",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        **license,
        language=["en"],
        base_model=[base_model],
        tags=["proclip", "llm2clip", "clip", "openmoji"],
        eval_results=evaluations,
    )
    return render(
        ModelCard,
        "quickstart_card.md",
        metadata,
        rows=results["rows"],
        num_concepts=results["num_concepts"],
        num_seen=results["num_seen"],
        num_language_concepts=results["num_language_concepts"],
        seed=results["seed"],
        size=results["size"],
        precision=precision(results.get("protocol") or {}),
        llm=llm,
        llm_title=llm_title,
    )
