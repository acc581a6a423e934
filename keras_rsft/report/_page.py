"""Renders a run as one HTML file."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_rsft import _storage
from keras_rsft._stats import paired_share_interval
from keras_rsft.config import TEXTS, PolicyConfig, TrainConfig, UnfreezeConfig
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.report import _charts as charts
from keras_rsft.report import _summary as summary
from keras_rsft.report._record import RunRecord, Samples, read_run
from keras_rsft.report._summary import share_text

# Gallery ------------------------------------------------------------------------------

# What a page holds in itself: it must stay small enough to be sent by mail.
MAX_EMBEDDED = 2_000
MAX_EMBEDDED_BYTES = 9_000_000
MAX_SHOWN_PAIRS = 60
EXAMPLES = 3


def confusion_of(
    samples: Samples, num_classes: int, *, max_classes: int = 20, max_pairs: int = 30
) -> dict[str, list]:
    """Counts given by predicted labels; only pairs with more than `max_classes`."""
    known = samples.predicted >= 0
    if not known.any():
        return {}
    flat = samples.given[known].astype(np.int64) * num_classes
    cells, frequencies = np.unique(flat + samples.predicted[known], return_counts=True)
    counted = zip(cells.tolist(), frequencies.tolist(), strict=True)
    pairs = [(*divmod(cell, num_classes), count) for cell, count in counted]
    different = sorted((one for one in pairs if one[0] != one[1]), key=lambda p: -p[2])
    found: dict[str, list] = {"counts": [], "strengths": []}
    found["pairs"] = different[:max_pairs]
    if num_classes <= max_classes:
        table = np.zeros((num_classes, num_classes), np.int64)
        table.flat[cells] = frequencies
        shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        found["counts"] = table.tolist()
        found["strengths"] = np.ceil(shares * 9).astype(int).tolist()
    return found


def gallery_data(
    record: RunRecord,
    *,
    served: bool,
    max_bytes: int = MAX_EMBEDDED_BYTES,
    token: str | None = None,
    message: str | None = None,
) -> dict[str, Any]:
    """Returns what the page's script shows, as JSON can hold it."""
    samples = record.ledger
    order = np.argsort(-samples.suspicion, kind="stable").tolist()
    row_of = {sample_id: row for row, sample_id in enumerate(samples.ids)}
    pairs = [
        (row_of[one], row_of[other], round(similarity, 3))
        for one, other, similarity in record.pairs[:MAX_SHOWN_PAIRS]
        if one in row_of and other in row_of
    ]
    in_pairs = [row for pair in pairs for row in pair[:2]]
    wrong = samples.looks_wrong
    first = [row for row in order if wrong[row]]
    wanted = order if served else [*in_pairs, *[*first, *order][:MAX_EMBEDDED]]
    contents: dict[int, str] = {}
    room = math.inf if served else max_bytes
    for row in dict.fromkeys(wanted):
        # Half of the room is for larger pictures.
        large = room > max_bytes / 2 and not served
        content = _content(record, row, served=served, large=large)
        room -= len(content.encode())
        if room < 0:
            break
        contents[row] = content
    rows = [row for row in order if row in contents]
    shown = {row: number for number, row in enumerate(rows)}

    def rounded(values: np.ndarray) -> list[float | None]:
        picked = values[rows].tolist()
        return [round(value, 4) if math.isfinite(value) else None for value in picked]

    return {
        "run": record.identity,
        "kind": record.kind,
        "classes": list(record.class_names),
        "total": len(samples.ids),
        "served": served,
        "token": token,
        "message": message,
        "rows": rows if token else [],
        "expected": (record.results.get("label_quality") or {}).get("expected_wrong"),
        "examples": _examples(record, rows, served=served, room=max_bytes / 10),
        "pairs": [
            [shown[one], shown[other], similarity]
            for one, other, similarity in pairs
            if one in shown and other in shown
        ],
        "samples": {
            "id": [samples.ids[row] for row in rows],
            "split": [samples.split[row] for row in rows],
            "given": samples.given[rows].tolist(),
            "predicted": samples.predicted[rows].tolist(),
            "clean": samples.clean[rows].tolist(),
            "probability": rounded(samples.probability),
            "suspicion": rounded(samples.suspicion),
            "loss": rounded(samples.loss),
            "wrong": wrong[rows].tolist(),
            "rejected": samples.rejected[rows].tolist(),
            "seen": samples.seen[rows].tolist(),
            "text" if record.kind == TEXTS else "picture": [contents[r] for r in rows],
        },
    }


def _content(record: RunRecord, row: int, *, served: bool, large: bool = False) -> str:
    """Returns a text, a picture as base64 or the number that names it, or ""."""
    sample_id = record.ledger.ids[row]
    if record.kind == TEXTS:
        return record.texts.get(sample_id, "")
    if served:
        return str(row) if sample_id in record.thumbnail_index else ""
    picture = record.preview(sample_id) if large else None
    return base64.b64encode(picture or record.thumbnail(sample_id) or b"").decode()


def _examples(
    record: RunRecord, rows: Sequence[int], *, served: bool, room: float
) -> dict[int, list[list[str]]]:
    """Returns the least suspicious samples of the classes shown, `[id, content]`."""
    samples = record.ledger
    agreed = np.flatnonzero(samples.given == samples.predicted)
    agreed = agreed[np.argsort(samples.suspicion[agreed], kind="stable")]
    of_class: dict[int, list[int]] = {}
    for row in agreed.tolist():
        best = of_class.setdefault(int(samples.given[row]), [])
        if len(best) < EXAMPLES:
            best.append(row)
    shown: dict[int, list[list[str]]] = {}
    classes = np.stack([samples.given[rows], samples.predicted[rows]], 1).ravel()
    for label in dict.fromkeys(classes.tolist()):
        best = of_class.get(label, [])
        found = [[samples.ids[at], _content(record, at, served=served)] for at in best]
        room -= sum(len(content.encode()) for _, content in found)
        if room < 0 and not served:
            break
        shown[label] = found
    return shown


# Page ---------------------------------------------------------------------------------

_STYLES = ("page.css", "review.css")
_SCRIPTS = (
    "charts.js", "decisions.js", "gallery.js", "review.js", "live.js", "start.js",
)  # fmt: skip
_MOST_CLASSES = 40
_LONGEST_VALUE = 300
# Where browsers save by default.
DOWNLOADED = "~/Downloads/corrections.csv"
_MARK = b'<meta name="generator" content="keras_rsft">'


def write_report(
    run: Any,
    history: Any = None,
    ledger: Any = None,
    *,
    images: Any = None,
    class_names: Sequence[str] | None = None,
    path: str | os.PathLike | None = None,
) -> Path:
    """Writes the page of a run: what came out, and which labels to look at.

    One HTML file that needs no network: the most suspicious 2,000 samples with their
    pictures, at most some 12 MB. Of a model of your own:
    `write_report(model, history, ledger)`.

    Args:
        run: A run, or the folder of a run or of a search; or an `RSFTModel` that was
            fitted with a ledger.
        history: Of such a model: what its `fit` returned.
        ledger: Of such a model: the `RejectionLedger` among the callbacks.
        images: Of such a model: the training samples' pictures, `(n, height, width[,
            channels])`, with any range of values. Default: the inputs of `fit`.
        class_names: Of such a model: the names of the classes, by label. Default: the
            numbers.
        path: The file. Default: `report.html` in the run's folder, of a model in the
            working directory. A report that is there already is replaced.

    Returns:
        The file's path.

    Raises:
        InvalidArgument: If it is no such folder or model, the run was not written, or
            `path` is a file of another kind.
        DataError: If a file of the run cannot be understood.
    """
    if ledger is None and (history is not None or hasattr(run, "fit")):
        raise InvalidArgument(
            "The report of a model is made from its ledger. Received: none. Call `fit` "
            "with a RejectionLedger among the callbacks, then "
            "`write_report(model, history, ledger)`."
        )
    if ledger is not None:
        from keras_rsft.report._own import write_folder  # With TensorFlow.

        target = Path(_storage.REPORT_FILE if path is None else path)
        _require_report(target)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent, run.model.name)
            folder.mkdir()
            write_folder(folder, run, history, ledger, images, class_names)
            page = render_page(read_run(folder))
        ledger.page = target
    else:
        written = run if isinstance(run, (str, os.PathLike)) else run.folder
        if written is None:
            raise InvalidArgument(
                "The report is made from a run's folder, and this run was not written. "
                "Give `finetune` an `output`."
            )
        record = read_run(Path(written))
        target = Path(record.folder / _storage.REPORT_FILE if path is None else path)
        _require_report(target)
        page = rendered(record)
    _storage.replaced(target, lambda beside: beside.write_text(page, encoding="utf-8"))
    return target


def _require_report(path: Path) -> None:
    """Refuses to overwrite a file that is not a report."""
    if path.exists() and not _is_report(path):
        raise InvalidArgument(
            f"{path} exists and is not a report. Nothing of yours is overwritten: "
            "choose another path, or move it away."
        )


def rendered(record: RunRecord, **how: Any) -> str:
    """Returns a run's page; what only now turns out to be damaged is one of two."""
    folder = record.folder
    source = f"{folder / _storage.RESULTS_FILE} or {_storage.CONFIG_FILE} beside it"
    with _storage.understood(source):
        return render_page(record, **how)


def _is_report(path: Path) -> bool:
    with (
        contextlib.suppress(OSError, DataError),
        _storage.open_regular(path) as file,
    ):
        return _MARK in file.read(4096)
    return False


def render_page(
    record: RunRecord,
    *,
    served: bool = False,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Returns the page as HTML, served with the pictures of all samples.

    With a token it asks the server to sort the samples anew; a message says why not.
    """
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("keras_rsft.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda one: summary.shown(one) if type(one) is str else one,
    )
    templates.filters |= {"safe_json": script_json, "share": share_text}
    style = "\n".join(map(charts.asset, _STYLES))
    scripts = "\n".join(map(charts.asset, _SCRIPTS))
    script = f'(() => {{\n"use strict";\n{scripts}\n}})();'
    pictures = "'self' data:" if served else "data:"
    results, config = record.results, record.config
    gallery, connect = None, "connect-src 'self'; " if token else ""
    if not record.is_search:
        gallery = gallery_data(record, served=served, token=token, message=message)
    return templates.get_template("report.html").render(
        policy=(
            f"default-src 'none'; img-src {pictures}; style-src {_hash(style)}; "
            f"script-src {_hash(script)}; {connect}base-uri 'none'; form-action 'none'"
        ),
        style=style,
        script=script,
        record=record,
        outcome=outcome_of(record),
        curves=learning_curves(record),
        curves_note=curves_note(record),
        overfitting=(results.get("overfitting") or {}).get("sentence"),
        histograms=charts.histograms(record.losses),
        pictures={
            name: f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
            for name, picture in record.pictures.items()
        },
        strategies=summary.strategies_table(results.get("strategies") or ()),
        settings=_settings(record),
        command=config.get("command") or results.get("command"),
        versions=config.get("versions") or results.get("versions", {}),
        finding=_finding(record),
        acceptance=_acceptance(record),
        most_classes=_MOST_CLASSES,
        gallery=gallery,
        against_before=(results.get("against_before") or {}).get("sentence"),
        next_command=gallery and next_command(record),
        labels=(results.get("label_quality") or {}).get("finding"),
        label_tables=_label_tables(results),
        confusion=gallery and confusion_of(record.ledger, len(record.class_names)),
    )


def script_json(value: Any) -> str:
    """Returns JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


# Options of a command that are about its own output.
_OWN_OPTIONS = {"--output": 1, "--json": 0, "--quiet": 0}
_TO_REPEAT = ("backbone", "epochs", "batch_size", "learning_rate", "optimizer", "seed")


def next_command(record: RunRecord) -> str | None:
    """Returns the whole command that trains on the corrections of a review."""
    config = record.config
    if "fingerprint" in config:
        return _next_call(record)
    try:
        words = shlex.split(str(config.get("command") or ""))
    except ValueError:
        words = []
    if words[1:2] in (["fit"], ["audit"]):
        kept, left_out = ["keras-rsft", "fit"], []
        rest = iter(words[2:])
        for word in rest:
            name, _, value = word.partition("=")
            if name == "--set":
                value = value or next(rest, "")
                if not value.startswith("before="):
                    kept += ["--set", value]
            elif name not in _OWN_OPTIONS:
                kept.append(word)
            else:
                left_out.append(name)
                if _OWN_OPTIONS[name] and not value:
                    next(rest, None)
    elif isinstance(config.get("data"), str):
        values = {name: config[name] for name in _TO_REPEAT if config.get(name)}
        values["policy"] = (config.get("policy") or {}).get("name")
        options = {name.replace("_", "-"): one for name, one in values.items() if one}
        kept = ["keras-rsft", "fit", config["data"]]
        kept += [f"--{name}={one}" for name, one in options.items()]
        left_out = ["--output"]
    else:
        return None
    if "--output" in left_out and (record.folder / _storage.PREDICTIONS_FILE).exists():
        kept += ["--set", f"before={record.folder}"]
    # Not quoted, so that a shell finds the home folder.
    return f"{shlex.join(kept)} --corrections {DOWNLOADED}"


def _next_call(record: RunRecord) -> str:
    """Returns the same as a call in Python, of data that no command can load."""
    config = record.config
    arguments = [f'corrections="{DOWNLOADED}"']
    if config.get("backbone"):
        arguments.append(f"features={config['backbone']!r}")
    settings = _changed(TrainConfig, config)
    if settings != "TrainConfig()":
        arguments.append(f"settings=rsft.{settings}")
    if (record.folder / _storage.PREDICTIONS_FILE).exists():
        arguments.append(f"before={str(record.folder)!r}")
    arguments.append('output=rsft.NumberedFolder("reviewed")')
    return f"rsft.finetune(data, {', '.join(arguments)})"


def _changed(kind: type, values: dict[str, Any]) -> str:
    """Returns the call that makes a configuration, without what is the default."""
    plain, given = kind(), []
    for field in dataclasses.fields(kind):
        value, default = values.get(field.name), getattr(plain, field.name)
        if isinstance(value, dict):
            if default is None or value != dataclasses.asdict(default):
                nested = _changed(_NESTED[field.name], value)
                given.append(f"{field.name}=rsft.{nested}")
        elif value is not None and value != default:
            given.append(f"{field.name}={value!r}")
    return f"{kind.__name__}({', '.join(given)})"


_NESTED: dict[str, type] = {"policy": PolicyConfig, "unfreeze": UnfreezeConfig}


def _acceptance(record: RunRecord) -> list[tuple[str, float]]:
    """Returns classes with their accepted shares, the least accepted first."""
    pairs = zip(record.class_names, record.acceptance.tolist(), strict=False)
    known = (pair for pair in pairs if not math.isnan(pair[1]))
    return sorted(known, key=lambda pair: pair[1])


def _finding(record: RunRecord) -> str | None:
    """Returns what a run found in its labels, or how a search chose."""
    if not record.is_search:
        return record.config.get("finding")
    chosen, reason = record.results.get("settings") or {}, record.results.get("reason")
    if policy := (chosen.get("policy") or {}).get("name"):
        rate = f"learning rate {chosen['learning_rate']:.3g}"
        return f"{reason} Its policy is {policy}, {rate}."
    return reason


def _label_tables(results: dict[str, Any]) -> tuple[summary.Table, ...]:
    found = results.get("label_quality")
    return () if found is None else summary.label_tables(found)


def _settings(record: RunRecord) -> list[tuple[str, str]]:
    """Returns the configuration as rows, one level deep."""
    flat: dict[str, Any] = {}
    for name, value in record.config.items():
        if name in ("command", "versions", "finding", "space"):
            continue
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": one for key, one in value.items()}
        else:
            flat[name] = value
    for name, value in flat.items():
        text = "-" if value is None else str(value)
        if isinstance(value, (dict, list)):
            text = json.dumps(value, ensure_ascii=False, default=str)
            if len(text) > _LONGEST_VALUE:
                text = f"{text[:_LONGEST_VALUE]}…"
        flat[name] = text
    return list(flat.items())


# -- The head of the page -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One sentence, `(name, value, note)` of its figures, and how it was measured."""

    sentence: str
    figures: list[tuple[str, str, str]]
    method: str = ""


def outcome_of(record: RunRecord) -> Outcome:
    if record.is_search:
        return _of_search(record)
    results = record.results
    if record.is_audit:
        return _of_audit(results["label_quality"])
    found = _paired(record) if results.get("against_plain") else _alone(record)
    known = results.get("wrong_labels")
    really = "estimated" if known is None else f"{share_text(known)} really are"
    right = share_text(results.get("right_labels_rejected"))
    notes = {
        f"{tuning}_test_accuracy": "the model that was kept"
        for tuning in summary.TUNINGS
        if results.get(f"{tuning}_kept")
    } | {
        "estimated_wrong_labels": really,
        "acceptance_rate": "",
        "wrong_labels_rejected": f"and {right} of the right ones",
    }
    shares = [
        (
            summary.RESULT_NAMES[key],
            summary.right_text(results, key) or share_text(results[key]),
            note,
        )
        for key, note in notes.items()
        if key in results
    ]
    return dataclasses.replace(found, figures=found.figures + shares)


def _of_audit(found: dict[str, Any]) -> Outcome:
    wrong = found["expected_wrong"]
    figures = [("Samples", f"{found['samples']:,}", "")]
    if wrong is not None:
        share = share_text(wrong / found["samples"])
        figures.append(("Labels expected wrong", f"{wrong:,.0f}", share))
        figures.append(("Labels that look wrong", f"{found['look_wrong']:,}", ""))
    return Outcome(found["finding"], figures)


def _paired(record: RunRecord) -> Outcome:
    paired, kind = record.results["against_plain"], record.kind
    images, both, split = paired["images"], paired["both_right"], paired["split"]
    only_ours, only_plain = paired["only_rejection_right"], paired["only_plain_right"]
    ours, plain = (both + only_ours) / images, (both + only_plain) / images
    low, high = paired_share_interval(only_ours, only_plain, images)
    points = 100 * (only_ours - only_plain) / images
    verdict = "a difference that may be chance"
    if low > 0 or high < 0:
        verdict = f"{abs(points):.1f} points {'better' if low > 0 else 'worse'}"
    interval = summary.range_text(low, high, "+")
    if by_right := paired.get("by_right_labels"):
        return _by_right_labels(record, by_right, ours, plain)
    wrong = paired["wrong_labels"]
    labels = {
        None: "by its given labels, right or wrong",
        0: "by labels that are known to be right",
    }.get(wrong, f"by its given labels, of which {wrong} are known wrong")
    return Outcome(
        f"With rejection the head gets {share_text(ours)} of {images:,} {split} {kind} "
        f"right, without it {share_text(plain)}: {verdict} (95 % interval {interval} "
        "points).",
        [
            ("With rejection", share_text(ours), _interval(ours, images)),
            ("Plain fine-tuning", share_text(plain), _interval(plain, images)),
            ("Difference in points", f"{points:+.1f}", f"95 %: {interval}"),
        ],
        f"Measured on the {split} split {labels}. Both heads have the same features, "
        "seed and settings. Intervals: Wilson (1927) for each head; Agresti and Min "
        f"(2005) for the difference, {kind[:-1]} by {kind[:-1]}. They cover the "
        f"choice of test {kind}, not of the seed.",
    )


_ESTIMATED = (
    "against the right labels, which nobody knows: estimated from the given ones, how "
    "often each class is mislabelled, and what the training samples say of each label"
)


def _by_right_labels(
    record: RunRecord, estimates: dict[str, list[float]], ours: float, plain: float
) -> Outcome:
    """Returns the outcome by the right labels, which are known or estimated."""
    paired, kind = record.results["against_plain"], record.kind
    split, known = paired["split"], paired["wrong_labels"] is not None
    about = "" if known else "about "
    rejection, without, gain = (
        estimates[name] for name in ("rejection", "plain", "difference")
    )
    verdict = "a difference that may be chance"
    if gain[1] > 0 or gain[2] < 0:
        better = "better" if gain[1] > 0 else "worse"
        verdict = f"{about}{100 * abs(gain[0]):.1f} points {better}"
    interval = summary.range_text(gain[1], gain[2], "+")
    how = "by labels that are known to be right" if known else _ESTIMATED

    def figure(title: str, one: list[float], given: float) -> tuple[str, str, str]:
        note = f"95 %: {summary.range_text(one[1], one[2])}"
        by_given = f"; by the given labels {share_text(given)}"
        by_given = "" if paired["wrong_labels"] == 0 else by_given
        return title, share_text(one[0]), f"{note}{by_given}"

    return Outcome(
        f"With rejection the head gets {about}{share_text(rejection[0])} of "
        f"{paired['images']:,} {split} {kind} right, without it {about}"
        f"{share_text(without[0])}: {verdict} (95 % interval {interval} points).",
        [
            figure("With rejection", rejection, ours),
            figure("Plain fine-tuning", without, plain),
            ("Difference in points", f"{100 * gain[0]:+.1f}", f"95 %: {interval}"),
        ],
        f"Measured on the {split} split {how}. Both heads have the same features, "
        f"seed and settings; the difference is taken {kind[:-1]} by {kind[:-1]}. The "
        f"intervals cover the choice of {split} {kind}, not of the seed.",
    )


def _alone(record: RunRecord) -> Outcome:
    found = summary.accuracies_of(record.results, record.split_sizes)
    if not found:
        return Outcome(record.results.get("sentence") or summary.NOT_JUDGED, [])
    one, kind = found[-1], record.kind
    about = "about " if one.by == "estimated" else ""
    note, by_given = f"95 %: {one.interval}", share_text(one.given)
    if one.by != "given":
        note += f"; by the given labels {by_given}"
    how = {
        "known": "by labels that are known to be right. Interval: Wilson (1927).",
        "estimated": f"{_ESTIMATED}.",
        "given": "by its given labels. Interval: Wilson (1927).",
    }[one.by]
    return Outcome(
        f"The model gets {about}{share_text(one.share)} of {one.count:,} {one.split} "
        f"{kind} right (95 % interval {one.interval}). No plain head was trained "
        "beside it.",
        [("Accuracy", share_text(one.share), note)],
        f"Measured on the {one.split} split {how} It covers the choice of {one.split} "
        f"{kind}, not of the seed.",
    )


def _interval(share: float, count: int) -> str:
    return f"95 %: {summary.proportion_text(share, count)}"


def _of_search(record: RunRecord) -> Outcome:
    results = record.results
    images = results.get("test_images", 0)
    figures, shares = [], {}
    estimated: set[str] = set()
    for key in ("chosen", "plain"):
        numbers = results.get(key) or {}
        for split in ("test", "validation"):
            name = f"{split}_accuracy"
            if (given := numbers.get(name)) is None:
                continue
            share = numbers.get(f"{name}_estimated", given)
            note = _interval(given, images) if split == "test" else ""
            if f"{name}_estimated" in numbers:
                low, high = numbers[f"{name}_low"], numbers[f"{name}_high"]
                note = f"95 %: {summary.range_text(low, high)}; by the given labels "
                note += share_text(given)
                estimated.add(split)
            if split == "test":
                shares[key] = share_text(share)
            figures.append((f"{split.title()}, {key}", share_text(share), note))
        if "acceptance_rate" in numbers:
            accepted = share_text(numbers["acceptance_rate"])
            figures.append((f"Accepted, {key}", accepted, ""))
    method = (
        f"{results.get('trials', 0)} trials. The test split was looked at once, "
        "for the chosen setting and for plain fine-tuning."
    )
    if (results.get("plain") or {}).get("trial"):
        method += " Plain fine-tuning is the best trial that accepts everything."
    if images and "test" not in estimated:
        method += " Intervals: Wilson (1927), each for itself."
    if estimated:
        method += (
            f" The accuracy of {' and '.join(sorted(estimated))} is against the right "
            "labels, which nobody knows: estimated from the given ones, how often each "
            "class is mislabelled, and what the training samples say of each label."
        )
    sentence = str(results.get("reason", ""))
    if len(shares) > 1:
        about = "about " if "test" in estimated else ""
        sentence = (
            f"The chosen setting gets {about}{shares['chosen']} of {images:,} test "
            f"{record.kind} right, plain fine-tuning {about}{shares['plain']}."
        )
    return Outcome(sentence, figures, method)


# -- Learning curves ------------------------------------------------------------


def learning_curves(record: RunRecord) -> list[charts.LineChart]:
    metrics = record.metrics
    plain = record.results.get("against_plain", {}).get("history", {})
    in_use = [math.nan] * len(metrics.get("loss", ()))
    for one in record.losses:
        if one.threshold is not None and one.epoch <= len(in_use):
            in_use[one.epoch - 1] = one.threshold
    precision = metrics.get("rejection_precision", [])
    selection = [
        ("accepted samples", "first", metrics.get("acceptance_rate", [])),
        ("wrong labels rejected", "second", metrics.get("rejection_recall", [])),
        ("rejected labels that are wrong", "quiet", precision),
    ]
    by_right = "_estimated" if _by_right(metrics) else ""
    of_plain = plain.get(f"val_accuracy{by_right}", [])
    accuracies = [
        *_of_both(metrics, "accuracy"),
        ("validation, plain head", "second", of_plain),
    ]
    losses = [*_of_both(metrics, "loss"), ("threshold", "threshold", in_use)]
    drawn = (
        charts.line_chart(
            "Accuracy" if by_right else "Accuracy, given labels", accuracies
        ),
        charts.line_chart("Loss", losses, as_percent=False),
        charts.line_chart("Acceptance", selection),
    )
    return [one for one in drawn if one is not None]


def _by_right(metrics: dict[str, list[float]]) -> bool:
    """Says whether right validation labels, as far as known, are not the given ones."""
    names = ("val_accuracy", "val_accuracy_estimated")
    pairs = zip(*(metrics.get(name, []) for name in names), strict=False)
    return any(abs(one - other) > 1e-6 for one, other in pairs)


def _of_both(
    metrics: dict[str, list[float]], measure: str
) -> list[tuple[str, str, Sequence[float]]]:
    def completed(name: str, instead: str) -> list[float]:
        """Epochs that train the backbone have the mean over the epoch alone."""
        values = metrics.get(name, metrics.get(instead, []))
        pairs = zip(values, metrics.get(instead, values), strict=True)
        return [other if math.isnan(value) else value for value, other in pairs]

    lines: list[tuple[str, str, Sequence[float]]] = [
        ("training, all samples", "quiet", completed(f"train_{measure}", measure)),
        ("validation", "first", metrics.get(f"val_{measure}", [])),
    ]
    if _by_right(metrics):
        right = metrics.get(f"val_{measure}_estimated", [])
        given = metrics.get(f"val_{measure}", [])
        lines[1:] = [
            ("validation, right labels", "first", right),
            ("validation, given labels", "first dashed", given),
        ]
    if any(rate < 1 for rate in metrics.get("acceptance_rate", [])):
        accepted = completed(f"train_accepted_{measure}", f"accepted_{measure}")
        lines.insert(1, ("training, accepted samples", "quiet dashed", accepted))
    return lines


def curves_note(record: RunRecord) -> str:
    if "train_accuracy" not in record.metrics:
        return ""
    note = "Measured at the end of each epoch, by the same weights for both splits."
    if _by_right(record.metrics):
        known = "validation_accuracy_clean" in record.results
        note += (
            f" Right labels are {'known' if known else 'estimated'}; training is "
            "measured by the given ones."
        )
    if any(map(math.isnan, record.metrics["train_accuracy"])):
        note += (
            " In epochs that train the backbone, training is the mean over the epoch."
        )
    return note
