"""Linear probe: how well a linear classifier names images from the frozen image encoder's features.

As in CLIP (Radford et al. 2021, appendix A.3): L2-regularised logistic regression by scikit-learn's L-BFGS, at most 1,000 iterations, its
strength chosen on a validation split by a sweep that starts at seven powers of a hundred and halves its step around the best, then trained
again on training and validation images together. It says what the features hold, whatever the text side makes of them.
"""

from dataclasses import dataclass

import numpy as np
import torch


# C of scikit-learn, the inverse strength: 1e-6, 1e-4, ... 1e6, as powers of ten.
_FIRST_POWERS = range(-6, 7, 2)
_HALVINGS = 3  # of the step between them: C is chosen to a factor of 10^(1/4)


@dataclass(frozen=True)
class LinearProbe:
    """What a linear probe found.

    Attributes:
        predictions: `(num_test,)` int64, the class that it gives each test image.
        accuracy: share of the test images that are right.
        mean_per_class: mean over the test images' classes of the share that is right.
        inverse_regularization: the C that was chosen.
        validation_accuracy: the accuracy on the validation split of every C that was tried.
    """

    predictions: np.ndarray
    accuracy: float
    mean_per_class: float
    inverse_regularization: float
    validation_accuracy: dict[float, float]


def linear_probe(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    seed: int = 0,
) -> LinearProbe:
    """Trains a linear classifier on frozen features and tests it.

    Features are divided by one number, the root mean square of the training features, so that the same C means the same for every model; nothing
    else is done to them. A fifth of the training images of every class (at least one of a class that has two) is held back to choose C.

    Args:
        train_features: `(num_train, dim)`, any floating dtype.
        train_labels: `(num_train,)` whole numbers.
        test_features, test_labels: `(num_test, dim)` and `(num_test,)`. A class that training does not have counts as wrong.
        seed: seed of the validation split.

    Raises:
        ValueError: shapes that do not match, NaN or infinite values, no images, or a single class.
        ModuleNotFoundError: without scikit-learn.
    """
    train_x, train_y = _check("train", train_features, train_labels)
    test_x, test_y = _check("test", test_features, test_labels)
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            f"train and test features have {train_x.shape[1]} and {test_x.shape[1]} dimensions: take both of one model."
        )
    if len(np.unique(train_y)) < 2:
        raise ValueError("a linear probe needs at least two classes, and train_labels has one.")
    held_back = _split(train_y, seed)
    fit_x, fit_y, valid_x, valid_y = train_x[~held_back], train_y[~held_back], train_x[held_back], train_y[held_back]
    if len(valid_y) == 0 or len(np.unique(fit_y)) < 2:
        raise ValueError("a validation split needs two classes with two training images each.")
    scale = float(np.sqrt(np.mean(np.square(fit_x))))
    if scale == 0:
        raise ValueError("train features are all 0.")

    tried: dict[float, float] = {}

    def try_power(power: float) -> float:
        if power not in tried:
            predictions = _fit(fit_x / scale, fit_y, power).predict(valid_x / scale)
            tried[power] = float((predictions == valid_y).mean())
        return tried[power]

    # Ties go to the C nearest to 1: at 1e-6 there is hardly a classifier left.
    best: float = max(_FIRST_POWERS, key=lambda power: (try_power(power), -abs(power)))
    step = 2.0
    for _ in range(_HALVINGS):
        step /= 2
        near = (power for power in (best - step, best, best + step) if abs(power) <= _FIRST_POWERS[-1])
        best = max(near, key=lambda power: (try_power(power), -abs(power)))
    predictions = _fit(train_x / scale, train_y, best).predict(test_x / scale)
    correct = predictions == test_y
    return LinearProbe(
        predictions=predictions,
        accuracy=float(correct.mean()),
        mean_per_class=float(np.mean([correct[test_y == label].mean() for label in np.unique(test_y)])),
        inverse_regularization=10.0**best,
        validation_accuracy={10.0**power: accuracy for power, accuracy in sorted(tried.items())},
    )


def _fit(features: np.ndarray, labels: np.ndarray, power: float):
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # CLIP's protocol stops after so many iterations, converged or not; and few images of many classes are no mistake.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%")
        return LogisticRegression(C=10.0**power, max_iter=1000).fit(features, labels)


def _split(labels: np.ndarray, seed: int) -> np.ndarray:
    """A fifth of every class, at least one where there are two: `(num_items,)` booleans."""
    rng = np.random.default_rng(seed)
    held_back = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held_back[rows[: max(len(rows) // 5, min(1, len(rows) - 1))]] = True
    return held_back


def _check(name: str, features: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    features, labels = torch.as_tensor(features), torch.as_tensor(labels)
    if features.dim() != 2 or len(features) == 0 or not features.is_floating_point():
        raise ValueError(
            f"{name} features must be floating point numbers (rows, dim) with at least one row, but have shape "
            f"{tuple(features.shape)} and dtype {features.dtype}."
        )
    if labels.shape != (len(features),) or labels.is_floating_point():
        raise ValueError(
            f"{name} labels must be {len(features)} whole numbers, one a row, but have shape {tuple(labels.shape)} and dtype {labels.dtype}."
        )
    if not torch.isfinite(features).all():
        raise ValueError(f"{name} features have NaN or infinite values.")
    return features.detach().float().cpu().numpy(), labels.long().cpu().numpy()
