"""Where each trial's line passes each axis."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from keras_rsft.report._charts import UNUSED, parallel_coordinates_svg
from keras_rsft.tuning._choice import TrialOutcome
from keras_rsft.tuning._folder import axes_of


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


@pytest.mark.parametrize(
    ("objective", "direction"), [("val_accuracy", "max"), ("val_loss", "min")]
)
def test_the_best_trial_is_on_top(objective, direction):
    for one, loss in zip(OUTCOMES, (1.0, 0.5, 0.1), strict=True):
        one.metrics["val_loss"] = loss
    text = parallel_coordinates_svg(
        axes_of(OUTCOMES, objective), higher_is_better=direction == "max"
    )
    *_, last = ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}polyline")
    assert last.get("stroke") == "#fca636"
    heights = [float(point.split(",")[1]) for point in last.get("points").split()]
    tops = {"max": min(heights), "min": max(heights[:2] + heights[3:])}
    assert heights[-1] == tops[direction]
