"""Splits one extraction among several processes and joins the parts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from keras_rsft._progress import progress_bar
from keras_rsft._storage import locked, replaced, write_json
from keras_rsft.errors import DataError, WorkerLost
from keras_rsft.features._store import FEATURES_FILE, INDEX_FILE, META_FILE, read_meta

_SHARE_FILE = "share.json"
LOCK_FILE = ".lock"
SECONDS_BETWEEN_LOOKS = 0.2
CHECKSUM = "blake2b"
_COPIED_BYTES = 2**24


def share_of(count: int, *, batch_size: int, shares: int, index: int) -> range:
    """Returns which samples are a worker's share."""
    # All shares have the same number of batches, give or take one.
    # Whole batches of the whole split, so that each sample is computed together with
    # those that it would have been computed with by one process.
    each, more = divmod(-(-count // batch_size), shares)
    starts = [number * each + min(number, more) for number in (index, index + 1)]
    return range(*(min(count, batch_size * start) for start in starts))


def chain_of(stretches: Iterable[range], count: int) -> list[range] | None:
    """Returns stretches that hold each of `count` positions once, in order."""
    longest: dict[int, range] = {}
    for stretch in sorted(stretches, key=len):
        longest[stretch.start] = stretch
    chain, reached = [], 0
    while reached < count:
        stretch = longest.get(reached, range(0))
        if not stretch:
            return None
        chain.append(stretch)
        reached = stretch.stop
    return chain if reached == count else None


@dataclasses.dataclass(frozen=True)
class Part:
    """What one worker has of its share."""

    path: Path
    stretch: range

    @classmethod
    def of(cls, folder: Path, stretch: range) -> Part:
        """Returns the part of the set that will be at `folder`; it need not exist."""
        return cls(shares_folder(folder) / f"{stretch.start}-{stretch.stop}", stretch)

    def finished(self) -> dict[str, Any] | None:
        """Returns `rows` and `checksums` of a finished part, else None."""
        try:
            said = json.loads((self.path / _SHARE_FILE).read_text(encoding="utf-8"))
            return {"rows": int(said["rows"]), "checksums": dict(said["checksums"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def finish(self, rows: int, checksums: Mapping[str, str]) -> None:
        said = {"rows": rows, "checksums": dict(checksums)}
        replaced(self.path / _SHARE_FILE, lambda path: write_json(path, said))

    @property
    def rows(self) -> int:
        return (self.finished() or {"rows": 0})["rows"]

    def reached(self) -> int:
        """Returns how many rows are on disk, as far as this machine can see."""
        return size_of(self.path / INDEX_FILE) // 8

    def held(self, timeout: float) -> contextlib.AbstractContextManager[None]:
        """Keeps others of this machine, at least, from writing the same part."""
        return held(self.path / LOCK_FILE, timeout)


def parts_of(folder: Path, count: int, batch_size: int, shares: int) -> list[Part]:
    """Returns the parts of all shares, in order, those of empty ones left out."""
    stretches = (
        share_of(count, batch_size=batch_size, shares=shares, index=index)
        for index in range(shares)
    )
    return [Part.of(folder, stretch) for stretch in stretches if stretch]


def finished_parts(folder: Path, count: int) -> list[Part] | None:
    """Returns finished parts of a set that make it whole; None if they do not."""
    names = [path.name.split("-") for path in shares_folder(folder).glob("*-*")]
    parts = [
        Part.of(folder, range(int(ends[0]), int(ends[1])))
        for ends in names
        if len(ends) == 2 and all(end.isdigit() for end in ends)
    ]
    chain = chain_of((part.stretch for part in parts if part.finished()), count)
    return [Part.of(folder, stretch) for stretch in chain] if chain else None


def shares_folder(folder: Path) -> Path:
    """Returns where the parts are of the set that will be at `folder`."""
    return folder.with_name(f"{folder.name}.shares")


def joining_folder(folder: Path) -> Path:
    """Returns where that set is while it is put together."""
    return folder.with_name(f"{folder.name}.joining")


def held(path: Path, timeout: float) -> contextlib.AbstractContextManager[None]:
    """Holds a lock, where the file system has locks; WorkerLost if others do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lost = WorkerLost(
        f"Another process has held {path.parent} for {timeout:.0f} s. "
        "Each worker must have an index of its own; end the other one."
    )
    return locked(path, timeout=timeout, taken=lost, needed=False)


def size_of(path: Path) -> int:
    """Returns the bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


class Watch:
    """Tells who has not moved for too long."""

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._last: dict[int, tuple[int, float]] = {}

    def lost(self, reached: Mapping[int, int], now: float) -> list[int]:
        """Returns whose number has been the same for longer than the timeout."""
        for who, value in reached.items():
            if self._last.get(who, (None, now))[0] != value:
                self._last[who] = (value, now)
        return [who for who in reached if now - self._last[who][1] > self._timeout]


def watched(
    reached: Callable[[], Mapping[int, int]], timeout: float
) -> Iterator[tuple[Mapping[int, int], list[int]]]:
    """Yields now and then how far all are, and who has not moved for too long."""
    watch = Watch(timeout)
    while True:
        now = reached()
        yield now, watch.lost(now, time.monotonic())
        time.sleep(min(SECONDS_BETWEEN_LOOKS, timeout))


def join_parts(
    folder: Path,
    parts: Sequence[Part],
    meta: Mapping[str, Any],
    *,
    name: str,
    timeout: float,
    progress: bool,
) -> None:
    """Puts finished parts together, verifies the set, and gives it its name."""
    # Verified are each part's checksums against those of its worker, the number of its
    # rows, and that its samples are of its share, in order, none twice. Afterwards all
    # parts are removed.
    files = (FEATURES_FILE, INDEX_FILE)
    with (
        held(shares_folder(folder) / LOCK_FILE, timeout),
        contextlib.ExitStack() as stack,
    ):
        if read_meta(folder) is None:
            joining = joining_folder(folder)
            shutil.rmtree(joining, ignore_errors=True)  # Of one that was killed.
            joining.mkdir(parents=True)
            total = sum(size_of(part.path / file) for part in parts for file in files)
            rows = 0
            opened = [stack.enter_context((joining / one).open("wb")) for one in files]
            advance = stack.enter_context(
                progress_bar(
                    f"{name}: putting shares together",
                    total=-(-total // 2**20), unit="MiB", visible=progress,
                )
            )  # fmt: skip
            for part in parts:
                said = part.finished() or {"rows": -1, "checksums": {}}
                index = np.fromfile(part.path / INDEX_FILE, dtype=np.int64)
                fault = index_fault(index, part.stretch, said["rows"])
                for file, target in zip(files, opened, strict=True):
                    checksum = append_file(part.path / file, target, advance)
                    if fault is None and checksum != said["checksums"].get(file):
                        fault = f"{file} is not what was written"
                if fault is not None:
                    shutil.rmtree(part.path, ignore_errors=True)
                    first, last = part.stretch.start, part.stretch.stop - 1
                    raise DataError(
                        f"The share of {name} from image {first} to {last} is damaged: "
                        f"{fault}. It was removed. Run the same command again, on all "
                        "workers; see that each has an index of its own."
                    )
                rows += len(index)
            for target in opened:
                target.flush()
                os.fsync(target.fileno())
            write_json(joining / META_FILE, {"rows": rows, **meta})
            publish(joining, folder)
        shutil.rmtree(shares_folder(folder), ignore_errors=True)


def publish(filled: Path, folder: Path) -> None:
    """Gives a complete folder its final name; a damaged one there is removed."""
    if read_meta(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)  # Only ever a damaged one.
        try:
            filled.rename(folder)
            return
        except OSError:
            if read_meta(folder) is None:
                raise
    shutil.rmtree(filled, ignore_errors=True)


def index_fault(index: np.ndarray, stretch: range, rows: int) -> str | None:
    """Says what is wrong with the samples of a part, or None."""
    if len(index) != rows:
        return f"it has {len(index)} rows and should have {rows}"
    if np.any(np.diff(index) <= 0):
        return "it has a sample twice, or out of order"
    if rows and not (index[0] in stretch and index[-1] in stretch):
        return "it has a sample of another share"
    return None


def append_file(
    source: Path, target: BinaryIO, advance: Callable[[float], None]
) -> str:
    """Copies a file to the end of another, and returns its checksum."""
    digest = hashlib.new(CHECKSUM)
    with source.open("rb") as file:
        while piece := file.read(_COPIED_BYTES):
            digest.update(piece)
            target.write(piece)
            advance(len(piece) / 2**20)
    return digest.hexdigest()
