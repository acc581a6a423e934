"""Writes a folder of results: whole or not at all, never over what exists.

Apart from the rooms that have results, so that all of them keep that promise in the
same way.
"""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_RUN_BY_SPREADSHEETS = ("=", "+", "-", "@", "\t", "\r", "'")


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


def guarded(cell: str) -> str:
    """Returns a cell that no spreadsheet runs as a formula.

    One that begins with `= + - @`, a tab, a carriage return or a quote gets a single
    quote before it, which `unguarded` takes away.
    """
    return f"'{cell}" if cell.startswith(_RUN_BY_SPREADSHEETS) else cell


def unguarded(cell: str) -> str:
    """Returns the text that `guarded` was given."""
    is_guarded = cell.startswith("'") and cell[1:].startswith(_RUN_BY_SPREADSHEETS)
    return cell[1:] if is_guarded else cell


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON; what it does not know is written as text."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Writes a CSV file with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
