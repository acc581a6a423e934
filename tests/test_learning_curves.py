"""Which curves a report draws, and what it says of them."""

from __future__ import annotations

import dataclasses
import math

import pytest
from made_run import made_run

from keras_rsft.report._page import curves_note, learning_curves, render_page
from keras_rsft.report._record import read_run

pytestmark = pytest.mark.usefixtures("eager")

ACCURACY = "Accuracy, given labels"
CURVES = {
    f"{part}_{measure}": [value, value + step, value + 2 * step]
    for part, value in (("train", 0.5), ("train_accepted", 0.6))
    for measure, step in (("accuracy", 0.1), ("loss", -0.1))
}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run that was made before there were such curves."""
    return read_run(made_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def record(before):
    metrics = before.metrics | CURVES | {"val_loss": [1.0, 0.9, 0.8]}
    return dataclasses.replace(before, metrics=metrics)


def lines_of(record, title):
    """Returns style and texts of each line by its name."""
    chart = next(one for one in learning_curves(record) if one.title == title)
    names, styles, texts = (chart.data[key] for key in ("names", "styles", "texts"))
    return dict(zip(names, zip(styles, texts, strict=True), strict=True))


def test_accepted_and_all_samples(record):
    for title in (ACCURACY, "Loss"):
        lines = lines_of(record, title)
        assert lines["training, all samples"][0] == "quiet"
        assert lines["training, accepted samples"][0] == "quiet dashed"
        assert lines["validation"][0] == "first"
    texts = lines_of(record, ACCURACY)["training, accepted samples"][1]
    assert texts == ["60.0 %", "70.0 %", "80.0 %"]


def test_validation_by_right_labels_stands_beside_the_given_ones(record):
    right = {"val_accuracy_estimated": [0.7, 0.8, 0.9]}
    right |= {"val_loss_estimated": [0.5, 0.4, 0.3]}
    of_plain = record.results["against_plain"]
    history = of_plain["history"] | {"val_accuracy_estimated": [0.65] * 3}
    against_plain = {"against_plain": of_plain | {"history": history}}
    judged = dataclasses.replace(
        record,
        metrics=record.metrics | right,
        results=record.results | against_plain,
    )
    lines = lines_of(judged, "Accuracy")
    assert lines["validation, right labels"] == (
        "first",
        ["70.0 %", "80.0 %", "90.0 %"],
    )
    assert lines["validation, given labels"] == ("first dashed", ["60.0 %"] * 3)
    assert lines["validation, plain head"][1] == ["65.0 %"] * 3
    assert "validation" not in lines
    assert lines_of(judged, "Loss")["validation, right labels"][1][0] == "0.5"
    assert "Right labels are estimated" in curves_note(judged)
    known = {"validation_accuracy_clean": 0.9}
    known = dataclasses.replace(judged, results=judged.results | known)
    assert "Right labels are known" in curves_note(known)


def test_right_labels_that_are_the_given_ones_get_no_line(record):
    same = {"val_accuracy_estimated": record.metrics["val_accuracy"]}
    same |= {"val_loss_estimated": [1.001, 0.9, 0.8]}
    judged = dataclasses.replace(record, metrics=record.metrics | same)
    assert lines_of(judged, ACCURACY) == lines_of(record, ACCURACY)
    assert lines_of(judged, "Loss") == lines_of(record, "Loss")
    assert "Right labels" not in curves_note(judged)


def test_where_nothing_is_rejected_a_line_is_drawn_once(record):
    plain = dataclasses.replace(
        record, metrics=record.metrics | {"acceptance_rate": [1.0] * 3}
    )
    for title in (ACCURACY, "Loss"):
        assert not any("accepted" in name for name in lines_of(plain, title))
    assert list(lines_of(plain, "Acceptance")) == ["accepted samples"]


def test_a_run_of_before_shows_what_it_has(before):
    assert list(lines_of(before, ACCURACY)) == [
        "training, all samples", "validation", "validation, plain head",
    ]  # fmt: skip
    assert list(lines_of(before, "Loss")) == ["training, all samples", "threshold"]
    assert curves_note(before) == ""


def test_epochs_that_train_the_backbone_have_the_mean_over_the_epoch(record):
    metrics = record.metrics | {"train_accuracy": [0.5, 0.6, math.nan]}
    longer = dataclasses.replace(record, metrics=metrics)
    _, texts = lines_of(longer, ACCURACY)["training, all samples"]
    assert texts == ["50.0 %", "60.0 %", "80.0 %"]
    assert curves_note(record).startswith("Measured at the end of each epoch")
    assert "epochs that train the backbone" not in curves_note(record)
    assert "epochs that train the backbone" in curves_note(longer)


def test_a_warning_is_shown_and_escaped(record):
    assert 'class="warning"' not in render_page(record)
    found = {"overfitting": {"sentence": "Overfitting <b>from</b> epoch 3 on"}}
    warned = dataclasses.replace(record, results=record.results | found)
    page = render_page(warned)
    assert "Overfitting &lt;b&gt;from&lt;/b&gt; epoch 3 on" in page
    assert "<b>from</b>" not in page
