"""A run folder that nothing was trained for: any number of samples, any names."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image

from keras_rsft import _storage
from keras_rsft._ledger import COLUMNS, HISTOGRAM_COLUMNS, Ledger, loss_histogram
from keras_rsft._storage import write_csv, write_json
from keras_rsft.features._store import checksum_of
from keras_rsft.report._record import read_run

HOSTILE_CLASSES = (
    "<script>document.title='class'</script>",
    "=1+1",
    "a \"quoted\", 'name'",
    "عربي",
    "🦉 " + "long" * 60,
)
HOSTILE_IDS = (
    "<img src=x onerror=document.title='id'>.png",
    "</script><script>document.title='json'</script>.png",
    "=HYPERLINK(1).png",
    "'quoted.png",
    "-dash,comma.png",
    'a"b\nline.png',
    "\u202ertl.png",
    "__proto__",
    "{{ 7 * 7 }}.png",
    "deep/" + "x" * 300 + ".png",
)


def made_run(
    folder: Path,
    *,
    count: int = 40,
    classes: tuple[str, ...] = ("cat", "dog", "owl"),
    ids: tuple[str, ...] = (),
    epochs: int = 3,
    clean: bool = False,
    picture_side: int = 16,
) -> Path:
    """Writes a run of `count` samples; the first are called `ids`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = np.array([*ids, *(f"{n:06}.png" for n in range(count - len(ids)))])
    labels = rng.integers(0, len(classes), count)
    ledger = Ledger(names, labels, labels if clean else None)
    rows = []
    for epoch in range(1, epochs + 1):
        losses = rng.gamma(2.0, 1.0, count).astype(np.float32)
        accepted = (losses < 2.5).astype(float)
        ledger.note_epoch(losses, accepted)
        rows += loss_histogram(losses, accepted, 2.5 if epoch > 1 else None).rows(epoch)
    scores = rng.gamma(0.3, 1.0, (count, len(classes))) + 1e-6
    shares = scores / scores.sum(axis=1, keepdims=True)
    ledger.note_probabilities(shares)
    ledger.right_probability = shares[np.arange(count), labels].astype(np.float32)
    ledger.looks_wrong = (ledger.right_probability < 0.6).astype(np.int32)
    write_csv(folder / _storage.LEDGER_FILE, COLUMNS, ledger.rows(classes))
    write_csv(folder / _storage.HISTOGRAMS_FILE, HISTOGRAM_COLUMNS, rows)
    _write_tables(folder, names, labels, classes, epochs)
    _write_thumbnails(folder, names, picture_side)
    wrong = int(ledger.looks_wrong.sum())
    found = {"samples": count, "look_wrong": wrong}
    found["expected_wrong"] = float(np.sum(1 - ledger.right_probability))
    _write_json(folder, classes, found)
    return folder


def write_features(folder: Path, cache: Path, *, dim: int = 6) -> np.ndarray:
    """Caches features of a run that hold its samples' right labels; returns these."""
    record = read_run(folder)
    given, classes = record.ledger.given, len(record.class_names)
    rng = np.random.default_rng(1)
    right = np.where(np.arange(len(given)) % 5, given, (given + 1) % classes)
    values = np.eye(classes, dim)[right] + rng.normal(0, 0.1, (len(given), dim))
    cache.mkdir()
    values.astype(np.float32).tofile(cache / "features.bin")
    np.arange(len(given), dtype=np.int64).tofile(cache / "index.bin")
    sizes = {"rows": len(given), "views": 1, "dim": dim, "precision": "float32"}
    names = ("features.bin", "index.bin")
    sizes["checksums"] = {name: checksum_of(cache / name) for name in names}
    write_json(cache / "meta.json", sizes)
    place = {"folder": str(cache), "rows": None, "dropped": {}, "clean": False}
    places = {"train": place | {"checksums": sizes["checksums"]}}
    write_json(folder / _storage.CACHED_FEATURES_FILE, places)
    return right


def _write_tables(folder, names, labels, classes, epochs):
    write_csv(
        folder / _storage.SAMPLES_FILE,
        ("id", "split", "given_label", "clean_label"),
        [
            *((i, "train", classes[k], "")
              for i, k in zip(names.tolist(), labels, strict=True)),
            *((f"test{n}.png", "test", classes[0], "") for n in range(200)),
        ],
    )  # fmt: skip
    write_csv(
        folder / _storage.METRICS_FILE,
        ("epoch", "acceptance_rate", "accuracy", "loss", "val_accuracy"),
        ((e, 0.7, 0.5 + 0.1 * e, 2.0 / e, 0.6) for e in range(1, epochs + 1)),
    )
    write_csv(
        folder / _storage.ACCEPTANCE_FILE,
        ("epoch", *classes),
        ((e, *(0.9 - 0.1 * (k % 5) for k in range(len(classes))))
         for e in range(1, epochs + 1)),
    )  # fmt: skip
    different = next(n for n in range(1, len(labels)) if labels[n] != labels[0])
    write_csv(
        folder / _storage.NEAR_DUPLICATES_FILE,
        ("id", "other_id", "similarity"),
        [(str(names[0]), str(names[different]), "0.9500")],
    )


def _write_thumbnails(folder, names, side):
    rows, offset = [], 0
    with (folder / _storage.THUMBNAILS_FILE).open("wb") as file:
        for number, name in enumerate(names.tolist()):
            encoded = _jpeg(number % 256, side)
            file.write(encoded)
            rows.append((name, offset, len(encoded)))
            offset += len(encoded)
    header = ("id", "offset", "bytes")
    write_csv(folder / _storage.THUMBNAILS_INDEX_FILE, header, rows)


@functools.cache
def _jpeg(seed: int, side: int) -> bytes:
    # Coarse noise, about as large as a photo's thumbnail of that side.
    coarse = np.random.default_rng(seed).integers(0, 256, (side // 4, side // 4, 3))
    image = Image.fromarray(coarse.astype(np.uint8)).resize((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return file.getvalue()


def _write_json(folder, classes, found):
    write_json(folder / _storage.CLASSES_FILE, list(classes))
    write_json(
        folder / _storage.CONFIG_FILE,
        {
            "command": "keras-rsft fit '<b>photos</b>' --epochs 3",
            "data": "<b>photos</b>",
            "policy": {"name": "auto", "threshold": None},
            "finding": "About 30 % of the labels look wrong.",
            "versions": {"keras": "3"},
        },
    )
    results = {
        "test_accuracy": 0.9,
        "acceptance_rate": 0.7,
        "label_quality": {
            "finding": f"{found['look_wrong']} of {found['samples']} look wrong.",
            **found,
            "splits": {"train": found | {"known": 0}},
            "classes": [],
        },
        "against_plain": {
            "split": "test",
            "images": 200,
            "both_right": 150,
            "only_rejection_right": 30,
            "only_plain_right": 10,
            "wrong_labels": None,
            "history": {"val_accuracy": [0.5, 0.5, 0.5]},
        },
    }
    write_json(folder / _storage.RESULTS_FILE, results)
