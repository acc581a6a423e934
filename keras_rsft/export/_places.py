"""Where exports go: names, free numbers, folders."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from keras_rsft._storage import MODEL_FILE, highest_number, locked
from keras_rsft.errors import InvalidArgument

MODELS_CONFIG = "models.config"
BATCHING_CONFIG = "batching.config"
_OURS = re.compile(rf"\d+|model-\d+\.[\w.]+|{MODELS_CONFIG}|{BATCHING_CONFIG}|\..*")


def check_name(name: str) -> str:
    """Returns a model's name that is safe as a folder, in a URL and in a config."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InvalidArgument(
            "A model's name has letters, digits, `_`, `.` and `-` only, no path "
            f"separator, and begins with a letter or digit. Received: {name!r}. "
            "Give another `name`."
        )
    return name


def unusable_model(model: str | os.PathLike) -> InvalidArgument:
    """Returns the error for what can be neither a run nor an export."""
    state = "" if os.path.exists(model) else ", which does not exist"
    return InvalidArgument(
        "The model must be a run folder, a .keras file, an exported SavedModel, or a "
        f".tflite or .onnx file. Received: {model}{state}."
    )


def check_exists(model: str | os.PathLike) -> None:
    if not os.path.exists(model):
        raise unusable_model(model)


def check_run_folder(folder: Path) -> None:
    if not (folder / MODEL_FILE).is_file():
        state = f"no {MODEL_FILE} in it" if folder.is_dir() else "no such folder"
        raise InvalidArgument(
            "Expected a run folder, as `keras-rsft fit` leaves it. "
            f"Received: {folder} ({state})."
        )


def model_folder(
    run: str | os.PathLike, name: str | None, directory: str | os.PathLike
) -> Path:
    """Returns the folder for a run's exports; it need not exist."""
    name = Path(run).absolute().name if name is None else name
    return check_model_folder(Path(directory) / check_name(name))


def check_model_folder(directory: str | os.PathLike) -> Path:
    """Returns the folder of a model's versions; it need not exist."""
    directory = Path(directory).absolute()
    _check_writable(directory)
    for path in sorted(directory.iterdir()) if directory.exists() else []:
        if not _OURS.fullmatch(path.name) or (
            path.name.isdigit() and not path.is_dir()
        ):
            raise InvalidArgument(
                f"{directory} must hold exported models only. Found: {path.name!r}. "
                "Choose another folder."
            )
    return directory


def free_version(directory: Path, version: int | None) -> int:
    """Returns the version to write: the one asked for, or one more than the highest."""
    if version is None:
        return highest_number(directory, r"(\d+)") + 1
    if version < 1 or (directory / str(version)).exists():
        raise InvalidArgument(
            "The version must be a number of at least 1 that does not exist yet. "
            f"Received: {version}, in {directory}."
        )
    return version


def free_file(directory: Path, suffix: str) -> Path:
    number = highest_number(directory, rf"model-(\d+)\.{suffix}") + 1
    return directory / f"model-{number}.{suffix}"


@contextlib.contextmanager
def turn_in(directory: Path) -> Iterator[None]:
    """Waits until no other export writes into a model's folder, then holds it."""
    # So two exports of one name get two versions, and what a killed one left half
    # written can be told from what is being written, and is removed.
    directory.mkdir(parents=True, exist_ok=True)
    # Beside the folder, which is the server's too.
    lock = directory.with_name(f".{directory.name}.lock")
    with locked(lock, needed=False):
        for left in directory.glob(".[0-9]*-*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        yield


def check_file(path: str | os.PathLike, suffix: str) -> Path:
    path = Path(path).absolute()
    if path.suffix != f".{suffix}":
        raise InvalidArgument(
            f"The file's name must end in .{suffix}. Received: {path.name!r}."
        )
    if path.exists():
        raise InvalidArgument(
            f"{path} exists, and nothing is overwritten. Choose another name."
        )
    _check_writable(path.parent)
    return path


def _check_writable(directory: Path) -> None:
    nearest = next(p for p in (directory, *directory.parents) if p.exists())
    if not nearest.is_dir():
        raise InvalidArgument(
            f"{nearest} is a file, so nothing can be exported to {directory}. "
            "Choose another folder."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InvalidArgument(
            f"{nearest} cannot be written to. Choose another folder, or change its "
            "permissions."
        )
