"""Which curves a report draws, and what it says of them."""

from __future__ import annotations

import dataclasses
import math

import pytest
from made_run import made_run

from keras_rsft.report.learning_curves import (
    curves_note,
    learning_curves,
    overfitting_warning,
)
from keras_rsft.report.page import render_page
from keras_rsft.report.run_record import read_run

pytestmark = pytest.mark.usefixtures("eager")

CURVES = {
    f"{part}_{measure}": [value, value + step, value + 2 * step]
    for part, value in (("train", 0.5), ("train_accepted", 0.6), ("val_accepted", 0.7))
    for measure, step in (("accuracy", 0.1), ("loss", -0.1))
}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run that was made before there were such curves."""
    return read_run(made_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def record(before):
    metrics = before.metrics | CURVES | {"val_loss": [1.0, 0.9, 0.8]}
    metrics["val_acceptance_rate"] = [1.0, 0.8, 0.8]
    return dataclasses.replace(before, metrics=metrics)


def with_policy(record, **policy):
    return dataclasses.replace(record, config=record.config | {"policy": policy})


def lines_of(record, key):
    chart = next(one for one in learning_curves(record) if one.key == key)
    return {line.name: line for line in chart.lines}


def test_accepted_and_all_samples_of_both_splits(record):
    for key in ("accuracy", "loss"):
        lines = lines_of(record, key)
        for split in ("training", "validation"):
            assert lines[f"{split}, all samples"].style in ("quiet", "first")
            assert "dashed" in lines[f"{split}, accepted samples"].style
    assert lines_of(record, "accuracy")["training, accepted samples"].texts == (
        "60.0 %", "70.0 %", "80.0 %",
    )  # fmt: skip
    assert "accepted validation samples" in lines_of(record, "selection")


def test_where_nothing_is_rejected_a_line_is_drawn_once(record):
    plain = dataclasses.replace(
        record,
        metrics=record.metrics
        | {"acceptance_rate": [1.0] * 3, "val_acceptance_rate": [1.0] * 3},
    )
    for key in ("accuracy", "loss"):
        assert not any("accepted" in name for name in lines_of(plain, key))
    assert list(lines_of(plain, "selection")) == ["accepted samples"]


def test_a_run_of_before_shows_what_it_has(before):
    assert list(lines_of(before, "accuracy")) == [
        "training, all samples", "validation, all samples", "validation, plain head",
    ]  # fmt: skip
    assert list(lines_of(before, "loss")) == ["training, all samples", "threshold"]
    assert curves_note(before) == ""


def test_epochs_that_train_the_base_have_the_mean_over_the_epoch(record):
    metrics = record.metrics | {"train_accuracy": [0.5, 0.6, math.nan]}
    longer = dataclasses.replace(record, metrics=metrics)
    texts = lines_of(longer, "accuracy")["training, all samples"].texts
    assert texts == ("50.0 %", "60.0 %", "80.0 %")
    assert "epochs that train the base" in curves_note(longer)


@pytest.mark.parametrize(
    "policy, part",
    [
        ({"name": "auto"}, "given label is likely right"),
        ({"name": "loss-threshold", "level": "sample"}, "would accept its loss"),
        ({"name": "accept-all"}, ""),
    ],
)
def test_what_is_said_of_accepted_validation_samples(record, policy, part):
    note = curves_note(with_policy(record, **policy))
    assert note.startswith("Measured at the end of each epoch")
    assert part in note
    assert ("accepted" in note) == bool(part)


def test_a_policy_of_batches_says_why_there_is_no_such_curve(record):
    metrics = {k: v for k, v in record.metrics.items() if "val_accepted" not in k}
    batches = dataclasses.replace(record, metrics=metrics)
    note = curves_note(with_policy(batches, name="loss-threshold", level="batch"))
    assert "judges whole batches" in note


def test_a_warning_is_shown_and_escaped(record):
    assert overfitting_warning(record) is None
    assert 'class="warning"' not in render_page(record)
    found = {"overfitting": {"sentence": "Overfitting <b>from</b> epoch 3 on"}}
    warned = dataclasses.replace(record, results=record.results | found)
    page = render_page(warned)
    assert "Overfitting &lt;b&gt;from&lt;/b&gt; epoch 3 on" in page
    assert "<b>from</b>" not in page
