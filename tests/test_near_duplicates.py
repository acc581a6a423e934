"""Near duplicates with different labels, and the thumbnails that show them."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from made_images import png, write
from PIL import Image

from keras_rsft.data._images import shrunk_jpeg
from keras_rsft.data._sources import load_images
from keras_rsft.features import _thumbnails as thumbnails
from keras_rsft.features._neighbours import near_duplicates
from keras_rsft.features._store import FeatureSet
from keras_rsft.features._thumbnails import write_previews, write_thumbnails


@pytest.fixture
def make_features(tmp_path):
    def build(values, labels):
        path = tmp_path / "features.bin"
        values = np.asarray(values, np.float32)
        values.tofile(path)
        ids = np.array([f"{number}" for number in range(len(values))])
        return FeatureSet(path, np.array(labels, np.int32), ids, values.shape[1])

    return build


def pairs_of(features, suspicion=None, **options):
    suspicion = np.zeros(len(features)) if suspicion is None else suspicion
    found = near_duplicates([features], suspicion, progress=False, **options)
    return [(min(p.first, p.second), max(p.first, p.second)) for p in found]


class TestNearDuplicates:
    def test_only_pairs_with_different_labels(self, make_features):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(60, 300))
        values[1], values[3] = values[0], values[2] + 0.01
        labels = np.arange(60) % 3
        labels[[0, 1, 2, 3]] = [0, 0, 0, 1]
        assert pairs_of(make_features(values, labels)) == [(2, 3)]

    @pytest.mark.parametrize("dim", [5, 128, 129, 700])
    def test_the_cosine_is_that_of_the_standardised_features(self, make_features, dim):
        rng = np.random.default_rng(1)
        values = rng.normal(size=(50, dim)) * rng.uniform(20, 50, dim) + 100
        values[7] = values[3] + rng.normal(size=dim) * 0.2
        labels = np.zeros(50)
        labels[7] = 1
        features = make_features(values, labels)
        (found,) = near_duplicates([features], np.zeros(50), progress=False)
        scaled = (values - values.mean(0)) / values.std(0)
        one, other = scaled[3], scaled[7]
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert found.similarity == pytest.approx(cosine, abs=1e-4)

    def test_the_most_alike_first_each_sample_once(self, make_features):
        rng = np.random.default_rng(2)
        values = rng.normal(size=(80, 200))
        values[1] = values[0] + 0.01 * rng.normal(size=200)
        values[2] = values[0] + 0.2 * rng.normal(size=200)
        values[11] = values[10] + 0.1 * rng.normal(size=200)
        labels = np.arange(80)
        features = make_features(values, labels)
        assert pairs_of(features) == [(0, 1), (10, 11)]
        assert pairs_of(features, max_pairs=1) == [(0, 1)]

    def test_only_the_most_suspicious_are_looked_up(self, make_features):
        rng = np.random.default_rng(3)
        values = rng.normal(size=(40, 200))
        values[1], values[11] = values[0], values[10]
        features = make_features(values, np.arange(40))
        suspicion = np.zeros(40)
        suspicion[11] = 1.0
        assert pairs_of(features, suspicion, max_queries=1) == [(10, 11)]

    def test_a_thousand_equal_images_are_no_million_pairs(self, make_features):
        rng = np.random.default_rng(4)
        values = rng.normal(size=(400, 20))
        values[:300] = values[0]
        found = pairs_of(make_features(values, np.arange(400) % 2), max_pairs=1000)
        assert 0 < len(found) <= 200
        assert len({row for pair in found for row in pair}) == 2 * len(found)

    def test_one_class_has_none(self, make_features):
        assert pairs_of(make_features(np.ones((5, 4)), np.zeros(5))) == []


class TestThumbnails:
    @pytest.fixture
    def split(self, photo_folder):
        return load_images(str(photo_folder)).train

    def read(self, folder):
        with (folder / "thumbnails.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        content = (folder / "thumbnails.bin").read_bytes()
        assert sum(int(row["bytes"]) for row in rows) == len(content)
        return {
            row["id"]: Image.open(
                io.BytesIO(content[int(row["offset"]) :][: int(row["bytes"])])
            )
            for row in rows
        }

    def write(self, split, folder, cache, **suspicion):
        folder.mkdir()
        write_thumbnails([split], suspicion, folder, cache_dir=cache, progress=False)
        return self.read(folder)

    def test_each_shows_its_image(self, split, tmp_path):
        pictures = self.write(split, tmp_path / "run", tmp_path / "cache")
        assert list(pictures) == split.ids.tolist()
        channels = {"red/": 0, "green/": 1, "blue/": 2}
        for name, picture in pictures.items():
            assert (picture.format, picture.size) == ("JPEG", (96, 96))
            means = np.asarray(picture).mean(axis=(0, 1))
            assert means.argmax() == channels[name[: name.index("/") + 1]]

    def test_they_are_made_once(self, split, tmp_path, monkeypatch):
        first = self.write(split, tmp_path / "one", tmp_path / "cache")
        monkeypatch.setattr(thumbnails, "_render", None)
        assert list(self.write(split, tmp_path / "two", tmp_path / "cache")) == list(
            first
        )

    def test_of_all_splits(self, photo_folder, tmp_path, monkeypatch):
        data = load_images(str(photo_folder))
        splits = [data.train, data.validation, data.test]
        (tmp_path / "run").mkdir()
        write_thumbnails(
            splits, {}, tmp_path / "run", cache_dir=tmp_path, progress=False
        )
        ids = [name for split in splits for name in split.ids.tolist()]
        assert list(self.read(tmp_path / "run")) == ids
        monkeypatch.setattr(thumbnails, "MAX_THUMBNAILS", 2)
        suspicion = {str(data.test.ids[0]): 0.9, str(data.train.ids[3]): 0.8}
        (tmp_path / "few").mkdir()
        write_thumbnails(splits, suspicion, tmp_path / "few", progress=False)
        assert set(self.read(tmp_path / "few")) == set(suspicion)

    def test_previews_show_the_most_suspicious_whole(
        self, photo_folder, tmp_path, monkeypatch
    ):
        data = load_images(str(photo_folder))
        splits = [data.train, data.validation, data.test]
        monkeypatch.setattr(thumbnails, "MAX_PREVIEWS", 2)
        monkeypatch.setattr(thumbnails, "PREVIEW_SIDE", 10)
        suspicion = {str(data.test.ids[0]): 0.9, str(data.train.ids[3]): 0.8}
        write_previews(splits, suspicion, tmp_path, progress=False)
        (tmp_path / "previews.csv").rename(tmp_path / "thumbnails.csv")
        (tmp_path / "previews.bin").rename(tmp_path / "thumbnails.bin")
        pictures = self.read(tmp_path)
        assert set(pictures) == set(suspicion)
        sizes = {(one.format, one.size) for one in pictures.values()}
        assert sizes == {("JPEG", (8, 10))}  # Of 16 x 20, uncropped.

    def test_an_image_that_cannot_be_read_has_no_preview(self, tmp_path):
        for label in ("a", "b"):
            for number in range(2):
                write(tmp_path / "p" / label / f"{number}.png", png(number))
        (tmp_path / "p" / "a" / "0.png").write_bytes(b"no picture")
        data = load_images(tmp_path / "p", validation_fraction=0, test_fraction=0)
        write_previews([data.train], {}, tmp_path, progress=False)
        lines = (tmp_path / "previews.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines[1:]] == [
            "a/1.png", "b/0.png", "b/1.png",
        ]  # fmt: skip

    def test_a_small_image_stays_as_it_is(self):
        picture = Image.open(io.BytesIO(shrunk_jpeg(png(120), 100)))
        assert picture.size == (8, 6)
        assert abs(int(np.asarray(picture)[0, 0, 0]) - 120) <= 1

    def test_an_interrupted_pass_leaves_nothing(self, split, tmp_path, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(thumbnails._storage, "write_csv", stop)
        with pytest.raises(KeyboardInterrupt):
            self.write(split, tmp_path / "one", tmp_path / "cache")
        assert [p.suffix for p in (tmp_path / "cache").iterdir()] in ([], [".lock"])
        monkeypatch.undo()
        assert len(self.write(split, tmp_path / "two", tmp_path / "cache")) > 0

    def test_an_unreadable_image_has_none(self, photo_folder, tmp_path):
        split = load_images(str(photo_folder)).train
        broken = tmp_path / "photos"
        for name in split.ids:
            (broken / name).parent.mkdir(parents=True, exist_ok=True)
            (broken / name).write_bytes((photo_folder / name).read_bytes())
        (broken / str(split.ids[2])).write_bytes(b"no image")
        whole = load_images(
            str(broken), validation_fraction=0.0, test_fraction=0.0
        ).train
        pictures = self.write(whole, tmp_path / "run", tmp_path / "cache")
        assert len(pictures) == len(whole) - 1
        assert str(split.ids[2]) not in pictures

    def test_of_too_many_the_most_suspicious(self, split, tmp_path, monkeypatch):
        monkeypatch.setattr(thumbnails, "MAX_THUMBNAILS", 2)
        chosen = [str(split.ids[9]), str(split.ids[4])]
        suspicion = dict.fromkeys(chosen, 0.9)
        pictures = self.write(split, tmp_path / "run", tmp_path / "cache", **suspicion)
        assert sorted(pictures) == sorted(chosen)
