"""The documents that `--json` prints, one for each command.

Their keys are part of the command line: what is here may be added to, and is not
renamed. Shares and accuracies are in [0, 1]; what is not known is null, and so is
a number that is NaN or infinite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from keras_rsft.cluster import Cluster
    from keras_rsft.comparing import Comparison
    from keras_rsft.data import ImageData
    from keras_rsft.demo import DemoResult
    from keras_rsft.export.from_run import Export
    from keras_rsft.export.verification import AccuracyCheck, Verification
    from keras_rsft.finetuning import Run, SplitFeatures
    from keras_rsft.finetuning.pilot import Pilot
    from keras_rsft.rank import BackboneRanking
    from keras_rsft.searching import Search


def run_document(run: Run, data: ImageData) -> dict[str, Any]:
    """Returns what `fit --json` prints.

    `command`, `folder`, `classes` (names), `images` (`train`, `validation`, `test`,
    `unreadable`: numbers), `corrections` (`files`, `keep`, `relabel`, `drop`; or
    null), `finding` (what `auto` found, or null) and `results` (as in `results.json`;
    of these `overfitting` has a `sentence` and the numbers in it, or is null).
    """
    from keras_rsft.finetuning.run_folder import results_of

    splits = (data.train, data.validation, data.test)
    return {
        "command": "fit",
        "folder": run.folder,
        "classes": run.class_names,
        "images": {split.name: len(split) for split in splits}
        | {"unreadable": len(run.features.unreadable)},
        "corrections": run.config.get("corrections"),
        "finding": run.finding,
        "results": results_of(run),
    }


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """Returns what `compare --json` prints.

    `command`, `folder`, `seeds` (their number), `noise` (or null), `methods` (for each
    name the fields of `MethodSummary`; an interval is `mean` and `half_width`),
    `verdict` (`winner`, `tied`, `sentence`) and `notes`.
    """
    return {
        "command": "compare",
        "folder": comparison.folder,
        "seeds": len({outcome.seed for outcome in comparison.outcomes}),
        "noise": comparison.config.get("noise"),
        "methods": comparison.summaries,
        "verdict": comparison.verdict,
        "notes": comparison.notes,
    }


def features_document(
    features: SplitFeatures | None, cluster: Cluster, folder: object
) -> dict[str, Any]:
    """Returns what `features --json` prints.

    `command`, `folder` (where features are kept), `share` (`index`, `count`) and
    `splits` (for each name `images`, `unreadable`, `dim`, `views`, `precision`,
    `bytes`, `path`; null with `--share`, which computes a part of them).
    """
    splits = None
    if features is not None:
        names = ("train", "validation", "test")
        parts = {name: getattr(features, name) for name in names}
        splits = {
            name: {
                "images": len(part),
                "unreadable": len(part.unreadable),
                "dim": part.dim,
                "views": part.views,
                "precision": part.precision,
                "bytes": part.num_bytes,
                "path": part.path,
            }
            for name, part in parts.items()
        }
    return {
        "command": "features",
        "folder": folder,
        "share": {"index": cluster.index, "count": len(cluster)},
        "splits": splits,
    }


def search_document(found: Search, fit_command: str) -> dict[str, Any]:
    """Returns what `search --json` prints.

    `command`, `folder`, `fit_command` (trains with the chosen setting) and `results`
    (as in `results.json`: `chosen`, `plain`, `reason`, `settings`, `trials`, `failed`
    and so on; with `--trainable` also `strategies`, each the fields of a
    `StrategyRow`).
    """
    return {
        "command": "search",
        "folder": found.folder,
        "fit_command": fit_command,
        "results": found.results,
    }


def ranking_document(ranking: BackboneRanking) -> dict[str, Any]:
    """Returns what `rank --json` prints: `command` and a `BackboneRanking`."""
    return {"command": "rank", **json_value(ranking)}


def pilot_document(pilot: Pilot) -> dict[str, Any]:
    """Returns what `fit --dry-run --json` prints.

    `command` and the fields of a `Pilot`.
    """
    return {"command": "fit --dry-run", **json_value(pilot)}


def demo_document(demo: DemoResult) -> dict[str, Any]:
    """Returns what `demo --json` prints.

    `command`, `folder`, `exported` (folder of the SavedModel), `sample_image`,
    `images` (`train`, `test`), `wrong_labels` (their number), `finding` and `results`
    (`plain`, `rsft` and `right labels only`, each as in `results.json`).
    """
    return {
        "command": "demo",
        "folder": demo.run.folder,
        "exported": demo.exported,
        "sample_image": demo.sample_image,
        "images": {"train": demo.train_size, "test": demo.test_size},
        "wrong_labels": demo.wrong_labels,
        "finding": demo.run.finding,
        "results": demo.results,
    }


def export_document(
    export: Export,
    serve_command: str | None,
    accuracy: AccuracyCheck | None,
    verification: Verification | None,
) -> dict[str, Any]:
    """Returns what `export --json` prints.

    `command`, `path`, `name`, `format`, `weight_dtype`, `num_bytes`, `weight_bytes`
    (of the weights in float32), `serve_command` (or null), `accuracy` (the fields of
    `AccuracyCheck`; null where weights are as they were or it was not measured) and
    `verification` (`passed` and the fields of `Verification`; null without
    `--verify`).
    """
    verified = None
    if verification is not None:
        verified = {"passed": verification.passed, **dataclasses.asdict(verification)}
    return {
        "command": "export",
        "path": export.path,
        "name": export.name,
        "format": export.settings.file_format,
        "weight_dtype": export.settings.weight_dtype,
        "num_bytes": export.num_bytes,
        "weight_bytes": export.weight_bytes,
        "serve_command": serve_command,
        "accuracy": accuracy,
        "verification": verified,
    }


def review_document(folder: Path, *, page: Path | None, url: str) -> dict[str, Any]:
    """Returns what `review --json` prints, with `--serve` once the server answers.

    `command`, `folder`, `page` (the file; null with `--serve`) and `url`.
    """
    return {"command": "review", "folder": folder, "page": page, "url": url}


def json_value(value: Any) -> Any:
    """Returns what JSON can hold, without NaN and infinity.

    Args:
        value: Mappings, sequences, dataclasses, NumPy values, paths and plain values.
    """
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: json_value(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): json_value(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(one) for one in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return json_value(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
