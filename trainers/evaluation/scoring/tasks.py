"""The kinds of benchmark: what each needs embedded, and how its numbers come from the embeddings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from trainers.evaluation.data.manifest import Manifest
from trainers.evaluation.data.sources import OpenedData, class_names, read_captions, read_labels

from .metrics import mean_per_class_accuracy, retrieval_ranks, zero_shot_classifier, zero_shot_ranks
from .ranks import TIE, unit


@dataclass
class Outcome:
    """The numbers of one benchmark.

    Attributes:
        metrics: fractions by name.
        items: tensors of the outcome of every item, for confidence intervals.
        notes: what a reader must know, in sentences.
        details: what else goes into the results.
    """

    metrics: dict[str, float]
    items: dict[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Task:
    """One benchmark on one data set, before any model.

    Attributes:
        manifest: what it is.
        data: its rows.
        image_columns: columns of its images.
        texts: its texts.
        space: "shared", the texts' embeddings in the space of the images, or "text", those of the text encoder by itself (a ProCLIP's
            LLM before the adapter).
        identity: what else the data is, beside images and texts, for the fingerprint.
        facts: counts for the results.
        score: `(image_embeds, text_embeds)` of one model to the numbers: the images of the first column, then of the second, in rows' order, and
            the texts in theirs. None for CKA, which compares the encoders of two models: see comparison.py.
    """

    manifest: Manifest
    data: OpenedData
    image_columns: tuple[str, ...]
    texts: list[str] = field(default_factory=list)
    space: str = "shared"
    identity: list[Any] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    score: Callable[[torch.Tensor, torch.Tensor], Outcome] | None = None


def prepare_task(manifest: Manifest, data: OpenedData) -> Task:
    """Reads texts and labels of `data`. ValueError names benchmark and row if one is not what the manifest states."""
    return {
        "retrieval": _retrieval,
        "zero_shot": _zero_shot,
        "fine_grained": _fine_grained,
        "caption_retrieval": _caption_retrieval,
        "linear_probe": _linear_probe,
        "cka": _cka,
    }[manifest.kind](manifest, data)


def _retrieval(manifest: Manifest, data: OpenedData) -> Task:
    captions = _captions(manifest, data)
    text_to_image = torch.tensor([row for row, texts in enumerate(captions) for _ in texts])
    texts = [text for some in captions for text in some]

    def score(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> Outcome:
        image_ranks, text_ranks = retrieval_ranks(image_embeds, text_embeds, text_to_image)
        metrics = _recall({"i2t": image_ranks, "t2i": text_ranks})
        items = {"i2t_rank": image_ranks, "t2i_rank": text_ranks, "text_to_image": text_to_image}
        return Outcome(metrics, items, _notes_on_texts(texts))

    return Task(
        manifest,
        data,
        (manifest.columns["image"],),
        texts,
        score=score,
        identity=text_to_image.tolist(),
        facts={"num_captions": len(texts)},
    )


def _caption_retrieval(manifest: Manifest, data: OpenedData) -> Task:
    captions = _captions(manifest, data)
    for row, some in enumerate(captions):
        if len(some) < 2:
            raise ValueError(
                f"{data.row_name(row)}: caption-to-caption retrieval needs two captions, and there is only {some[0]!r:.80}"
            )
    firsts, seconds = [some[0] for some in captions], [some[1] for some in captions]

    def score(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> Outcome:
        first, second = text_embeds.split(len(captions))
        first_ranks, second_ranks = retrieval_ranks(first, second, torch.arange(len(captions)))
        metrics = _recall({"first_to_second": first_ranks, "second_to_first": second_ranks})
        items = {"i2t_rank": first_ranks, "t2i_rank": second_ranks, "text_to_image": torch.arange(len(captions))}
        return Outcome(metrics, items, _notes_on_texts(firsts + seconds))

    return Task(
        manifest, data, (), firsts + seconds, score=score, space="text", facts={"num_captions": 2 * len(captions)}
    )


def _zero_shot(manifest: Manifest, data: OpenedData) -> Task:
    names, labels = _classes_and_labels(manifest, data)
    templates = manifest.prompt_templates
    texts = [template.replace("{}", name) for name in names for template in templates]
    class_index = torch.arange(len(names)).repeat_interleave(len(templates))
    counts = torch.bincount(labels, minlength=len(names))
    absent = [names[i] for i in (counts == 0).nonzero().squeeze(1).tolist()]

    def score(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> Outcome:
        ranks, predictions = zero_shot_ranks(image_embeds, zero_shot_classifier(text_embeds, class_index), labels)
        correct = ranks == 0
        metrics = {
            "top1": int(correct.sum()) / len(labels),
            "top5": int((ranks < 5).sum()) / len(labels),
            "mean_per_class": mean_per_class_accuracy(correct, labels),
        }
        items = {"correct": correct.to(torch.uint8), "label": labels, "prediction": predictions}
        notes = []
        if absent:
            notes.append(
                f"{len(absent)} of {len(names)} classes have no images (such as {absent[0]!r}): they can be predicted, and mean_per_class "
                "is over the others."
            )
        same = len(names) - len(set(names))
        if same:
            notes.append(f"{same} class names are also another class's: their prompts tie, and a tie counts as wrong.")
        return Outcome(metrics, items, notes)

    return Task(
        manifest,
        data,
        (manifest.columns["image"],),
        texts,
        score=score,
        identity=[labels.tolist(), names],
        facts={
            "num_classes": len(names),
            "num_classes_without_images": len(absent),
            "classes": names,
            "num_prompts": len(templates),
            "prompts": templates,
        },
    )


def _fine_grained(manifest: Manifest, data: OpenedData) -> Task:
    columns, template = manifest.columns, manifest.prompt_templates[0]
    pairs = manifest.compares_pairs
    text_columns = ("caption_1", "caption_2") if pairs else ("caption", "negative")
    image_columns = ("image_1", "image_2") if pairs else ("image",)
    sides = []
    for name in text_columns:
        some = read_captions(data.rows[columns[name]], data.row_name)
        sides.append([template.replace("{}", texts[0]) for texts in some])
    categories = list(data.rows[columns["category"]]) if "category" in columns else None

    def score(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> Outcome:
        rows = len(sides[0])
        images = unit(image_embeds).split(rows)
        texts = unit(text_embeds).split(rows)
        scores = {(i, t): (image * text).sum(-1) for i, image in enumerate(images) for t, text in enumerate(texts)}
        if not pairs:
            right = {"accuracy": scores[0, 0] > scores[0, 1] + TIE}
        else:
            text_right = (scores[0, 0] > scores[1, 0] + TIE) & (scores[1, 1] > scores[0, 1] + TIE)
            image_right = (scores[0, 0] > scores[0, 1] + TIE) & (scores[1, 1] > scores[1, 0] + TIE)
            right = {"text_score": text_right, "image_score": image_right, "group_score": text_right & image_right}
        metrics = {name: int(hit.sum()) / rows for name, hit in right.items()}
        primary = right[manifest.primary_metric]
        items = {"correct": primary.to(torch.uint8)}
        if categories is not None:
            kinds = list(dict.fromkeys(map(str, categories)))
            place = torch.tensor([kinds.index(str(category)) for category in categories])
            items |= {"label": place}
            for i, kind in enumerate(kinds):
                metrics[f"{manifest.primary_metric}/{kind}"] = float(primary[place == i].double().mean())
            metrics["mean_over_categories"] = sum(
                metrics[f"{manifest.primary_metric}/{kind}"] for kind in kinds
            ) / len(kinds)
        return Outcome(metrics, items)

    return Task(
        manifest,
        data,
        tuple(columns[name] for name in image_columns),
        [text for side in sides for text in side],
        score=score,
        identity=[categories],
        facts={"prompts": [template]},
    )


def _linear_probe(manifest: Manifest, data: OpenedData) -> Task:
    names, labels = _classes_and_labels(manifest, data)
    train, test = labels[: data.num_train], labels[data.num_train :]

    def score(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> Outcome:
        from .linear_probe import linear_probe

        try:
            found = linear_probe(image_embeds[: len(train)], train, image_embeds[len(train) :], test)
        except ValueError as error:
            raise ValueError(f"benchmark {manifest.name}: {error}") from error
        predictions = torch.from_numpy(found.predictions)
        items = {"correct": (predictions == test).to(torch.uint8), "label": test, "prediction": predictions}
        notes = [
            f"Inverse regularisation {found.inverse_regularization:.3g}, chosen on training images that were held back."
        ]
        return Outcome({"accuracy": found.accuracy, "mean_per_class": found.mean_per_class}, items, notes)

    facts = {
        "num_classes": len(names),
        "num_train": len(train),
        "features": "image embeddings in the shared space, not normalised, divided by their root mean square",
    }
    return Task(
        manifest, data, (manifest.columns["image"],), score=score, identity=[labels.tolist(), names], facts=facts
    )


def _cka(manifest: Manifest, data: OpenedData) -> Task:
    facts = {"features": "mean over the tokens of each layer; the last is the image embedding"}
    return Task(manifest, data, (manifest.columns["image"],), facts=facts)


def _captions(manifest: Manifest, data: OpenedData) -> list[list[str]]:
    """Every row's captions, as many as the manifest states."""
    column = data.rows[manifest.columns["captions"]]
    captions = read_captions(column, data.row_name, manifest.caption_separator, manifest.max_captions)
    if len(captions) < 2:
        raise ValueError(f"benchmark {manifest.name}: one row alone is always found: retrieval needs at least 2")
    stated, found = manifest.data.num_captions, sum(map(len, captions))
    if stated is not None and data.limit is None and found != stated:
        raise ValueError(
            f"benchmark {manifest.name}: {data.source} has {found:,} captions where the manifest states {stated:,}: it is another version, "
            "or its captions are separated in another way"
        )
    return captions


def _classes_and_labels(manifest: Manifest, data: OpenedData) -> tuple[list[str], torch.Tensor]:
    """The classes' names, and the number of every row's class `(rows,)`."""
    where, classes = f"benchmark {manifest.name}", manifest.classes
    assert classes is not None  # the manifest was checked
    label_column = manifest.columns["label"]
    feature = data.rows.features[label_column]
    names = class_names(classes, data, feature, where)
    unedited = feature.names if getattr(feature, "names", None) else None
    return names, torch.tensor(read_labels(data.rows[label_column], names, unedited, data.row_name))


def _recall(ranks: dict[str, torch.Tensor]) -> dict[str, float]:
    metrics = {f"{way}_r@{k}": int((of < k).sum()) / len(of) for k in (1, 5, 10) for way, of in ranks.items()}
    first, second = (metrics[f"{way}_r@1"] for way in ranks)
    return {"mean_r@1": (first + second) / 2, **metrics}


def _notes_on_texts(texts: list[str]) -> list[str]:
    repeated = len(texts) - len(set(texts))
    if not repeated:
        return []
    return [
        f"{repeated} captions are word for word another one: of two images with the same caption, each counts the other's as before its own."
    ]
