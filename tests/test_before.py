"""A run after a review against the one before it, on the same corrected labels."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types

import keras
import numpy as np
import pytest

from keras_rsft._storage import read_csv
from keras_rsft.config import FeatureConfig, PolicyConfig, TrainConfig
from keras_rsft.data._labels import add_label_noise, apply_corrections
from keras_rsft.data._sources import load_images
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.label_quality._audit import LabelQuality
from keras_rsft.report._live import LiveAudit
from keras_rsft.report._record import read_run
from keras_rsft.training._before import RunBefore, joined, predictions_of_model
from keras_rsft.training._head import head_probabilities
from keras_rsft.training._run import finetune

pytestmark = pytest.mark.usefixtures("eager")


def quality_of(labels, reviewed=None) -> LabelQuality:
    """Labels that all count as right."""
    labels = np.array(labels)
    rows = np.eye(2, dtype=np.float32)[labels]
    right = np.ones(len(labels), np.float32)
    return LabelQuality(
        rows, right, 0.0, np.eye(2), labels, "No sign of wrong labels",
        reviewed=reviewed,
    )  # fmt: skip


def part_of(names: str, labels, clean=None):
    ids = np.array(list(names))
    clean = None if clean is None else np.array(clean)
    return types.SimpleNamespace(ids=ids, labels=np.array(labels), clean_labels=clean)


class TestByHand:
    @pytest.fixture
    def features(self):
        return types.SimpleNamespace(
            validation=part_of("abcdef", [0, 0, 0, 1, 1, 1]),
            test=part_of("wxyz", [0, 1, 0, 1]),
        )

    @pytest.fixture
    def quality(self, features):
        held_out = tuple(
            quality_of(part.labels) for part in (features.validation, features.test)
        )
        return dataclasses.replace(quality_of([0, 1]), held_out=held_out)

    def test_samples_that_neither_run_was_trained_on(self, features, quality, tmp_path):
        # The earlier run trained on a and z; this one has no prediction of f.
        before = RunBefore(
            tmp_path / "photos-1",
            {"b": 0, "c": 1, "d": 0, "e": 1, "f": 1, "w": 0, "x": 0, "y": 1},
        )
        ours = {
            "validation": (np.array(list("abcde")), np.array([1, 0, 0, 1, 1])),
            "test": (np.array(list("wxyz")), np.array([0, 1, 1, 0])),
        }
        found = before.against(ours, features, quality)
        # b, c, d, e, w, x, y: before b, e, w are right, now all but y.
        assert (found.samples, found.splits) == (7, ("validation", "test"))
        assert found.before.value == pytest.approx(3 / 7)
        assert found.after.value == pytest.approx(6 / 7)
        assert found.gain.value == pytest.approx(3 / 7)
        assert found.gain.low < 3 / 7 < found.gain.high
        assert found.sentence.startswith(
            "Before the review 42.9 %, after it 85.7 % (+42.9, 95 % interval +"
        )
        assert "7 validation and test samples. Before: photos-1." in found.sentence

    def test_known_labels_count(self, features, quality):
        features.validation = part_of("abcdef", [0] * 6, clean=[1] * 6)
        features.test = part_of("", [])
        before = RunBefore("before", dict.fromkeys("abcdef", 0))
        ours = {"validation": (np.array(list("abcdef")), np.ones(6, int))}
        found = before.against(ours, features, quality)
        assert (found.before.value, found.after.value) == (0.0, 1.0)

    def test_nothing_in_common_or_not_to_be_judged(self, features, quality):
        ours = {"validation": (np.array(["a"]), np.array([0]))}
        assert RunBefore("before", {"q": 0}).against(ours, features, quality) is None
        blind = [dataclasses.replace(q, can_judge=False) for q in quality.held_out]
        quality = dataclasses.replace(quality, held_out=tuple(blind))
        assert RunBefore("before", {"a": 0}).against(ours, features, quality) is None

    def test_rows_of_two_splits_are_joined(self):
        parts = [
            (quality_of([0, 1, 1], np.array([True, False, False])), np.array([0, 2])),
            (quality_of([1, 0]), np.array([1])),
        ]
        found = joined(parts)
        assert found.labels.tolist() == [0, 1, 0]
        assert found.reviewed.tolist() == [True, False, False]
        assert found.out_of_sample.argmax(axis=1).tolist() == [0, 1, 0]


class TestRuns:
    """Two runs on photos whose labels are partly wrong in all splits."""

    @pytest.fixture(scope="class")
    @classmethod
    def noisy(cls, photo_folder):
        data = load_images(str(photo_folder), test_fraction=0.25)
        splits = ("train", "validation", "test")
        return add_label_noise(data, "symmetric:0.25", seed=1, splits=splits)

    @pytest.fixture(scope="class")
    @classmethod
    def root(cls, tmp_path_factory):
        return tmp_path_factory.mktemp("before")

    @pytest.fixture(scope="class")
    @classmethod
    def fit(cls, noisy, root, tiny_base_file):
        def fit(name, **options):
            settings = {"epochs": 6, "batch_size": 8, "learning_rate": 0.05}
            settings |= {"policy": PolicyConfig(threshold=0.8)}
            settings |= options.pop("settings", {})
            notes = []
            run = finetune(
                noisy,
                features=FeatureConfig(str(tiny_base_file), cache_dir=root / "cache"),
                settings=TrainConfig(**settings),
                output=root / "runs" / name,
                with_plain=False,
                progress=False,
                on_note=notes.append,
                **options,
            )
            return run, notes

        return fit

    @pytest.fixture(scope="class")
    @classmethod
    def first(cls, fit):
        return fit("first")[0]

    @pytest.fixture(scope="class")
    @classmethod
    def corrections(cls, noisy, root):
        """Sets all labels of the test split right and drops its first image."""
        names, rows = noisy.class_names, ["id,given_label,decision,new_label"]
        test = noisy.test
        for at, sample_id in enumerate(test.ids.tolist()):
            given, right = names[test.labels[at]], names[test.clean_labels[at]]
            decision = "keep," if given == right else f"relabel,{right}"
            rows.append(f"{sample_id},{given},{decision if at else 'drop,'}")
        path = root / "corrections.csv"
        path.write_text("\n".join(rows) + "\n")
        return path

    @pytest.fixture(scope="class")
    @classmethod
    def second(cls, first, fit, corrections):
        return fit("second", corrections=corrections)

    def test_predictions_are_those_of_the_model(self, first, noisy):
        rows = list(read_csv(first.folder / "predictions.csv"))
        held_out = [*noisy.validation.ids.tolist(), *noisy.test.ids.tolist()]
        assert [row["id"] for row in rows] == held_out
        images = np.stack([image for _, image in noisy.test.images((16, 16))])
        loaded = keras.saving.load_model(first.folder / "model.keras")
        predicted = loaded.predict(images, verbose=0).argmax(axis=-1)
        named = [row["predicted_label"] for row in rows if row["split"] == "test"]
        assert named == [noisy.class_names[label] for label in predicted]

    def test_both_are_judged_by_the_corrected_labels(self, first, second, noisy):
        run, notes = second
        found = run.against_before
        assert (found.run, notes) == (str(first.folder), [])
        test, validation = run.features.test, run.features.validation
        assert len(test) == len(noisy.test) - 1
        assert found.samples == len(test) + len(validation)
        for model, shown in ((first.head, found.before), (run.head, found.after)):
            right = [
                head_probabilities(model.model, part).argmax(-1) == part.clean_labels
                for part in (validation, test)
            ]
            assert shown.value == pytest.approx(np.mean(np.concatenate(right)))
        assert found.gain.value == pytest.approx(found.after.value - found.before.value)
        written = json.loads((run.folder / "results.json").read_text())
        assert written["against_before"]["sentence"] == found.sentence

    def test_a_review_goes_on_where_the_run_has_left(self, first, second):
        """Nothing new decided: the order of the page is that of the run's ledger."""
        for run in (first, second[0]):
            record = read_run(run.folder)
            found = LiveAudit(record)({})["samples"]
            unseen = np.flatnonzero(~record.ledger.reviewed)
            order = np.argsort(found["row"])
            assert np.array(found["row"])[order].tolist() == unseen.tolist()
            np.testing.assert_allclose(
                np.array(found["suspicion"])[order],
                record.ledger.suspicion[unseen],
                atol=2e-3,
            )

    def test_a_second_review_is_compared_with_the_first(self, second, fit, root):
        run, _ = second
        names, validation = run.class_names, run.features.validation
        more = root / "more.csv"
        label = names[validation.labels[0]]
        more.write_text(
            f"id,given_label,decision,new_label\n{validation.ids[0]},{label},keep,\n"
        )
        kept = run.folder / "corrections.csv"
        third, _ = fit("third", corrections=[kept, more])
        assert third.against_before.run == str(run.folder)

    def test_another_setting_is_no_review(self, second, fit, corrections, first):
        other = {"settings": {"learning_rate": 0.1}, "corrections": corrections}
        run, notes = fit("other", **other)
        assert run.against_before is None
        assert "nothing to compare with" in notes[0]
        named, _ = fit("named", before=first.folder, **other)
        assert named.against_before.run == str(first.folder)

    def test_other_labels_are_no_run_before(self, first, fit, corrections, root):
        path = first.folder / "predictions.csv"
        before = path.read_text()
        lines = before.splitlines()
        row = next(at for at, line in enumerate(lines) if ",validation," in line)
        sample_id, split, given, predicted = lines[row].split(",")
        lines[row] = ",".join(
            [sample_id, split, "red" if given != "red" else "blue", predicted]
        )
        try:
            path.write_text("\n".join(lines) + "\n")
            with pytest.raises(InvalidArgument, match="under other labels"):
                fit("never", corrections=corrections, before=first.folder)
            path.write_text("id,split\na,b\n")
            with pytest.raises(DataError, match="not as `keras-rsft` wrote it"):
                fit("never", corrections=corrections, before=first.folder)
        finally:
            path.write_text(before)
        assert not (root / "runs" / "never").exists()

    def test_refused(self, fit, corrections, first, tmp_path):
        with pytest.raises(InvalidArgument, match="Give its `corrections`"):
            fit("never", before=first.folder)
        with pytest.raises(InvalidArgument, match=r"predictions\.csv"):
            fit("never", before=tmp_path, corrections=corrections)


def test_predictions_of_a_model_of_images(photo_folder, tmp_path):
    """The image that cannot be read has none, and the others keep their ids."""
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    (root / "blue" / "03.png").write_bytes(b"no picture")
    data = load_images(root, validation_fraction=0, test_fraction=0)
    data = dataclasses.replace(data, test=dataclasses.replace(data.train, name="test"))
    images = keras.Input((16, 16, 3))
    model = keras.Model(images, keras.layers.GlobalAveragePooling2D()(images))
    found = predictions_of_model(model, data)
    assert list(found) == ["test"]
    ids, predicted = found["test"]
    assert ids.tolist() == [one for one in data.train.ids if one != "blue/03.png"]
    channels = {"red": 0, "green": 1, "blue": 2}
    assert predicted.tolist() == [channels[one.split("/")[0]] for one in ids]


def test_the_command_refuses_it_without_corrections(call, photo_folder, tiny_base_file):
    options = ("--backbone", tiny_base_file, "--set", "before=runs/photos-1")
    status, _, err = call("fit", photo_folder, *options)
    assert (status, "Give its `corrections` too" in err) == (2, True)


def test_corrections_of_the_training_split_alone(photo_folder, tmp_path):
    """The labels of the held-out splits are those of the run before."""
    from keras_rsft.training._before import _read_before

    data = load_images(str(photo_folder))
    sample_id, label = data.train.ids[0], data.class_names[data.train.labels[0]]
    file = tmp_path / "c.csv"
    file.write_text(f"id,given_label,decision,new_label\n{sample_id},{label},keep,\n")
    held_out = data.test.ids[0], data.class_names[data.test.labels[0]]
    header = "id,split,given_label,predicted_label\n"
    path = tmp_path / "predictions.csv"
    path.write_text(f"{header}{held_out[0]},test,{held_out[1]},red\n")
    corrected = apply_corrections(data, file)
    found = _read_before(tmp_path, corrected)
    assert found.predicted == {held_out[0]: data.class_names.index("red")}
