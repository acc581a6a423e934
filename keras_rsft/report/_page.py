"""Renders a run as one HTML file."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from keras_rsft import _storage
from keras_rsft._stats import paired_share_interval, proportion_interval
from keras_rsft.errors import InvalidArgument
from keras_rsft.report import _charts as charts
from keras_rsft.report._record import RunRecord, Samples, read_run
from keras_rsft.report._summary import TUNINGS, share_text, strategies_table

# Gallery ------------------------------------------------------------------------------

# What a page holds in itself: it must stay small enough to be sent by mail.
MAX_EMBEDDED = 2_000
MAX_EMBEDDED_BYTES = 9_000_000
MAX_SHOWN_PAIRS = 60


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Given against predicted labels: a row of counts for each given class."""

    classes: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    strengths: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int, int], ...]


def confusion_of(
    samples: Samples, num_classes: int, *, max_classes: int = 20, max_pairs: int = 30
) -> Confusion:
    """Counts labels; with more than `max_classes` there is no table, only pairs."""
    known = samples.predicted >= 0
    flat = samples.given[known].astype(np.int64) * num_classes
    flat += samples.predicted[known]
    cells, frequencies = np.unique(flat, return_counts=True)
    different = cells // num_classes != cells % num_classes
    order = np.argsort(-frequencies[different], kind="stable")[:max_pairs]
    pairs = tuple(
        (int(cell // num_classes), int(cell % num_classes), int(count))
        for cell, count in zip(
            cells[different][order], frequencies[different][order], strict=True
        )
    )
    if num_classes > max_classes:
        return Confusion((), (), (), pairs)
    table = np.zeros((num_classes, num_classes), np.int64)
    table.flat[cells] = frequencies
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    strengths = np.where(table > 0, np.clip(np.ceil(shares * 9), 1, 9), 0).astype(int)
    return Confusion(
        tuple(range(num_classes)),
        tuple(tuple(row) for row in table.tolist()),
        tuple(tuple(row) for row in strengths.tolist()),
        pairs,
    )


def gallery_data(
    record: RunRecord, *, served: bool, max_bytes: int = MAX_EMBEDDED_BYTES
) -> dict[str, Any]:
    """Returns what the page's script shows, as JSON can hold it."""
    samples = record.ledger
    order = np.argsort(-samples.numbers["suspicion"], kind="stable")
    place = {sample_id: row for row, sample_id in enumerate(samples.ids)}
    pairs = [
        (place[one], place[other], similarity)
        for one, other, similarity in record.pairs[:MAX_SHOWN_PAIRS]
        if one in place and other in place
    ]
    pictures: dict[int, str] = {}
    if served:
        rows = order.tolist()
    else:
        wanted = [row for pair in pairs for row in pair[:2]]
        wanted += order[:MAX_EMBEDDED].tolist()
        pictures = _shown(record, list(dict.fromkeys(wanted)), max_bytes)
        rows = [row for row in order.tolist() if row in pictures]
    shown = {row: number for number, row in enumerate(rows)}
    return {
        "run": record.identity,
        "kind": record.kind,
        "classes": list(record.class_names),
        "total": len(samples),
        "served": served,
        "pairs": [
            [shown[one], shown[other], round(similarity, 3)]
            for one, other, similarity in pairs
            if one in shown and other in shown
        ],
        "samples": _columns(record, rows, pictures, served=served),
    }


def _shown(record: RunRecord, rows: Sequence[int], max_bytes: int) -> dict[int, str]:
    """Returns pictures or texts till they fill the room; "" where there is none."""
    pictures, used = {}, 0
    for row in rows:
        sample_id = record.ledger.ids[row]
        if record.kind == "texts":
            text = record.texts.get(sample_id, "")
        else:
            picture = record.thumbnail(sample_id) or b""
            text = base64.b64encode(picture).decode("ascii")
        used += len(text.encode())
        if used > max_bytes:
            break
        pictures[row] = text
    return pictures


def _columns(
    record: RunRecord, rows: Sequence[int], pictures: dict[int, str], *, served: bool
) -> dict[str, list]:
    samples = record.ledger
    picked = np.array(rows, np.int64)
    columns = {
        "id": [samples.ids[row] for row in rows],
        "given": samples.given[picked].tolist(),
        "predicted": samples.predicted[picked].tolist(),
        "clean": samples.clean[picked].tolist(),
        "probability": _rounded(samples.numbers["predicted_probability"][picked]),
        "suspicion": _rounded(samples.numbers["suspicion"][picked]),
        "loss": _rounded(samples.numbers["loss_mean"][picked]),
        "rejected": samples.counts["rejected"][picked].tolist(),
        "seen": samples.counts["seen"][picked].tolist(),
    }
    if record.kind == "texts":  # A server has no more of them than the page.
        columns["text"] = [record.texts.get(samples.ids[row], "") for row in rows]
    elif served:  # The row's number in the ledger names the picture.
        has_picture = [samples.ids[row] in record.thumbnail_places for row in rows]
        columns["picture"] = [
            str(row) if has else "" for row, has in zip(rows, has_picture, strict=True)
        ]
    else:
        columns["picture"] = [pictures[row] for row in rows]
    return columns


def _rounded(values: np.ndarray) -> list[float | None]:
    return [round(v, 4) if math.isfinite(v) else None for v in values.tolist()]


# Page ---------------------------------------------------------------------------------

_STYLES = ("page.css", "review.css")
_SCRIPTS = ("charts.js", "decisions.js", "gallery.js", "review.js", "start.js")
_MOST_CLASSES = 40
_LONGEST_VALUE = 300
_MARK = b'<meta name="generator" content="keras_rsft">'


class _Written(Protocol):
    @property
    def folder(self) -> Path | None: ...


def write_report(
    run: _Written | str | os.PathLike, path: str | os.PathLike | None = None
) -> Path:
    """Writes the page of a run: what came out, and which labels to look at.

    One HTML file that needs no network: the most suspicious 2,000 samples with their
    pictures, at most some 12 MB.

    Args:
        run: A run, or the folder of a run or of a search.
        path: The file. Default: `report.html` in the run's folder. A report that is
            there already is replaced.

    Returns:
        The file's path.

    Raises:
        InvalidArgument: If it is no such folder, the run was not written, or `path`
            is a file of another kind.
        DataError: If a file of the run cannot be understood.
    """
    folder = run if isinstance(run, (str, os.PathLike)) else run.folder
    if folder is None:
        raise InvalidArgument(
            "The report is made from a run's folder, and this run was not written. "
            "Give `finetune` an `output`."
        )
    record = read_run(Path(folder))
    path = record.folder / _storage.REPORT_FILE if path is None else Path(path)
    _require_own(path)
    beside = path.with_name(f".partial-{path.name}")
    beside.write_text(render_page(record), encoding="utf-8")
    os.replace(beside, path)
    return path


def _require_own(path: Path) -> None:
    """Raises InvalidArgument if a file is there that is no report."""
    if path.exists() and not (path.is_file() and _MARK in path.read_bytes()[:4096]):
        raise InvalidArgument(
            f"{path} exists and is not a report. Nothing of yours is overwritten: "
            "choose another path, or move it away."
        )


def render_page(record: RunRecord, *, served: bool = False) -> str:
    """Returns the page as HTML, served with the pictures of all samples."""
    style = "\n".join(_asset(name) for name in _STYLES)
    scripts = "\n".join(map(_asset, _SCRIPTS))
    script = f'(() => {{\n"use strict";\n{scripts}\n}})();'
    pictures = "'self' data:" if served else "data:"
    policy = (
        f"default-src 'none'; img-src {pictures}; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    page = _templates().get_template("report.html")
    return page.render(
        policy=policy,
        style=style,
        script=script,
        record=record,
        **_content(record, served=served),
    )


def _content(record: RunRecord, *, served: bool) -> dict[str, Any]:
    content: dict[str, Any] = {
        "outcome": outcome_of(record),
        "curves": learning_curves(record),
        "curves_note": curves_note(record),
        "overfitting": (record.results.get("overfitting") or {}).get("sentence"),
        "histograms": charts.histograms(record.losses),
        "pictures": {
            name: f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
            for name, picture in record.pictures.items()
        },
        "strategies": strategies_table(record.results.get("strategies") or ()),
        "settings": _settings(record),
        "command": record.config.get("command") or record.results.get("command"),
        "versions": record.config.get("versions") or record.results.get("versions", {}),
        "finding": _finding(record),
        "served": served,
        "acceptance": None,
        "gallery": None,
    }
    if record.is_search:
        return content
    samples = record.ledger
    data = gallery_data(record, served=served)
    confusion = confusion_of(samples, len(record.class_names))
    return content | {
        "acceptance": _acceptance(record),
        "confusion": confusion,
        "gallery": data,
        "gallery_json": script_json(data),
        "left_out": len(samples) - len(data["samples"]["id"]),
    }


def script_json(value: Any) -> str:
    """Returns JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _acceptance(record: RunRecord) -> dict[str, Any] | None:
    """Returns classes with their accepted shares, the least accepted first."""
    if record.acceptance is None:
        return None
    pairs = zip(record.class_names, record.acceptance.tolist(), strict=False)
    known = sorted((one for one in pairs if one[1] == one[1]), key=lambda one: one[1])
    rows = [(name, share, share_text(share)) for name, share in known]
    return {"shown": rows[:_MOST_CLASSES], "rest": rows[_MOST_CLASSES:]}


def _finding(record: RunRecord) -> str | None:
    """Returns what a run found in its labels, or how a search chose."""
    if not record.is_search:
        return record.config.get("finding")
    values = record.results.get("settings") or {}
    policy = values.get("policy") or {}
    reason = record.results.get("reason")
    if not policy.get("name"):
        return reason
    rate = f"learning rate {values['learning_rate']:.3g}"
    return f"{reason} Its policy is {policy['name']}, {rate}."


def _settings(record: RunRecord) -> list[tuple[str, str]]:
    """Returns the configuration as rows, one level deep."""
    rows = []
    for name, value in record.config.items():
        if name in ("command", "versions", "finding", "space"):
            continue
        if isinstance(value, dict):
            rows += [
                (f"{name}.{key}", _shown_settings(one)) for key, one in value.items()
            ]
        else:
            rows.append((name, _shown_settings(value)))
    return rows


def _shown_settings(value: Any) -> str:
    if isinstance(value, (dict, list)):
        text = json.dumps(value, ensure_ascii=False, default=str)
        return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
    return "-" if value is None else str(value)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


@functools.cache
def _asset(name: str) -> str:
    place = resources.files("keras_rsft.report") / "assets" / name
    return place.read_text(encoding="utf-8")


def _templates() -> Any:
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("keras_rsft.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters["safe_json"] = script_json
    return templates


# -- The head of the page -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number: its name, its value, and what to know about it."""

    name: str
    value: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The head of the page: one sentence, its numbers, and how they were measured."""

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
        f"With rejection the head gets {share_text(ours / images)} of {images:,} "
        f"{paired['split']} {kind} right, without it {share_text(plain / images)}: "
        f"{verdict} ({interval} points)."
    )
    figures = [
        Figure("With rejection", share_text(ours / images), _interval(ours, images)),
        Figure(
            "Plain fine-tuning", share_text(plain / images), _interval(plain, images)
        ),
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
            f"The model gets {share_text(accuracy)} of {count:,} {split} {record.kind} "
            f"right (interval of {interval}). No plain head was trained beside it."
        )
        method = (
            f"Measured on the {split} split by its given labels. Interval: Wilson "
            f"(1927). It says what other {record.kind} would change, not another seed."
        )
        return sentence, [Figure("Accuracy", share_text(accuracy), interval)], method
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
            figures.append(Figure(name, share_text(shown), "the model that was kept"))
    if "estimated_wrong_labels" in results:
        wrong = share_text(results["estimated_wrong_labels"], 0)
        known = results.get("wrong_labels")
        note = "estimated" if known is None else f"{share_text(known, 0)} really are"
        figures.append(Figure("Labels that look wrong", wrong, note))
    if "acceptance_rate" in results:
        accepted = share_text(results["acceptance_rate"], 0)
        figures.append(Figure("Accepted", accepted, "of the last epoch's samples"))
    if "wrong_labels_rejected" in results:
        right = share_text(results.get("right_labels_rejected"))
        rejected = share_text(results["wrong_labels_rejected"])
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
            figures.append(Figure(name, share_text(accuracy), note))
        if numbers.get("acceptance_rate") is not None:
            accepted = share_text(numbers["acceptance_rate"])
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
        f"The chosen setting gets {share_text(ours)} of {counted} right, plain "
        f"fine-tuning {share_text(plain)}."
    )


# -- Learning curves ------------------------------------------------------------


def learning_curves(record: RunRecord) -> list[charts.LineChart]:
    """Returns the charts of a run by epoch."""
    metrics = record.metrics
    plain = record.results.get("against_plain", {}).get("history", {})
    plain_validation = [float(value) for value in plain.get("val_accuracy", [])]
    thresholds = {one.epoch: one.threshold for one in record.losses}
    epochs = range(1, len(metrics.get("loss", ())) + 1)
    known = (thresholds.get(epoch) for epoch in epochs)
    in_use = [math.nan if one is None else one for one in known]
    drawn = [
        charts.line_chart(
            "accuracy",
            "Accuracy, given labels",
            [
                *_of_both(metrics, "accuracy"),
                ("validation, plain head", "second", plain_validation),
            ],
            as_percent=True,
        ),
        charts.line_chart(
            "loss",
            "Loss",
            [*_of_both(metrics, "loss"), ("threshold", "threshold", in_use)],
            as_percent=False,
        ),
        charts.line_chart(
            "selection",
            "Acceptance",
            [
                ("accepted samples", "first", metrics.get("acceptance_rate", [])),
                ("wrong labels rejected", "second",
                 metrics.get("rejection_recall", [])),
                ("rejected labels that are wrong", "quiet",
                 metrics.get("rejection_precision", [])),
            ],
            as_percent=True,
        ),
    ]  # fmt: skip
    return [one for one in drawn if one is not None]


def _of_both(
    metrics: dict[str, list[float]], measure: str
) -> list[tuple[str, str, Sequence[float]]]:
    def completed(name: str, instead: str) -> Sequence[float]:
        """Epochs that train the backbone have the mean over the epoch alone."""
        others = metrics.get(instead, [])
        values = metrics.get(name, others)
        if len(others) != len(values):
            return values
        pairs = zip(values, others, strict=True)
        return [other if math.isnan(value) else value for value, other in pairs]

    older = "accepted_loss" if measure == "loss" else ""
    lines = [
        ("training, all samples", "quiet", completed(f"train_{measure}", measure)),
        ("training, accepted samples", "quiet dashed",
         completed(f"train_accepted_{measure}", older)),
        ("validation", "first", metrics.get(f"val_{measure}", [])),
    ]  # fmt: skip
    rejects = any(rate < 1 for rate in metrics.get("acceptance_rate", []))
    return lines if rejects else [one for one in lines if "dashed" not in one[1]]


def curves_note(record: RunRecord) -> str:
    """Says how the accuracies and losses were measured."""
    if "train_accuracy" not in record.metrics:
        return ""
    said = "Measured at the end of each epoch, by the same weights for both splits."
    if any(map(math.isnan, record.metrics["train_accuracy"])):
        said += " In epochs that train the base, training is the mean over the epoch."
    return said
