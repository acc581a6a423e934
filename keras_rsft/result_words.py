"""How results are worded where a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_rsft.intervals import Interval

# Of the results of a run those that are shares, in the order in which they are shown.
RESULT_NAMES = {
    "test_accuracy": "Accuracy on the test split",
    "validation_accuracy": "Accuracy on the validation split",
    "head_test_accuracy": "Head alone, test split",
    "head_validation_accuracy": "Head alone, validation split",
    "stage2_test_accuracy": "Last block fine-tuned, test split",
    "stage2_validation_accuracy": "Last block fine-tuned, validation split",
    "unfrozen_test_accuracy": "Base trained too, test split",
    "unfrozen_validation_accuracy": "Base trained too, validation split",
    "acceptance_rate": "Accepted in the last epoch",
    "estimated_wrong_labels": "Labels that look wrong",
    "wrong_labels": "Wrong training labels",
    "wrong_labels_rejected": "Wrong labels rejected",
    "right_labels_rejected": "Right labels rejected",
}


# What was done to the base after the head: its name in the results, and in words.
TUNINGS = {"stage2": "Last block fine-tuned", "unfrozen": "Base trained too"}


def share_text(share: float | None, digits: int = 1) -> str:
    """Returns a share in percent, a dash for None and NaN."""
    if share is None or math.isnan(share):
        return "-"
    return f"{100 * share:.{digits}f} %"


def interval_text(interval: Interval | None, sign: str = "") -> str:
    """Returns a mean and half of its interval in percent, a dash for None.

    Args:
        interval: A mean; an infinite width, of one seed, is not shown.
        sign: `"+"` to show the sign of the mean.
    """
    if interval is None:
        return "-"
    mean = f"{100 * interval.mean:{sign}.1f}"
    if math.isinf(interval.half_width):
        return mean
    return f"{mean} ± {100 * interval.half_width:.1f}"


def comparison_note(seeds: int) -> str:
    """Says what a comparison's numbers are, and what their intervals cover.

    Args:
        seeds: Number of seeds; one has no interval.
    """
    note = "Test accuracy in percent{}; differences to plain are paired by seed."
    if seeds == 1:
        return note.format("")
    spread = f", mean of {seeds} seeds ± half of its 95 % interval over seeds"
    return f"{note.format(spread)} The verdict allows for other test samples too."


def setting_text(values: Mapping[str, Any]) -> str:
    """Returns names and values of a trial in one line, numbers to three digits."""
    short = (
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )
    return ", ".join(short)


def strategy_texts(row: Mapping[str, Any]) -> list[str]:
    """Returns what a person reads of one strategy.

    Args:
        row: The fields of a `StrategyRow`.

    Returns:
        What learnt, the policy, validation accuracy with its standard error in percent,
        accepted share, time, trainable weights, and whether it is the choice.
    """
    accuracy, seconds = row["validation_accuracy"], row["seconds"]
    weights = row["trainable_weights"]
    shown = "-"
    if accuracy is not None:
        shown = f"{100 * accuracy:.1f} ± {100 * row['standard_error']:.1f}"
    elif row["message"]:
        shown = "failed"
    return [
        row["trainable"],
        row["policy"],
        shown,
        share_text(row["acceptance_rate"]),
        "-" if seconds is None else seconds_text(seconds),
        "-" if weights is None else f"{weights:,}",
        "chosen" if row["chosen"] else "",
    ]


STRATEGY_HEADER = (
    "Trained",
    "Policy",
    "Validation",
    "Accepted",
    "Time",
    "Weights",
    "",
)
STRATEGY_NOTE = (
    "Validation accuracy in percent ± its standard error; a head's time is its share "
    "of the time of all heads; weights are those that learn."
)


def seconds_text(seconds: float) -> str:
    """Returns a measured time in seconds, or in minutes where it is long."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


def about(seconds: float) -> str:
    """Returns a duration that does not look more exact than it is."""
    if seconds < 1:
        return "less than a second"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
