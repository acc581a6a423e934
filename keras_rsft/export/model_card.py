"""A model card from a run: what the model is, how good, and what it was made of.

Markdown with a YAML head, as model hubs read it. The head's values are JSON, which
YAML includes, and the template escapes all that it prints, so that no name can break
out.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from keras_rsft._storage import LEDGER_FILE, RESULTS_FILE, SAMPLES_FILE, read_csv
from keras_rsft.backbones.weights_licence import licence_of_weights
from keras_rsft.intervals import proportion_interval

if TYPE_CHECKING:
    from keras_rsft.export.from_run import FinishedRun

SUSPICIOUS = 0.5
MOST_NAMED = 20


def model_card(run: FinishedRun, name: str) -> str:
    """Returns the card of a run's model; what its folder does not hold is left out."""
    config, results = run.config, {}
    if (run.folder / RESULTS_FILE).is_file():
        results = json.loads((run.folder / RESULTS_FILE).read_text(encoding="utf-8"))
        results |= results.get("chosen") or {}  # Of a search.
    samples = _read_rows(run.folder / SAMPLES_FILE)
    sizes = {
        split: sum(row.get("split") == split for row in samples)
        for split in ("train", "validation", "test")
    }
    accuracies = []
    for split in ("validation", "test"):
        share, count = results.get(f"{split}_accuracy"), sizes[split]
        if share is not None and count:
            low, high = proportion_interval(round(share * count), count)
            accuracies.append((split, 100 * share, 100 * low, 100 * high, count))
    ledger = _read_rows(run.folder / LEDGER_FILE)
    scored = [(float(row.get("suspicion") or 0), row) for row in ledger]
    data = Path(str(config.get("data", "unknown"))).name
    policy = config.get("policy")
    backbone = str(config.get("backbone", "unknown"))
    environment = jinja2.Environment(  # noqa: S701 - `finalize` escapes, for Markdown.
        loader=jinja2.PackageLoader("keras_rsft.export"),
        finalize=_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["raw"] = _Escaped
    environment.filters["code"] = _code
    environment.filters["tojson_line"] = lambda value: _Escaped(json.dumps(value))
    template = environment.get_template("model_card.md")
    return template.render(
        head=_head(name, data, results.get("test_accuracy")),
        name=name,
        run=run,
        results=results,
        data=data,
        counted=", ".join(f"{size} {split}" for split, size in sizes.items() if size),
        base=Path(backbone).name,
        policy=isinstance(policy, dict) and (policy.get("name") or "auto"),
        accuracies=accuracies,
        ledger=ledger,
        found=sorted((p for p in scored if p[0] > SUSPICIOUS), key=lambda p: -p[0]),
        suspicious=SUSPICIOUS,
        most_named=MOST_NAMED,
        licence=licence_of_weights(backbone, str(config.get("weights", "unknown"))),
    )


def _head(name: str, data: str, accuracy: float | None) -> dict[str, Any]:
    entry = {
        "task": {"type": "image-classification"},
        "dataset": {"type": "image", "name": data},
        "metrics": []
        if accuracy is None
        else [{"type": "accuracy", "value": accuracy}],
    }
    return {
        "library_name": "keras",
        "pipeline_tag": "image-classification",
        "license": "other",
        "tags": ["keras_rsft", "tensorflow", "noisy-labels"],
        "model-index": [{"name": name, "results": [entry]}],
    }


class _Escaped(str):
    """Text that is printed as it is."""


def _read_rows(path: Path) -> list[dict[str, str]]:
    return list(read_csv(path)) if path.is_file() else []


def _text(value: Any) -> str:
    """Makes text harmless in Markdown, its tables and its HTML."""
    if isinstance(value, _Escaped):
        return value
    escaped = html.escape(" ".join(str(value).split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in escaped)


def _code(text: str) -> _Escaped:
    """Makes text harmless between backticks."""
    return _Escaped(" ".join(text.split()).replace("`", "'").replace("|", "\\|"))
