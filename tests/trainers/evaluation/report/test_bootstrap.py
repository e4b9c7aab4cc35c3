"""Intervals of the bootstrap, against a draw of every item, against scipy, and against intervals known in closed form."""

import math

import numpy as np
import pytest

from trainers.evaluation.report.bootstrap import (
    Interval,
    Outcomes,
    accuracy_outcomes,
    image_to_text_outcomes,
    interval,
    mean_per_class_outcomes,
    resample,
    score_interval,
    text_to_image_outcomes,
)


def naive_resample(outcomes: list[Outcomes], resamples: int, seed: int) -> np.ndarray:
    """Draws every item by its number, with replacement (within its class where there are classes)."""
    rng = np.random.default_rng(seed)
    strata = next((entry.strata for entry in outcomes if entry.strata is not None), None)
    groups = [np.arange(len(outcomes[0]))] if strata is None else [np.flatnonzero(strata == c) for c in set(strata)]
    scores = []
    for _ in range(resamples):
        chosen = np.concatenate([rng.choice(group, len(group)) for group in groups])
        scores.append(
            [
                Outcomes(
                    entry.hits[chosen], entry.trials[chosen], None if entry.strata is None else entry.strata[chosen]
                ).value
                for entry in outcomes
            ]
        )
    return np.array(scores)


def two_models(num_items: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = rng.random(num_items) < 0.6
    return first, np.where(rng.random(num_items) < 0.8, first, ~first)


def differences(found: np.ndarray, expected: np.ndarray) -> list[str]:
    """Which of mean, spread, tails and correlation of the columns are not the same; the tolerances are several times the noise of 4,000 draws."""
    tails = [0.025, 0.975]
    compared = {
        "mean": (found.mean(0), pytest.approx(expected.mean(0), abs=0.006)),
        "spread": (found.std(0), pytest.approx(expected.std(0), rel=0.08)),
        "tails": (np.quantile(found, tails, axis=0), pytest.approx(np.quantile(expected, tails, axis=0), abs=0.02)),
    }
    if found.shape[1] > 1:
        compared["correlation"] = (np.corrcoef(found.T), pytest.approx(np.corrcoef(expected.T), abs=0.06))
    return [f"{name}: {ours} is not {theirs}" for name, (ours, theirs) in compared.items() if ours != theirs]


# The scores themselves


def test_scores_by_hand():
    assert accuracy_outcomes(np.array([1, 0, 1, 1])).value == 3 / 4
    # Class 0: 1 of 1. Class 7: 1 of 3.
    assert mean_per_class_outcomes(np.array([1, 1, 0, 0]), np.array([0, 7, 7, 7])).value == (1 + 1 / 3) / 2
    assert image_to_text_outcomes(np.array([0, 1, 5]), k=1).value == 1 / 3
    assert image_to_text_outcomes(np.array([0, 1, 5]), k=5).value == 2 / 3
    found = text_to_image_outcomes(np.array([0, 3, 0, 1, 0]), np.array([0, 0, 1, 2, 2]), k=1)
    assert found.value == 3 / 5
    assert found.hits.tolist() == [1, 1, 1] and found.trials.tolist() == [2, 1, 2]


# The distribution


def test_resampling_is_a_draw_of_every_item():
    first, second = two_models()
    outcomes = [accuracy_outcomes(first), accuracy_outcomes(second)]
    assert not differences(resample(outcomes, 4000, seed=1), naive_resample(outcomes, 4000, seed=2))


def test_images_are_drawn_with_all_their_captions():
    rng = np.random.default_rng(0)
    text_to_image = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    # All captions of a picture are found or none: as one draw each they would seem to say more than 40 pictures do.
    ranks = np.repeat(rng.integers(0, 2, 40), np.bincount(text_to_image))
    outcomes = [
        text_to_image_outcomes(ranks, text_to_image, k=1),
        image_to_text_outcomes(rng.integers(0, 2, 40), k=1),
    ]
    found = resample(outcomes, 4000, seed=1)
    assert not differences(found, naive_resample(outcomes, 4000, seed=2))
    single_captions = resample([accuracy_outcomes(ranks < 1)], 4000)
    assert found[:, 0].std() > 1.5 * single_captions.std()


def test_mean_per_class_is_drawn_within_classes():
    first, second = two_models()
    labels = np.repeat([0, 1, 2], [5, 15, 40])
    outcomes = [mean_per_class_outcomes(first, labels), mean_per_class_outcomes(second, labels)]
    found = resample(outcomes, 4000, seed=1)
    assert not differences(found, naive_resample(outcomes, 4000, seed=2))
    # Within a class the spread is binomial: the variance of the mean over classes is known.
    rates = [first[labels == c].mean() for c in range(3)]
    variance = sum(rate * (1 - rate) / count for rate, count in zip(rates, (5, 15, 40), strict=True)) / 9
    assert found[:, 0].var() == pytest.approx(variance, rel=0.1)


def test_accuracy_and_mean_per_class_share_their_resamples():
    first, _ = two_models()
    labels = np.repeat([0, 1], 30)  # of one size, so that both are the same number
    found = resample([accuracy_outcomes(first), mean_per_class_outcomes(first, labels)], 500)
    assert found[:, 0] == pytest.approx(found[:, 1], abs=1e-12)


def test_blocks_of_resamples_cover_all(monkeypatch):
    monkeypatch.setattr("trainers.evaluation.report.bootstrap._BLOCK", 10)
    first, second = two_models()
    outcomes = [accuracy_outcomes(first), accuracy_outcomes(second)]
    found = resample(outcomes, 4000, seed=1)
    assert (found > 0).all()
    assert not differences(found, naive_resample(outcomes, 4000, seed=2))


def test_the_seed_decides():
    outcomes = [accuracy_outcomes(two_models()[0])]
    assert (resample(outcomes, 100, seed=3) == resample(outcomes, 100, seed=3)).all()
    assert (resample(outcomes, 100, seed=3) != resample(outcomes, 100, seed=4)).any()


# Intervals


def difference_interval(model: Outcomes, baseline: Outcomes, resamples: int = 20_000, seed: int = 0) -> Interval:
    scores = resample([model, baseline], resamples, seed)
    return interval(model.value - baseline.value, scores[:, 0] - scores[:, 1], len(model))


def test_interval_is_scipys_percentile_interval():
    stats = pytest.importorskip("scipy.stats")
    first, second = two_models(200)
    found = difference_interval(accuracy_outcomes(first), accuracy_outcomes(second))
    peer = stats.bootstrap(
        (first.astype(float), second.astype(float)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found.value == first.mean() - second.mean()
    # A step of one item is 0.005.
    assert (found.low, found.high) == pytest.approx((peer.low, peer.high), abs=0.0051)


def test_interval_of_many_items_is_the_normal_one():
    correct = np.arange(10_000) % 10 < 7
    found = score_interval(accuracy_outcomes(correct))
    half = 1.96 * math.sqrt(0.7 * 0.3 / 10_000)
    assert (found.low, found.high) == pytest.approx((0.7 - half, 0.7 + half), abs=6e-4)


def test_pairing_narrows_the_difference():
    correct = np.arange(400) % 2 == 0
    slightly_worse = correct & (np.arange(400) >= 20)
    found = difference_interval(accuracy_outcomes(slightly_worse), accuracy_outcomes(correct))
    # 10 of 400 lost: the unpaired interval would reach from -9.4 to +4.4 points.
    assert found.value == pytest.approx(-0.025)
    assert -0.045 < found.low < -0.03 and -0.02 < found.high < 0


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        first = rng.random(200) < 0.7
        second = np.where(rng.random(200) < 0.85, first, rng.random(200) < 0.4)
        truth = 0.15 * (0.7 - 0.4)
        found = difference_interval(accuracy_outcomes(first), accuracy_outcomes(second), resamples=2000, seed=trial)
        covered += found.low <= truth <= found.high
    assert 0.91 < covered / 300 < 0.985


def test_an_interval_without_spread_is_not_believed():
    # None of 60 items is missed: up to 1 - 0.025 ** (1 / 60) = 6.0 % may be.
    found = score_interval(accuracy_outcomes(np.ones(60, bool)))
    assert found.low == pytest.approx(0.025 ** (1 / 60)) and found.high == 1.0
    same = difference_interval(accuracy_outcomes(two_models()[0]), accuracy_outcomes(two_models()[0]))
    assert (same.value, same.low, same.high) == pytest.approx((0, -0.0596, 0.0596), abs=1e-4)


def test_a_higher_confidence_is_wider():
    resampled = np.random.default_rng(0).normal(size=20_000)
    plain, strict = (interval(0.0, resampled, 100, confidence) for confidence in (0.95, 0.99))
    assert plain.high == pytest.approx(1.96, abs=0.05) and strict.high == pytest.approx(2.576, abs=0.08)


# Bad input


def test_bad_outcomes_are_refused():
    with pytest.raises(ValueError, match="hits must be one whole number an item and at least one"):
        accuracy_outcomes(np.zeros(0, bool))
    with pytest.raises(ValueError, match="hits must be one whole number.*float64"):
        Outcomes(np.array([0.5]), np.array([1]))
    with pytest.raises(ValueError, match=r"must be of the same items, but have \[2, 3\] rows"):
        Outcomes(np.array([1, 0]), np.array([1, 1, 1]))
    with pytest.raises(ValueError, match="item 1 has no trial, or hits that are not between 0 and its trials"):
        Outcomes(np.array([1, 2]), np.array([1, 1]))
    with pytest.raises(ValueError, match="item 0 has no trial"):
        text_to_image_outcomes(np.array([0]), np.array([1]), k=1)


def test_outcomes_of_other_items_are_not_paired():
    with pytest.raises(ValueError, match=r"same items, but there are \[2, 3\] items"):
        difference_interval(accuracy_outcomes(np.ones(2, int)), accuracy_outcomes(np.ones(3, int)))
    with pytest.raises(ValueError, match="same class for each item"):
        difference_interval(
            mean_per_class_outcomes(np.ones(2, int), np.array([0, 1])),
            mean_per_class_outcomes(np.ones(2, int), np.array([1, 0])),
        )
    with pytest.raises(ValueError, match="nothing to resample"):
        resample([])
    with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
        score_interval(accuracy_outcomes(np.ones(2, int)), confidence=95)
