"""The verdict follows from the intervals by the written rules, and its words never claim more."""

import numpy as np
import pytest

from trainers.evaluation.report.bootstrap import Interval, accuracy_outcomes, mean_per_class_outcomes
from trainers.evaluation.report.verdict import Change, Task, compare, decide, describe


def correct(share: float, count: int, seed: int = 0) -> np.ndarray:
    """`count` items of which exactly `share` are right, in a random order."""
    right = np.arange(count) < round(share * count)
    return np.random.default_rng(seed).permutation(right)


def task(
    name: str, model: np.ndarray, baseline: np.ndarray, group: str = "classification", dataset: str | None = None
):
    return Task(name, "top1", group, accuracy_outcomes(model), accuracy_outcomes(baseline), dataset or name)


def change(low: float, high: float, num_items: int = 100) -> Change:
    difference = Interval((low + high) / 2, low, high)
    same = Interval(0.5, 0.4, 0.6)
    return Change("a", "top1", "classification", same, same, difference, decide(difference, num_items), num_items)


@pytest.mark.parametrize(
    ("low", "high", "decision", "words"),
    [
        (0.012, 0.0301, "gained", "gained 1.2 to 3.1 points"),
        (0.0, 0.03, "kept", "kept: 0.0 points lost at most"),
        (-0.01, 0.03, "kept", "kept: 1.0 points lost at most"),
        (-0.0099, -0.002, "kept", "kept: 1.0 points lost at most"),
        (-0.0101, -0.002, "lost", "lost 0.2 to 1.1 of 50.0 points"),
        (-0.123, -0.0456, "lost", "lost 4.5 to 12.3 of 50.0 points"),
        (-0.0101, 0.0, "undecided", "not decided by this data: between 1.1 points lost and 0.0 gained"),
        (-0.2, 0.1234, "undecided", "not decided by this data: between 20.0 points lost and 12.4 gained"),
    ],
)
def test_decisions_and_words_by_the_rules(low, high, decision, words):
    found = change(low, high)
    assert found.decision == decision
    assert describe(found) == words


def test_few_items_decide_nothing():
    assert change(-0.9, -0.5, num_items=29).decision == "undecided"
    assert describe(change(-0.9, -0.5, num_items=29)) == "not decided: 29 items are too few"
    assert change(-0.9, -0.5, num_items=30).decision == "lost"


def test_a_broken_clip_is_said_to_be_broken():
    verdict = compare([task(f"set-{i}", correct(0.3, 500, i), correct(0.7, 500, i)) for i in range(3)])
    assert verdict.answer == "yes"
    assert verdict.headline.startswith("Yes. Zero-shot classification lost 3")
    assert verdict.headline.endswith("points on average over 3 scores.")
    (average,) = verdict.averages
    assert average.difference.value == pytest.approx(-0.4)
    assert average.difference.low < -0.4 < average.difference.high < -0.3
    assert [found.decision for found in verdict.tasks] == ["lost"] * 3
    assert any("The largest loss of zero-shot classification is in set-" in sentence for sentence in verdict.sentences)


def test_a_loss_that_is_surely_under_a_tenth_of_the_score_is_a_little():
    right = correct(0.8, 4000)
    a_little = compare([task("set", right & (np.arange(4000) >= 200), right)])  # about 4 of 80 points
    assert (a_little.answer, a_little.averages[0].decision) == ("a little", "lost")
    assert a_little.headline.startswith("A little. Zero-shot classification lost ")
    # About 8 of 80 points: the interval reaches past a tenth.
    assert compare([task("set", right & (np.arange(4000) >= 400), right)]).answer == "yes"


def test_a_kept_clip_is_said_to_be_kept_only_where_the_data_can_say_so():
    right = correct(0.7, 4000)
    swapped = right.copy()
    swapped[:10] = ~swapped[:10]
    assert compare([task("large", swapped, right)]).answer == "no"
    assert compare([task("large", swapped, right)]).headline.startswith("No. Zero-shot classification kept: 0.")
    # The same share of changes on 200 pictures leaves more than a point open.
    few = correct(0.7, 200)
    flipped = few.copy()
    flipped[[3, 7, 11, 15]] = ~flipped[[3, 7, 11, 15]]
    assert compare([task("small", flipped, few)]).answer == "undecided"
    # And no change at all among 50 pictures does not show that there is none.
    assert compare([task("tiny", few[:50], few[:50])]).answer == "undecided"


def test_one_lost_task_makes_it_partly():
    right = correct(0.7, 3000)
    verdict = compare(
        [task(f"kept-{i}", right, right) for i in range(10)] + [task("lost", right & (np.arange(3000) > 150), right)]
    )
    assert verdict.averages[0].decision == "kept"
    assert verdict.answer == "partly"
    assert "but 1 of 11 zero-shot tasks lost" in verdict.headline
    assert any(
        "largest loss of zero-shot classification is in lost (top1): lost" in line for line in verdict.sentences
    )


def test_an_average_is_the_mean_of_its_tasks_and_independent_data_sets_narrow_it():
    tasks = [task(f"set-{i}", correct(0.6, 400, i), correct(0.7, 400, i + 50)) for i in range(4)]
    verdict = compare(tasks)
    (average,) = verdict.averages
    assert average.model.value == pytest.approx(0.6) and average.baseline.value == pytest.approx(0.7)
    assert average.num_items == 400

    def width(found):
        return found.high - found.low

    alone = compare(tasks[:1]).averages[0]
    assert width(average.difference) == pytest.approx(width(alone.difference) / 2, rel=0.1)
    # Four tasks on the same pictures, with the same outcomes, say no more than one of them.
    copies = [
        Task(f"copy-{i}", "top1", "classification", tasks[0].model, tasks[0].baseline, "one set") for i in range(4)
    ]
    assert width(compare(copies).averages[0].difference) == pytest.approx(width(alone.difference), rel=0.05)


def test_intervals_of_many_tasks_hold_together():
    alone = compare([task("a", correct(0.6, 400), correct(0.7, 400, 9))]).tasks[0].difference
    among = compare([task(f"set-{i}", correct(0.6, 400), correct(0.7, 400, 9)) for i in range(20)]).tasks[0].difference
    # 97.5 % and 99.875 % quantiles of the normal distribution: 1.96 and 3.02.
    assert (among.high - among.low) / (alone.high - alone.low) == pytest.approx(3.02 / 1.96, rel=0.08)


def test_luck_alone_is_rarely_called_a_loss():
    rng = np.random.default_rng(0)
    called = 0
    for trial in range(40):
        tasks = []
        for number in range(8):
            base = rng.random(300) < 0.6
            swap = rng.random(300) < 0.2
            tasks.append(task(f"{number}", np.where(swap, rng.random(300) < 0.6, base), base))
        called += any(found.decision == "lost" for found in compare(tasks, resamples=2000, seed=trial).tasks)
    assert called <= 5  # 2.5 % of the trials lose by luck somewhere; taken one by one, every sixth would


def test_areas_are_told_apart_and_zero_shot_comes_first():
    lost, base = correct(0.4, 600), correct(0.7, 600)
    verdict = compare(
        [
            task("flickr", base, lost, "retrieval"),
            task("imagenet", lost, base),
            task("imagenet-a", lost, base, "robustness"),
            task("own", lost, base, "something_new"),
        ]
    )
    assert [average.name for average in verdict.averages] == [
        "zero-shot classification",
        "retrieval",
        "something new",
    ]
    assert any(line.startswith("Retrieval: gained 2") for line in verdict.sentences)
    assert compare([task("flickr", base, lost, "retrieval")]).answer == "not measured"


def test_the_linear_probe_tells_which_side_lost():
    lost, base = correct(0.3, 3000), correct(0.7, 3000)
    kept = compare([task("zs", lost, base), task("probe", base, base, "linear_probe")])
    assert any("what was lost is on the text side" in line for line in kept.sentences)
    both = compare([task("zs", lost, base), task("probe", lost, base, "linear_probe")])
    assert any("part of the loss is in the image encoder itself" in line for line in both.sentences)
    fine = compare([task("zs", base, base), task("probe", lost, base, "linear_probe")])
    assert not any("text side" in line or "image encoder" in line for line in fine.sentences)


def test_mean_per_class_and_accuracy_of_one_data_set_live_together():
    labels = np.arange(600) % 3
    tasks = [
        task("a", correct(0.4, 600), correct(0.7, 600), dataset="d"),
        Task(
            "a",
            "mean_per_class",
            "classification",
            mean_per_class_outcomes(correct(0.4, 600), labels),
            mean_per_class_outcomes(correct(0.7, 600), labels),
            "d",
        ),
    ]
    assert [found.decision for found in compare(tasks).tasks] == ["lost", "lost"]


def test_the_same_input_gives_the_same_verdict():
    tasks = [task("a", correct(0.6, 100), correct(0.7, 100, 9))]
    assert compare(tasks, seed=3) == compare(tasks, seed=3)
    assert compare(tasks, resamples=37, seed=3) != compare(tasks, resamples=37, seed=4)


def test_bad_input_is_refused():
    ones = np.ones(40, bool)
    with pytest.raises(ValueError, match="no task that both models were scored on"):
        compare([])
    with pytest.raises(ValueError, match="task 'a' has the metric 'top1' twice"):
        compare([task("a", ones, ones), task("a", ones, ones)])
    with pytest.raises(ValueError, match="task 'a' has 40 items for the model and 39 for the baseline"):
        compare([task("a", ones, ones[1:])])
    with pytest.raises(ValueError, match="margin must be 0 or more"):
        compare([task("a", ones, ones)], margin=-0.1)
