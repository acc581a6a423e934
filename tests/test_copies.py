"""Copies: found over all splits, one witness in an audit, in one split, told of."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from made_images import write
from PIL import Image

import keras_rsft as rsft
from keras_rsft.data._labels import symmetric_noise
from keras_rsft.features import _neighbours as neighbours
from keras_rsft.features._neighbours import copy_groups
from keras_rsft.features._store import FeatureSet
from keras_rsft.label_quality import _regression as module
from keras_rsft.label_quality._audit import audit_labels
from keras_rsft.label_quality._regression import LeftOutRegression
from keras_rsft.report._live import LiveAudit
from keras_rsft.report._record import read_run
from keras_rsft.training._features import open_features

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def feature_set(tmp_path):
    made = []

    def build(values, labels=None, groups=None):
        made.append(tmp_path / f"features-{len(made)}.bin")
        values = np.asarray(values, np.float32)
        values.tofile(made[-1])
        labels = np.zeros(len(values)) if labels is None else labels
        ids = np.array([f"{len(made)}/{number}.jpg" for number in range(len(values))])
        labels = np.asarray(labels, np.int32)
        return FeatureSet(made[-1], labels, ids, values.shape[1], groups=groups)

    return build


def clusters(count=400, num_classes=4, dim=40, seed=0):
    """Samples around one centre a class; returns features and right labels."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_classes, dim)) * 0.7
    labels = np.arange(count) % num_classes
    return centres[labels] + rng.normal(size=(count, dim)), labels


def groups_of(parts, **options):
    found = copy_groups(parts, progress=False, **options)
    numbers, sizes = np.unique(found, return_counts=True)
    return [np.flatnonzero(found == one).tolist() for one in numbers[sizes > 1]]


class TestGroups:
    @pytest.mark.parametrize("dim", [40, 129, 700])
    @pytest.mark.parametrize("block", [8_000_000, 1000])
    @pytest.mark.parametrize("most", [100_000, 100])
    def test_over_all_splits(self, feature_set, dim, block, most, monkeypatch):
        monkeypatch.setattr(neighbours, "_BLOCK_VALUES", block)
        monkeypatch.setattr(neighbours, "_MAX_ALL_PAIRS", most)
        monkeypatch.setattr(neighbours, "_NEIGHBOURHOOD", 50)
        values, _ = clusters(dim=dim)
        rng = np.random.default_rng(1)
        values[7] = values[3]
        values[390] = values[3] + 0.05 * rng.normal(size=dim)
        values[201] = 1.02 * values[200]
        parts = [feature_set(values[:300]), feature_set(values[300:])]
        assert groups_of(parts) == [[3, 7, 390], [200, 201]]

    def test_of_many_samples_only_neighbours_are_compared(
        self, feature_set, monkeypatch
    ):
        values, _ = clusters(3000)
        copies = values[:1000] + 0.1 * np.random.default_rng(1).normal(size=(1000, 40))
        parts = [feature_set(np.concatenate([values, copies]))]
        monkeypatch.setattr(neighbours, "_MAX_ALL_PAIRS", 1000)
        monkeypatch.setattr(neighbours, "_NEIGHBOURHOOD", 100)
        sets = neighbours._Pool(parts).neighbourhoods()
        assert len(sets) == 40
        assert all((np.diff(one) > 0).all() for one in sets)
        assert (np.bincount(np.concatenate(sets)) == 3).all()
        assert len(groups_of(parts)) >= 990

    @pytest.mark.parametrize("dim", [3, 6, 12, 300])
    def test_neighbours_in_few_dimensions_are_none(self, feature_set, dim):
        assert groups_of([feature_set(clusters(1500, dim=dim)[0])]) == []

    def test_where_every_sample_stands_twice(self, feature_set):
        values, _ = clusters()
        parts = [feature_set(np.concatenate([values, values]))]
        assert groups_of(parts) == [[at, at + 400] for at in range(400)]

    def test_a_thousand_black_images_are_one_group(self, feature_set):
        values, _ = clusters(1500, dim=300)
        values[100:1100] = values[5]
        assert groups_of([feature_set(values)]) == [[5, *range(100, 1100)]]

    def test_pixels_tell_of_nearest_neighbours(self, feature_set):
        rng = np.random.default_rng(2)
        values = rng.normal(size=(60, 200))
        values[9] = values[4] + 0.8 * rng.normal(size=200)
        values[30] = values[20] + 0.8 * rng.normal(size=200)
        asked = []

        def look_same(pairs):
            asked.extend(pairs.tolist())
            return pairs[:, 0] == 4

        assert groups_of([feature_set(values)]) == []
        assert groups_of([feature_set(values)], look_same=look_same) == [[4, 9]]
        assert asked == [[4, 9], [20, 30]]


class TestRegression:
    @pytest.mark.parametrize("solved", [512, 1])
    @pytest.mark.parametrize("rows", [4096, 5])
    @pytest.mark.parametrize("dim", [5, 60])  # Fewer and more than there are samples.
    def test_scores_equal_a_fit_without_the_group(
        self, feature_set, solved, rows, dim, monkeypatch
    ):
        monkeypatch.setattr(module, "MAX_GROUP_TO_SOLVE", solved)
        monkeypatch.setattr(module, "CHUNK_ROWS", rows)
        values, labels = clusters(count=40, dim=dim)
        groups = np.arange(40)
        groups[[3, 17]], groups[[8, 9, 30]], groups[[20, 39]] = 3, 8, 20
        weights = np.linspace(0.2, 1.0, 40).astype(np.float32)
        weights[9] = 0.0
        regression = LeftOutRegression(feature_set(values, labels, groups), 4, seed=0)
        scores = regression.left_out_scores(weights)
        further = feature_set(values[[2, 8]] + 0.3, [0, 0], np.array([8, 99]))
        others = regression.scores(further)

        def standardised(rows):
            scaled = (rows - values.mean(0)) / values.std(0)
            return np.hstack([scaled, np.ones((len(rows), 1))])

        inputs, targets = standardised(values), np.eye(4)[labels]
        penalty = np.diag([regression._ridge] * dim + [1e-4])

        def fit_without(group):
            kept = groups != group
            weighted = inputs[kept] * weights[kept, None]
            return np.linalg.solve(
                weighted.T @ inputs[kept] + penalty, weighted.T @ targets[kept]
            )

        for place in (0, 3, 8, 9, 17, 30, 39):
            expected = inputs[place] @ fit_without(groups[place])
            np.testing.assert_allclose(scores[place], expected, atol=1e-4)
        away = standardised(values[[2, 8]] + 0.3)
        for place, group in enumerate((8, 99)):
            expected = away[place] @ fit_without(group)
            np.testing.assert_allclose(others[place], expected, atol=1e-4)


class TestAudit:
    @pytest.fixture
    def noisy(self):
        values, right = clusters()
        rng = np.random.default_rng(1)
        return values, right, symmetric_noise(right, 0.25, num_classes=4, rng=rng)

    def test_doubled_rows_say_what_single_ones_say(self, feature_set, noisy):
        values, _, given = noisy
        single = audit_labels(feature_set(values, given), num_classes=4, progress=False)
        twice = feature_set(np.tile(values, (2, 1)), np.tile(given, 2))
        doubled = audit_labels(twice, num_classes=4, progress=False)
        assert single.noise_rate == pytest.approx(0.25, abs=0.05)
        assert doubled.noise_rate == pytest.approx(single.noise_rate, abs=1e-3)
        np.testing.assert_allclose(doubled.noise, single.noise, atol=1e-3)
        np.testing.assert_allclose(
            doubled.out_of_sample, np.tile(single.out_of_sample, (2, 1)), atol=1e-3
        )

    def test_wrong_labels_with_a_copy_are_suspected(self, feature_set):
        values, right = clusters(dim=150)
        rng = np.random.default_rng(1)
        given = symmetric_noise(right, 0.25, num_classes=4, rng=rng)
        copied = np.flatnonzero(given != right)[:60]
        more = feature_set(
            np.concatenate([values, values[copied]]),
            np.concatenate([given, given[copied]]),
        )
        found = audit_labels(more, num_classes=4, progress=False)
        assert found.looks_wrong[400:].mean() > 0.9
        assert found.noise_rate == pytest.approx(160 / 460, abs=0.03)
        # As long as copies judge one another, they hide all of it.
        alone = dataclasses.replace(more, groups=np.arange(460))
        blind = audit_labels(alone, num_classes=4, progress=False)
        assert blind.looks_wrong[400:].mean() < 0.1

    def test_held_out_samples_are_judged_without_their_copies(self, feature_set, noisy):
        values, _, given = noisy
        train, held_out = (
            feature_set(values, given),
            feature_set(values[:90], given[:90]),
        )
        found = audit_labels(train, num_classes=4, held_out=[held_out], progress=False)
        np.testing.assert_allclose(
            found.held_out[0].out_of_sample, found.out_of_sample[:90], atol=1e-3
        )

    def test_without_copies_nothing_changes(self, feature_set, noisy):
        values, _, given = noisy
        looked = audit_labels(feature_set(values, given), num_classes=4, progress=False)
        alone = feature_set(values, given, np.arange(400))
        told = audit_labels(alone, num_classes=4, progress=False)
        np.testing.assert_array_equal(looked.out_of_sample, told.out_of_sample)
        np.testing.assert_array_equal(looked.right_probability, told.right_probability)

    def test_of_two_labels_of_one_photo_the_less_likely_looks_wrong(self, feature_set):
        values, right = clusters()
        copies = np.arange(0, 40, 4)  # Of class 0, the copies labelled 1.
        features = feature_set(
            np.concatenate([values, values[copies]]), np.append(right, [1] * 10)
        )
        found = audit_labels(features, num_classes=4, progress=False)
        sums = found.right_probability[copies] + found.right_probability[400:]
        assert (sums <= 1.0 + 1e-6).all()
        assert found.looks_wrong[400:].all()
        assert not found.looks_wrong[copies].any()
        # A copy with the same label is no second witness of it.
        assert found.right_probability[copies].min() > 0.9

    def test_a_reviewed_label_settles_those_of_its_copies(self, feature_set, noisy):
        values, right, given = noisy
        wrong = np.flatnonzero(given != right)[:20]
        before = feature_set(
            np.concatenate([values, values[wrong]]),
            np.concatenate([given, given[wrong]]),
        )
        labels, reviewed = before.labels.copy(), np.zeros(420, bool)
        labels[400:], reviewed[400:] = right[wrong], True
        after = dataclasses.replace(
            before, labels=labels, reviewed=reviewed, before_review=before
        )
        found = audit_labels(
            after, num_classes=4, held_out=[before.take(wrong)], progress=False
        )
        assert (found.right_probability[wrong] == 0.0).all()
        assert (found.held_out[0].right_probability == 0.0).all()
        assert (found.right_probability[400:] == 1.0).all()

    def test_one_class_of_copies_is_too_few_to_judge_by(self, feature_set):
        values, labels = clusters(80, num_classes=2)
        values[1::2] = values[1]
        found = audit_labels(feature_set(values, labels), num_classes=2, progress=False)
        assert not found.can_judge


# Photos -------------------------------------------------------------------------------


def photo(seed, size=32):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    """30 photos in each of two classes; the first 12 of class a stand there twice."""
    root = tmp_path / "photos"
    for label, name in enumerate("ab"):
        for number in range(30):
            content = encoded(photo(100 * label + number))
            write(root / name / f"{number:02}.png", content)
            if name == "a" and number < 12:
                write(root / name / "again" / f"{number:02}.png", content)
    return root


def splits_of(data):
    return {
        one: name
        for name in ("train", "validation", "test")
        for one in getattr(data, name).ids.tolist()
    }


class TestSplits:
    def test_equal_files_go_to_one_split(self, photos):
        placed = splits_of(rsft.load_images(photos))
        assert len(set(placed.values())) == 3
        for number in range(12):
            name = f"{number:02}.png"
            assert placed[f"a/{name}"] == placed[f"a/again/{name}"]

    def test_equal_texts_go_to_one_split(self, tmp_path):
        for name in "ab":
            for number in range(40):
                text = f"{name} says {number // 2:02}".encode()
                write(tmp_path / name / f"{number:02}.txt", text)
        placed = splits_of(rsft.load_texts(tmp_path))
        assert len(set(placed.values())) == 3
        for name in "ab":
            for number in range(0, 40, 2):
                pair = (f"{name}/{number:02}.txt", f"{name}/{number + 1:02}.txt")
                assert placed[pair[0]] == placed[pair[1]]

    def test_files_of_one_size_that_differ_are_no_copies(self, tmp_path):
        for number in range(40):
            beginning = bytes([number // 4]) * 6000
            for name in "ab":  # The middles are equal in fours, the ends in none.
                content = beginning + f"{name}{number:02}".encode()
                write(tmp_path / name / f"{number:02}.png", content)
        reader = rsft.load_images(tmp_path, validation_fraction=0).train.reader
        assert reader.copy_names().tolist() == reader._ids.tolist()

    def test_files_that_cannot_be_read_are_no_copies(self, photos):
        for name in ("0.png", "1.png"):
            (photos / "b" / name).write_bytes(b"")
        data = rsft.load_images(photos, validation_fraction=0, test_fraction=0)
        reader = data.train.reader
        (photos / "a" / "00.png").unlink()
        names = dict(zip(data.train.ids, reader.copy_names(), strict=True))
        assert names["b/1.png"] == "b/1.png"
        assert names["a/again/00.png"] == "a/again/00.png"
        assert names["a/again/01.png"] == "a/01.png"

    def test_the_data_say_which_splits_were_cut(self, photos):
        assert rsft.load_images(photos).cut == ("validation", "test")
        assert rsft.load_images(photos, test_fraction=0).cut == ("validation",)


class TestNearCopies:
    @pytest.fixture
    def resized(self, photos):
        """Photos with larger copies of held-out ones beside, one in another class."""
        data = rsft.load_images(photos)
        for at, one in enumerate([*data.test.ids[:3], *data.validation.ids[:2]]):
            image = Image.open(photos / one).resize((48, 48), Image.Resampling.BICUBIC)
            content = encoded(image, "JPEG", quality=80)
            folder = "b" if at == 0 and one.startswith("a") else one[0]
            write(photos / folder / f"large-{at}.jpg", content)
        return photos

    @pytest.fixture
    def opened(self, tiny_base_file, tmp_path):
        config = rsft.FeatureConfig(str(tiny_base_file), cache_dir=tmp_path / "cache")

        def run(data, **options):
            return open_features(data, config, progress=False, **options)

        return run

    def test_held_out_copies_are_left_out(self, resized, opened, tmp_path):
        source = opened(rsft.load_images(resized))
        found = source.features
        trained = set(found.train.groups.tolist())
        assert not trained & set(found.validation.groups.tolist())
        chosen = trained | set(found.validation.groups.tolist())
        assert not chosen & set(found.test.groups.tolist())
        left_out = [one for part in found.left_out.values() for one in part.ids]
        assert left_out
        for part, split in ((found.test, "test"), (found.validation, "validation")):
            assert getattr(source.data, split).ids.tolist() == part.ids.tolist()
        assert sum(found.copies.left_out.values()) == len(left_out)
        for one, original in found.copy_of.items():
            pixels = [
                np.asarray(Image.open(resized / name).convert("L").resize((8, 8)))
                for name in (one, original)
            ]
            assert np.abs(np.subtract(*pixels, dtype=int)).max() < 40
        names = {*found.copy_of, *found.copy_of.values()}
        assert sum("large" in name for name in names) == 5

    def test_the_users_splits_stay_and_are_told_of(self, photos, opened):
        for name in "ab":
            for number in range(4):
                content = (photos / name / f"{20 + number}.png").read_bytes()
                write(photos / "test" / name / f"{number}.png", content)
        for name in "ab":
            (photos / name).rename(photos / f"train-{name}")
            (photos / "train").mkdir(exist_ok=True)
            (photos / f"train-{name}").rename(photos / "train" / name)
        data = rsft.load_images(photos, validation_fraction=0)
        found = opened(data).features
        assert len(found.test) == 8
        assert found.left_out == {}
        assert found.copies.remaining == {"test": 8}
        assert "20 groups of copies, 0 with different labels." in found.copies.sentence
        assert "8 test samples are copies" in found.copies.sentence

    def test_a_review_that_keeps_two_labels_of_a_photo_is_told(self, photos, opened):
        copy = "b/copied.png"
        write(photos / copy, (photos / "a" / "00.png").read_bytes())
        data = rsft.load_images(photos, validation_fraction=0, test_fraction=0)
        found = (
            "12 groups of copies, 1 with different labels: at least 1 label is wrong"
        )
        assert opened(data).features.copies.sentence == f"{found}."
        decisions = {
            "id": ["a/00.png", copy],
            "given_label": ["a", "b"],
            "decision": ["keep", "keep"],
            "new_label": ["", ""],
        }
        reviewed = rsft.apply_corrections(data, decisions)
        said = opened(reviewed).features.copies.sentence
        assert said == f"{found}, 1 of them after a review: look again."

    def test_they_are_looked_for_once(self, resized, opened, monkeypatch):
        data = rsft.load_images(resized)
        first = opened(data).features
        monkeypatch.setattr("keras_rsft.training._features.copy_groups", None)
        again = opened(data).features
        np.testing.assert_array_equal(first.train.groups, again.train.groups)

    def test_a_run_tells_of_them(self, resized, tiny_base_file, tmp_path):
        run = rsft.finetune(
            rsft.load_images(resized),
            features=rsft.FeatureConfig(str(tiny_base_file), cache_dir=tmp_path),
            settings=rsft.TrainConfig(epochs=2, batch_size=8),
            output=tmp_path / "run",
            with_plain=False,
            progress=False,
        )
        results = json.loads((run.folder / "results.json").read_text())
        assert results["copies"]["different_labels"] == 1

        def rows(name):
            with (run.folder / name).open(encoding="utf-8") as file:
                return list(csv.DictReader(file))

        samples = {row["id"]: row for row in rows("samples.csv")}
        copied = [row for row in samples.values() if row["copy_of"]]
        assert len(copied) == 17
        groups = {row["copy_of"] for row in copied}
        assert results["copies"]["groups"] == len(groups)
        left_out = sum(results["copies"]["left_out"].values())
        of_ledger = [row for row in rows("ledger.csv") if "left out" in row["split"]]
        assert len(of_ledger) == left_out > 0
        for row in of_ledger:
            assert samples[row["id"]]["split"] == row["split"]
        pairs = rows("near_duplicates.csv")
        assert any("large" in pair["id"] + pair["other_id"] for pair in pairs)
        for pair in pairs:
            assert pair["split"] == samples[pair["id"]]["split"]
            assert pair["other_split"] == samples[pair["other_id"]]["split"]
        live = LiveAudit(read_run(run.folder))
        assert len(live({})["samples"]["row"]) == len(rows("ledger.csv"))
        groups = {
            str(one): group
            for part in live._parts.values()
            for one, group in zip(part.ids, part.groups.tolist(), strict=True)
        }
        assert len(groups) - len(set(groups.values())) == len(copied)
        assert all(groups[row["id"]] == groups[row["copy_of"]] for row in copied)
        page = rsft.write_report(run).read_text(encoding="utf-8")
        assert run.features.copies.sentence in page
