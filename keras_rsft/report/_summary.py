"""One tabular summary per result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from keras_rsft.config import takes_texts

if TYPE_CHECKING:
    from keras_rsft._stats import Interval


# Words --------------------------------------------------------------------------------

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
    """Returns a mean ± half of its interval in percent; no width for one seed."""
    if interval is None:
        return "-"
    mean = f"{100 * interval.mean:{sign}.1f}"
    if math.isinf(interval.half_width):
        return mean
    return f"{mean} ± {100 * interval.half_width:.1f}"


def setting_text(values: Mapping[str, Any]) -> str:
    """Returns names and values of a trial in one line, numbers to three digits."""
    short = (
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )
    return ", ".join(short)


def strategy_texts(row: Mapping[str, Any]) -> list[str]:
    """Returns the cells of one `StrategyRow`, given as a mapping of its fields."""
    accuracy, seconds = row["validation_accuracy"], row["seconds"]
    weights = row["trainable_weights"]
    shown = "-"
    if accuracy is not None:
        shown = f"{100 * accuracy:.1f} ± {100 * row['standard_error']:.1f}"
    elif row["message"]:
        shown = "failed"
    return [
        row["unfreeze"],
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


# Summaries ----------------------------------------------------------------------------

SHOWN_TRIALS = 5


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text; the first `text_columns` to the left, the others to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    note: str = ""
    text_columns: int = 1


@dataclasses.dataclass(frozen=True)
class Summary:
    """Tables, what should worry a reader, and what explains the numbers."""

    tables: tuple[Table, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def run_summary(run: Any) -> Summary:
    """Summarises a `Run`."""
    results = run.results
    rows = [
        (name, share_text(results[key]))
        for key, name in RESULT_NAMES.items()
        if key in results
    ]
    for tuning, name in TUNINGS.items():
        if (kept := results.get(f"{tuning}_kept")) is not None:
            rows.append((name, "kept" if kept else "not kept: worse on validation"))
    if "best_epoch" in results:
        epochs = f"{results['best_epoch']} of {results['epochs_trained']}"
        rows.append(("Epoch that was kept", epochs))
    rows.append(("Time", f"{results['seconds']:.1f} s"))
    warnings = []
    if unreadable := len(run.features.unreadable):
        kind = "texts" if takes_texts(run.config["backbone"]) else "images"
        warnings.append(
            f"{unreadable} {kind} cannot be read and were left out; see "
            "unreadable.csv in the run folder."
        )
    if run.overfitting is not None:
        warnings.append(run.overfitting.sentence)
    notes = () if run.finding is None else (run.finding,)
    return Summary((Table(("", ""), tuple(rows)),), tuple(warnings), notes)


def comparison_summary(comparison: Any) -> Summary:
    """Summarises a `Comparison`: a row for each method, and the verdict."""
    columns = ("Method", "Test", "To plain", "Accepted", "Recovered", "Seconds")
    rows = []
    for name, method in comparison.summaries.items():
        accuracy = interval_text(method.test_accuracy)
        if method.stalled:
            accuracy = f"{accuracy}, {method.stalled} stalled".removeprefix("-, ")
        difference = interval_text(method.difference_to_plain, sign="+")
        shares = (method.acceptance_rate, method.recovered)
        shown = (share_text(share, 0) for share in shares)
        rows.append((name, accuracy, difference, *shown, f"{method.seconds:.1f}"))
    seeds = len({outcome.seed for outcome in comparison.outcomes})
    spread = covered = made_wrong = ""
    if seeds > 1:  # One has no interval.
        spread = f", mean of {seeds} seeds ± half of its 95 % interval over seeds"
        covered = " The verdict allows for other test samples too."
    if noise := comparison.config.get("noise"):
        made_wrong = (
            f"Training and validation labels were made wrong on purpose ({noise}), "
            "other ones for each seed."
        )
    measured = (
        f"Test accuracy in percent{spread}; differences to plain are paired by seed."
    )
    notes = (made_wrong, measured + covered, comparison.verdict.sentence)
    return Summary(
        (Table(columns, tuple(rows)),), comparison.notes, tuple(filter(None, notes))
    )


def search_summary(found: Any, most_trials: int = SHOWN_TRIALS) -> Summary:
    """Summarises a `Search`: the best trials, and the choice beside plain."""
    results = found.results
    better = sorted(
        (one for one in found.outcomes if one.metrics),
        key=lambda one: -one.metrics["val_accuracy"],
    )
    trials = Table(
        ("Trial", "Setting", "Validation", "Accepted"),
        tuple(
            (
                one.trial_id,
                setting_text(one.values),
                share_text(one.metrics["val_accuracy"]),
                share_text(one.metrics["acceptance_rate"]),
            )
            for one in better[:most_trials]
        ),
        title=f"The best of {len(found.outcomes)} trials",
        text_columns=2,
    )
    strategies = strategies_table(results.get("strategies", ()))
    names = ("validation_accuracy", "test_accuracy", "acceptance_rate")
    choice = Table(
        ("", "Validation", "Test", "Accepted"),
        tuple(
            (title, *(share_text(results[key].get(name)) for name in names))
            for key, title in (("chosen", "chosen"), ("plain", "plain fine-tuning"))
        ),
    )
    warnings: tuple[str, ...] = ()
    if failed := results["failed"]:
        noun = "trial" if failed == 1 else "trials"
        warnings = (f"{failed} {noun} failed; see trials.csv.",)
    tables = (trials, *([strategies] if strategies.rows else []), choice)
    return Summary(tables, warnings, (found.choice.reason,))


def strategies_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns how much of the backbone to train, from the fields of `StrategyRow`s."""
    return Table(
        STRATEGY_HEADER,
        tuple(tuple(strategy_texts(row)) for row in rows),
        title="How much of the backbone to train",
        note=STRATEGY_NOTE,
        text_columns=2,
    )


def ranking_summary(ranking: Any) -> Summary:
    """Summarises a `BackboneRanking`: the backbones, the best first."""
    first, *others = ranking.ranked
    rows = tuple(
        (
            one.name,
            f"{100 * one.accuracy:.1f} ± {100 * one.accuracy_error:.1f}",
            "" if one is first else f"{100 * one.behind:.1f}",
            f"{1000 * one.seconds_per_image:.1f}",
            f"{one.weights_bytes / 1e6:.1f}",
            str(one.dim),
        )
        for one in ranking.ranked
    )
    notes = [
        f"Accuracy in percent of a quick head on {ranking.num_images} training "
        "samples, each predicted from the others, ± half of its 95 % interval; ms of "
        "the pass for a sample."
    ]
    if ranking.counts_right_labels:
        notes.append(
            f"About {100 * ranking.noise_rate:.0f} % of the labels look wrong: each "
            "label counts by how likely it is right, by all bases together."
        )
    equal = [one.name for one in others if one.behind <= one.behind_error]
    if equal:
        notes.append(
            f"Not shown to be worse than the first: {', '.join(equal)}; a larger "
            "--sample tells more."
        )
    warnings = [f"{name}: {why.partition(chr(10))[0]}" for name, why in ranking.failed]
    columns = ("Base", "Accuracy", "Behind", "ms", "MB", "Features")
    return Summary((Table(columns, rows),), tuple(warnings), tuple(notes))
