"""Which learning curves a report shows, and what is said beside them.

The geometry is made in `charts.py`. Training is drawn in grey and validation in colour;
what is of the accepted samples alone is dashed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from keras_rsft.report import charts
from keras_rsft.report.run_record import RunRecord

Series = tuple[str, str, Sequence[float]]


def learning_curves(record: RunRecord) -> list[charts.LineChart]:
    """Returns the charts of a run: accuracy, loss and acceptance by epoch."""
    metrics = record.metrics
    plain = record.results.get("against_plain", {}).get("history", {})
    plain_validation = [float(value) for value in plain.get("val_accuracy", [])]
    drawn = [
        charts.line_chart(
            "accuracy",
            "Accuracy, given labels",
            [
                *_of_both(record, "accuracy"),
                ("validation, plain head", "second", plain_validation),
            ],
            as_percent=True,
        ),
        charts.line_chart(
            "loss",
            "Loss",
            [
                *_of_both(record, "loss"),
                ("threshold", "threshold", _thresholds(record)),
            ],
            as_percent=False,
        ),
        charts.line_chart(
            "selection",
            "Acceptance",
            [
                ("accepted samples", "first", metrics.get("acceptance_rate", [])),
                ("accepted validation samples", "first dashed",
                 _unless_equal(metrics, "val_acceptance_rate", "acceptance_rate")),
                ("wrong labels rejected", "second",
                 metrics.get("rejection_recall", [])),
                ("rejected labels that are wrong", "quiet",
                 metrics.get("rejection_precision", [])),
            ],
            as_percent=True,
        ),
    ]  # fmt: skip
    return [one for one in drawn if one is not None]


def curves_note(record: RunRecord) -> str:
    """Says how the accuracies and losses were measured, and what "accepted" means."""
    metrics = record.metrics
    if "train_accuracy" not in metrics:
        return ""
    said = ["Measured at the end of each epoch, by the same weights for both splits."]
    if any(map(math.isnan, metrics["train_accuracy"])):
        said.append(
            "In epochs that train the base, training is the mean over the epoch."
        )
    policy = record.config.get("policy") or {}
    if "val_accepted_loss" not in metrics:
        if policy.get("level") == "batch" and metrics.get("val_loss"):
            said.append(
                "The policy judges whole batches, so there is no curve of accepted "
                "validation samples."
            )
    elif policy.get("name") == "auto":
        said.append(
            "A validation sample counts as accepted where its given label is likely "
            "right by what the training samples say, and it is learnt better than by "
            "guessing."
        )
    elif policy.get("name") != "accept-all":
        said.append(
            "A validation sample counts as accepted where the policy would accept its "
            "loss at that epoch; it changes nothing in the policy."
        )
    return " ".join(said)


def overfitting_warning(record: RunRecord) -> str | None:
    """Returns what the run found in its curves, in one sentence, or None."""
    found = record.results.get("overfitting")
    return str(found["sentence"]) if found else None


def _of_both(record: RunRecord, measure: str) -> list[Series]:
    metrics = record.metrics
    whole = _completed(metrics, f"train_{measure}", measure)
    older = "accepted_loss" if measure == "loss" else ""
    accepted = _completed(metrics, f"train_accepted_{measure}", older)
    validation = metrics.get(f"val_{measure}", [])
    lines = [
        ("training, all samples", "quiet", whole),
        ("training, accepted samples", "quiet dashed", accepted),
        ("validation, all samples", "first", validation),
        ("validation, accepted samples", "first dashed",
         metrics.get(f"val_accepted_{measure}", [])),
    ]  # fmt: skip
    rejects = any(rate < 1 for rate in metrics.get("acceptance_rate", []))
    return lines if rejects else [one for one in lines if "dashed" not in one[1]]


def _completed(
    metrics: dict[str, list[float]], name: str, instead: str
) -> Sequence[float]:
    """Returns values, those of another name where there are none."""
    others = metrics.get(instead, [])
    values = metrics.get(name, others)
    if len(others) != len(values):
        return values
    return [
        other if math.isnan(value) else value
        for value, other in zip(values, others, strict=True)
    ]


def _unless_equal(
    metrics: dict[str, list[float]], name: str, other: str
) -> Sequence[float]:
    values = metrics.get(name, [])
    return [] if values == metrics.get(other) else values


def _thresholds(record: RunRecord) -> list[float]:
    thresholds = {one.epoch: one.threshold for one in record.losses}
    return [
        float("nan") if thresholds.get(epoch) is None else thresholds[epoch]
        for epoch in range(1, len(record.metrics.get("loss", ())) + 1)
    ]
