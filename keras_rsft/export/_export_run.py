"""Exports the model of a run folder, with its model card."""

from __future__ import annotations

import collections
import dataclasses
import html
import json
import os
from pathlib import Path
from typing import Any

import jinja2
import keras

from keras_rsft import _storage
from keras_rsft._runtime import require_tensorflow_backend
from keras_rsft.backbones._build import UNREADABLE, first_line, load_keras_file
from keras_rsft.backbones._foreign import weights_bytes
from keras_rsft.backbones._load import licence_of_weights
from keras_rsft.config import ExportConfig
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.export import _places
from keras_rsft.export._formats import export_litert, export_onnx, require_tf2onnx
from keras_rsft.export._saved_model import export_saved_model
from keras_rsft.report._summary import Accuracy, accuracies_of, share_text

# Model card ---------------------------------------------------------------------------

_MOST_NAMED = 20


def model_card(run: FinishedRun, name: str) -> str:
    """Returns the card of a run's model; what its folder does not hold is left out."""
    config, results = run.config, _read_json(run.folder / _storage.RESULTS_FILE)
    results |= results.get("chosen") or {}  # Of a search.
    samples = _read_rows(run.folder / _storage.SAMPLES_FILE)
    sizes = collections.Counter(row.get("split", "") for row in samples)
    ledger = _read_rows(run.folder / _storage.LEDGER_FILE)
    found = [row for row in ledger if row.get("looks_wrong") == "1"]
    data = Path(str(config.get("data", "unknown"))).name
    policy = config.get("policy")
    backbone = str(config.get("backbone", "unknown"))
    accuracies = accuracies_of(results, sizes)
    metrics = [metric for one in accuracies[-1:] for metric in _metrics(one)]
    entry = {
        "task": {"type": "image-classification"},
        "dataset": {"type": "image", "name": data},
        "metrics": metrics,
    }
    environment = jinja2.Environment(  # noqa: S701 - `finalize` escapes, for Markdown.
        loader=jinja2.PackageLoader("keras_rsft.export"),
        finalize=_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "share": share_text}
    environment.filters["json"] = json.dumps
    return environment.get_template("model_card.md").render(
        index=[{"name": name, "results": [entry]}],
        name=name,
        run=run,
        results=results,
        data=data,
        counted=", ".join(
            f"{sizes[split]} {split}"
            for split in ("train", "validation", "test")
            if sizes[split]
        ),
        backbone=Path(backbone).name,
        policy=isinstance(policy, dict) and (policy.get("name") or "auto"),
        accuracies=accuracies,
        label_quality=results.get("label_quality"),
        found=sorted(found, key=lambda row: float(row["right_probability"])),
        most_named=_MOST_NAMED,
        licence=licence_of_weights(backbone, str(config.get("weights", "unknown"))),
    )


def _metrics(accuracy: Accuracy) -> list[dict[str, Any]]:
    """Returns an accuracy as an index of models reads it, the given labels last."""
    one = {"type": "accuracy", "value": accuracy.share}
    if accuracy.by == "given":
        return [one]
    given = {"type": "accuracy", "value": accuracy.given}
    names = {"name": f"Accuracy by right labels, {accuracy.by}"}
    return [one | names, given | {"name": "Accuracy by the given labels"}]


def _read_rows(path: Path) -> list[dict[str, str]]:
    return list(_storage.read_csv(path)) if path.exists() else []


def _text(value: Any) -> str:
    """Escapes text for Markdown, its tables and its HTML."""
    if hasattr(value, "__html__"):  # Marked as safe in the template.
        return value
    escaped = html.escape(" ".join(str(value).split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in escaped)


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|")


# Export -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    folder: Path
    model: keras.Model
    class_names: tuple[str, ...]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: Folder of a SavedModel's version, or a file.
        name: The model's name.
        settings: What was asked for.
        num_bytes: Size of all its files.
        weight_bytes: Size of the model's weights in float32.
    """

    path: Path
    name: str
    settings: ExportConfig
    num_bytes: int
    weight_bytes: int


def read_run(folder: str | os.PathLike) -> FinishedRun:
    folder = Path(folder)
    _places.check_run_folder(folder)
    try:
        model = load_keras_file(folder / _storage.MODEL_FILE)
    except (DataError, InvalidArgument):
        raise
    except UNREADABLE as error:
        raise DataError(
            f"{folder / _storage.MODEL_FILE} cannot be read: {first_line(error)}. A "
            "backbone with layers of your own needs these registered with Keras first."
        ) from error
    class_names = _storage.read_class_names(folder, model.output_shape[-1])
    search = folder / _storage.SEARCH_FILE
    if not search.is_file():
        config = _read_json(folder / _storage.CONFIG_FILE)
        return FinishedRun(folder, model, class_names, config)
    results = _read_json(folder / _storage.RESULTS_FILE)
    with _storage.understood(search):
        config = dict(_read_json(search)["data"][0])
    with _storage.understood(folder / _storage.RESULTS_FILE):
        config |= results.get("settings") or {}
        config |= {name: results.get(name) for name in ("command", "versions")}
    return FinishedRun(folder, model, class_names, config)


def _read_json(path: Path) -> dict[str, Any]:
    return _storage.json_of(path, dict) if path.exists() else {}


def export_run(
    run: FinishedRun | str | os.PathLike,
    *,
    name: str | None = None,
    directory: str | os.PathLike = "saved_models",
    settings: ExportConfig | None = None,
) -> Export:
    """Exports a run's model as `DIRECTORY/NAME/VERSION/` or `DIRECTORY/NAME/model-N.*`.

    A model card lies in a version as `README.md`, beside a file as `model-N.*.md`.

    Args:
        run: A run folder, or what `read_run` returns.
        name: The model's name. Default: that of the run folder.
        directory: Folder of exported models. Default `saved_models`.
        settings: Format and its options. Default: a SavedModel in float32.

    Returns:
        Where it lies and how large it is.

    Raises:
        InvalidArgument: If an argument does not fit or the folder cannot be used.
        DataError: If the run cannot be read.
        ImportError: If the format's extra is not installed.
    """
    require_tensorflow_backend("`export_run`")
    settings = settings or ExportConfig()
    folder = run.folder if isinstance(run, FinishedRun) else run
    target = _places.model_folder(folder, name, directory)  # Before anything slow.
    if settings.file_format == "saved-model":
        _places.free_version(target, settings.version)
    if settings.file_format == "onnx":
        require_tf2onnx()
    if not isinstance(run, FinishedRun):
        run = read_run(run)
    # All else that it shows has been read by now.
    with _storage.understood(run.folder / _storage.RESULTS_FILE):
        names, card = run.class_names, model_card(run, target.name)
    dtype = settings.weight_dtype
    if settings.file_format == "saved-model":
        path = export_saved_model(
            run.model,
            target,
            class_names=names,
            version=settings.version,
            top_k=settings.top_k,
            max_pixels=settings.max_pixels,
            weight_dtype=dtype,
            model_card=card,
        )
    else:
        with _places.turn_in(target):
            if settings.file_format == "litert":
                path = _places.free_file(target, "tflite")
                export_litert(run.model, path, class_names=names, weight_dtype=dtype)
            else:
                path = _places.free_file(target, "onnx")
                export_onnx(run.model, path, class_names=names)
            _storage.write_new_file(Path(f"{path}.md"), card.encode())
    return Export(
        path=path,
        name=target.name,
        settings=settings,
        num_bytes=size_on_disk(path),
        weight_bytes=weights_bytes(run.model),
    )


def size_on_disk(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
