"""The rule that says whether curves overfit: what must warn, and what must not."""

from __future__ import annotations

import numpy as np
import pytest

from keras_rsft.training._curves import accuracy_error, find_overfitting

pytestmark = pytest.mark.usefixtures("eager")

SIZE = 400


def curves(training, validation, *, losses=None, error=0.03):
    found = {"train_accepted_accuracy": training, "val_accuracy": validation}
    if losses is not None:
        found["train_accepted_loss"], found["val_loss"] = losses
        found["val_loss_error"] = [error] * len(losses[0])
    return {name: list(map(float, values)) for name, values in found.items()}


RISING = np.linspace(0.6, 0.99, 20)
UP_AND_DOWN = np.concatenate([np.linspace(0.6, 0.9, 8), np.linspace(0.9, 0.75, 12)])


def test_validation_falls_while_training_rises():
    found = find_overfitting(curves(RISING, UP_AND_DOWN), SIZE)
    assert found.measure == "accuracy"
    assert found.best_epoch == 8
    assert found.epochs == 20
    best, last = found.validation
    assert best == pytest.approx(UP_AND_DOWN[9])  # Of epochs 6 to 10 the median.
    assert last == pytest.approx(UP_AND_DOWN[-3])
    assert found.training[1] == pytest.approx(RISING[-3])
    for part in ("from epoch 9 on", "`--epochs 8`", "`--early-stopping`", "77.7 %"):
        assert part in found.sentence


def test_the_loss_tells_where_the_accuracy_does_not():
    flat = np.full(20, 0.9)
    losses = (np.linspace(1, 0.01, 20), np.abs(np.linspace(-0.3, 0.6, 20)) + 0.3)
    found = find_overfitting(curves(RISING, flat, losses=losses), SIZE)
    assert found.measure == "loss"
    assert found.best_epoch in (7, 8)
    assert "validation loss rose from" in found.sentence
    assert "training loss fell from" in found.sentence
    assert (
        find_overfitting(curves(RISING, flat, losses=losses, error=1.0), SIZE) is None
    )


def test_wrong_labels_that_fit_badly_are_no_overfitting():
    """By the given labels both measures get worse, by the right ones better."""
    losses = (np.linspace(1, 0.01, 20), np.linspace(0.5, 2.0, 20))
    given = curves(RISING, UP_AND_DOWN, losses=losses)
    assert find_overfitting(given, SIZE) is not None
    right = {"val_accuracy_estimated": RISING, "val_loss_estimated": losses[0]}
    assert find_overfitting(given | right, SIZE) is None


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_overfitting_by_right_labels_is_said_to_be_so(measure):
    falling = np.abs(np.linspace(-0.3, 0.6, 20)) + 0.3
    given = curves(RISING, RISING, losses=(np.linspace(1, 0.01, 20), 1 - RISING))
    assert find_overfitting(given, SIZE) is None
    right = {"accuracy": RISING, "loss": 1 - RISING}
    right |= {measure: {"accuracy": UP_AND_DOWN, "loss": falling}[measure]}
    right = {f"val_{name}_estimated": values for name, values in right.items()}
    found = find_overfitting(given | right, SIZE)
    assert found.measure == measure
    assert found.by_right_labels
    assert f"validation {measure} by right labels" in found.sentence


def test_the_error_of_an_estimate_counts():
    given = curves(RISING, RISING) | {"val_accuracy_estimated": UP_AND_DOWN}
    assert find_overfitting(given, SIZE) is not None
    errors = {"val_accuracy_error": [0.2] * 20}
    assert find_overfitting(given | errors, SIZE) is None


@pytest.mark.parametrize(
    "training, validation",
    [
        (RISING, RISING - 0.2),  # A gap that does not grow.
        (RISING, np.linspace(0.6, 0.7, 20)),  # It grows, and validation rises too.
        (RISING, np.full(20, 0.8)),
        (np.linspace(0.99, 0.6, 20), UP_AND_DOWN),  # Training falls too: it diverges.
        (RISING[:7], UP_AND_DOWN[::3]),  # Too few epochs to tell.
        (RISING, np.where(np.arange(20) == 12, 0.3, 0.85)),  # One bad epoch.
        (RISING, np.where(np.arange(20) == 6, 1.0, 0.97)),  # One lucky epoch.
        (RISING, np.where(np.arange(20) > 17, 0.6, 0.85)),  # Two bad ones at the end.
        (RISING, np.r_[UP_AND_DOWN[:14], [0.9] * 6]),  # It recovers.
        (RISING, np.full(20, np.nan)),
        ([], []),
    ],
)
def test_what_must_not_warn(training, validation):
    assert find_overfitting(curves(training, validation), SIZE) is None


def test_a_fall_within_the_standard_error_is_none():
    fallen = np.concatenate([np.full(8, 0.9), np.full(12, 0.88)])
    assert accuracy_error(0.9, 400) < 0.02 < accuracy_error(0.9, 200)
    assert find_overfitting(curves(RISING, fallen), 400) is not None
    assert find_overfitting(curves(RISING, fallen), 200) is None


def test_the_standard_error_of_an_accuracy():
    # (90 + 2) / 104 and its binomial error, by hand.
    assert accuracy_error(0.9, 100) == pytest.approx(0.031328, abs=1e-6)
    assert accuracy_error(1.0, 6) > 0.1  # Six of six says little.
    assert accuracy_error(1.02, 6) == accuracy_error(1.0, 6)  # Of an estimate.


def test_without_curves_nothing_is_said():
    assert find_overfitting({"val_accuracy": list(UP_AND_DOWN)}, SIZE) is None
    assert find_overfitting({}, 0) is None


def test_noise_alone_seldom_warns():
    """Of a validation that does not fall, and jitters by half a standard error."""
    rng = np.random.default_rng(0)
    training = np.linspace(0.8, 0.9, 30)
    warned = [
        find_overfitting(curves(training, 0.85 + rng.normal(0, 0.5 * 0.018, 30)), SIZE)
        is not None
        for _ in range(300)
    ]
    assert np.mean(warned) < 0.03
