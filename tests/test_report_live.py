"""The order of a review, sorted anew by what was decided."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made_run import made_run, write_features

from keras_rsft._storage import CACHED_FEATURES_FILE, write_csv
from keras_rsft.errors import DataError
from keras_rsft.features._store import FeatureSet
from keras_rsft.label_quality._audit import audit_labels
from keras_rsft.report._live import LiveAudit
from keras_rsft.report._record import read_run


@pytest.fixture
def folder(tmp_path):
    return made_run(tmp_path / "run", count=90)


@pytest.fixture
def right(folder, tmp_path):
    return write_features(folder, tmp_path / "cache")


def test_wrong_labels_come_first_and_what_was_decided_is_gone(folder, right):
    record = read_run(folder)
    wrong = np.flatnonzero(record.ledger.given != right)
    live = LiveAudit(record)
    first = live({})
    rows = first["samples"]["row"]
    assert sorted(rows) == list(range(90))
    assert set(rows[: len(wrong)]) == set(wrong.tolist())
    assert first["expected"] == pytest.approx(len(wrong), abs=2)
    seen = wrong[:10].tolist()
    decided = {record.ledger.ids[row]: int(right[row]) for row in seen[:5]}
    decided |= {record.ledger.ids[row]: None for row in seen[5:]}
    later = live(decided)
    rest = later["samples"]["row"]
    assert sorted(rest) == sorted(set(range(90)) - set(seen))
    assert set(rest[: len(wrong) - 10]) == set(wrong[10:].tolist())
    assert later["expected"] == pytest.approx(len(wrong) - 10, abs=2)
    suspicion = later["samples"]["suspicion"]
    assert suspicion == sorted(suspicion, reverse=True)
    proposed = dict(zip(rest, later["samples"]["predicted"], strict=True))
    assert all(proposed[row] == right[row] for row in wrong[10:].tolist())
    flagged = np.array(rest)[later["samples"]["wrong"]]
    assert set(flagged.tolist()) == set(wrong[10:].tolist())


def test_it_is_the_audit_of_the_corrected_labels(folder, right, tmp_path):
    """As `fit --corrections` would make it."""
    record = read_run(folder)
    ids, given = np.array(record.ledger.ids), record.ledger.given
    whole = FeatureSet(tmp_path / "cache" / "features.bin", given, ids, dim=6)
    looked = np.arange(90) < 20
    labels = np.where(looked, right, given)
    dropped = np.arange(90) == 3
    part = FeatureSet(
        whole.path, labels, ids, dim=6, reviewed=looked, before_review=whole
    ).take(np.flatnonzero(~dropped))
    expected = audit_labels(part, num_classes=3, progress=False)
    decided = {name: int(labels[at]) for at, name in enumerate(ids[:20].tolist())}
    decided[str(ids[3])] = None
    found = LiveAudit(record)(decided)["samples"]
    order = np.argsort(found["row"])
    np.testing.assert_allclose(
        np.array(found["suspicion"])[order], expected.suspicion[19:], atol=1e-4
    )


def test_a_run_that_was_corrected_before(folder, right, tmp_path):
    """Sample 0 was dropped, sample 1 relabelled, sample 2 kept."""
    record = read_run(folder)
    names, ids = record.class_names, record.ledger.ids
    ledger = folder / "ledger.csv"
    lines = ledger.read_text().splitlines()
    other = names[(record.ledger.given[1] + 1) % 3]
    cells = lines[2].split(",")
    cells[2] = other
    ledger.write_text("\n".join([lines[0], ",".join(cells), *lines[3:]]) + "\n")
    given = [names[label] for label in record.ledger.given]
    rows = [
        (ids[0], given[0], "drop", ""),
        (ids[1], given[1], "relabel", other),
        (ids[2], given[2], "keep", ""),
    ]
    write_csv(
        folder / "corrections.csv", ("id", "given_label", "decision", "new_label"), rows
    )
    write_csv(
        folder / "samples.csv",
        ("id", "split", "given_label", "clean_label", "decision", "label_before"),
        [
            (i, "train", label, "", {1: "relabel", 2: "keep"}.get(at, ""), "")
            for at, (i, label) in enumerate(zip(ids, given, strict=True))
            if at
        ],
    )
    places = json.loads((folder / CACHED_FEATURES_FILE).read_text())
    places["train"]["dropped"] = {ids[0]: 0}
    (folder / CACHED_FEATURES_FILE).write_text(json.dumps(places))
    live = LiveAudit(read_run(folder))
    part = live._parts["train"]
    assert part.ids.tolist() == ids[1:]
    assert part.reviewed.nonzero()[0].tolist() == [0, 1]
    assert names[part.labels[0]] == other
    assert part.before_review.ids.tolist() == ids
    assert part.before_review.labels.tolist() == record.ledger.given.tolist()
    np.testing.assert_array_equal(part.file_rows(np.arange(2)), [1, 2])
    rest = live({})["samples"]["row"]
    assert sorted(rest) == list(range(2, 89))  # Rows of the ledger, which has 89.


def test_splits_and_copies(folder, right, tmp_path):
    """Some validation samples were left out: copies of training samples."""
    record = read_run(folder)
    splits = ["train"] * 60 + ["validation"] * 20 + ["validation (left out)"] * 10
    ids, names = record.ledger.ids, record.class_names
    lines = (folder / "ledger.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    for cells, split in zip(rows, splits, strict=True):
        cells[1] = split
    text = "\n".join([lines[0], *(",".join(cells) for cells in rows)]) + "\n"
    (folder / "ledger.csv").write_text(text)
    copy_of = {80: ids[5], 81: ids[60]}
    write_csv(
        folder / "samples.csv",
        ("id", "split", "given_label", "clean_label", "decision", "label_before",
         "copy_of"),
        [(one, split, names[record.ledger.given[at]], "", "", "", copy_of.get(at, ""))
         for at, (one, split) in enumerate(zip(ids, splits, strict=True))],
    )  # fmt: skip
    place = json.loads((folder / CACHED_FEATURES_FILE).read_text())["train"]
    places = {
        name: place | {"rows": [at for at, one in enumerate(splits) if one == name]}
        for name in dict.fromkeys(splits)
    }
    places["validation"]["clean"] = True
    (folder / CACHED_FEATURES_FILE).write_text(json.dumps(places))
    live = LiveAudit(read_run(folder))
    train, validation, left_out = live._parts.values()
    assert left_out.groups[0] == train.groups[5]
    assert left_out.groups[1] == validation.groups[0]
    assert len(np.unique(np.concatenate([train.groups, validation.groups]))) == 80
    assert validation.reviewed.all()
    assert left_out.ids.tolist() == ids[80:]
    np.testing.assert_array_equal(
        left_out.features, np.fromfile(train.path, np.float32).reshape(90, 6)[80:]
    )
    assert sorted(live({})["samples"]["row"]) == [*range(60), *range(80, 90)]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda places: places.clear(), "cannot be read"),
        (lambda places: places["train"].update(folder=7), "cannot be read"),
        (lambda places: places["train"].update(folder="/no/such"), "no longer cached"),
        (lambda places: places["train"].update(dropped={"x": 2}), "not those"),
        (lambda places: places["train"].update(rows=[0] * 90), "not those"),
        (lambda places: places["train"].update(rows=list(range(1, 91))), "not those"),
        (lambda places: places["train"].update(dropped={"x": -9}), "not those"),
        (lambda places: places["train"].update(checksums={}), "not those"),
        (lambda places: places.update(train=[]), "cannot be read"),
    ],
)
def test_features_that_are_gone_or_others(folder, right, change, message):
    path = folder / CACHED_FEATURES_FILE
    places = json.loads(path.read_text())
    change(places)
    path.write_text(json.dumps(places))
    with pytest.raises(DataError, match=message):
        LiveAudit(read_run(folder))


def test_a_run_that_does_not_say_where_they_are(folder):
    with pytest.raises(DataError, match="does not say where"):
        LiveAudit(read_run(folder))
