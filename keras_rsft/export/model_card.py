"""A model card from a run: what the model is, how good, and what it was made of.

Markdown with a YAML head, as model hubs read it. The head's values are JSON, which
YAML includes, so that no name can break out of them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_rsft.backbones.weights_licence import licence_of_weights
from keras_rsft.intervals import proportion_interval
from keras_rsft.result_folder import read_csv
from keras_rsft.run_files import LEDGER_FILE, RESULTS_FILE, SAMPLES_FILE

if TYPE_CHECKING:
    from keras_rsft.export.from_run import FinishedRun

SUSPICIOUS = 0.5
MOST_NAMED = 20
_SPLITS = ("train", "validation", "test")


def model_card(run: FinishedRun, name: str) -> str:
    """Returns the card of a run's model."""
    results = _read_results(run.folder)
    samples = _read_rows(run.folder / SAMPLES_FILE)
    sizes = {s: sum(row.get("split") == s for row in samples) for s in _SPLITS}
    parts = [
        _head(run, name, results),
        f"# {_text(name)}\n",
        *_data(run, sizes),
        *_training(run),
        *_metrics(results, sizes),
        *_suspicious(_read_rows(run.folder / LEDGER_FILE)),
        *_limits(results),
        *_licence(run),
        *_versions(run),
    ]
    return "\n".join(parts)


def _head(run: FinishedRun, name: str, results: dict[str, Any]) -> str:
    task = {"type": "image-classification"}
    entry: dict[str, Any] = {"task": task, "dataset": {"type": "image"}}
    entry["dataset"]["name"] = Path(str(run.config.get("data", "unknown"))).name
    accuracy = results.get("test_accuracy")
    entry["metrics"] = (
        [] if accuracy is None else [{"type": "accuracy", "value": accuracy}]
    )
    values = {
        "library_name": "keras",
        "pipeline_tag": "image-classification",
        "license": "other",
        "tags": ["keras_rsft", "tensorflow", "noisy-labels"],
        "model-index": [{"name": name, "results": [entry]}],
    }
    lines = (f"{key}: {json.dumps(value)}" for key, value in values.items())
    return "\n".join(["---", *lines, "---\n"])


def _data(run: FinishedRun, sizes: dict[str, int]) -> Iterator[str]:
    yield "## Data\n"
    counted = ", ".join(f"{size} {split}" for split, size in sizes.items() if size)
    source = Path(str(run.config.get("data", "unknown"))).name
    yield f"Images from `{_code(source)}`{': ' + counted if counted else ''}.\n"
    names = ", ".join(_text(name) for name in run.class_names)
    yield f"{len(run.class_names)} classes: {names}.\n"


def _training(run: FinishedRun) -> Iterator[str]:
    config = run.config
    yield "## Training\n"
    size = " x ".join(str(side) for side in run.model.input_shape[1:3])
    base = Path(str(config.get("backbone", "unknown"))).name
    yield f"A new head on the frozen base `{_code(base)}`, images of {size} pixels.\n"
    policy = config.get("policy")
    if isinstance(policy, dict):
        chosen = policy.get("name") or "auto"
        yield f"Samples accepted by the policy `{_code(str(chosen))}`.\n"
    if config.get("finding"):
        yield f"{_text(config['finding'])}\n"


def _metrics(results: dict[str, Any], sizes: dict[str, int]) -> Iterator[str]:
    rows = []
    for split in ("validation", "test"):
        share = results.get(f"{split}_accuracy")
        if share is None or not sizes[split]:
            continue
        count = sizes[split]
        low, high = proportion_interval(round(share * count), count)
        interval = f"{100 * low:.1f} to {100 * high:.1f} %"
        rows.append(f"| {split} | {100 * share:.1f} % | {interval} | {count} |")
    if rows:
        yield "## Accuracy\n"
        yield "| split | accuracy | 95 % interval | images |"
        yield "| --- | --- | --- | --- |"
        yield "\n".join(rows) + "\n"
        yield f"Measured against {_judges(results)}.\n"


def _judges(results: dict[str, Any]) -> str:
    if "chosen_trial" in results:
        return (
            "the labels as given, and on the test split against the right ones where "
            "these are known. The validation split chose among "
            f"{results.get('trials')} settings, so that its accuracy is likely too high"
        )
    return "the labels as given, right or wrong"


def _suspicious(ledger: Sequence[dict[str, str]]) -> Iterator[str]:
    scored = [(float(row.get("suspicion") or 0), row) for row in ledger]
    found = sorted(
        (pair for pair in scored if pair[0] > SUSPICIOUS), key=lambda pair: -pair[0]
    )
    if not ledger:
        return
    yield "## Labels found suspicious\n"
    counted = f"{len(found)} of {len(ledger)} training labels"
    yield f"{counted}, by a score over {SUSPICIOUS}."
    if found:
        yield f"The first {min(MOST_NAMED, len(found))}:\n"
        yield "| score | sample | given label |"
        yield "| --- | --- | --- |"
    for score, row in found[:MOST_NAMED]:
        label = _text(row.get("given_label", ""))
        yield f"| {score:.2f} | `{_code(row['id'])}` | {label} |"
    yield ""


def _limits(results: dict[str, Any]) -> Iterator[str]:
    yield "## Limits\n"
    yield (
        "Every image gets one of the classes above, also one that shows none of them. "
        "The accuracy holds for images like those it was measured on.\n"
    )
    if results.get("stage2_kept"):
        yield "The last block of the base was fine-tuned too.\n"
    if results.get("unfrozen_kept") or results.get("trainable", "frozen") != "frozen":
        yield "A part of the base was trained too.\n"


def _licence(run: FinishedRun) -> Iterator[str]:
    backbone = str(run.config.get("backbone", "unknown"))
    weights = str(run.config.get("weights", "unknown"))
    yield f"## Licence of the weights\n\n{licence_of_weights(backbone, weights)}\n"


def _versions(run: FinishedRun) -> Iterator[str]:
    versions = run.config.get("versions")
    if isinstance(versions, dict):
        named = (f"{_text(str(k))} {_text(str(v))}" for k, v in versions.items())
        yield f"## Versions\n\n{', '.join(named)}\n"


def _read_results(folder: Path) -> dict[str, Any]:
    """Returns the results of a run; of a search, those of its choice as well."""
    path = folder / RESULTS_FILE
    if not path.is_file():
        return {}
    results = json.loads(path.read_text(encoding="utf-8"))
    return results | (results.get("chosen") or {})


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    return list(read_csv(path))


def _text(text: str) -> str:
    """Makes text harmless in Markdown, its tables and its HTML."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in escaped)


def _code(text: str) -> str:
    """Makes text harmless between backticks."""
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|")
