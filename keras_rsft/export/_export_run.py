"""Exports the model of a run folder, with its model card."""

from __future__ import annotations

import dataclasses
import html
import json
import os
from pathlib import Path
from typing import Any

import jinja2
import keras

from keras_rsft._runtime import require_tensorflow_backend
from keras_rsft._storage import (
    CONFIG_FILE,
    LEDGER_FILE,
    MODEL_FILE,
    RESULTS_FILE,
    SAMPLES_FILE,
    SEARCH_FILE,
    read_csv,
    write_new_file,
)
from keras_rsft.backbones._foreign import weights_bytes
from keras_rsft.backbones._load import licence_of_weights
from keras_rsft.errors import DataError
from keras_rsft.export._formats import export_litert, export_onnx, require_tf2onnx
from keras_rsft.export._places import (
    ExportConfig,
    check_run_folder,
    free_file,
    free_version,
    model_folder,
    turn_in,
)
from keras_rsft.export._saved_model import export_saved_model
from keras_rsft.report._summary import accuracy_rows
from keras_rsft.training._run import read_class_names

# Model card ---------------------------------------------------------------------------

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
        accuracies=accuracy_rows(results, sizes),
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


# Export -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run read back from its folder."""

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
    """Reads a run folder back."""
    folder = Path(folder)
    check_run_folder(folder)
    try:
        model = keras.saving.load_model(folder / MODEL_FILE, compile=False)
        class_names = read_class_names(folder)
        config = _read_config(folder)
    except (ValueError, TypeError, KeyError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"The run {folder} cannot be read: {reason} Its base, head and class "
            f"names must be whole; a base with layers of your own needs these "
            "registered with Keras first."
        ) from error
    return FinishedRun(folder, model, class_names, config)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / SEARCH_FILE).is_file():
        return _read_json(folder / CONFIG_FILE)
    results = _read_json(folder / RESULTS_FILE)
    source = _read_json(folder / SEARCH_FILE)["data"]["source"]
    recorded = {name: results.get(name) for name in ("command", "versions")}
    return source | (results.get("settings") or {}) | recorded


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


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
        InvalidArgument: If an argument does not fit or the place cannot be used.
        DataError: If the run cannot be read.
        ImportError: If the format's extra is not installed.
    """
    require_tensorflow_backend("`export_run`")
    settings = settings or ExportConfig()
    folder = run.folder if isinstance(run, FinishedRun) else run
    target = model_folder(folder, name, directory)  # Before anything slow.
    if settings.file_format == "saved-model":
        free_version(target, settings.version)
    if settings.file_format == "onnx":
        require_tf2onnx()
    if not isinstance(run, FinishedRun):
        run = read_run(run)
    path = _write(run, target, settings)
    return Export(
        path=path,
        name=target.name,
        settings=settings,
        num_bytes=size_on_disk(path),
        weight_bytes=weights_bytes(run.model),
    )


def _write(run: FinishedRun, target: Path, settings: ExportConfig) -> Path:
    names, card = run.class_names, model_card(run, target.name)
    if settings.file_format == "saved-model":
        return export_saved_model(
            run.model,
            target,
            class_names=names,
            version=settings.version,
            top_k=settings.top_k,
            weight_dtype=settings.weight_dtype,
            model_card=card,
        )
    with turn_in(target):
        if settings.file_format == "litert":
            path = export_litert(
                run.model,
                free_file(target, "tflite"),
                class_names=names,
                weight_dtype=settings.weight_dtype,
            )
        else:
            path = export_onnx(run.model, free_file(target, "onnx"), class_names=names)
        write_new_file(Path(f"{path}.md"), card.encode())
    return path


def size_on_disk(path: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
