"""The beginnings of a split's texts, kept in a run for whoever shows it.

A pack is one file of JSON lines, `texts.jsonl`, each with the keys `id` and `text`.
Unlike a table it holds nothing that a spreadsheet would run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from keras_rsft.data import TextSplit
from keras_rsft.errors import DataError
from keras_rsft.features.thumbnails import MAX_THUMBNAILS, most_suspicious
from keras_rsft.run_files import TEXTS_FILE

MAX_CHARACTERS = 600


def write_excerpts(split: TextSplit, suspicion: dict[str, float], folder: Path) -> None:
    """Puts the beginnings of the texts that can be read into a folder."""
    chosen = most_suspicious(split, suspicion, MAX_THUMBNAILS)
    with (folder / TEXTS_FILE).open("w", encoding="utf-8") as file:
        for sample_id, text in _readable(split, chosen):
            line = {"id": sample_id, "text": excerpt_of(text)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def excerpt_of(text: str) -> str:
    """Returns the beginning of a text, 600 characters at most, in one paragraph."""
    flat = " ".join(text[: 10 * MAX_CHARACTERS].split())
    if len(flat) <= MAX_CHARACTERS and len(text) <= 10 * MAX_CHARACTERS:
        return flat
    return f"{flat[: MAX_CHARACTERS - 1]}…"


def _readable(split: TextSplit, chosen: np.ndarray) -> Iterator[tuple[str, str]]:
    for index in chosen.tolist():
        try:
            yield str(split.ids[index]), split.text(index)
        except (DataError, OSError):  # It is in unreadable.csv, or gone since.
            continue
