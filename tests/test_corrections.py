"""Corrections: what a file may say, what it changes, and the whole round."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from made_images import SPLIT_NAMES, all_ids, named_labels

from keras_rsft._ledger import Ledger
from keras_rsft._storage import guarded_cell, plain_cell, read_csv, write_csv
from keras_rsft.config import FeatureConfig, PolicyConfig, TrainConfig
from keras_rsft.data._labels import Correction, add_label_noise, apply_corrections
from keras_rsft.data._sources import load_images
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.features._batches import TrainingBatches
from keras_rsft.features._extract import FrozenBackbone, extract_features
from keras_rsft.features._store import FeatureSet
from keras_rsft.policies._listed import AcceptReviewed
from keras_rsft.policies._threshold import LossMixture, LossThreshold
from keras_rsft.training._run import finetune

pytestmark = pytest.mark.usefixtures("eager")

HEADER = "id,given_label,decision,new_label"


def write_rows(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    """Writes a file of corrections."""
    return lambda *rows, **options: write_rows(tmp_path / "c.csv", *rows, **options)


@pytest.fixture
def data(folder):
    return load_images(folder)


@pytest.fixture
def named(data):
    """Ids of the training split and their labels' names, in order."""
    return list(named_labels(data, "train").items())


class TestWhatIsChanged:
    def test_labels_rows_and_the_record(self, data, named, file):
        (kept, cat), (moved, _), (gone, _) = named[:3]
        after = apply_corrections(
            data,
            file(f"{kept},{cat},keep,", f"{moved},cat,relabel,owl", f"{gone},cat,drop"),
        )
        labels = named_labels(after, "train")
        assert gone not in labels
        assert len(after.train) == len(data.train) - 1
        assert labels[kept] == "cat"
        assert labels[moved] == "owl"
        assert set(after.train.ids[after.train.reviewed]) == {kept, moved}
        assert after.corrections.describe() == (
            "Corrections: 1 labels kept, 1 relabelled, 1 samples dropped."
        )
        assert data.train.reviewed is None
        others = set(labels) - {kept, moved}
        assert {labels[i] for i in others} == {"cat", "dog", "owl"}
        assert all(labels[i] == dict(named)[i] for i in others)

    def test_every_split_and_a_word_about_the_test_split(self, data, file):
        rows = []
        for name in SPLIT_NAMES:
            sample_id, label = next(iter(named_labels(data, name).items()))
            rows.append(f"{sample_id},{label},relabel,owl")
        after = apply_corrections(data, file(*rows))
        for name in SPLIT_NAMES:
            assert next(iter(named_labels(after, name).values())) == "owl"
        assert (
            "1 of these samples are in the test split" in after.corrections.describe()
        )

    def test_a_second_review_goes_on_from_the_first(self, data, named, tmp_path):
        (one, _), (two, _), (three, _) = named[:3]
        first = write_rows(
            tmp_path / "1.csv", f"{one},cat,relabel,dog", f"{two},cat,relabel,dog"
        )
        second = write_rows(
            tmp_path / "2.csv", f"{one},dog,relabel,cat", f"{two},dog,keep,",
            f"{three},cat,drop,",
        )  # fmt: skip
        after = apply_corrections(data, [first, second])
        assert after.corrections.rows == (
            Correction(one, "cat", "keep"),
            Correction(two, "cat", "relabel", "dog"),
            Correction(three, "cat", "drop"),
        )
        assert len(after.corrections.files) == 2
        with pytest.raises(DataError, match="dropped before"):
            apply_corrections(
                data, [second_of(first), second_of(write_rows(tmp_path / "3.csv",
                f"{three},cat,drop,")), write_rows(tmp_path / "4.csv",
                f"{three},cat,keep,")],
            )  # fmt: skip

    def test_labels_given_later_have_not_been_reviewed(self, data, named, file):
        after = apply_corrections(data, file(f"{named[0][0]},cat,keep,"))
        noisy = add_label_noise(after, "symmetric:0.5", seed=0)
        assert noisy.train.reviewed is None


def second_of(path: Path) -> str:
    return str(path)


class TestCells:
    @pytest.mark.parametrize(
        "text, cell",
        [
            ("=1+2", "'=1+2"),
            ("@a", "'@a"),
            ("-dog", "'-dog"),
            ("+dog", "'+dog"),
            ("\tdog", "'\tdog"),
            ("'=dog", "''=dog"),
            ("'dog", "''dog"),
            ("dog's", "dog's"),
            ("-0.5", "-0.5"),
            ("", ""),
        ],
    )
    def test_a_guard_comes_and_goes(self, text, cell):
        assert guarded_cell(text) == cell
        assert plain_cell(cell) == text

    def test_a_quote_that_guards_nothing_stays(self):
        assert plain_cell("'dog") == "'dog"
        assert plain_cell("'-1") == "-1"

    def test_a_table_comes_back_as_it_was(self, tmp_path):
        rows = [["=a", 'b,"\n', -1.5], ["'x", "-2", 3]]
        write_csv(tmp_path / "t.csv", ["=id", "name", "n"], rows)
        assert (tmp_path / "t.csv").read_text().startswith("'=id,")
        read = [list(row.values()) for row in read_csv(tmp_path / "t.csv")]
        assert read == [["=a", 'b,"\n', "-1.5"], ["'x", "-2", "3"]]

    def test_hostile_names_from_a_spreadsheet(self, tmp_path):
        for label in ("=cmd", "owl, grey"):
            for number in range(4):
                place = tmp_path / "p" / label / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(b"")
        data = load_images(tmp_path / "p", validation_fraction=0, test_fraction=0)
        path = tmp_path / "c.csv"
        rows = '\'=cmd/0.png,\'=cmd,relabel,"owl, grey"\r\n"owl, grey/1.png",'
        rows += '"owl, grey",DROP,\r\n\r\n'
        path.write_bytes(f"\ufeff{HEADER},comment\r\n{rows}".encode())
        after = apply_corrections(data, path)
        assert named_labels(after, "train")["=cmd/0.png"] == "owl, grey"
        assert len(after.train) == 7


class TestRefused:
    @pytest.mark.parametrize(
        "rows, message",
        [
            (["{0},cat,delete,"], "line 2: the decision must be keep, relabel or drop"),
            (["{0},cat,relabel,"], "needs a new_label"),
            (["{0},cat,relabel,cat"], "Use keep where"),
            (["{0},cat,keep,dog"], "keep has no new_label"),
            (["{0},cat,drop,dog"], "drop has no new_label"),
            (["{0},cat,keep,", "{0},cat,keep,"], "decides twice about .* 2 and 3"),
            (["{0},cat,keep,", "{0},cat,drop,"], "decides twice"),
            (["{0},dog,keep,"], "was 'dog' when it was reviewed and is 'cat' now"),
            (["{0},cat,relabel,dgo"], "'dgo' is not a class.*mean 'dog'"),
            (["cat/99.png,cat,keep,"], "1 of 1 ids .* not in .*'cat/99.png' in line 2"),
            ([",cat,keep,"], "line 2 has no id"),
            (["{0},,keep,"], "no given_label"),
            (["{0},cat,keep,,,"], "more cells than the header"),
            ([], "no row below the header"),
            (['{0},"cat,keep,'], "comma-separated"),
        ],
    )
    def test_a_row(self, data, named, file, rows, message):
        rows = [row.format(named[0][0]) for row in rows]
        with pytest.raises(DataError, match=message):
            apply_corrections(data, file(*rows))

    def test_a_class_without_images(self, data, named, file):
        rows = [f"{i},{name},drop," for i, name in named if name == "cat"]
        with pytest.raises(DataError, match="no training image of 'cat'"):
            apply_corrections(data, file(*rows))

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"", "It has: none"),
            (b"id,given_label,decision\na,b,keep\n", "no column 'new_label'"),
            (b"id;given;decision;new_label\n", "It has: 'id', 'given', 'deci"),
            (b"\xff\xfe\x00", "in UTF-8"),
        ],
    )
    def test_a_file(self, data, tmp_path, content, message):
        (tmp_path / "c.csv").write_bytes(content)
        with pytest.raises(DataError, match=message):
            apply_corrections(data, tmp_path / "c.csv")

    def test_no_file(self, data, tmp_path):
        for path in (tmp_path / "none.csv", tmp_path):
            with pytest.raises(InvalidArgument, match="Expected a CSV file"):
                apply_corrections(data, path)


class TestFeatures:
    @pytest.fixture
    def passes(self, monkeypatch):
        """Counts the images that go through a base."""
        seen = []
        made = FrozenBackbone.forward.func

        def counting(self):
            forward = made(self)

            def run(images):
                seen.append(len(images))
                return forward(images)

            return run

        monkeypatch.setattr(FrozenBackbone, "forward", property(counting))
        return seen

    @pytest.mark.parametrize("views", [1, 2])
    def test_the_base_does_not_run_again(
        self, data, named, file, tiny_base, tmp_path, passes, views
    ):
        kept = extract_features(
            tiny_base,
            data.train,
            cache_dir=tmp_path / "k",
            augmentations=views,
            progress=False,
        )
        assert sum(passes) == views * len(data.train)
        rows = [f"{named[n][0]},cat,drop," for n in (0, 3)]
        after = apply_corrections(
            data, file(*rows, f"{named[1][0]},cat,relabel,owl")
        ).train
        part = extract_features(
            tiny_base,
            after,
            cache_dir=tmp_path / "k",
            augmentations=views,
            progress=False,
        )
        assert sum(passes) == views * len(data.train)
        rest = np.setdiff1d(np.arange(len(kept)), [0, 3])
        assert part.ids.tolist() == after.ids.tolist() == kept.ids[rest].tolist()
        assert part.labels.tolist() == after.labels.tolist()
        assert part.reviewed.tolist() == after.reviewed.tolist()
        np.testing.assert_array_equal(part.all_views, kept.all_views[rest])
        np.testing.assert_array_equal(
            np.concatenate(list(part.chunks(7))), kept.features[rest]
        )
        np.testing.assert_allclose(
            part.moments()[0], kept.features[rest].mean(axis=0), rtol=1e-5
        )

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_batches_have_the_rows_of_their_samples(
        self, tmp_path, monkeypatch, in_memory
    ):
        from keras_rsft.features import _batches as batches

        if not in_memory:
            monkeypatch.setattr(batches, "MAX_BYTES_IN_MEMORY", 0)
        values = np.arange(10 * 2 * 3, dtype=np.float32).reshape(10, 2, 3)
        values.tofile(tmp_path / "f.bin")
        labels = np.arange(10, dtype=np.int32)
        whole = FeatureSet(
            tmp_path / "f.bin", labels, labels.astype(str), 3, augmentations=2
        )
        part = whole.take(np.array([1, 4, 5, 9])).take(np.array([1, 3]))
        assert part.ids.tolist() == ["4", "9"]
        made = TrainingBatches(part, batch_size=2, seed=0)
        for epoch in range(4):
            made.callback.on_epoch_begin(epoch)
            for rows, given in made.dataset:
                for row, label in zip(rows.numpy(), given.numpy(), strict=True):
                    assert row.tolist() in values[label].tolist()


class TestTrust:
    def test_reviewed_samples_are_accepted_over_a_policy(self):
        reviewed = np.array([True, False, False, True])
        policy = AcceptReviewed(LossThreshold(1.0), reviewed)
        losses = np.array([5.0, 5.0, 0.5, np.nan], np.float32)
        mask = policy(losses, None, np.arange(4))
        assert np.asarray(mask).tolist() == [True, False, True, False]
        mask = policy(losses[:2], None, np.array([1, 2]))
        assert np.asarray(mask).tolist() == [False, False]
        assert int(policy.steps_seen) == int(policy.policy.steps_seen) == 2
        assert policy.threshold_in_use() == 1.0

    def test_saved_with_the_policy_inside(self, tmp_path):
        from keras_rsft.model._rsft_model import RSFTModel

        policy = AcceptReviewed(LossMixture(), np.array([True, False]))
        policy.policy.threshold.assign(0.75)
        assert policy.needs_ledger
        head = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        RSFTModel(head, policy).save(tmp_path / "m.keras")
        loaded = keras.saving.load_model(tmp_path / "m.keras").policy
        assert np.asarray(loaded.reviewed).tolist() == [True, False]
        assert float(loaded.policy.threshold) == 0.75

    def test_not_over_whole_batches(self):
        with pytest.raises(InvalidArgument, match="one by one"):
            AcceptReviewed(LossThreshold(1.0, level="batch"), [True])
        with pytest.raises(InvalidArgument, match="which samples"):
            AcceptReviewed(LossThreshold(1.0), [True])(np.ones(1, np.float32))

    def test_a_reviewed_label_is_not_suspicious(self):
        ledger = Ledger(["a", "b"], [0, 1])
        ledger.note_probabilities(np.array([[0.1, 0.9], [0.9, 0.1]], np.float32))
        ledger.note_reviewed(np.array([True, False]))
        assert ledger.suspicion.tolist() == pytest.approx([0.0, 0.9])


class TestRound:
    @pytest.fixture
    def settings(self):
        return TrainConfig(
            policy=PolicyConfig(threshold=0.8), epochs=12, batch_size=8,
            learning_rate=0.05,
        )  # fmt: skip

    @pytest.fixture
    def fit(self, settings, tiny_base_file, tmp_path):
        def run(data, name, **options):
            return finetune(
                data, output=tmp_path / name, progress=False,
                features=FeatureConfig(
                    str(tiny_base_file), cache_dir=tmp_path / "kept"
                ),
                **({"settings": settings} | options),
            )  # fmt: skip

        return run

    @pytest.mark.slow
    def test_noise_review_corrections_better(self, fit, photo_folder, tmp_path):
        noisy = add_label_noise(load_images(photo_folder), "symmetric:0.25", seed=0)
        before = fit(noisy, "first")
        right = named_labels(load_images(photo_folder), "train")
        rows = []
        rows_of = read_csv(before.folder / "ledger.csv")
        suspects = sorted(
            (row for row in rows_of if row["split"] == "train"),
            key=lambda row: -float(row["suspicion"]),
        )
        for number, row in enumerate(suspects[:10]):
            label = right[row["id"]]
            if number == 9:
                rows.append(f"{row['id']},{row['given_label']},drop,")
            elif label == row["given_label"]:
                rows.append(f"{row['id']},{label},keep,")
            else:
                rows.append(f"{row['id']},{row['given_label']},relabel,{label}")
        file = write_rows(tmp_path / "corrections.csv", *rows)
        after = fit(noisy, "second", corrections=file)
        assert after.results["wrong_labels"] < before.results["wrong_labels"]
        assert after.results["test_accuracy"] >= before.results["test_accuracy"]
        config = json.loads((after.folder / "config.json").read_text())
        counts = {k: config["corrections"][k] for k in ("keep", "relabel", "drop")}
        assert sum(counts.values()) == 10
        samples = list(read_csv(after.folder / "samples.csv"))
        assert sum(row["decision"] == "relabel" for row in samples) == counts["relabel"]
        assert len(samples) == len(all_ids(noisy)) - 1
        # What a run keeps of them is a file of corrections, too.
        again = fit(noisy, "third", corrections=after.folder / "corrections.csv")
        assert again.history == after.history

    def test_what_was_reviewed_is_accepted(self, fit, photo_folder, file, settings):
        data = load_images(photo_folder)
        rows = [f"{i},{name},keep," for i, name in named_labels(data, "train").items()]
        strict = TrainConfig(
            policy=PolicyConfig(threshold=1e-6, warmup_epochs=0), epochs=2
        )
        trusted = fit(data, "strict", corrections=file(*rows), settings=strict)
        assert trusted.results["acceptance_rate"] == 1
        auto = TrainConfig(epochs=2, batch_size=8)
        run = fit(data, "auto", corrections=file(*rows), settings=auto)
        assert run.trained.label_quality.noise_rate == 0
        with (run.folder / "ledger.csv").open(encoding="utf-8") as lines:
            rows = [row for row in csv.DictReader(lines) if row["split"] == "train"]
            assert {row["suspicion"] for row in rows} == {"0"}
