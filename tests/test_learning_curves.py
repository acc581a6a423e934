"""Which curves a report draws, and what it says of them."""

from __future__ import annotations

import dataclasses
import math

import pytest
from made_run import made_run

from keras_rsft.report._page import curves_note, learning_curves, render_page
from keras_rsft.report._record import read_run

pytestmark = pytest.mark.usefixtures("eager")

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


def lines_of(record, key):
    """Returns style and texts of each line by its name."""
    chart = next(one for one in learning_curves(record) if one.key == key)
    return dict(
        zip(chart.names, zip(chart.styles, chart.texts, strict=True), strict=True)
    )


def test_accepted_and_all_samples(record):
    for key in ("accuracy", "loss"):
        lines = lines_of(record, key)
        assert lines["training, all samples"][0] == "quiet"
        assert lines["training, accepted samples"][0] == "quiet dashed"
        assert lines["validation"][0] == "first"
    assert lines_of(record, "accuracy")["training, accepted samples"][1] == (
        "60.0 %", "70.0 %", "80.0 %",
    )  # fmt: skip


def test_where_nothing_is_rejected_a_line_is_drawn_once(record):
    plain = dataclasses.replace(
        record, metrics=record.metrics | {"acceptance_rate": [1.0] * 3}
    )
    for key in ("accuracy", "loss"):
        assert not any("accepted" in name for name in lines_of(plain, key))
    assert list(lines_of(plain, "selection")) == ["accepted samples"]


def test_a_run_of_before_shows_what_it_has(before):
    assert list(lines_of(before, "accuracy")) == [
        "training, all samples", "validation", "validation, plain head",
    ]  # fmt: skip
    assert list(lines_of(before, "loss")) == ["training, all samples", "threshold"]
    assert curves_note(before) == ""


def test_epochs_that_train_the_base_have_the_mean_over_the_epoch(record):
    metrics = record.metrics | {"train_accuracy": [0.5, 0.6, math.nan]}
    longer = dataclasses.replace(record, metrics=metrics)
    _, texts = lines_of(longer, "accuracy")["training, all samples"]
    assert texts == ("50.0 %", "60.0 %", "80.0 %")
    assert curves_note(record).startswith("Measured at the end of each epoch")
    assert "epochs that train the base" not in curves_note(record)
    assert "epochs that train the base" in curves_note(longer)


def test_a_warning_is_shown_and_escaped(record):
    assert 'class="warning"' not in render_page(record)
    found = {"overfitting": {"sentence": "Overfitting <b>from</b> epoch 3 on"}}
    warned = dataclasses.replace(record, results=record.results | found)
    page = render_page(warned)
    assert "Overfitting &lt;b&gt;from&lt;/b&gt; epoch 3 on" in page
    assert "<b>from</b>" not in page
