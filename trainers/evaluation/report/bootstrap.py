"""Bootstrap confidence intervals of hit rates, and of the difference of two models that were scored on the same items.

An item is an image with everything that belongs to it: in retrieval all its captions go with it, because they are no independent draws
(a cluster bootstrap). Every resample draws as many items as there are, with replacement; both models, and all tasks that share the
images, see the same resample, so that what is hard for both cancels in the difference (a paired bootstrap). A mean over classes is resampled
within each class: its interval speaks of other images of the same classes, and no class is ever empty.

Items with the same outcome are interchangeable, so a resample is one draw from a multinomial distribution over the distinct
outcomes instead of a draw of every item. That is exactly the same distribution, and a million images that two models get
right or wrong take as long as four.

Efron and Tibshirani, An Introduction to the Bootstrap, 1993: chapters 8 (clusters, strata) and 13 (percentile interval).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


RESAMPLES = 20_000
# Counts drawn at once: 64 MB.
_BLOCK = 8_000_000


@dataclass(frozen=True)
class Outcomes:
    """How one model did in one task, item by item.

    The score is the sum of `hits` over the sum of `trials`; with `strata` it is the mean of that over the strata.

    Attributes:
        hits: `(num_items,)` whole numbers, in how many of its trials an item was right.
        trials: `(num_items,)` whole numbers, at least 1: 1 where an image is classified, the number of captions in text-to-image retrieval.
        strata: `(num_items,)` whole numbers, the class of each item, for a mean over classes; otherwise `None`.
    """

    hits: np.ndarray
    trials: np.ndarray
    strata: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("hits", "trials", "strata"):
            values = getattr(self, name)
            if values is None:
                continue
            values = np.asarray(values)
            if values.ndim != 1 or len(values) == 0 or values.dtype.kind not in "iub":
                raise ValueError(
                    f"{name} must be one whole number an item and at least one, but has shape {values.shape} and dtype {values.dtype}."
                )
            object.__setattr__(self, name, values.astype(np.int64))
        lengths = {len(values) for values in (self.hits, self.trials, self.strata) if values is not None}
        if len(lengths) > 1:
            raise ValueError(f"hits, trials and strata must be of the same items, but have {sorted(lengths)} rows.")
        if (self.trials < 1).any() or (self.hits < 0).any() or (self.hits > self.trials).any():
            wrong = (self.trials < 1) | (self.hits < 0) | (self.hits > self.trials)
            raise ValueError(
                f"item {int(wrong.argmax())} has no trial, or hits that are not between 0 and its trials."
            )

    def __len__(self) -> int:
        return len(self.hits)

    @property
    def value(self) -> float:
        """The score, a fraction."""
        if self.strata is None:
            return float(self.hits.sum() / self.trials.sum())
        _, strata = np.unique(self.strata, return_inverse=True)
        return float(np.mean(np.bincount(strata, self.hits) / np.bincount(strata, self.trials)))


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its confidence interval, all fractions (of 1, not percent)."""

    value: float
    low: float
    high: float

    def clipped(self) -> "Interval":
        """The same with ends between 0 and 1."""
        return Interval(self.value, max(self.low, 0.0), min(self.high, 1.0))


def accuracy_outcomes(correct: np.ndarray) -> Outcomes:
    """Outcomes whose score is the accuracy. `correct`: `(num_items,)` 0 or 1."""
    correct = np.asarray(correct)
    return Outcomes(correct, np.ones(len(correct), np.int64))


def mean_per_class_outcomes(correct: np.ndarray, labels: np.ndarray) -> Outcomes:
    """Outcomes whose score is the mean of the classes' accuracies. `correct`, `labels`: `(num_items,)`; classes without items do not count."""
    correct = np.asarray(correct)
    return Outcomes(correct, np.ones(len(correct), np.int64), np.asarray(labels))


def image_to_text_outcomes(ranks: np.ndarray, k: int) -> Outcomes:
    """Outcomes whose score is image-to-text recall@k. `ranks`: `(num_images,)`, how many wrong texts come before the image's first."""
    return accuracy_outcomes(np.asarray(ranks) < k)


def text_to_image_outcomes(ranks: np.ndarray, text_to_image: np.ndarray, k: int) -> Outcomes:
    """Outcomes whose score is text-to-image recall@k; an item is an image with all its captions. `ranks`: `(num_texts,)`, how many wrong images come
    before the caption's own; `text_to_image`: `(num_texts,)`, the image of each caption, and every image has one.
    """
    text_to_image = np.asarray(text_to_image)
    trials = np.bincount(text_to_image)
    hits = np.bincount(text_to_image, np.asarray(ranks) < k, minlength=len(trials))
    return Outcomes(hits.astype(np.int64), trials)


def resample(outcomes: Sequence[Outcomes], resamples: int = RESAMPLES, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Scores on resampled items, `(resamples, len(outcomes))` float64 fractions: the same items for every entry of `outcomes`, which are of several
    models and tasks on the same items. `seed` is as `numpy.random.default_rng` takes it. ValueError if items or strata differ.
    """
    if not outcomes:
        raise ValueError("there is nothing to resample: outcomes is empty.")
    if len({len(entry) for entry in outcomes}) > 1:
        raise ValueError(
            "outcomes that are resampled together must be of the same items, but there are "
            f"{sorted({len(entry) for entry in outcomes})} items: score both models on the same data."
        )
    stratified = [entry.strata for entry in outcomes if entry.strata is not None]
    if any((strata != stratified[0]).any() for strata in stratified):
        raise ValueError("outcomes that are resampled together must have the same class for each item.")
    strata = np.unique(stratified[0], return_inverse=True)[1] if stratified else np.zeros(len(outcomes[0]), np.int64)
    num_strata = int(strata.max()) + 1

    columns = np.stack([column for entry in outcomes for column in (entry.hits, entry.trials)], axis=1)
    rng = np.random.default_rng(seed)
    totals = np.zeros((resamples, columns.shape[1]))  # hits and trials over all strata, alternating
    rates = np.zeros((resamples, len(outcomes)))  # sum of the strata's hit rates
    for stratum in range(num_strata):
        kinds, counts = np.unique(columns[strata == stratum], axis=0, return_counts=True)
        step = max(1, _BLOCK // len(kinds))
        for start in range(0, resamples, step):
            rows = slice(start, min(start + step, resamples))
            drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=rows.stop - rows.start)
            sums = drawn @ kinds
            totals[rows] += sums
            rates[rows] += sums[:, 0::2] / sums[:, 1::2]
    overall = totals[:, 0::2] / totals[:, 1::2]
    by_class = np.array([entry.strata is not None for entry in outcomes])
    return np.where(by_class, rates / num_strata, overall)


def interval(value: float, resampled: np.ndarray, num_items: int, confidence: float = 0.95) -> Interval:
    """The percentile interval of one score, or of a difference of two, from `value` on the `num_items` items themselves and `resampled (resamples,)`.

    Resamples know only what was seen: if all are the same (no item missed, or no item on which two models differ), the interval would
    have no width. It then gets the exact width for none seen in `num_items` draws, `1 - ((1 - confidence) / 2) ** (1 / num_items)`
    (Clopper and Pearson 1934; the "rule of three").
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, but is {confidence}.")
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    if low == high:
        unseen = 1 - tail ** (1 / num_items)
        low, high = low - unseen, high + unseen
    return Interval(value, float(low), float(high))


def score_interval(
    outcomes: Outcomes, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The score of one model with its interval, cut to 0 ... 1."""
    scores = resample([outcomes], resamples, seed)[:, 0]
    return interval(outcomes.value, scores, len(outcomes), confidence).clipped()
