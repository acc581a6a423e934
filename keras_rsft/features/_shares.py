"""Splits one extraction among several processes and joins the parts."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from keras_rsft._storage import (
    json_of,
    locked,
    make_folder,
    open_regular,
    replaced,
    write_json,
)
from keras_rsft.errors import WorkerLost
from keras_rsft.features._store import read_meta

_SHARE_FILE = "share.json"
_LOCK_FILE = ".lock"
SECONDS_BETWEEN_LOOKS = 0.2
_COPIED_BYTES = 2**24


def share_of(count: int, batch_size: int, shares: int, index: int) -> range:
    # All shards have the same number of batches, give or take one.
    # Whole batches of the whole split, so that each sample is computed together with
    # those that it would have been computed with by one process.
    each, more = divmod(-(-count // batch_size), shares)
    starts = [number * each + min(number, more) for number in (index, index + 1)]
    return range(*(min(count, batch_size * start) for start in starts))


def chain_of(stretches: Iterable[range], count: int) -> list[range] | None:
    """Returns stretches that hold each of `count` positions once, in order."""
    longest = {stretch.start: stretch for stretch in sorted(stretches, key=len)}
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
    """The shard of one worker, as far as it is on disk."""

    path: Path
    stretch: range

    @classmethod
    def of(cls, folder: Path, stretch: range) -> Part:
        """Returns the part of the set that will be at `folder`; it need not exist."""
        return cls(shares_folder(folder) / f"{stretch.start}-{stretch.stop}", stretch)

    def finished(self) -> dict[str, Any] | None:
        """Returns `rows` and `checksums` of a finished part, else None."""
        try:
            record = json_of(self.path / _SHARE_FILE, dict)
            return {"rows": int(record["rows"]), "checksums": dict(record["checksums"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def finish(self, rows: int, checksums: Mapping[str, str]) -> None:
        record = {"rows": rows, "checksums": dict(checksums)}
        replaced(self.path / _SHARE_FILE, lambda path: write_json(path, record))

    @property
    def rows(self) -> int:
        return (self.finished() or {"rows": 0})["rows"]


def parts_of(folder: Path, count: int, batch_size: int, shares: int) -> list[Part]:
    """Returns the parts of all shares, in order, those of empty ones left out."""
    stretches = (share_of(count, batch_size, shares, at) for at in range(shares))
    return [Part.of(folder, stretch) for stretch in stretches if stretch]


def finished_parts(folder: Path, count: int) -> list[Part] | None:
    """Returns finished parts of a set that make it whole; None if they do not."""
    names = (path.name for path in shares_folder(folder).glob("*-*"))
    ends = (re.fullmatch(r"([0-9]+)-([0-9]+)", name) for name in names)
    parts = (Part.of(folder, range(int(e[1]), int(e[2]))) for e in ends if e)
    chain = chain_of((part.stretch for part in parts if part.finished()), count)
    return [Part.of(folder, stretch) for stretch in chain] if chain else None


def shares_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.shares")


def joining_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.joining")


def held(folder: Path, timeout: float) -> contextlib.AbstractContextManager[None]:
    """Locks a folder, where the file system has locks; WorkerLost if others do."""
    make_folder(folder)
    lost = WorkerLost(
        f"Another process has held {folder} for {timeout:.0f} s. "
        "Each worker must have an index of its own; end the other one."
    )
    return locked(folder / _LOCK_FILE, timeout=timeout, taken=lost, needed=False)


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def watched(
    files: Callable[[], Mapping[int, Path]], timeout: float
) -> Iterator[tuple[Mapping[int, int], list[int]]]:
    """Yields now and then the sizes of files, and which have not grown for too long."""
    last: dict[int, tuple[int, float]] = {}
    while True:
        sizes = {who: size_of(file) for who, file in files().items()}
        now = time.monotonic()
        for who, size in sizes.items():
            if last.get(who, (None, now))[0] != size:
                last[who] = (size, now)
        yield sizes, [who for who in sizes if now - last[who][1] > timeout]
        time.sleep(min(SECONDS_BETWEEN_LOOKS, timeout))


def remove(folder: Path) -> None:
    """Removes a folder, or a link to one, whose folder stays."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def publish(filled: Path, folder: Path) -> None:
    """Gives a complete folder its final name; a damaged one there is removed."""
    if read_meta(folder) is None:
        remove(folder)  # Only ever a damaged one.
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
    source: Path, target: BinaryIO, before: int, advance: Callable[[float], None]
) -> tuple[str, int]:
    """Copies a file to the end of another; returns its checksum, and that of both."""
    checksum = 0
    with open_regular(source) as file:
        while piece := file.read(_COPIED_BYTES):
            checksum, before = (zlib.crc32(piece, one) for one in (checksum, before))
            target.write(piece)
            advance(len(piece) / 2**20)
    return f"{checksum:08x}", before
