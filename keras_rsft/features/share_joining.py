"""Makes one verified set of features of the parts that several processes computed.

Where the parts are, and when they are finished, is `shares.py`'s business.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from keras_rsft.errors import DataError
from keras_rsft.features.feature_set import (
    FEATURES_FILE,
    INDEX_FILE,
    META_FILE,
    read_meta,
)
from keras_rsft.features.shares import (
    LOCK_FILE,
    Part,
    held,
    joining_folder,
    shares_folder,
    size_of,
)
from keras_rsft.progress import progress_bar
from keras_rsft.result_folder import write_json

CHECKSUM = "blake2b"
_COPIED_BYTES = 2**24


def join_parts(
    folder: Path,
    parts: Sequence[Part],
    meta: Mapping[str, Any],
    *,
    name: str,
    patience: float,
    progress: bool,
) -> None:
    """Puts finished parts together, verifies the set, and gives it its name."""
    # Verified are each part's checksums against those of what its worker wrote, the
    # number of its rows, and that its samples are of its share, in order, none twice.
    # Afterwards all parts are removed.
    with held(shares_folder(folder) / LOCK_FILE, patience):
        if read_meta(folder) is None:
            joining = joining_folder(folder)
            shutil.rmtree(joining, ignore_errors=True)  # Of one that was killed.
            joining.mkdir(parents=True)
            # Appends all parts to one set, and returns its number of rows.
            files = (FEATURES_FILE, INDEX_FILE)
            total = sum(size_of(part.path / file) for part in parts for file in files)
            rows = 0
            with contextlib.ExitStack() as stack:
                targets = {
                    file: stack.enter_context((joining / file).open("wb"))
                    for file in files
                }
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
                    for file, target in targets.items():
                        checksum = append_file(part.path / file, target, advance)
                        if fault is None and checksum != said["checksums"].get(file):
                            fault = f"{file} is not what was written"
                    if fault is not None:
                        shutil.rmtree(part.path, ignore_errors=True)
                        raise DataError(_damaged(part, name, fault))
                    rows += len(index)
                for target in targets.values():
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


def _damaged(part: Part, name: str, fault: str) -> str:
    return (
        f"The share of {name} from image {part.stretch.start} to "
        f"{part.stretch.stop - 1} is damaged: {fault}. It was removed. Run the same "
        "command again, on all workers; see that each has an index of its own."
    )
