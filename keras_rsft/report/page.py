"""Fills the templates: a run, as one HTML file that needs nothing else.

The page may load and send nothing: its content security policy names its own style
and script by their hashes. Text from the data is escaped by the template engine, or
is JSON that the script shows as text alone.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_rsft import _storage
from keras_rsft.errors import InvalidArgument
from keras_rsft.report import charts
from keras_rsft.report.gallery import confusion_of, gallery_data
from keras_rsft.report.learning_curves import (
    curves_note,
    learning_curves,
    overfitting_warning,
)
from keras_rsft.report.outcome import outcome_of, percent
from keras_rsft.report.run_record import RunRecord, read_run
from keras_rsft.result_words import STRATEGY_HEADER, STRATEGY_NOTE, strategy_texts

if TYPE_CHECKING:
    from keras_rsft.finetuning import Run

_STYLES = ("page.css", "review.css")
_SCRIPTS = ("charts.js", "decisions.js", "gallery.js", "review.js", "start.js")
_MOST_CLASSES = 40
_LONGEST_VALUE = 300
_MARK = b'<meta name="generator" content="keras_rsft">'


def write_report(
    run: Run | str | os.PathLike, path: str | os.PathLike | None = None
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
    folder = getattr(run, "folder", run)
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
    """Returns the page as HTML.

    Args:
        record: The run.
        served: True for `server.py`, which has all samples' pictures. Default False.
    """
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
        "overfitting": overfitting_warning(record),
        "histograms": charts.histograms(record.losses),
        "sizes": charts,
        "pictures": _pictures(record),
        "strategies": _strategies(record),
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
    samples = record.samples
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
    rows = [(name, share, percent(share)) for name, share in known]
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


def _pictures(record: RunRecord) -> dict[str, str]:
    """Returns the search's pictures as addresses that hold them."""
    return {
        name: f"data:image/svg+xml;base64,{base64.b64encode(picture).decode('ascii')}"
        for name, picture in record.pictures.items()
    }


def _strategies(record: RunRecord) -> dict[str, Any]:
    """Returns how much of the base to train, as a table; no rows for other folders."""
    rows = record.results.get("strategies") or ()
    return {
        "header": STRATEGY_HEADER,
        "rows": [strategy_texts(row) for row in rows],
        "note": STRATEGY_NOTE,
    }


def _settings(record: RunRecord) -> list[tuple[str, str]]:
    """Returns the configuration as rows, one level deep."""
    rows = []
    for name, value in record.config.items():
        if name in ("command", "versions", "finding", "space"):
            continue
        if isinstance(value, dict):
            rows += [(f"{name}.{key}", _shown(one)) for key, one in value.items()]
        else:
            rows.append((name, _shown(value)))
    return rows


def _shown(value: Any) -> str:
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


def _templates():
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("keras_rsft.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters["safe_json"] = script_json
    templates.filters["percent"] = percent
    return templates
