"""The linear probe on features whose classes are known to be separable, useless, or few."""

import numpy as np
import pytest
import torch

from trainers.evaluation.scoring.linear_probe import linear_probe


pytest.importorskip("sklearn")


def blobs(count: int, spread: float, seed: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` points of each class around its own axis of four, spread normally."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(count)
    return torch.eye(4)[labels] + spread * torch.randn(len(labels), 4, generator=generator), labels


def test_separable_classes_are_learned_and_noise_is_not():
    found = linear_probe(*blobs(30, 0.05, 0), *blobs(20, 0.05, 1))
    assert found.accuracy == found.mean_per_class == 1.0
    assert found.predictions.tolist() == [0, 1, 2] * 20
    features, labels = blobs(60, 0.05, 0)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    assert linear_probe(features, shuffled, *blobs(60, 0.05, 1)).accuracy < 0.55


def test_it_is_logistic_regression_on_all_training_images_with_the_chosen_strength():
    from sklearn.linear_model import LogisticRegression

    (train, labels), (test, test_labels) = blobs(40, 0.6, 0), blobs(100, 0.6, 1)
    found = linear_probe(train, labels, test, test_labels)
    generator = np.random.default_rng(0)
    held = np.zeros(120, bool)
    for label in range(3):
        held[generator.permutation(np.flatnonzero(labels.numpy() == label))[:8]] = True
    scale = train[~held].square().mean().sqrt().item()
    expected = LogisticRegression(C=found.inverse_regularization, max_iter=1000).fit(train / scale, labels)
    assert (found.predictions == expected.predict(test / scale)).mean() > 0.99
    assert found.accuracy == pytest.approx((expected.predict(test / scale) == test_labels.numpy()).mean(), abs=0.01)
    best = max(found.validation_accuracy.values())
    assert found.validation_accuracy[found.inverse_regularization] == best
    # Seven powers, then two neighbours at each halving at most; of the best the one nearest to 1.
    assert 8 <= len(found.validation_accuracy) <= 13
    chosen = abs(np.log10(found.inverse_regularization))
    assert all(abs(np.log10(c)) >= chosen - 1e-9 for c, value in found.validation_accuracy.items() if value == best)


def test_one_scale_of_all_features_changes_nothing():
    (train, labels), (test, test_labels) = blobs(20, 0.6, 0), blobs(50, 0.6, 1)
    small, large = (linear_probe(train * by, labels, test * by, test_labels) for by in (1.0, 256.0))
    assert (small.predictions == large.predictions).all()
    assert small.inverse_regularization == large.inverse_regularization


def test_mean_per_class_weighs_classes_alike():
    (train, labels), (test, test_labels) = blobs(30, 0.05, 0), blobs(4, 0.05, 1)
    test_labels = test_labels.clone()
    test_labels[0] = 1  # one picture of class 0 is labelled wrongly: class 1 has 4 right of 5
    found = linear_probe(train, labels, test, test_labels)
    assert found.accuracy == 11 / 12
    assert found.mean_per_class == pytest.approx((1 + 4 / 5 + 1) / 3)


def test_a_class_that_training_lacks_is_wrong():
    test, test_labels = blobs(5, 0.05, 1, classes=4)
    assert linear_probe(*blobs(20, 0.05, 0), test, test_labels).accuracy == 0.75


def test_bad_input_is_refused():
    train, test = blobs(5, 0.1, 0), blobs(5, 0.1, 1)
    with pytest.raises(ValueError, match="at least two classes"):
        linear_probe(train[0], torch.zeros(15, dtype=torch.long), *test)
    with pytest.raises(ValueError, match="train features must be floating point numbers .* at least one row"):
        linear_probe(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), *test)
    with pytest.raises(ValueError, match="test labels must be 15 whole numbers"):
        linear_probe(*train, test[0], test[1][:3])
    with pytest.raises(ValueError, match="test features have NaN"):
        linear_probe(*train, test[0] * float("nan"), test[1])
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        linear_probe(*train, test[0][:, :3], test[1])
    with pytest.raises(ValueError, match="two classes with two training images each"):
        linear_probe(torch.eye(4)[:3], torch.arange(3), *test)
    with pytest.raises(ValueError, match="all 0"):
        linear_probe(torch.zeros(15, 4), train[1], *test)
