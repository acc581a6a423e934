"""Picks the samples that a page shows, most suspicious first, with their pictures."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_rsft.report.run_record import RunRecord, Samples

# What a page holds in itself: it must stay small enough to be sent by mail.
MAX_EMBEDDED = 2_000
MAX_EMBEDDED_BYTES = 9_000_000
MAX_SHOWN_PAIRS = 60


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Given against predicted labels: a row of counts for each given class.

    `strengths` has each count's share of its row, from 0 to 9; `pairs` the most
    frequent different labels: given, predicted, count.
    """

    classes: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    strengths: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int, int], ...]


def confusion_of(
    samples: Samples, num_classes: int, *, max_classes: int = 20, max_pairs: int = 30
) -> Confusion:
    """Counts labels; with more than `max_classes` there is no table, only pairs."""
    known = samples.predicted >= 0
    flat = samples.given[known].astype(np.int64) * num_classes
    flat += samples.predicted[known]
    cells, frequencies = np.unique(flat, return_counts=True)
    different = cells // num_classes != cells % num_classes
    order = np.argsort(-frequencies[different], kind="stable")[:max_pairs]
    pairs = tuple(
        (int(cell // num_classes), int(cell % num_classes), int(count))
        for cell, count in zip(
            cells[different][order], frequencies[different][order], strict=True
        )
    )
    if num_classes > max_classes:
        return Confusion((), (), (), pairs)
    table = np.zeros((num_classes, num_classes), np.int64)
    table.flat[cells] = frequencies
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    strengths = np.where(table > 0, np.clip(np.ceil(shares * 9), 1, 9), 0).astype(int)
    return Confusion(
        tuple(range(num_classes)),
        tuple(tuple(row) for row in table.tolist()),
        tuple(tuple(row) for row in strengths.tolist()),
        pairs,
    )


def gallery_data(
    record: RunRecord, *, served: bool, max_bytes: int = MAX_EMBEDDED_BYTES
) -> dict[str, Any]:
    """Returns what the page's script shows, as JSON can hold it.

    A served page lists every sample and fetches pictures one by one. Else the pictures
    or texts of the most suspicious are embedded, and those alone are listed.
    """
    samples = record.ledger
    order = np.argsort(-samples.numbers["suspicion"], kind="stable")
    place = {sample_id: row for row, sample_id in enumerate(samples.ids)}
    pairs = [
        (place[one], place[other], similarity)
        for one, other, similarity in record.pairs[:MAX_SHOWN_PAIRS]
        if one in place and other in place
    ]
    pictures: dict[int, str] = {}
    if served:
        rows = order.tolist()
    else:
        wanted = [row for pair in pairs for row in pair[:2]]
        wanted += order[:MAX_EMBEDDED].tolist()
        pictures = _shown(record, list(dict.fromkeys(wanted)), max_bytes)
        rows = [row for row in order.tolist() if row in pictures]
    shown = {row: number for number, row in enumerate(rows)}
    return {
        "run": record.identity,
        "kind": record.kind,
        "classes": list(record.class_names),
        "total": len(samples),
        "served": served,
        "pairs": [
            [shown[one], shown[other], round(similarity, 3)]
            for one, other, similarity in pairs
            if one in shown and other in shown
        ],
        "samples": _columns(record, rows, pictures, served=served),
    }


def _shown(record: RunRecord, rows: Sequence[int], max_bytes: int) -> dict[int, str]:
    """Returns pictures or texts till they fill the room; "" where there is none."""
    pictures, used = {}, 0
    for row in rows:
        sample_id = record.ledger.ids[row]
        if record.kind == "texts":
            text = record.texts.get(sample_id, "")
        else:
            picture = record.thumbnail(sample_id) or b""
            text = base64.b64encode(picture).decode("ascii")
        used += len(text.encode())
        if used > max_bytes:
            break
        pictures[row] = text
    return pictures


def _columns(
    record: RunRecord, rows: Sequence[int], pictures: dict[int, str], *, served: bool
) -> dict[str, list]:
    samples = record.ledger
    picked = np.array(rows, np.int64)
    columns = {
        "id": [samples.ids[row] for row in rows],
        "given": samples.given[picked].tolist(),
        "predicted": samples.predicted[picked].tolist(),
        "clean": samples.clean[picked].tolist(),
        "probability": _rounded(samples.numbers["predicted_probability"][picked]),
        "suspicion": _rounded(samples.numbers["suspicion"][picked]),
        "loss": _rounded(samples.numbers["loss_mean"][picked]),
        "rejected": samples.counts["rejected"][picked].tolist(),
        "seen": samples.counts["seen"][picked].tolist(),
    }
    if record.kind == "texts":  # A server has no more of them than the page.
        columns["text"] = [record.texts.get(samples.ids[row], "") for row in rows]
    elif served:  # The row's number in the ledger names the picture.
        has_picture = [samples.ids[row] in record.thumbnail_places for row in rows]
        columns["picture"] = [
            str(row) if has else "" for row, has in zip(rows, has_picture, strict=True)
        ]
    else:
        columns["picture"] = [pictures[row] for row in rows]
    return columns


def _rounded(values: np.ndarray) -> list[float | None]:
    return [round(v, 4) if math.isfinite(v) else None for v in values.tolist()]
