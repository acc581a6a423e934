"""Says in words and numbers what came out of a run. Draws nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from keras_rsft.intervals import paired_share_interval, proportion_interval
from keras_rsft.report.run_record import RunRecord
from keras_rsft.result_words import TUNINGS


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number with its name: what it is, its value, and what to know about it."""

    name: str
    value: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The head of the page.

    Attributes:
        sentence: What came out, in one sentence.
        figures: The numbers behind it.
        method: How they were measured, in small print.
    """

    sentence: str
    figures: tuple[Figure, ...]
    method: str


def outcome_of(record: RunRecord) -> Outcome:
    """Returns what came out of a run or of a search."""
    if record.is_search:
        return _of_search(record)
    paired = record.results.get("against_plain")
    if paired:
        sentence, figures, method = _paired(paired, record.kind)
    else:
        sentence, figures, method = _alone(record)
    figures += _shares(record.results)
    return Outcome(sentence, tuple(figures), method)


def percent(share: float | None, digits: int = 1) -> str:
    """Returns a share in [0, 1] as a percentage, "-" for None and NaN."""
    if share is None or share != share:  # Only NaN differs from itself.
        return "-"
    return f"{100 * share:.{digits}f} %"


def _paired(paired: dict[str, Any], kind: str) -> tuple[str, list[Figure], str]:
    images, both = paired["images"], paired["both_right"]
    ours, plain = (
        both + paired[f"only_{name}_right"] for name in ("rejection", "plain")
    )
    low, high = paired_share_interval(
        paired["only_rejection_right"], paired["only_plain_right"], images
    )
    points = 100 * (ours - plain) / images
    interval = f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    if low > 0:
        verdict = f"{points:.1f} points better"
    elif high < 0:
        verdict = f"{-points:.1f} points worse"
    else:
        verdict = "a difference that may be chance"
    sentence = (
        f"With rejection the head gets {percent(ours / images)} of {images:,} "
        f"{paired['split']} {kind} right, without it {percent(plain / images)}: "
        f"{verdict} ({interval} points)."
    )
    figures = [
        Figure("With rejection", percent(ours / images), _interval(ours, images)),
        Figure("Plain fine-tuning", percent(plain / images), _interval(plain, images)),
        Figure("Difference in points", f"{points:+.1f}", _range(low, high, "+")),
    ]
    return sentence, figures, _method(paired["split"], paired["wrong_labels"], kind)


def _method(split: str, wrong_labels: int | None, kind: str) -> str:
    labels = {
        None: "by its given labels, right or wrong",
        0: "by labels that are known to be right",
    }.get(wrong_labels, f"by its given labels, of which {wrong_labels} are known wrong")
    return (
        f"Measured on the {split} split {labels}. Both heads have the same features, "
        "seed and settings. Intervals: Wilson (1927) for each head; Agresti and Min "
        f"(2005) for the difference, {kind[:-1]} by {kind[:-1]}. They say what other "
        f"{kind} would change, not what another seed would."
    )


def _alone(record: RunRecord) -> tuple[str, list[Figure], str]:
    for split in ("test", "validation"):
        accuracy = record.results.get(f"{split}_accuracy")
        count = record.split_sizes.get(split, 0)
        if accuracy is None or not count:
            continue
        interval = _interval(round(accuracy * count), count)
        sentence = (
            f"The model gets {percent(accuracy)} of {count:,} {split} {record.kind} "
            f"right (interval of {interval}). No plain head was trained beside it."
        )
        method = (
            f"Measured on the {split} split by its given labels. Interval: Wilson "
            f"(1927). It says what other {record.kind} would change, not another seed."
        )
        return sentence, [Figure("Accuracy", percent(accuracy), interval)], method
    return "There is no test or validation split to judge the model by.", [], ""


def _interval(right: int, count: int) -> str:
    return _range(*proportion_interval(right, count))


def _range(low: float, high: float, sign: str = "") -> str:
    return f"95 %: {100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _shares(results: dict[str, Any]) -> list[Figure]:
    figures = []
    for tuning, name in TUNINGS.items():
        if results.get(f"{tuning}_kept"):
            shown = results.get(f"{tuning}_test_accuracy")
            figures.append(Figure(name, percent(shown), "the model that was kept"))
    if "estimated_wrong_labels" in results:
        wrong = percent(results["estimated_wrong_labels"], 0)
        known = results.get("wrong_labels")
        note = "estimated" if known is None else f"{percent(known, 0)} really are"
        figures.append(Figure("Labels that look wrong", wrong, note))
    if "acceptance_rate" in results:
        accepted = percent(results["acceptance_rate"], 0)
        figures.append(Figure("Accepted", accepted, "of the last epoch's samples"))
    if "wrong_labels_rejected" in results:
        right = percent(results.get("right_labels_rejected"))
        rejected = percent(results["wrong_labels_rejected"])
        note = f"and {right} of the right ones"
        figures.append(Figure("Wrong labels rejected", rejected, note))
    return figures


def _of_search(record: RunRecord) -> Outcome:
    results = record.results
    rows = {row: results.get(row) or {} for row in ("chosen", "plain")}
    images = results.get("test_images") or 0
    figures = []
    for row, numbers in rows.items():
        for split in ("test", "validation"):
            accuracy = numbers.get(f"{split}_accuracy")
            if accuracy is None:
                continue
            judged = split == "test" and images
            note = _interval(round(accuracy * images), images) if judged else ""
            name = f"{split.capitalize()}, {row}"
            figures.append(Figure(name, percent(accuracy), note))
        if numbers.get("acceptance_rate") is not None:
            accepted = percent(numbers["acceptance_rate"])
            figures.append(Figure(f"Accepted, {row}", accepted))
    method = (
        f"{results.get('trials', 0)} trials. The test split was looked at once, "
        "for the chosen setting and for plain fine-tuning."
    )
    if rows["plain"].get("trial"):
        method += " Plain fine-tuning is the best trial that accepts everything."
    if images:
        method += " Intervals: Wilson (1927), each for itself."
    return Outcome(
        _search_sentence(rows, images, record.kind) or str(results.get("reason", "")),
        tuple(figures),
        method,
    )


def _search_sentence(
    rows: dict[str, dict[str, Any]], images: int, kind: str
) -> str | None:
    ours, plain = (rows[row].get("test_accuracy") for row in ("chosen", "plain"))
    if ours is None or plain is None:
        return None
    counted = f"{images:,} test {kind}" if images else f"the test {kind}"
    return (
        f"The chosen setting gets {percent(ours)} of {counted} right, plain "
        f"fine-tuning {percent(plain)}."
    )
