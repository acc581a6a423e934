"""An audit of what somebody has in memory: embeddings or predictions, and labels."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import keras_rsft as rsft
from keras_rsft.data._labels import symmetric_noise
from keras_rsft.data._samples import Correction
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.features._store import ArrayFeatures, FeatureSet

NAMES = np.array(["ant", "bee", "cat", "dog"])
FOUND = ("out_of_sample", "right_probability", "noise", "looks_wrong")


def audit(*inputs, **options):
    return rsft.audit_labels(*inputs, progress=False, **options)


@pytest.fixture(scope="module")
def samples():
    """Returns features `(400, 40)`, labels of which 80 are wrong, and the right ones.

    The values are whole numbers, which every dtype holds.
    """
    rng = np.random.default_rng(0)
    right = np.arange(400) % 4
    x = 8 * rng.normal(size=(4, 40))[right] + 10 * rng.normal(size=(400, 40))
    y = symmetric_noise(right, 0.2, num_classes=4, rng=np.random.default_rng(1))
    x = x.round().astype(np.float32)
    x[17], x[300] = x[3], x[4]  # Two copies.
    return x, y, right


@pytest.fixture(scope="module")
def found(samples):
    return audit(*samples[:2])


@pytest.fixture(scope="module")
def predictions(samples):
    """Returns out-of-fold probabilities of the noisy labels, `(400, 4)`."""
    x, y, _ = samples
    p = np.empty((400, 4))
    for fold in range(5):
        learnt = np.arange(400) % 5 != fold
        targets = np.eye(4)[y[learnt]]
        weights = np.linalg.solve(
            x[learnt].T @ x[learnt] + 1e4 * np.eye(40), x[learnt].T @ targets
        )
        p[~learnt] = np.exp(4 * x[~learnt] @ weights)
    return p / p.sum(axis=1, keepdims=True)


class TorchTensor:
    """Is read as PyTorch's are: off the graph, then off the GPU."""

    def __init__(self, values, steps=()):
        self._values, self._steps = values, steps

    def detach(self):
        return TorchTensor(self._values, (*self._steps, "detach"))

    def cpu(self):
        return TorchTensor(self._values, (*self._steps, "cpu"))

    def numpy(self):
        if self._steps != ("detach", "cpu"):
            raise RuntimeError("Can't call numpy() on it.")
        return self._values


def require_equal(one, other):
    for name in FOUND:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


class TestFeatures:
    def test_equal_those_in_a_file_to_the_last_bit(self, samples, found, tmp_path):
        x, y, _ = samples
        x.tofile(tmp_path / "f.bin")
        ids = np.arange(400).astype(str)
        cached = FeatureSet(tmp_path / "f.bin", y.astype(np.int32), ids, dim=40)
        held_out = [cached.take(np.arange(90))]
        by_file = audit(cached, num_classes=4, held_out=held_out)
        by_array = audit(x, y, held_out=[(x[:90], y[:90])])
        require_equal(by_file, by_array)
        require_equal(by_file.held_out[0], by_array.held_out[0])
        np.testing.assert_array_equal(by_file.wrong, by_array.wrong.astype(str))
        require_equal(found, audit(cached))

    @pytest.mark.parametrize(
        "convert",
        [
            lambda x: x.astype(np.float64),
            lambda x: x.astype(np.float16),
            lambda x: x.astype(np.int32),
            lambda x: x.astype(np.int8),
            np.asfortranarray,
            np.ndarray.tolist,
            tf.constant,
            lambda x: tf.constant(x, tf.bfloat16),
            TorchTensor,
            pd.DataFrame,
        ],
    )
    def test_kinds_of_arrays(self, samples, found, convert):
        x, y, _ = samples
        require_equal(audit(convert(x), y), found)

    def test_a_memory_map_is_read_in_parts(self, samples, found, tmp_path, monkeypatch):
        x, y, _ = samples
        np.save(tmp_path / "x.npy", x)
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        made = []
        of = ArrayFeatures.of.__func__
        monkeypatch.setattr(
            ArrayFeatures,
            "of",
            classmethod(lambda *a, **o: made.append(of(*a, **o)) or made[-1]),
        )
        require_equal(audit(mapped, y), found)
        assert np.shares_memory(made[0].values, mapped)

    def test_an_array_stays_as_it_was(self, samples):
        x, y, _ = samples
        x_before, y_before = x.copy(), y.copy()
        audit(x, y, held_out=[(x, y)])
        np.testing.assert_array_equal(x, x_before)
        np.testing.assert_array_equal(y, y_before)
        assert x.flags.writeable

    def test_loads_no_tensorflow(self):
        code = (
            "import sys, numpy as np, keras_rsft as rsft\n"
            "y = np.arange(60) % 3\n"
            "x = np.eye(3)[y] + np.random.default_rng(0).normal(size=(60, 3)) / 9\n"
            "print(rsft.audit_labels(x, y).summary(), 'tensorflow' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True)
        assert done.stdout.endswith(b"False\n"), done.stderr


class TestLabels:
    @pytest.mark.parametrize(
        "convert",
        [
            np.ndarray.tolist,
            lambda y: y[:, None],
            lambda y: y.astype(np.uint8),
            lambda y: np.eye(4)[y],
            lambda y: np.eye(4, dtype=bool)[y].tolist(),
            lambda y: y.astype(object),
            pd.Series,
            lambda y: pd.Series(y, index=np.arange(400)[::-1]).astype("Int64"),
            tf.constant,
            TorchTensor,
            lambda y: tf.one_hot(y, 4),
        ],
    )
    def test_numbers(self, samples, found, convert):
        x, y, _ = samples
        quality = audit(x, convert(y))
        require_equal(quality, found)
        assert quality.class_names is None
        np.testing.assert_array_equal(quality.wrong, found.wrong)

    @pytest.mark.parametrize(
        "convert",
        [
            lambda y: NAMES[y],
            lambda y: NAMES[y].tolist(),
            lambda y: NAMES[y].astype(object),
            lambda y: pd.Series(NAMES[y]),
            lambda y: pd.Categorical(NAMES[y]),
            lambda y: pd.Series(NAMES[y]).astype("category"),
            lambda y: tf.constant(NAMES[y].tolist()),
        ],
    )
    def test_names(self, samples, found, convert):
        x, y, _ = samples
        quality = audit(x, convert(y))
        require_equal(quality, found)
        assert quality.class_names == tuple(NAMES.tolist())

    def test_classes_in_an_order_of_the_user(self, samples):
        x, y, _ = samples
        order = ["dog", "ant", "wolf", "cat", "bee"]
        for options in (
            {"labels": NAMES[y], "class_names": order},
            {"labels": pd.Categorical(NAMES[y], categories=order)},
        ):
            quality = audit(x, **options)
            assert quality.class_names == tuple(order)
            assert quality.out_of_sample.shape == (400, 5)
            assert [order[label] for label in quality.labels] == NAMES[y].tolist()

    def test_true_and_false(self, samples):
        x, y, _ = samples
        frame = audit(x, y < 2).to_frame()
        assert frame["given_label"].tolist() == (y < 2).tolist()

    def test_more_classes_than_labels_tell_of(self, samples):
        x, y, _ = samples
        assert audit(x, y, num_classes=6).noise.shape == (6, 6)
        held_out = [(x[:50], np.full(50, 5))]
        assert audit(x, y, held_out=held_out).noise.shape == (6, 6)


class TestProbabilities:
    def test_find_the_wrong_labels(self, samples, predictions):
        _, y, right = samples
        quality = audit(None, y, probabilities=predictions)
        wrong = y != right
        assert quality.noise_rate == pytest.approx(0.2, abs=0.05)
        assert wrong[quality.wrong].mean() > 0.8
        assert quality.looks_wrong[wrong].mean() > 0.7

    def test_a_model_as_unsure_as_the_labels(self):
        """Its probabilities explain the labels without any noise, too."""
        right, rng = np.arange(2000) % 4, np.random.default_rng(0)
        y = symmetric_noise(right, 0.4, num_classes=4, rng=rng)
        p = np.where(np.eye(4, dtype=bool)[right], 0.6, 0.4 / 3)
        p *= rng.uniform(0.8, 1.25, size=p.shape)
        quality = audit(None, y, probabilities=p / p.sum(axis=1, keepdims=True))
        assert quality.noise_rate == pytest.approx(0.4, abs=0.02)
        assert (quality.looks_wrong == (y != right)).mean() > 0.98

    def test_equal_predictions_are_no_copies(self, samples):
        _, y, right = samples
        p = np.where(np.eye(4, dtype=bool)[right], 0.7, 0.1)
        quality = audit(None, y, probabilities=p)
        np.testing.assert_array_equal(quality.looks_wrong, y != right)

    def test_held_out(self, samples, predictions):
        y = samples[1]
        held_out = [(predictions[:90], y[:90])]
        quality = audit(None, y, probabilities=predictions, held_out=held_out)
        for name in ("out_of_sample", "right_probability"):
            np.testing.assert_allclose(
                getattr(quality.held_out[0], name), getattr(quality, name)[:90], 1e-3
            )

    def test_columns_are_the_sorted_names(self, samples, predictions):
        y = samples[1]
        numbered = audit(None, y, probabilities=predictions)
        named = audit(None, NAMES[y], probabilities=predictions.astype(np.float16))
        np.testing.assert_allclose(
            named.right_probability, numbered.right_probability, atol=0.05
        )


class TestResult:
    def test_the_wrong_ones_are_ranked(self, samples, found):
        _, y, right = samples
        assert found.wrong.dtype.kind == "i"
        np.testing.assert_array_equal(
            np.sort(found.wrong), np.flatnonzero(found.looks_wrong)
        )
        assert (np.diff(found.suspicion[found.wrong]) <= 0).all()
        assert (y != right)[found.wrong].mean() > 0.9

    def test_ids(self, samples, found):
        x, y, _ = samples
        ids = np.array([f"photo {number}" for number in range(400)])
        held_out = [(x[:50], y[:50])]
        quality = audit(x, y, ids=ids, held_out=held_out)
        np.testing.assert_array_equal(quality.wrong, ids[found.wrong])
        assert quality.held_out[0].wrong.dtype.kind == "i"

    def test_a_frame(self, samples, found):
        x, y, _ = samples
        quality = audit(x, NAMES[y], ids=range(1000, 1400))
        frame = quality.to_frame()
        assert list(frame.columns) == [
            "id", "given_label", "proposed_label", "right_probability", "looks_wrong"
        ]  # fmt: skip
        assert frame["id"].tolist() == list(range(1000, 1400))
        assert frame["given_label"].tolist() == NAMES[y].tolist()
        np.testing.assert_array_equal(frame["looks_wrong"], found.looks_wrong)
        differs = frame["proposed_label"] != frame["given_label"]
        np.testing.assert_array_equal(differs, found.looks_wrong)
        right = frame["proposed_label"].to_numpy() == NAMES[samples[2]]
        assert right[found.wrong].mean() > 0.8
        assert found.to_frame()["given_label"].tolist() == y.tolist()

    def test_without_pandas_a_dict(self, found, monkeypatch):
        expected = found.to_frame()
        monkeypatch.setitem(sys.modules, "pandas", None)
        columns = found.to_frame()
        assert isinstance(columns, dict)
        for name, values in columns.items():
            np.testing.assert_array_equal(values, expected[name])

    def test_a_summary(self, samples):
        x, y, _ = samples
        quality = audit(x, NAMES[y], held_out=[(x[:50], NAMES[y[:50]])])
        first, *rows = quality.summary().splitlines()
        assert first == quality.finding
        header, *rows = [row for row in rows if row]
        assert header.split()[:2] == ["Given", "label"]
        assert {row.split()[0] for row in rows[:4]} == set(NAMES)
        assert rows[4].split()[0] == "all"
        assert rows[4].split()[1] == "450"
        assert [row.split()[0] for row in rows[5:]] == [
            "Split", "labels", "held_out[0]", "all"
        ]  # fmt: skip

    def test_a_notebook(self, samples):
        x, y, _ = samples
        hostile = np.array(["<script>", "b" * 40, "c&", "<b>"])
        quality = audit(x, hostile[y])
        root = ElementTree.fromstring(f"<div>{quality._repr_html_()}</div>")
        assert not list(root.iter("script"))
        cells = [[cell.text or "" for cell in row] for row in root.iter("tr")]
        assert str(quality.wrong[0]) in [row[0] for row in cells]
        words = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {"<script>", "b" * 9 + "…", "expected wrong labels"} <= set(words)

    def test_nothing_wrong_has_no_picture(self, samples):
        right = samples[2]
        quality = audit(np.eye(4)[right] * 9 + samples[0][:, :4] / 40, right)
        assert len(quality.wrong) == 0
        assert "<svg" not in quality._repr_html_()
        assert "None of 400 labels looks wrong" in quality.summary()

    def test_what_cannot_be_judged(self, samples):
        quality = audit(samples[0], np.random.default_rng(0).integers(4, size=400))
        assert quality.summary() == quality.finding
        assert "no better than chance" in quality._repr_html_()


class TestCorrections:
    @pytest.fixture
    def rows(self, samples, found):
        """Returns decisions on the most suspicious: kept, relabelled, dropped."""
        y, right = samples[1:]
        decided = []
        for number, row in enumerate(found.wrong[:30].tolist()):
            given, new = NAMES[y[row]], NAMES[right[row]]
            decision = "keep" if given == new else "relabel"
            if number % 5 == 0:
                decision = "drop"
            new = new if decision == "relabel" else ""
            decided.append(Correction(str(row), str(given), decision, str(new)))
        return decided

    @pytest.mark.parametrize("kind", ["rows", "frame", "empty cells", "dict", "file"])
    def test_reviewed_labels_are_known(self, samples, rows, kind, tmp_path):
        x, y, right = samples
        frame = pd.DataFrame(rows)
        given = {"rows": rows, "frame": frame, "dict": frame.to_dict("list")}
        given["empty cells"] = frame.replace("", None)
        given["file"] = tmp_path / "corrections.csv"
        frame.to_csv(given["file"], index=False)
        quality = audit(x, NAMES[y], corrections=given[kind])
        dropped = {int(row.id) for row in rows if row.decision == "drop"}
        assert set(range(400)) - set(quality.ids.tolist()) == dropped
        assert len(dropped) == 6
        decided = np.isin(quality.ids, [int(row.id) for row in rows])
        np.testing.assert_array_equal(quality.reviewed, decided)
        np.testing.assert_array_equal(
            quality.labels[decided], right[quality.ids[decided]]
        )
        assert (quality.right_probability[decided] == 1.0).all()
        assert not np.isin(quality.wrong, [int(row.id) for row in rows]).any()
        # The noise is that of the labels before the review.
        assert 1 - np.diag(quality.noise).mean() == pytest.approx(0.2, abs=0.05)

    def test_numbers_beside_empty_cells(self, samples):
        """pandas makes 1.0 of 1 where other cells are empty."""
        x, y, _ = samples
        table = {
            "id": [3, 5],
            "given_label": y[[3, 5]],
            "decision": ["keep", "relabel"],
            "new_label": [np.nan, float((y[5] + 1) % 4)],
        }
        quality = audit(x, y, corrections=pd.DataFrame(table))
        assert quality.labels[5] == (y[5] + 1) % 4
        assert np.flatnonzero(quality.reviewed).tolist() == [3, 5]

    def test_none(self, samples, found):
        quality = audit(*samples[:2], corrections=[])
        assert quality.reviewed is None
        require_equal(quality, found)

    def test_of_predictions(self, samples, predictions, rows):
        y = samples[1]
        quality = audit(None, NAMES[y], probabilities=predictions, corrections=rows)
        assert quality.reviewed.sum() == 24

    def test_also_of_a_data_set(self, rows):
        data = rsft.load_images("digits")
        name, label = data.train.ids[0], str(data.train.labels[0])
        new = "1" if label == "0" else "0"
        frame = pd.DataFrame([Correction(str(name), label, "relabel", new)])
        for given in (frame, list(frame.itertuples(index=False))):
            after = rsft.apply_corrections(data, given)
            assert after.train.labels[0] == int(new)
        ((file, digest),) = after.corrections.files
        assert file == "the corrections"
        assert len(digest) == 64

    @pytest.mark.parametrize(
        "corrections, error, message",
        [
            ([("0", "ant")], InvalidArgument, r"`Correction` rows.*'ant'"),
            ({"id": [0]}, DataError, "have no column 'given_label', 'decision'"),
            ([("a", "ant", "keep", "")], DataError, "not in `labels`.*line 1"),
            ([("0", "ant", "look", "")], DataError, "line 1: the decision must"),
            (["none.csv"], InvalidArgument, "Expected corrections as a CSV file"),
            (5, InvalidArgument, "Received: 5"),
            ("none.csv", InvalidArgument, "no such file"),
        ],
    )
    def test_refused(self, samples, corrections, error, message):
        x, y, _ = samples
        with pytest.raises(error, match=message):
            audit(x, NAMES[y], corrections=corrections)


BAD_FEATURES = {
    "shorter": (lambda x: x[:-1], "399 rows in `features` and 400 labels"),
    "nan": (lambda x: poked(x, [7, 9], np.nan), "2 of 400 rows .* row 7, 9. Leave"),
    "infinite": (lambda x: poked(x, [0], np.inf), "1 of 400 rows .* in row 0"),
    "large": (lambda x: poked(x.astype(float), [3], 1e300), "1 of 400 rows"),
    "empty": (lambda x: x[:0], "`features` is empty"),
    "no columns": (lambda x: x[:, :0], "`features` is empty"),
    "one dimension": (lambda x: x[:, 0], r"use x.reshape\(-1, 1\)"),
    "three": (lambda x: x.reshape(400, 5, 8), r"x.reshape\(len\(x\), -1\)"),
    "images": (lambda x: x.reshape(400, 2, 4, 5), "look like images.* rsft.finetune"),
    "objects": (lambda x: x.astype(object), "must be numbers.* dtype object"),
    "ragged": (lambda x: [[1.0], [1.0, 2.0]] * 200, "`features` cannot be read"),
    "a data set": (lambda x: tf.data.Dataset.range(3), "must be numbers"),
    "words": (lambda x: [["a"]] * 400, "must be numbers"),
}  # fmt: skip
BAD_LABELS = {
    "negative": (lambda y: poked(y, [2], -1), "1 of 400 .* negative, .* row 2"),
    "whole": (lambda y: y.astype(float), r"dtype float64.*\.astype\(int\)"),
    "fractions": (lambda y: y + 0.5, "Sort them into classes"),
    "nan": (lambda y: poked(y.astype(float), [5], np.nan), "1 of 400 .* row 5"),
    "none": (lambda y: poked(NAMES[y].astype(object), [5], None), "missing.* row 5"),
    "nan in a list": (lambda y: [*NAMES[y[1:]], np.nan], "missing.* row 399"),
    "no category": (lambda y: pd.Categorical(np.where(y, NAMES[y], None)), "missing"),
    "empty": (lambda y: y[:0], "`labels` is empty"),
    "one class": (lambda y: 0 * y, "All 400 labels are 0"),
    "one name": (lambda y: ["a"] * 400, "All 400 labels are 'a'"),
    "ids": (lambda y: y + 10_000, "labels from 0 to 999.* up to 10,003"),
    "soft": (lambda y: np.full((400, 4), 0.25), "400 of 400 other rows"),
    "images": (lambda y: np.zeros((400, 2, 2)), r"shape \(400, 2, 2\)"),
    "left out": (lambda y: None, "Expected `labels` for `features`"),
    "mixed": (lambda y: poked(NAMES[y].astype(object), [8], 3), "not of one kind"),
}  # fmt: skip


def poked(array, rows, value):
    array = array.copy()
    array[rows] = value
    return array


class TestRefused:
    @pytest.fixture(autouse=True)
    def computes_nothing(self, monkeypatch):
        def computed(*_, **__):
            pytest.fail("It was refused too late.")

        module = "keras_rsft.label_quality._audit"
        monkeypatch.setattr(f"{module}.with_copies", computed)
        monkeypatch.setattr(f"{module}.LeftOutRegression", computed)
        monkeypatch.setattr(f"{module}.GivenScores", computed)

    def refused(self, message, *inputs, **options):
        with pytest.raises((DataError, InvalidArgument), match=message) as error:
            audit(*inputs, **options)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", BAD_FEATURES)
    def test_features(self, samples, name):
        change, message = BAD_FEATURES[name]
        self.refused(message, change(samples[0]), samples[1])

    @pytest.mark.parametrize("name", BAD_LABELS)
    def test_labels(self, samples, name):
        change, message = BAD_LABELS[name]
        self.refused(message, samples[0], change(samples[1]))

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"num_classes": 3}, "labels from 0 to 2.*labels up to 3. Give another"),
            ({"class_names": ["a", "b"]}, "labels from 0 to 1"),
            ({"class_names": ["a", "b", "c", "a"]}, "must be different"),
            ({"class_names": NAMES, "num_classes": 5}, "number of names.* 4 names"),
            ({"ids": [1] * 400}, "400 different ids.* 1 of them"),
            ({"ids": range(9)}, r"shape \(9,\)"),
            ({"probabilities": np.ones((400, 4)) / 4}, "Received: both"),
            ({"held_out": [np.ones((3, 40))]}, r"pairs \(features, labels\)"),
            ({"held_out": [(np.ones((3, 9)), [0, 1, 1])]}, "9 and 40"),
            ({"held_out": [(np.ones((3, 40)), ["a"] * 3)]}, "or all names"),
            ({"held_out": [(np.ones((3, 40)), [1, 2])]}, r"held_out\[0\]\[1\]"),
        ],
    )
    def test_options(self, samples, options, message):
        self.refused(message, *samples[:2], **options)

    def test_a_name_that_is_no_class(self, samples):
        x, y, _ = samples
        names = ["ant", "bee", "cats", "dog"]
        self.refused("such as 'cat'.*mean 'cats'", x, NAMES[y], class_names=names)

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda p: 2 * p, "400 of 400 rows .* not probabilities.*softmax"),
            (lambda p: poked(p, [3], [1.5, -0.5, 0, 0]), "1 of 400 .* row 3"),
            (lambda p: poked(p, [3], np.nan), "1 of 400 .* row 3"),
            (lambda p: p[:, :3] / p[:, :3].sum(1, keepdims=True), "from 0 to 2"),
            (lambda p: p[:9], "9 rows in `probabilities` and 400 labels"),
            (lambda p: p[:, 0], r"must be an array"),
        ],
    )
    def test_probabilities(self, samples, predictions, change, message):
        self.refused(message, None, samples[1], probabilities=change(predictions))

    def test_probabilities_of_other_names(self, samples, predictions):
        p = np.hstack([predictions, np.zeros((400, 1))])
        self.refused(
            "a column .* each of the 4 classes", None, NAMES[samples[1]],
            probabilities=p,
        )  # fmt: skip

    def test_neither(self, samples):
        self.refused("Received: neither", None, samples[1])

    def test_labels_of_a_feature_set(self, samples, tmp_path):
        y = samples[1]
        cached = FeatureSet(tmp_path / "f.bin", y, np.arange(400).astype(str), dim=40)
        self.refused("labels of its own.* by name", cached, 4)
        self.refused("ids of its own", cached, ids=np.arange(400))
