"""Files and folders of results: whole or not at all, never over what exists."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import glob
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import filelock

from keras_rsft.errors import DataError, InvalidArgument, TrainingStalled

# --- Names of files -----------------------------------------------------------------

MODEL_FILE = "model.keras"
HEAD_FILE = "head.keras"
CONFIG_FILE = "config.json"
RESULTS_FILE = "results.json"
CLASSES_FILE = "classes.json"
METRICS_FILE = "metrics.csv"
SAMPLES_FILE = "samples.csv"
LEDGER_FILE = "ledger.csv"
LABELS_FILE = "labels.csv"
ACCEPTANCE_FILE = "acceptance_by_class.csv"
HISTOGRAMS_FILE = "loss_histograms.csv"
NEAR_DUPLICATES_FILE = "near_duplicates.csv"
THUMBNAILS_FILE = "thumbnails.bin"
THUMBNAILS_INDEX_FILE = "thumbnails.csv"
PREVIEWS_FILE, PREVIEWS_INDEX_FILE = "previews.bin", "previews.csv"
PREDICTIONS_FILE = "predictions.csv"
CACHED_FEATURES_FILE = "cached_features.json"
TEXTS_FILE = "texts.jsonl"
CORRECTIONS_FILE = "corrections.csv"
REPORT_FILE = "report.html"
SEARCH_FILE = "search.json"

# --- Whole or not at all ------------------------------------------------------------

_PARTIAL = ".partial-"


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Gives an empty hidden folder beside `target`, renamed to it in the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        partial.chmod(0o755)
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _file_beside(path: Path) -> Iterator[Path]:
    """Gives a path of the same name in a new private folder: no link can be there."""
    folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=path.parent))
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replaced(path: Path, write: Callable[[Path], Any]) -> None:
    with _file_beside(path) as beside:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)


def write_new_file(path: Path, content: bytes) -> None:
    """Writes a file whole; raises InvalidArgument where it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _file_beside(path) as beside:
            beside.write_bytes(content)
            try:
                os.link(beside, path)  # Unlike a rename, fails where the target exists.
            except FileExistsError:
                raise
            except OSError:  # No hard links on FAT and on some network file systems.
                path.open("xb").close()  # Takes the name; what is replaced is our own.
                beside.replace(path)
    except FileExistsError:
        raise InvalidArgument(
            f"{path} exists, and nothing is overwritten. Choose another name."
        ) from None


# --- Files of somebody else ---------------------------------------------------------
# A folder may come from anybody: a link in it could give away, or overwrite, any file
# of the user, and a pipe would be waited for without end.

_NO_LINK, _NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)
_IRREGULAR = {errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR}
# What is read whole.
_MOST_BYTES = 2**30


def open_regular(
    path: str | os.PathLike,
    mode: str = "rb",
    *,
    buffering: int = -1,
    most: float = math.inf,
    dir_fd: int | None = None,
) -> BinaryIO:
    """Opens a file to read, `"rb"`, or to append, `"ab"`: no link, pipe or device."""
    irregular = DataError(
        f"{path} is a link, a pipe or a folder, has a second name, or is too large. "
        "Only plain files are used here: put a copy in its place, or remove it."
    )

    def opener(path: str, flags: int) -> int:
        # Opening a pipe would wait for somebody at its other end.
        return os.open(path, flags | _NO_LINK | _NO_WAIT, 0o666, dir_fd=dir_fd)

    try:
        file: Any = open(path, mode, buffering, opener=opener)  # noqa: SIM115
    except OSError as error:
        if error.errno in _IRREGULAR:
            raise irregular from error
        raise
    state = os.fstat(file.fileno())
    # A second name may be one outside of the folder.
    fits = state.st_nlink == 1 if mode == "ab" else state.st_size <= most
    if not (stat.S_ISREG(state.st_mode) and fits):
        file.close()
        raise irregular
    return file


def make_folder(path: Path) -> Path:
    """Makes a folder to write into, if there is none; refuses a link to one."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise DataError(f"{path} is a link, and nothing is written through one here.")
    return path


def require_no_links(folder: Path) -> None:
    """Refuses a folder that others write into by name, if a link or a pipe is in it."""
    for path in folder.rglob("*"):
        kind = path.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise DataError(
                f"{path} is a link or a pipe, and nothing is written through one here. "
                "Put a copy in its place, or remove it."
            )


@contextlib.contextmanager
def understood(path: str | os.PathLike) -> Iterator[None]:
    """Says of whatever fails as a file is read that this file is damaged."""
    try:
        yield
    except (OSError, ImportError, DataError, InvalidArgument):
        raise
    except Exception as error:  # Of JSON, of NumPy, of zip files, of what follows.
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} cannot be read: it is not as `keras-rsft` wrote it "
            f"({type(error).__name__}: {reason}). Restore it, or make the run again."
        ) from error


def bytes_of(path: Path) -> bytes:
    with open_regular(path, most=_MOST_BYTES) as file:
        return file.read()


# --- JSON and CSV -------------------------------------------------------------------

# What starts a formula in a spreadsheet; the quote itself, to tell it from a guard.
_GUARDED = ("=", "+", "-", "@", "\t", "\r", "'")


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON; what it does not know is written as text."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def json_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: json_value(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): json_value(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(one) for one in value]
    if hasattr(value, "tolist"):  # An array or a number of NumPy.
        return json_value(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def json_of(path: Path, kind: type = object) -> Any:
    """Returns what a JSON file holds; DataError where it is damaged."""
    with understood(path):
        content = json.loads(bytes_of(path).decode("utf-8"))
        if not isinstance(content, kind):
            raise TypeError(f"a {type(content).__name__}, not a {kind.__name__}")
        return content


def read_class_names(folder: Path, count: int | None = None) -> tuple[str, ...]:
    path = folder / CLASSES_FILE
    names = json_of(path, list)
    with understood(path):
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a name is no text")
        if len({*names}) != (count or len(names) or 1):
            raise ValueError(f"{len({*names})} different names, and {count} classes")
    return tuple(names)


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds, or None where it is missing or damaged."""
    try:
        return json_of(path)
    except (OSError, DataError):
        return None


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([guarded_cell(name) for name in header])
        writer.writerows([guarded_cell(value) for value in row] for row in rows)


def write_pack(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Writes files by id one behind the other, and beside them where each is."""
    rows, offset = [], 0
    with path.open("wb") as pack:
        for name, content in files:
            pack.write(content)
            rows.append((name, offset, len(content)))
            offset += len(content)
    write_csv(path.with_suffix(".csv"), ("id", "offset", "bytes"), rows)


def read_csv(path: Path) -> Iterator[dict[str, str]]:
    """Yields the rows of what `write_csv` wrote, by column, the guards taken off."""
    with text_of(path) as file:
        for row in csv.DictReader(file):
            yield {plain_cell(name): plain_cell(cell) for name, cell in row.items()}


@contextlib.contextmanager
def text_of(path: Path) -> Iterator[TextIO]:
    """Opens a text file of a run; what its reader finds wrong is said of this file."""
    with understood(path), open_regular(path) as file:
        yield io.TextIOWrapper(file, encoding="utf-8", newline="")


def guarded_cell(value: Any) -> Any:
    """Puts a quote before a text that a spreadsheet would run as a formula."""
    if not isinstance(value, str) or not value.startswith(_GUARDED):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def plain_cell(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(_GUARDED) else cell


# --- Locks --------------------------------------------------------------------------


@contextlib.contextmanager
def locked(
    path: str | os.PathLike,
    *,
    timeout: float = -1.0,
    taken: Exception | None = None,
    needed: bool = True,
) -> Iterator[None]:
    """Holds a lock file; raises `taken` if it is not free within `timeout` seconds."""
    lock = filelock.FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise (taken or TimeoutError(f"{path} is locked.")) from None
    except (OSError, NotImplementedError):
        if needed:
            raise
    try:
        yield
    finally:
        lock.release()


# --- Errors and versions ------------------------------------------------------------


def disk_full_said(error: BaseException, folder: Path) -> BaseException:
    """Returns an error that says what to do about a full disk, or the error itself."""
    full = os.strerror(errno.ENOSPC)
    if not isinstance(error, OSError) or not (
        error.strerror == full or f"errno = {errno.ENOSPC}" in str(error)
    ):
        return error
    return OSError(
        errno.ENOSPC,
        f"{full}. Make room, and run the same command again to resume",
        str(error.filename or folder),
    )


def package_versions() -> dict[str, str]:
    names = ("keras_rsft", "keras", "tensorflow", "numpy")
    return {name: version(name) for name in names}


def installed_versions() -> dict[str, str]:
    """Returns the same with Python and the platform, for the record."""
    python = {"python": sys.version.split()[0], "platform": platform.platform()}
    return package_versions() | python


# --- Numbered folders ---------------------------------------------------------------


def check_new_folder(output: str | os.PathLike) -> Path:
    """Returns the path of a folder that can be made; else raises InvalidArgument."""
    folder = Path(output).absolute()
    if folder.exists():
        raise InvalidArgument(
            f"The run folder must not exist yet. Received: {output}. "
            "Nothing is overwritten: choose another `--output`."
        )
    blocked = next((p for p in folder.parents if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise InvalidArgument(f"{blocked} is a file, so {output} cannot be made.")
    return folder


def numbered(root: str | os.PathLike, name: str) -> Iterator[Path]:
    """Yields `ROOT/NAME-1`, `ROOT/NAME-2` and so on."""
    return (Path(root) / f"{name}-{number}" for number in itertools.count(1))


def highest_number(directory: Path, pattern: str) -> int:
    """Returns the highest number in names that fully match a pattern's group, or 0."""
    if not directory.is_dir():
        return 0
    matches = (re.fullmatch(pattern, path.name) for path in directory.iterdir())
    return max((int(match[1]) for match in matches if match), default=0)


@dataclasses.dataclass(frozen=True)
class NumberedFolder:
    """Asks for `ROOT/NAME-N`: an unfinished run of the same kind, or the first free N.

    Attributes:
        name: Name before the number.
        root: Folder of runs. Default `runs`.
    """

    name: str
    root: str | os.PathLike = "runs"


# --- Unfinished runs ----------------------------------------------------------------
# A run `photos-1` begins as the folder `photos-1.unfinished` beside its final place,
# which one living process holds. There are its identity and its checkpoints.

_SUFFIX = ".unfinished"
_IDENTITY_FILE = "identity.json"
_LOCK_FILE = ".lock"
_RUN_FOLDER = "run"
# The state of the head's training, of the backbone's, and whether activations are
# cached: another run must not read them.
HEAD_STATE, BACKBONE_STATE = "training.npz", "base_training.npz"
CACHE_CHOICE = "activations.json"
_STATE_FILES = (HEAD_STATE, BACKBONE_STATE, CACHE_CHOICE)
_OWN_NAMES = {_IDENTITY_FILE, _LOCK_FILE, _RUN_FOLDER, *_STATE_FILES}


@dataclasses.dataclass(frozen=True)
class RunPlace:
    """The folder of a run to be, and the unfinished one that this process holds."""

    folder: Path
    unfinished: Path
    resumed: bool

    def write(self, fill: Callable[[Path], None]) -> None:
        run = self.unfinished / _RUN_FOLDER
        shutil.rmtree(run, ignore_errors=True)  # Of a run that was killed here.
        run.mkdir()
        try:
            fill(run)
            run.rename(self.folder)
        finally:
            shutil.rmtree(run, ignore_errors=True)


class _Taken(InvalidArgument):
    """This folder cannot be had; another one may."""


def run_identity(
    source: Any, classes: Sequence[str], samples: Iterable[bytes], **choices: Any
) -> dict[str, Any]:
    """Returns what two runs must share to be the same run, as JSON can hold it."""
    digest = hashlib.blake2b(digest_size=16)
    for part in samples:
        digest.update(part)
    data = [source, list(classes), digest.hexdigest()]
    identity = {"data": data, **choices, "versions": package_versions()}
    return json.loads(json.dumps(identity, default=str))


@contextlib.contextmanager
def open_place(
    output: str | os.PathLike | NumberedFolder, identity: dict[str, Any]
) -> Iterator[RunPlace]:
    """Holds the folder of a run: a new one, or an unfinished one of this identity."""
    with contextlib.ExitStack() as stack:
        for folder in _candidates(output, identity):
            try:
                place = stack.enter_context(_claimed(folder, identity))
                break
            except _Taken:
                if not isinstance(output, NumberedFolder):
                    raise
        try:
            yield place
        except (DataError, InvalidArgument, TrainingStalled):
            shutil.rmtree(place.unfinished, ignore_errors=True)
            raise
        finally:
            if place.folder.exists() or not (place.unfinished / HEAD_STATE).exists():
                shutil.rmtree(place.unfinished, ignore_errors=True)


def _candidates(
    output: str | os.PathLike | NumberedFolder, identity: dict[str, Any]
) -> Iterator[Path]:
    if not isinstance(output, NumberedFolder):
        yield check_new_folder(output)
        return
    root = Path(output.root).absolute()
    same = []
    for unfinished in sorted(root.glob(f"{glob.escape(output.name)}-*{_SUFFIX}")):
        folder = unfinished.with_name(unfinished.name.removesuffix(_SUFFIX))
        if folder.exists():  # Killed between finished and cleared.
            with contextlib.suppress(_Taken), _held(unfinished):
                shutil.rmtree(unfinished, ignore_errors=True)
        elif read_json(unfinished / _IDENTITY_FILE) == identity:
            same.append(folder)
    for folder in itertools.chain(same, numbered(root, output.name)):
        if not folder.exists():
            yield check_new_folder(folder)


@contextlib.contextmanager
def _claimed(folder: Path, identity: dict[str, Any]) -> Iterator[RunPlace]:
    unfinished = folder.with_name(f"{folder.name}{_SUFFIX}")
    with _held(unfinished):
        if folder.exists():  # Finished by another process just now.
            raise _Taken(f"{folder} exists. Nothing is overwritten.")
        before = read_json(unfinished / _IDENTITY_FILE)
        before = before if isinstance(before, dict) else None
        place = RunPlace(folder, unfinished, resumed=before == identity)
        if before not in (None, identity) and (unfinished / HEAD_STATE).exists():
            names = sorted(
                name
                for name in before.keys() | identity.keys()
                if before.get(name) != identity.get(name)
            )
            raise _Taken(
                f"{unfinished} is a run that was not finished, with other "
                f"{' and '.join(names)}. Repeat its command to resume it, remove it, "
                "or choose another `--output`."
            )
        for left in unfinished.glob(f"{_PARTIAL}*"):  # By a process that was killed.
            shutil.rmtree(left, ignore_errors=True)
        if not place.resumed:
            for name in _STATE_FILES:  # Nobody knows of which run.
                (unfinished / name).unlink(missing_ok=True)
            replaced(
                unfinished / _IDENTITY_FILE, lambda path: write_json(path, identity)
            )
        yield place


@contextlib.contextmanager
def _held(unfinished: Path) -> Iterator[None]:
    """Makes and locks an unfinished folder; refuses one that is somebody else's."""
    if os.path.lexists(unfinished):
        is_own = unfinished.is_dir() and not unfinished.is_symlink()
        found = list(unfinished.iterdir()) if is_own else [unfinished]
        names = {path.name for path in found} - _OWN_NAMES
        if not all(name.startswith(_PARTIAL) for name in names):
            raise _Taken(
                f"{unfinished} exists and is no unfinished run. Nothing is "
                "overwritten: choose another `--output`."
            )
    busy = _Taken(
        f"Another process is working on {unfinished}. Wait for it, or choose another "
        "`--output`."
    )
    with contextlib.ExitStack() as stack:
        while True:
            unfinished.mkdir(parents=True, exist_ok=True)
            lock = locked(unfinished / _LOCK_FILE, timeout=0, taken=busy)
            # Not found where its last owner is done and has removed the folder.
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(lock)
                break
        yield
