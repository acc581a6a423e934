"""Data sets of TensorFlow Datasets, on tiny ones that the tests write."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from made_images import (
    SPLIT_NAMES,
    all_ids,
    indices_of,
    value_of,
)
from PIL import Image

from keras_rsft.data._arrays import load_data
from keras_rsft.data._sources import load_images
from keras_rsft.errors import DataError, InvalidArgument


def write_tfds(data_dir: Path, name: str, counts) -> None:
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(5, 5, 3)),
            "label": tfds.features.ClassLabel(names=["x", "y", "z"]),
            "human": tfds.features.ClassLabel(num_classes=3),
            "number": np.int64,
        }
    )
    directory = data_dir / name / "1.0.0"
    directory.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version("1.0.0"),
        data_dir=str(directory),
        module_name="tests",
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=9)
    writer.initialize_splits([split for split, _ in counts])
    for split, count in counts:
        samples = [
            {
                "image": np.full((5, 5, 3), number, np.uint8),
                "label": number % 3,
                "human": -1 if split == "test" else (number + 1) % 3,
                "number": number,
            }
            for number in range(count)
        ]
        writer.add_examples({split: samples})
    writer.close_all()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    write_tfds(data_dir, "tiny", (("train", 24), ("test", 6), ("extra", 3)))
    write_tfds(data_dir, "untrained", (("left", 8), ("right", 6)))
    write_tfds(data_dir, "lopsided", (("train", 2), ("test", 3)))
    return data_dir


def test_objects_of_the_package_are_data(data_dir):
    by_name = load_images("tfds:tiny", data_dir=data_dir)
    builder = tfds.builder("tiny", data_dir=data_dir)
    data = load_data(builder)
    assert data.source == "tfds:tiny/1.0.0"
    assert data.class_names == by_name.class_names
    assert all_ids(data) == all_ids(by_name)
    loaded = tfds.load("tiny", data_dir=data_dir)
    data = load_data(loaded, class_names=["x", "y", "z"])
    assert [len(getattr(data, s)) for s in SPLIT_NAMES] == [21, 3, 6]
    pixels = [value_of(image) for _, image in data.test.images(5)]
    assert (pixels, data.test.labels.tolist()) == ([*range(6)], [0, 1, 2, 0, 1, 2])


class TestTfds:
    """A data set of three shards, with human labels for the training part only."""

    def load(self, data_dir, name="tiny", **options):
        return load_images(f"tfds:{name}", data_dir=data_dir, **options)

    def test_splits_labels_and_ids(self, data_dir):
        data = self.load(data_dir)
        assert data.class_names == ("x", "y", "z")
        assert [len(getattr(data, s)) for s in SPLIT_NAMES] == [21, 3, 6]
        assert data.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert data.test.ids[0] == "tiny-test.tfrecord-00000__0"
        assert len(set(all_ids(data))) == 30
        assert not any("extra" in id_ for id_ in all_ids(data))

    @pytest.mark.slow
    def test_images_belong_to_their_labels_across_shards(self, data_dir):
        for split in ("train", "validation", "test"):
            part = getattr(self.load(data_dir), split)
            seen = [(int(i), value_of(image)) for i, image in part.images(4)]
            assert [index for index, _ in seen] == list(range(len(part)))
            # The red value is the sample's number, the label that modulo 3.
            assert [value % 3 for _, value in seen] == part.labels.tolist()
            values = [value for _, value in seen]
            assert values == sorted(set(values))

    def test_start_take_and_encoded(self, data_dir):
        train = self.load(data_dir).train
        values = [value_of(image) for _, image in train.images(4)]
        later = [(int(i), value_of(image)) for i, image in train.images(4, start=7)]
        assert later == list(enumerate(values))[7:]
        some = train.take([2, 11, 17])
        chosen = [(int(i), value_of(image)) for i, image in some.images(4)]
        assert chosen == [(0, values[2]), (1, values[11]), (2, values[17])]
        stored = Image.open(io.BytesIO(train.encoded(11)))
        assert stored.getpixel((0, 0))[0] == values[11]
        assert indices_of(train.images(4, start=len(train))) == []

    def test_human_labels_with_clean_ones(self, data_dir):
        data = self.load(data_dir, label_key="human", clean_label_key="label")
        assert data.class_names == ("x", "y", "z")
        np.testing.assert_array_equal(
            data.train.labels, (data.train.clean_labels + 1) % 3
        )
        np.testing.assert_array_equal(data.test.labels, data.test.clean_labels)
        plain = self.load(data_dir)
        assert data.test.fingerprint == plain.test.fingerprint

    def test_unlabelled_samples_are_explained(self, data_dir):
        with pytest.raises(DataError, match=r"6 of 30 samples.*clean_label_key"):
            self.load(data_dir, label_key="human")

    @pytest.mark.slow
    def test_without_a_split_called_train_all_is_cut(self, data_dir):
        data = self.load(data_dir, "untrained", test_fraction=0)
        assert len(data.train) + len(data.validation) == 14
        for part in (data.train, data.validation):
            seen = [(int(i), value_of(image) % 3) for i, image in part.images(4)]
            assert seen == list(enumerate(part.labels.tolist()))
        assert indices_of(data.train.images(4, start=9)) == [9, 10]

    def test_a_class_that_train_lacks_is_named(self, data_dir):
        with pytest.raises(DataError, match="Without one: 'z' in test"):
            self.load(data_dir, "lopsided")

    def test_fingerprint_is_that_of_the_ids(self, data_dir):
        train = self.load(data_dir).train
        assert train.fingerprint == self.load(data_dir).train.fingerprint
        assert train.fingerprint != train.take(range(5)).fingerprint

    def test_unknown_names_and_keys_are_explained(self, data_dir):
        with pytest.raises(
            InvalidArgument, match=r"'tfds:cifar1O'.*Did you mean \"tfds"
        ):
            load_images("tfds:cifar1O")
        with pytest.raises(InvalidArgument, match="which has: human, label"):
            self.load(data_dir, label_key="number")
        with pytest.raises(InvalidArgument, match="clean_label_key='nope'"):
            self.load(data_dir, clean_label_key="nope")

    def test_a_failed_download_is_explained(self, tmp_path, monkeypatch):
        def fail(builder, **_):
            raise ConnectionError("no route to host")

        monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
        with pytest.raises(DataError, match=r"ConnectionError: no route.*data_dir"):
            load_images("tfds:mnist", data_dir=tmp_path)

    def test_labels_are_gathered_without_decoding(self, data_dir, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("an image was decoded")

        monkeypatch.setattr(tfds.features.Image, "decode_example", refuse)
        assert len(self.load(data_dir).train) == 21
