"""Writes a folder of results: whole or not at all, never over what exists.

Apart from the rooms that have results, so that all of them keep that promise in the
same way.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# What starts a formula in a spreadsheet; the quote itself, to tell it from a guard.
_GUARDED = ("=", "+", "-", "@", "\t", "\r", "'")


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Gives a folder beside `target` to fill, and renames it when that is done.

    Args:
        target: The folder to be; its parents are made. It must not exist.

    Yields:
        A hidden folder in the same place. It is removed if filling it fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        partial.chmod(0o755)
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replaced(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file beside its place, and renames it once it is on the disk.

    Args:
        path: The file to be; one that is there is replaced.
        write: Writes to the path that it is given.
    """
    beside = path.with_name(f".partial-{path.name}")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON; what it does not know is written as text."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Writes a CSV file with a header, safe to open in a spreadsheet.

    Texts that a spreadsheet would run are guarded; `read_csv` gives them back.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([guarded_cell(name) for name in header])
        writer.writerows([guarded_cell(value) for value in row] for row in rows)


def read_csv(path: Path) -> Iterator[dict[str, str]]:
    """Yields the rows of what `write_csv` wrote, by column, the guards taken off."""
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield {plain_cell(name): plain_cell(cell) for name, cell in row.items()}


def guarded_cell(value: Any) -> Any:
    """Puts a quote before a text that a spreadsheet would run as a formula.

    A file or a class may be named `=HYPERLINK(...)`. Numbers stay as they are, also
    negative ones.

    Args:
        value: A cell; all but strings are returned unchanged.
    """
    if not isinstance(value, str) or not value.startswith(_GUARDED):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def plain_cell(cell: str) -> str:
    """Takes the quote off again that `guarded_cell` puts before a text."""
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(_GUARDED) else cell


def disk_full_said(error: BaseException, folder: Path) -> BaseException:
    """Returns an error that says what to do about a full disk, or the error itself.

    Args:
        error: What went wrong.
        folder: Where was written to.
    """
    full = os.strerror(errno.ENOSPC)
    if not isinstance(error, OSError) or not (
        error.strerror == full or f"errno = {errno.ENOSPC}" in str(error)
    ):
        return error
    return OSError(
        errno.ENOSPC,
        f"{full}. Make room, and run the same command again to go on",
        str(error.filename or folder),
    )


def installed_versions() -> dict[str, str]:
    """Returns the versions that results depend on, by name, for the record."""
    packages = ("keras_rsft", "keras", "tensorflow", "numpy")
    return {name: version(name) for name in packages} | {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
    }
