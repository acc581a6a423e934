"""Shares of one pass that several processes make, and how they become one set.

A share is a stretch of the split, whole batches of it. Its part is append-only, in a
folder that all processes see, and none of them writes into another's. No connection is
needed: a file that appears by a rename says that a part is finished, and whoever waits
looks at files. Locks are used where the file system has them, and not relied on.
Running the base is `extraction.py`'s business, making one set `share_joining.py`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_rsft.cluster import Cluster
from keras_rsft.errors import WorkerLost
from keras_rsft.features.feature_set import (
    FEATURES_FILE,
    INDEX_FILE,
    read_meta,
)
from keras_rsft.progress import progress_bar
from keras_rsft.result_folder import replaced, write_json

_SHARE_FILE = "share.json"
LOCK_FILE = ".lock"
SECONDS_BETWEEN_LOOKS = 0.2


def share_of(count: int, *, batch_size: int, shares: int, index: int) -> range:
    """Returns which samples are a worker's share."""
    # All shares have the same number of batches, give or take one.
    # Whole batches of the whole split, so that each sample is computed together with
    # those that it would have been computed with by one process.
    each, more = divmod(-(-count // batch_size), shares)
    start, stop = (
        min(count, batch_size * (number * each + min(number, more)))
        for number in (index, index + 1)
    )
    return range(start, stop)


def chain_of(stretches: Iterable[range], count: int) -> list[range] | None:
    """Returns stretches that hold each of `count` positions once, in order."""
    longest: dict[int, range] = {}
    for stretch in sorted(stretches, key=len):
        longest[stretch.start] = stretch
    chain, reached = [], 0
    while reached < count:
        stretch = longest.get(reached)
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
        name = f"{stretch.start}-{stretch.stop}"
        return cls(shares_folder(folder) / name, stretch)

    def finished(self) -> dict[str, Any] | None:
        """Returns `rows` and `checksums` of a finished part, else None."""
        try:
            said = json.loads((self.path / _SHARE_FILE).read_text(encoding="utf-8"))
            return {"rows": int(said["rows"]), "checksums": dict(said["checksums"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def finish(self, rows: int, checksums: Mapping[str, str]) -> None:
        """Says that the part is whole."""
        said = {"rows": rows, "checksums": dict(checksums)}
        replaced(self.path / _SHARE_FILE, lambda path: write_json(path, said))

    @property
    def rows(self) -> int:
        """The number of rows of a finished part, else 0."""
        said = self.finished()
        return 0 if said is None else said["rows"]

    def reached(self) -> int:
        """Returns how many rows are on disk, as far as this machine can see."""
        return size_of(self.path / INDEX_FILE) // 8

    def held(self, patience: float) -> contextlib.AbstractContextManager[None]:
        """Keeps others of this machine, at least, from writing the same part."""
        return held(self.path / LOCK_FILE, patience)


def parts_of(folder: Path, count: int, batch_size: int, shares: int) -> list[Part]:
    """Returns the parts of all shares, in order, those of empty ones left out."""
    stretches = (
        share_of(count, batch_size=batch_size, shares=shares, index=index)
        for index in range(shares)
    )
    return [Part.of(folder, stretch) for stretch in stretches if stretch]


def finished_parts(folder: Path, count: int) -> list[Part] | None:
    """Returns finished parts of a set that make it whole; None if they do not."""
    stretches = []
    for path in shares_folder(folder).glob("*-*"):
        ends = path.name.split("-")
        if len(ends) == 2 and all(end.isdigit() for end in ends):
            stretch = range(*map(int, ends))
            if Part(path, stretch).finished():
                stretches.append(stretch)
    chain = chain_of(stretches, count)
    return [Part.of(folder, stretch) for stretch in chain] if chain else None


def shares_folder(folder: Path) -> Path:
    """Returns where the parts are of the set that will be at `folder`."""
    return folder.with_name(f"{folder.name}.shares")


def joining_folder(folder: Path) -> Path:
    """Returns where that set is while it is put together."""
    return folder.with_name(f"{folder.name}.joining")


@contextlib.contextmanager
def held(path: Path, patience: float) -> Iterator[None]:
    """Holds a lock on a file, where the file system has locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise WorkerLost(
                        f"Another process has held {path.parent} for {patience:.0f} s. "
                        "Each worker must have an index of its own; end the other one."
                    ) from None
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            except OSError:  # Not every network's disk has locks.
                pass
            break
        yield


def size_of(path: Path) -> int:
    """Returns the bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


class Watch:
    """Tells who has not moved for too long."""

    def __init__(self, patience: float):
        self._patience = patience
        self._last: dict[int, tuple[int, float]] = {}

    def lost(self, reached: Mapping[int, int], now: float) -> list[int]:
        """Returns whose number has been the same for longer than the patience."""
        for who, value in reached.items():
            if self._last.get(who, (None, now))[0] != value:
                self._last[who] = (value, now)
        return [who for who in reached if now - self._last[who][1] > self._patience]


def wait_for_parts(
    folder: Path,
    parts: Sequence[Part],
    cluster: Cluster,
    *,
    name: str,
    patience: float,
    progress: bool,
) -> None:
    """Waits until all parts are finished, or put together already."""
    watch = Watch(patience)
    total, done = sum(len(part.stretch) for part in parts), 0
    label = f"Features of {name}, all workers"
    with progress_bar(label, total=total, unit="images", visible=progress) as advance:
        while True:
            missing = {
                index: part.reached()
                for index, part in enumerate(parts)
                if part.finished() is None
            }
            if not missing or read_meta(folder) is not None:
                return
            lost = watch.lost(missing, time.monotonic())
            if lost:
                raise WorkerLost(_parts_missing(lost, missing, parts, cluster, name))
            left = sum(len(parts[who].stretch) - rows for who, rows in missing.items())
            advance(max(0, total - left - done))
            done = max(done, total - left)
            time.sleep(min(SECONDS_BETWEEN_LOOKS, patience))


def wait_for_set(folder: Path, cluster: Cluster, *, name: str, patience: float) -> None:
    """Waits until the chief has put finished parts together."""
    watch = Watch(patience)
    while read_meta(folder) is None:
        reached = {0: size_of(joining_folder(folder) / FEATURES_FILE)}
        if watch.lost(reached, time.monotonic()):
            raise WorkerLost(
                f"All shares of {name} are finished, and {cluster.named(0)} has not "
                f"put them together for {patience:.0f} s. Start the same command there "
                "again, and here: all that was computed is kept."
            )
        time.sleep(min(SECONDS_BETWEEN_LOOKS, patience))


def _parts_missing(
    lost: Sequence[int],
    reached: Mapping[int, int],
    parts: Sequence[Part],
    cluster: Cluster,
    name: str,
) -> str:
    said = [
        f"{cluster.named(who)} has {reached[who]} of the images "
        f"{parts[who].stretch.start} to {parts[who].stretch.stop - 1}"
        for who in lost
    ]
    text = (
        f"Features of {name} are missing, and nothing is added any more: "
        f"{'; '.join(said)}. Start the same command there again, and here: all that "
        "was computed is kept."
    )
    if not all(parts[who].path.exists() for who in lost):
        text += (
            " If it is running, it is computing other features: all workers need the "
            "same folder of features, the same images, with the same times of change, "
            "the same base and the same `--precision`."
        )
    return text
