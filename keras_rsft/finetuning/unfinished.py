"""Where a run lies while it is not finished, so that a killed one can go on.

A run `photos-1` begins as the folder `photos-1.unfinished` beside its final place,
which one living process holds. There are its identity and its checkpoint. A finished
run is filled in there and renamed, so that `photos-1` appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from keras_rsft.data import SampleData
from keras_rsft.errors import DataError, InvalidArgument, TrainingStalled
from keras_rsft.finetuning.run_folder import check_new_folder
from keras_rsft.result_folder import replaced, write_json

SUFFIX = ".unfinished"
_IDENTITY_FILE = "identity.json"
_CHECKPOINT_FILE = "training.npz"
_BASE_CHECKPOINT_FILE = "base_training.npz"
_ACTIVATIONS_FILE = "activations.json"
_LOCK_FILE = ".lock"
_RUN_FOLDER = "run"
# What an unfinished run knows beside its identity, and another one must not.
_STATE_FILES = (_CHECKPOINT_FILE, _BASE_CHECKPOINT_FILE, _ACTIVATIONS_FILE)
_OWN_NAMES = {_IDENTITY_FILE, _LOCK_FILE, _RUN_FOLDER, *_STATE_FILES}
_PACKAGES = ("keras_rsft", "keras", "tensorflow", "numpy")


@dataclasses.dataclass(frozen=True)
class NumberedFolder:
    """Asks for `ROOT/NAME-N`: an unfinished run of the same kind, or the first free N.

    Attributes:
        name: Name before the number.
        root: Folder of runs. Default `runs`.
    """

    name: str
    root: str | os.PathLike = "runs"


@dataclasses.dataclass(frozen=True)
class RunPlace:
    """A run's place, held by this process.

    Attributes:
        folder: The run folder to be.
        unfinished: The folder beside it that holds the run until then.
        went_on: True where a run of the same kind was begun there before.
    """

    folder: Path
    unfinished: Path
    went_on: bool

    @property
    def checkpoint(self) -> Path:
        """File of the training's state; it need not exist."""
        return self.unfinished / _CHECKPOINT_FILE

    @property
    def base_checkpoint(self) -> Path:
        """The same of the training of a part of the base."""
        return self.unfinished / _BASE_CHECKPOINT_FILE

    @property
    def activations(self) -> Path:
        """File of how that training gets its activations; it need not exist."""
        return self.unfinished / _ACTIVATIONS_FILE

    def write(self, fill: Callable[[Path], None]) -> None:
        """Has the run filled in, and renames it to its final place.

        Args:
            fill: Called with an empty folder.
        """
        run = self.unfinished / _RUN_FOLDER
        shutil.rmtree(run, ignore_errors=True)  # Of a run that was killed here.
        run.mkdir()
        try:
            fill(run)
            run.rename(self.folder)
        except BaseException:
            shutil.rmtree(run, ignore_errors=True)
            raise


class _Taken(InvalidArgument):
    """This folder cannot be had; another one may."""


@contextlib.contextmanager
def open_place(
    output: str | os.PathLike | NumberedFolder, identity: dict[str, Any]
) -> Iterator[RunPlace]:
    """Holds the place of a run: a new one, or one that was killed and goes on.

    Where the run fails, its place is kept if there is a checkpoint to go on from and
    trying again may help, as after Ctrl-C or on a full disk.

    Args:
        output: The run folder, which must not exist, or the kind of name for it.
        identity: What `run_identity` gives. Only an unfinished run with the same one
            is gone on with; one with another is never touched.

    Raises:
        InvalidArgument: If the run folder exists or cannot be made, another process
            holds it, or it has an unfinished run of another kind.
    """
    place, lock = _claimed(output, identity)
    try:
        yield place
    except (DataError, InvalidArgument, TrainingStalled):
        shutil.rmtree(place.unfinished, ignore_errors=True)
        raise
    finally:
        if place.folder.exists() or not place.checkpoint.exists():
            shutil.rmtree(place.unfinished, ignore_errors=True)
        lock.release()


def run_identity(data: SampleData, **choices: Any) -> dict[str, Any]:
    """Returns what two runs must share to be the same run, as JSON can hold it.

    Args:
        data: The images with their labels.
        **choices: Everything else that the trained weights depend on.
    """
    digest = hashlib.blake2b(digest_size=16)
    for split in (data.train, data.validation, data.test):
        digest.update("\n".join(split.ids.tolist()).encode())
        # What was reviewed is accepted whatever the policy says.
        for values in (split.labels, split.clean_labels, split.reviewed):
            digest.update(b"-" if values is None else b"+")
            if values is not None:
                digest.update(np.ascontiguousarray(values).data)
    identity = {
        "data": [data.source, list(data.class_names), digest.hexdigest()],
        **choices,
        "versions": {name: version(name) for name in _PACKAGES},
    }
    return json.loads(json.dumps(identity, default=str))


def _claimed(
    output: str | os.PathLike | NumberedFolder, identity: dict[str, Any]
) -> tuple[RunPlace, filelock.BaseFileLock]:
    if not isinstance(output, NumberedFolder):
        return _claim(check_new_folder(output), identity)
    root = Path(output.root).absolute()
    _clear_finished(root, output.name)
    candidates = _candidates(root, output.name, identity)
    while True:  # There always is a next number.
        with contextlib.suppress(_Taken):
            return _claim(check_new_folder(next(candidates)), identity)


def _candidates(root: Path, name: str, identity: dict[str, Any]) -> Iterator[Path]:
    """Yields unfinished runs of the same kind, then all numbers that are free."""
    for folder, unfinished in _unfinished_runs(root, name):
        if not folder.exists() and _identity_in(unfinished) == identity:
            yield folder
    for number in itertools.count(1):
        folder = root / f"{name}-{number}"
        if not folder.exists():
            yield folder


def _clear_finished(root: Path, name: str) -> None:
    """Removes what is left of runs that were killed between finished and cleared."""
    for folder, unfinished in _unfinished_runs(root, name):
        if folder.exists():
            with contextlib.suppress(_Taken):
                _check_ours(unfinished)
                lock = _locked(unfinished)
                shutil.rmtree(unfinished, ignore_errors=True)
                lock.release()


def _unfinished_runs(root: Path, name: str) -> list[tuple[Path, Path]]:
    """Returns `(run folder to be, unfinished folder)` of every number."""
    found = sorted(root.glob(f"{glob.escape(name)}-*{SUFFIX}"))
    return [(path.with_name(path.name.removesuffix(SUFFIX)), path) for path in found]


def _claim(
    folder: Path, identity: dict[str, Any]
) -> tuple[RunPlace, filelock.BaseFileLock]:
    unfinished = folder.with_name(f"{folder.name}{SUFFIX}")
    _check_ours(unfinished)
    lock = _locked(unfinished)
    try:
        if folder.exists():  # Finished by another process just now.
            raise _Taken(f"{folder} exists. Nothing is overwritten.")
        kept = _identity_in(unfinished)
        checkpoint = unfinished / _CHECKPOINT_FILE
        if kept not in (None, identity) and checkpoint.exists():
            raise _Taken(_other_run(unfinished, kept, identity))
        if kept != identity:
            for name in _STATE_FILES:  # Of nobody knows which run.
                (unfinished / name).unlink(missing_ok=True)
            replaced(
                unfinished / _IDENTITY_FILE, lambda path: write_json(path, identity)
            )
        return RunPlace(folder, unfinished, went_on=kept == identity), lock
    except BaseException:
        lock.release()
        raise


def _locked(unfinished: Path) -> filelock.BaseFileLock:
    while True:
        unfinished.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(unfinished / _LOCK_FILE, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise _Taken(
                f"Another process is working on {unfinished}. Wait for it, or choose "
                "another `--output`."
            ) from None
        except FileNotFoundError:  # Its last owner is done and removed the folder.
            continue
        return lock


def _check_ours(unfinished: Path) -> None:
    """Refuses a folder that happens to have our name and is somebody else's."""
    if not unfinished.exists():
        return
    names = (
        {path.name for path in unfinished.iterdir()} if unfinished.is_dir() else {""}
    )
    others = {name for name in names - _OWN_NAMES if not name.startswith(".partial-")}
    if others:
        raise _Taken(
            f"{unfinished} exists and is no unfinished run. Nothing is overwritten: "
            "choose another `--output`."
        )


def _identity_in(unfinished: Path) -> dict[str, Any] | None:
    try:
        return json.loads((unfinished / _IDENTITY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _other_run(unfinished: Path, kept: dict[str, Any], identity: dict[str, Any]) -> str:
    names = sorted(
        name
        for name in kept.keys() | identity.keys()
        if kept.get(name) != identity.get(name)
    )
    return (
        f"{unfinished} is a run that was not finished, with other "
        f"{' and '.join(names)}. Repeat its command to go on with it, remove it, or "
        "choose another `--output`."
    )
