"""What a tuned model kept of the CLIP that it came from, in words that follow from intervals by written rules.

The rules, for the difference "model minus baseline" of a score, with its interval [low, high] and a margin (1 point unless told otherwise):

    low > 0           gained      better than the baseline beyond chance
    low >= -margin    kept        if anything was lost, it is less than the margin
    high < 0          lost        worse than the baseline beyond chance
    otherwise         undecided   the data allow both a loss beyond the margin and none

They are tried in this order. Fewer than 30 items decide nothing. Averages are plain means over tasks, resampled as the tasks are: tasks on the
same images together, others independently. The intervals of all tasks hold together with the stated confidence, and so do those of all
averages (Bonferroni), so that one of twenty tasks is not "lost" by luck. In words, ends are rounded outwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .bootstrap import RESAMPLES, Interval, Outcomes, interval, resample, score_interval


MARGIN = 0.01
CONFIDENCE = 0.95
MIN_ITEMS = 30
A_LITTLE = 0.1  # of the baseline's score

# What is averaged together, and how it is called. The first answers the question; a group that is not here is an area of its own.
AREAS = {
    "classification": "zero-shot classification",
    "robustness": "zero-shot classification",
    "retrieval": "retrieval",
    "long_retrieval": "retrieval",
    "multilingual": "languages",
    "linear_probe": "linear probe",
    "fine_grained": "fine-grained understanding",
    "caption_retrieval": "caption-to-caption retrieval",
}
KNOWLEDGE, PROBE = "zero-shot classification", "linear probe"


@dataclass(frozen=True)
class Task:
    """One score of both models on the same items.

    Attributes:
        name: name of the task, such as "flickr30k".
        metric: name of the score, such as "i2t_r@1".
        group: as in results.json: "classification", "robustness", "retrieval" and so on.
        model, baseline: outcomes of the same items in the same order.
        dataset: what tells data sets apart; tasks with the same one and as many items are resampled together.
    """

    name: str
    metric: str
    group: str
    model: Outcomes
    baseline: Outcomes
    dataset: str


@dataclass(frozen=True)
class Change:
    """What became of one score, or of an average. All numbers are fractions.

    Attributes:
        name, metric, group: those of the task; for an average the area's name, "average" and the area's name.
        model, baseline: the scores, each with its own interval.
        difference: model minus baseline, with its paired interval, which holds together with the others'.
        decision: "gained", "kept", "lost" or "undecided".
        num_items: images behind it (of an average: the fewest of its tasks).
    """

    name: str
    metric: str
    group: str
    model: Interval
    baseline: Interval
    difference: Interval
    decision: str
    num_items: int


@dataclass(frozen=True)
class Verdict:
    """The answer, and what it follows from.

    Attributes:
        answer: "yes", "a little", "no", "partly", "undecided" or "not measured": is CLIP's zero-shot knowledge broken?
        headline: the answer in a sentence.
        sentences: what else the intervals say: the tasks that lost, retrieval, the linear probe.
        averages: one a area, zero-shot classification first.
        tasks: in the order given.
    """

    answer: str
    headline: str
    sentences: list[str]
    averages: list[Change]
    tasks: list[Change]


def area_of(group: str) -> str:
    """The area in which the tasks of `group` are averaged."""
    return AREAS.get(group, group.replace("_", " "))


def decide(difference: Interval, num_items: int, margin: float = MARGIN) -> str:
    """ "gained", "kept", "lost" or "undecided", by the rules at the top of this file."""
    if num_items < MIN_ITEMS:
        return "undecided"
    if difference.low > 0:
        return "gained"
    if difference.low >= -margin:
        return "kept"
    return "lost" if difference.high < 0 else "undecided"


def describe(change: Change, margin: float = MARGIN) -> str:
    """A decision in words, such as "lost 3.1 to 5.4 of 74.5 points", with the ends of the interval rounded outwards to a tenth of a point."""
    low, high = floor_points(change.difference.low), ceil_points(change.difference.high)
    if change.num_items < MIN_ITEMS:
        return f"not decided: {change.num_items} items are too few"
    if change.decision == "gained":
        return f"gained {low:.1f} to {high:.1f} points"
    if change.decision == "kept":
        # Rounded outwards, -0.97 would be "1.0 points lost at most", which is no less than the margin.
        return f"kept: {min(max(0.0, -low), 100 * margin):.1f} points lost at most"
    if change.decision == "lost":
        return f"lost {max(0.0, -high):.1f} to {-low:.1f} of {100 * change.baseline.value:.1f} points"
    return f"not decided by this data: between {-low:.1f} points lost and {max(0.0, high):.1f} gained"


def floor_points(fraction: float) -> float:
    """Points of a fraction, rounded down to a tenth; 1e-9 is rounding of the floats themselves."""
    return math.floor(1000 * fraction + 1e-9) / 10


def ceil_points(fraction: float) -> float:
    """Points of a fraction, rounded up to a tenth."""
    return math.ceil(1000 * fraction - 1e-9) / 10


def compare(
    tasks: Sequence[Task],
    margin: float = MARGIN,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Verdict:
    """Compares a model with its baseline over all tasks, at least one.

    Args:
        margin: the largest loss that counts as kept, a fraction of 1: 0.01 is one point.
        confidence: of all tasks' intervals together, and of all averages' together.
        resamples, seed: settings of the bootstrap.

    Raises:
        ValueError: no tasks, a task twice, a margin below 0, or models that were scored on different items.
    """
    if not tasks:
        raise ValueError("there is no task that both models were scored on, so there is nothing to compare.")
    if margin < 0:
        raise ValueError(f"margin must be 0 or more, but is {margin}.")
    names = [(task.name, task.metric) for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"task {twice[0][0]!r} has the metric {twice[0][1]!r} twice.")
    model, baseline = _resample_all(tasks, resamples, seed)
    per_task = 1 - (1 - confidence) / len(tasks)
    changes = [
        _change(
            (task.name, task.metric, task.group),
            score_interval(task.model, confidence, resamples, seed),
            score_interval(task.baseline, confidence, resamples, seed),
            model[:, i] - baseline[:, i],
            per_task,
            len(task.model),
            margin,
        )
        for i, task in enumerate(tasks)
    ]
    areas = [area_of(task.group) for task in tasks]
    ordered = sorted(dict.fromkeys(areas), key=[*dict.fromkeys(AREAS.values()), *areas].index)
    averages = []
    for area in ordered:
        members = [i for i, other in enumerate(areas) if other == area]
        own, others = model[:, members].mean(1), baseline[:, members].mean(1)
        fewest = min(len(tasks[i].model) for i in members)
        averages.append(
            _change(
                (area, "average", area),
                interval(_mean([tasks[i].model for i in members]), own, fewest, confidence).clipped(),
                interval(_mean([tasks[i].baseline for i in members]), others, fewest, confidence).clipped(),
                own - others,
                1 - (1 - confidence) / len(ordered),
                fewest,
                margin,
            )
        )
    by_area = {average.name: average for average in averages}
    members_of = {area: [change for change, other in zip(changes, areas) if other == area] for area in ordered}
    answer, headline = _answer(by_area.get(KNOWLEDGE), members_of.get(KNOWLEDGE, []), margin)
    return Verdict(answer, headline, _sentences(by_area, members_of, margin), averages, changes)


def _answer(average: Change | None, tasks: list[Change], margin: float) -> tuple[str, str]:
    """The answer to "did I break CLIP?" and its sentence, from the average over zero-shot tasks and from each of them."""
    if average is None:
        return (
            "not measured",
            "Zero-shot classification was not measured, so whether CLIP's knowledge is kept is not known.",
        )
    lost = sum(change.decision == "lost" for change in tasks)
    on_average = describe(average, margin)
    of = f"{lost} of {len(tasks)} zero-shot tasks"
    if average.decision == "lost":
        if average.difference.low > -A_LITTLE * average.baseline.value:
            return "a little", f"A little. Zero-shot classification {on_average}{_mean_of(tasks)}."
        return "yes", f"Yes. Zero-shot classification {on_average}{_mean_of(tasks)}."
    if average.decision == "undecided":
        if lost:
            return "partly", f"In part. {_sentence(of)} lost; their average is {on_average}."
        return "undecided", f"Undecided. Zero-shot classification is {on_average}{_mean_of(tasks)}."
    if lost:
        return "partly", f"In part. Zero-shot classification {on_average}{_mean_of(tasks)}, but {of} lost."
    return "no", f"No. Zero-shot classification {on_average}{_mean_of(tasks)}."


def _sentences(by_area: dict[str, Change], members: dict[str, list[Change]], margin: float) -> list[str]:
    sentences = []
    knowledge = by_area.get(KNOWLEDGE)
    for area, average in by_area.items():
        tasks = members[area]
        if area != KNOWLEDGE:
            sentences.append(f"{_sentence(area)}: {describe(average, margin)}{_mean_of(tasks)}.")
        if len(tasks) > 1:
            worst = min(tasks, key=lambda change: change.difference.value)
            if worst.decision == "lost":
                sentences.append(
                    f"The largest loss of {area} is in {worst.name} ({worst.metric}): {describe(worst, margin)}."
                )
            undecided = sum(change.decision == "undecided" for change in tasks)
            if undecided:
                sentences.append(
                    f"{undecided} of {len(tasks)} scores of {area} are not decided by this data, taken by themselves."
                )
    probe = by_area.get(PROBE)
    if knowledge is not None and probe is not None and knowledge.decision == "lost":
        if probe.decision in ("kept", "gained"):
            sentences.append(
                "A linear probe still finds the classes in the image encoder's features: what was lost is on the text side, "
                "or in how the two sides meet."
            )
        elif probe.decision == "lost":
            sentences.append("The linear probe lost too: part of the loss is in the image encoder itself.")
    return sentences


def _resample_all(tasks: Sequence[Task], resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Resampled scores of the model and of the baseline, `(resamples, num_tasks)` each."""
    groups: dict[tuple, list[int]] = {}
    for i, task in enumerate(tasks):
        if len(task.model) != len(task.baseline):
            raise ValueError(
                f"task {task.name!r} has {len(task.model)} items for the model and {len(task.baseline)} for the baseline: "
                "evaluate both on the same data."
            )
        strata = None if task.model.strata is None else task.model.strata.tobytes()
        groups.setdefault((task.dataset, len(task.model), strata), []).append(i)
    model, baseline = np.empty((resamples, len(tasks))), np.empty((resamples, len(tasks)))
    for number, members in enumerate(groups.values()):
        outcomes = [side for i in members for side in (tasks[i].model, tasks[i].baseline)]
        # A stream of its own: data sets with the same stream would be resampled alike, and so not independently.
        scores = resample(outcomes, resamples, seed=[seed, number])
        model[:, members], baseline[:, members] = scores[:, 0::2], scores[:, 1::2]
    return model, baseline


def _change(
    names: tuple[str, str, str],
    model: Interval,
    baseline: Interval,
    differences: np.ndarray,
    confidence: float,
    num_items: int,
    margin: float,
) -> Change:
    difference = interval(model.value - baseline.value, differences, num_items, confidence)
    return Change(*names, model, baseline, difference, decide(difference, num_items, margin), num_items)


def _mean(outcomes: Sequence[Outcomes]) -> float:
    return float(np.mean([some.value for some in outcomes]))


def _mean_of(tasks: list[Change]) -> str:
    return f" on average over {len(tasks)} scores" if len(tasks) > 1 else ""


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]
