"""The card of PEFT adapters on a ProCLIP model, in place of the empty form that PEFT writes."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from modeling_proclip.conversion.json_files import read_json

from .checkpoint_facts import is_hub_name, read_header, read_training, shown_name
from .citations import citations
from .measurements import model_index, not_measured, read_measurements
from .model import PLACEHOLDER, UNKNOWN, rows_of_tasks
from .rendering import Markdown, render
from .scrubbing import scrub


ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINING_FILE = "adapter_config.json", "adapter_model.safetensors", "training.json"


def adapter_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    results: Iterable[str | Path] = (),
    license: str = UNKNOWN,
    languages: Sequence[str] = (),
    datasets: Sequence[str] = (),
    limits: Sequence[str] = (),
) -> ModelCard:
    """Render the card of adapters that `ProCLIPPeftModel.save_pretrained` wrote, from their configuration, their tensors' headers and the record
    of their training.

    Args:
        folder: Folder of the adapters.
        repo_id: Name on the Hub that the card's snippets load them by; by default they name a folder.
        base_model: Name on the Hub of the checkpoint that they are for, where `adapter_config.json` names a folder.
        results: Results of an evaluation of the base with these adapters, as `proclip evaluate` wrote them.
        license, languages, datasets, limits: As for [`model_card`]; data sets by name.

    Raises:
        ValueError: If the folder holds no adapters, or the Hub would refuse the metadata.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no PEFT adapters: it needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    config = read_json(folder / ADAPTER_CONFIG)
    base = base_model or config.get("base_model_name_or_path")
    header = read_header(folder / ADAPTER_WEIGHTS)
    measured = [result for file in results for result in read_measurements(file)]
    record = folder / TRAINING_FILE
    training = read_training(read_json(record, list), record) if record.is_file() else []
    name, title = repo_id or PLACEHOLDER, (repo_id or folder.resolve().name).split("/")[-1]
    data = ModelCardData(
        model_name=title,
        library_name="peft",
        pipeline_tag="zero-shot-image-classification",
        license=license,
        language=list(languages) or None,
        base_model=base if base and is_hub_name(base) else None,
        datasets=[dataset for dataset in datasets if is_hub_name(dataset)] or None,
        tags=["proclip", "clip", config["peft_type"].lower()],
        eval_results=model_index(measured) or None,
    )
    return render(
        ModelCard,
        "adapter_card.md",
        data,
        name=name,
        title=title,
        base=None if base is None else shown_name(base),
        base_to_load=base if base and is_hub_name(base) else "path/of/its/base",
        config=config,
        towers=[
            title
            for tower, title in (("vision_model", "image encoder"), ("text_model", "LLM"))
            if any(f".{tower}." in tensor for tensor in header)
        ],
        num_parameters=sum(math.prod(tensor["shape"]) for tensor in header.values()),
        num_bytes=(folder / ADAPTER_WEIGHTS).stat().st_size,
        logit_scale=any(tensor.endswith(".logit_scale") for tensor in header),
        training=training,
        license=license,
        tasks=rows_of_tasks(measured),
        weights_checked=False,
        not_measured=not_measured(measured),
        datasets=scrub(list(datasets)),
        limits=[Markdown(" ".join(limit.split())) for limit in limits],
        citations=citations(training),
    )
