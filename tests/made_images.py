"""Small images and tables that the tests of the data room write themselves."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

SPLIT_NAMES = ("train", "validation", "test")


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value % 256, np.uint8)).save(file, "PNG")
    return file.getvalue()


def value_of(image) -> int:
    """The grey value of an image of one colour; resizing leaves 1e-6 of error."""
    return round(float(image[0, 0, 0]))


def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No two files are equal: equal ones would go to one split.
    path.write_bytes(content or png(len(str(path))) + os.fsencode(path))
    return path


def write_table(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def all_ids(data) -> list[str]:
    return sorted(i for name in SPLIT_NAMES for i in getattr(data, name).ids.tolist())


def named_labels(data, split: str) -> dict[str, str]:
    part = getattr(data, split)
    names = [data.class_names[label] for label in part.labels]
    return dict(zip(part.ids.tolist(), names, strict=True))


def indices_of(dataset) -> list[int]:
    return [int(index) for index, _ in dataset]
