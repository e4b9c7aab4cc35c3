"""The card of any ProCLIP checkpoint, from what its folder and its results hold."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging

from .checkpoint_facts import base_card, is_hub_name, is_repo_id, own_weights, read_facts, shown_name
from .citations import citations
from .measurements import (
    RESULTS_FILE,
    Measurement,
    evaluated_weights,
    model_index,
    not_measured,
    read_measurements,
    shown_source,
)
from .rendering import Markdown, render, signed
from .scrubbing import scrub
from .validity import is_language, listed


logger = logging.get_logger(__name__)

UNKNOWN = "unknown"
PLACEHOLDER = "path/of/this/folder"  # what cards call a checkpoint that has no name yet
_TOWERS = {"vision": "image encoder", "text": "LLM"}


def model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    results: Iterable[str | Path] | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_models: Mapping[str, str] | None = None,
    base_licenses: Mapping[str, str] | None = None,
    languages: Sequence[str] | None = None,
    datasets: Mapping[str, str | None] | None = None,
    limits: Sequence[str] = (),
    remote_code: bool | None = None,
    weights_in: str | Path | None = None,
    title: str | None = None,
) -> ModelCard:
    """Render the card of a checkpoint from its state on the disk: configuration, tensors' headers, the record of its training, results.

    It states no number that these do not hold, and says of what is not known that it is not known.

    Args:
        folder: The checkpoint.
        repo_id: Name on the Hub that the card's snippets load it by; by default they name a folder.
        results: Results of its evaluation, files or folders as `proclip evaluate` and `proclip quickstart` write them. By default every
            `results.json` in the folder or directly in a sub-folder that is of these weights.
        license, license_name, license_link: Licence of the checkpoint; "unknown" by default.
        base_models: Names on the Hub of what the towers come from, under "vision" and "text", where the checkpoint names folders or
            nothing.
        base_licenses: Licences of the towers, under "vision" and "text". By default those that the cards of the base models name, as far as
            they are in their folders or in the Hub's local cache.
        languages: ISO 639 codes of the languages that the model is for. By default those that the LLM's card names.
        datasets: What it was trained on: names, on the Hub where they are there, and the licence of each or None if it is not known. Beside
            those that the trainers recorded.
        limits: Sentences to add to the card's limits.
        remote_code: Whether the snippets load it with `trust_remote_code=True` and without this package. By default as the checkpoint's
            `auto_map` says; publishing adds one.
        title: Title of the card; by default the name of the repository or folder.
        weights_in: Folder of the weights that results are held against, if not `folder`: publishing lays out another state of them.

    Returns:
        `ModelCard` whose metadata [`check_card`] accepts. Nothing is written. One that holds nothing but what the checkpoint says is signed
        by a comment at its end, so that publishing can render it anew, with later results and the name on the Hub.

    Raises:
        ValueError: If the folder holds no ProCLIP checkpoint, a result names other weights, a licence or language code is none of the
            Hub's, or a key is unknown.
        FileNotFoundError: If a result is missing.
    """
    checkpoint = read_facts(folder)
    remote_code = "auto_map" in checkpoint.config if remote_code is None else remote_code
    for name, given in (("base_models", base_models), ("base_licenses", base_licenses)):
        if unknown := set(given or {}) - set(_TOWERS):
            raise ValueError(f"{name} has no key {sorted(unknown)[0]!r}; the keys are {', '.join(_TOWERS)}")
    weights_in, given_results, given_languages = weights_in or folder, results, languages
    results = results_in(weights_in) if results is None else _checked(results, weights_in)
    measured = [result for file in results for result in read_measurements(file)]
    named = {**checkpoint.base_models, **(base_models or {})}
    bases = {tower: named[tower] for tower in _TOWERS if tower in named}
    base_cards = {
        tower: base_card(name, checkpoint.config.get(f"{tower}_model_revision")) for tower, name in bases.items()
    }
    recorded = [stage.data for stage in checkpoint.training if stage.data]
    trained_on = {**{shown_source(data): None for data in recorded}, **scrub(dict(datasets or {}))}
    from_hub = [data["source"] for data in recorded if data.get("revision") or data.get("on_hub")]
    on_hub = {*filter(is_repo_id, from_hub), *filter(is_hub_name, datasets or {})}
    if languages is None:
        languages = [code for code in listed(base_cards.get("text", {}).get("language")) if is_language(code)]
    name = repo_id or PLACEHOLDER
    title = title or (repo_id or Path(folder).resolve().name).split("/")[-1]
    data = ModelCardData(
        model_name=title,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        license=license or UNKNOWN,
        license_name=license_name,
        license_link=license_link,
        language=list(languages) or None,
        base_model=[name for name in bases.values() if is_hub_name(name)] or None,
        datasets=sorted(on_hub) or None,
        tags=["proclip", "clip", "image-text-retrieval", "feature-extraction", "sentence-transformers"],
        eval_results=model_index(measured) or None,
    )
    card = render(
        ModelCard,
        "model_card.md",
        data,
        name=name,
        title=title,
        checkpoint=checkpoint,
        config=checkpoint.config,
        training=checkpoint.training,
        towers=[
            {
                "title": title,
                "base": shown_name(bases[tower]) if tower in bases else None,
                "license": (base_licenses or {}).get(tower) or _license_of(base_cards.get(tower, {})),
            }
            for tower, title in _TOWERS.items()
        ],
        remote_code=remote_code,
        trust=Markdown(", trust_remote_code=True" if remote_code else ""),
        loads_text=checkpoint.loads_text,
        checkpoint_license=license_name or license or UNKNOWN,
        datasets={name: licence or UNKNOWN for name, licence in trained_on.items()},
        languages=list(languages),
        tasks=rows_of_tasks(measured),
        weights_checked=all(evaluated_weights(file) is not None for file in results),
        not_measured=not_measured(measured),
        limits=[Markdown(" ".join(limit.split())) for limit in limits],
        citations=citations(checkpoint.training, checkpoint.config["vision_config"]["model_type"]),
    )
    added = (
        license,
        license_name,
        license_link,
        base_models,
        base_licenses,
        given_languages,
        datasets,
        given_results,
        limits,
    )
    return card if any(added) else ModelCard(signed(card.content))


def results_in(folder: str | Path) -> list[Path]:
    """Every `results.json` in a checkpoint's folder or directly in a sub-folder that is ours, and not of other weights than the folder holds."""
    files = [
        file
        for file in sorted(Path(folder).glob(RESULTS_FILE)) + sorted(Path(folder).glob(f"*/{RESULTS_FILE}"))
        if _is_ours(file)
    ]
    others = _with_other_weights(files, folder)
    return [file for file in files if file not in others]


def _is_ours(file: Path) -> bool:
    try:
        return bool(read_measurements(file))
    except ValueError as error:
        logger.warning(f"The card does not show {file}: {error}")
        return False


def _checked(results: Iterable[str | Path], folder: str | Path) -> list[str | Path]:
    files = list(results)
    for file in _with_other_weights(files, folder):
        raise ValueError(
            f"{file} is of other weights than {folder} holds: evaluate this checkpoint, or name its own results"
        )
    return files


def _with_other_weights(files: Iterable[Any], folder: str | Path) -> list[Any]:
    """Those of the results that name other weights than the checkpoint's."""
    named = {file: weights for file in files if (weights := evaluated_weights(file)) is not None}
    ours = own_weights(folder) if named else set()
    return [file for file, weights in named.items() if weights not in ours]


def _license_of(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("license_name") or ", ".join(listed(metadata.get("license"))) or UNKNOWN)


def rows_of_tasks(results: Iterable[Measurement]) -> list[dict[str, Any]]:
    """For the table of results, one row a task: its data and its numbers, the primary one first."""
    tasks: dict[tuple[str, str], dict[str, Any]] = {}
    for result in sorted(results, key=lambda result: not result.primary):
        row = tasks.setdefault(
            (result.task, result.dataset),
            {
                "task": result.task,
                "dataset": result.dataset,
                "split": result.split,
                "num_items": result.num_items,
                "limit": result.limit,
                "precision": result.precision,
                "values": [],
            },
        )
        row["values"].append((result.metric, result.value))
    return list(tasks.values())
