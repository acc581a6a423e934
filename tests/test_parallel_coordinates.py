"""Where each trial's line passes each axis."""

from __future__ import annotations

import numpy as np
import pytest

from keras_rsft.searching.choice import TrialOutcome
from keras_rsft.searching.names import SearchOptions
from keras_rsft.searching.parallel_coordinates import (
    UNUSED,
    axes_of,
    draw_parallel_coordinates,
)


def outcome(accuracy, **values):
    metrics = {"val_accuracy": accuracy, "acceptance_rate": 1.0}
    return TrialOutcome("0", "COMPLETED", values, metrics, 1)


OUTCOMES = [
    outcome(0.5, learning_rate=0.001, policy="b", momentum=0.9, warmup_epochs=2),
    outcome(0.6, learning_rate=0.01, policy="a", momentum=0.9),
    outcome(0.9, learning_rate=0.1, policy="c", momentum=0.9, warmup_epochs=0),
]


def test_axes():
    axes = {axis.name: axis for axis in axes_of(OUTCOMES, "val_accuracy")}
    assert list(axes) == [
        "policy", "learning_rate", "warmup_epochs", "acceptance_rate", "val_accuracy",
    ]  # fmt: skip
    np.testing.assert_allclose(axes["learning_rate"].positions, [0, 0.5, 1])
    np.testing.assert_allclose(axes["policy"].positions, [0.5, 0, 1])
    np.testing.assert_allclose(axes["warmup_epochs"].positions, [1, UNUSED, 0])
    np.testing.assert_allclose(axes["val_accuracy"].positions, [0, 0.25, 1])
    np.testing.assert_allclose(axes["acceptance_rate"].positions, 0.5)
    assert axes["policy"].ticks == {0: "a", 0.5: "b", 1: "c"}
    assert axes["warmup_epochs"].ticks == {UNUSED: "not used", 0: "0", 1: "2"}
    assert axes["acceptance_rate"].ticks == {0.5: "1"}
    assert axes["learning_rate"].ticks[1.0] == "0.1"


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_a_picture(tmp_path, objective):
    pytest.importorskip("matplotlib")
    for one in OUTCOMES:
        one.metrics["val_loss"] = 1.0
    options = SearchOptions(objective=objective)
    path = draw_parallel_coordinates(OUTCOMES, options, tmp_path)
    assert path.read_text().startswith("<?xml")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_without_a_completed_trial(tmp_path):
    failed = TrialOutcome("0", "FAILED", {}, {}, 0, "why")
    assert draw_parallel_coordinates([failed], SearchOptions(), tmp_path) is None
