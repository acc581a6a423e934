"""Splits: their images, fingerprints and changes, and how they are cut."""

from __future__ import annotations

import collections
import dataclasses
import os
import random

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given
from hypothesis import strategies as st
from made_images import (
    indices_of,
    png,
    write,
)
from PIL import Image

from keras_rsft.data._images import decode_image
from keras_rsft.data._sources import load_images
from keras_rsft.data._splits import (
    TEST,
    TRAIN,
    VALIDATION,
    Cut,
    assign_splits,
    sorted_names,
    split_counts,
)
from keras_rsft.errors import InvalidArgument


class TestImages:
    @pytest.fixture
    def train(self, folder):
        return load_images(folder).train

    def test_order_and_element_spec(self, train):
        images = train.images(8)
        assert images.element_spec == (
            tf.TensorSpec([], tf.int64),
            tf.TensorSpec([8, 8, 3], tf.float32),
        )
        assert indices_of(images) == list(range(42))
        assert indices_of(train.images(8, start=40)) == [40, 41]
        assert indices_of(train.images(8, start=42)) == []

    def test_an_image_is_what_decode_image_gives(self, train):
        index, image = next(iter(train.images((4, 9), start=11)))
        assert int(index) == 11
        np.testing.assert_array_equal(image, decode_image(train.encoded(11), (4, 9)))

    def test_views_do_not_depend_on_where_reading_starts(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        for name in ("a", "b"):
            for number in range(3):
                path = tmp_path / name / f"{number}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(noise).save(path)
        train = load_images(tmp_path, validation_fraction=0, test_fraction=0).train
        views = {int(i): v.numpy() for i, v in train.images(8, augmentations=3, seed=4)}
        assert views[0].shape == (3, 8, 8, 3)
        later = {
            int(i): v for i, v in train.images(8, augmentations=3, seed=4, start=4)
        }
        np.testing.assert_array_equal(views[4], later[4])
        np.testing.assert_array_equal(views[0][0], views[1][0])
        assert np.abs(views[0][1:] - views[1][1:]).mean() > 1

    @pytest.mark.parametrize(
        "options",
        [
            {"start": -1},
            {"start": 43},
            {"start": 0.5},
            {"augmentations": 0},
            {"seed": 2**63},
        ],
    )
    def test_wrong_options_are_refused(self, train, options):
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            train.images(8, **options)

    def test_unreadable_images_are_left_out_and_explained(self, tmp_path, capfd):
        whole = png(5)
        bad = {
            "b-empty.png": (b"", "The file is empty."),
            "c-cut.png": (whole[:-20], "Invalid PNG"),
            "d-cut.jpg": (b"\xff\xd8\xff\xe0" + bytes(30), "Invalid JPEG"),
            "e-text.jpg": (b"a text", "Not an image of a known kind"),
            "f-gone.png": (whole, "The file cannot be opened: No such file"),
        }
        for name, (content, _) in bad.items():
            (tmp_path / "x").mkdir(exist_ok=True)
            (tmp_path / "x" / name).write_bytes(content)
        for path in ("x/a.png", "x/g.jpg", "y/h.png"):
            write(tmp_path / path, whole)
        train = load_images(tmp_path, validation_fraction=0, test_fraction=0).train
        (tmp_path / "x" / "f-gone.png").unlink()
        assert indices_of(train.images(8)) == [0, 6, 7]
        assert train.read_error(6) is None  # a PNG called .jpg
        for index, (_, reason) in enumerate(bad.values(), start=1):
            assert train.read_error(index).startswith(reason)
        assert "Error" not in capfd.readouterr().out

    def test_an_index_out_of_range_is_refused(self, train):
        for index in (42, -43):
            with pytest.raises(IndexError):
                train.encoded(index)


class TestFingerprint:
    def train(self, folder, **options):
        return load_images(
            folder, validation_fraction=0, test_fraction=0, **options
        ).train

    def test_is_the_same_for_the_same_files(self, folder):
        one = self.train(folder).fingerprint
        assert one == self.train(folder, split_seed=9).fingerprint
        assert len(one) == 64
        assert set(one) <= set("0123456789abcdef")

    def test_does_not_depend_on_labels(self, folder):
        train = self.train(folder)
        other = train.with_labels(train.labels[::-1], train.labels)
        assert other.fingerprint == train.fingerprint

    @pytest.mark.parametrize("change", ["touch", "grow", "add", "remove", "rename"])
    def test_changes_with_the_files(self, folder, change):
        before = self.train(folder).fingerprint
        image = folder / "cat" / "03.png"
        if change == "touch":
            os.utime(image, ns=(1, image.stat().st_mtime_ns + 1))
        elif change == "grow":
            time = image.stat().st_mtime_ns
            image.write_bytes(image.read_bytes() + b"x")
            os.utime(image, ns=(time, time))
        elif change == "add":
            write(folder / "cat" / "new.png")
        elif change == "remove":
            image.unlink()
        else:
            image.rename(folder / "cat" / "other.png")
        assert self.train(folder).fingerprint != before

    def test_of_digits_changes_with_the_pixels(self):
        train = load_images("digits").train
        reader = train.reader
        pixels = reader._images.copy()
        pixels[3, 0, 0] += 1
        every = np.arange(len(pixels)).astype(str)
        reader = type(reader)(every, pixels).take(reader._items)
        reader._ids = train.ids
        changed = dataclasses.replace(train, reader=reader)
        assert changed.fingerprint != train.fingerprint
        assert load_images("digits").train.fingerprint == train.fingerprint


class TestChangedSplits:
    @pytest.fixture
    def train(self):
        return load_images("digits").train

    def test_with_labels(self, train):
        labels = (train.labels + 1) % 10
        noisy = train.with_labels(labels.astype(np.int64), train.labels)
        assert noisy.labels.dtype == np.int32
        np.testing.assert_array_equal(noisy.labels, labels)
        np.testing.assert_array_equal(noisy.clean_labels, train.labels)
        kept = noisy.with_labels(train.labels)
        np.testing.assert_array_equal(kept.clean_labels, train.labels)

    @pytest.mark.parametrize(
        "labels", [[1, 2], np.zeros(1259), np.zeros((1259, 1), int)]
    )
    def test_wrong_labels_are_refused(self, train, labels):
        with pytest.raises(InvalidArgument, match="1259 integers"):
            train.with_labels(labels)

    def test_take(self, train):
        noisy = train.with_labels(train.labels, train.labels)
        some = noisy.take([3, 10])
        assert some.ids.tolist() == [train.ids[3], train.ids[10]]
        assert some.labels.tolist() == train.labels[[3, 10]].tolist()
        assert some.clean_labels.tolist() == some.labels.tolist()
        assert some.encoded(1) == train.encoded(10)
        assert len(train.take([])) == 0

    @pytest.mark.parametrize("indices", [[3, 2], [1, 1], [-1], [1259], [[0]]])
    def test_take_keeps_the_order(self, train, indices):
        with pytest.raises(InvalidArgument, match="strictly increasing"):
            train.take(indices)


@pytest.mark.parametrize(
    "count, fractions, expected",
    [
        (1, (0.15, 0.15), (0, 0)),
        (2, (0.15, 0.15), (0, 0)),
        (2, (0.5, 0.4), (0, 1)),
        (3, (0.15, 0.15), (1, 1)),
        (3, (0.15, 0.0), (1, 0)),
        (3, (0.9, 0.05), (1, 1)),
        (4, (0.49, 0.49), (1, 2)),
        (10, (0.15, 0.15), (2, 2)),
        (100, (0.15, 0.2), (15, 20)),
        (100, (0.99, 0.0), (99, 0)),
    ],
)
def test_split_counts(count, fractions, expected):
    assert split_counts(count, Cut(*fractions, 0)) == expected


@pytest.mark.parametrize(
    "names, expected",
    [
        (["10", "9", "2.5", "-1"], ("-1", "2.5", "9", "10")),
        (["10", "9", "nan"], ("10", "9", "nan")),
        (["b", "A", "a"], ("A", "a", "b")),
        (["01", "1"], ("01", "1")),
    ],
)
def test_sorted_names(names, expected):
    assert sorted_names(names) == expected


fraction_pairs = st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).filter(
    lambda pair: sum(pair) < 0.99
)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    fractions=fraction_pairs,
    seed=st.integers(-5, 2**40),
    order=st.randoms(use_true_random=False),
)
def test_assignment_is_complete_stratified_and_blind_to_order(
    labels, fractions, seed, order
):
    ids = [f"image {number}" for number in range(len(labels))]

    def assign(positions):
        return assign_splits(
            np.array(ids)[positions],
            np.array(labels)[positions],
            Cut(*fractions, seed),
        )

    splits = assign(np.arange(len(ids)))
    for label, count in collections.Counter(labels).items():
        found = collections.Counter(splits[np.array(labels) == label].tolist())
        validation, test = split_counts(count, Cut(*fractions, 0))
        assert (found[VALIDATION], found[TEST]) == (validation, test)
        assert found[TRAIN] == count - validation - test >= 1
    positions = list(range(len(ids)))
    order.shuffle(positions)
    np.testing.assert_array_equal(assign(np.array(positions)), splits[positions])


@given(count=st.integers(1, 80), fractions=fraction_pairs, seed=st.integers(0, 99))
def test_one_more_image_moves_at_most_one_at_each_border(count, fractions, seed):
    def assign(number):
        return assign_splits(
            np.array([f"{n}" for n in range(number)]),
            np.zeros(number, int),
            Cut(*fractions, seed),
        )

    assert np.count_nonzero(assign(count) != assign(count + 1)[:count]) <= 2


@example(  # Which copy is trained must not be the one that comes first.
    samples=[(0, 0), (0, 0), (0, 0), (0, 0), (1, 1), (2, 1), (1, 0), (2, 0)],
    fractions=(0.0, 0.5),
    order=random.Random(0),
)
@given(
    samples=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1),
    fractions=fraction_pairs,
    order=st.randoms(use_true_random=False),
)
def test_copies_stay_together_and_every_class_is_trained(samples, fractions, order):
    def assign(samples):
        return assign_splits(
            np.array([f"text {text}" for text, _ in samples]),
            np.array([label for _, label in samples]),
            Cut(*fractions, 0),
        ).tolist()

    placed = dict(zip(samples, assign(samples), strict=True))
    assert len({(text, split) for (text, _), split in placed.items()}) == len(
        {text for text, _ in samples}
    )
    trained = {label for (_, label), split in placed.items() if split == TRAIN}
    assert trained == {label for _, label in samples}
    order.shuffle(samples)
    assert assign(samples) == [placed[sample] for sample in samples]


def test_splits_of_copies_are_near_their_share():
    def sizes(copies):
        splits = assign_splits(
            np.repeat([f"text {number}" for number in range(len(copies))], copies),
            np.zeros(sum(copies), int),
            Cut(0.2, 0.1, 0),
        )
        return [np.count_nonzero(splits == code) for code in (TEST, VALIDATION)]

    assert sizes([2] * 100) == [20, 40]
    assert sizes([3] * 10) == [3, 6]
    # One text that comes often takes no split for itself.
    assert sizes([50] + [1] * 50) == [10, 20]
    assert sizes([9, 9, 9]) == [9, 9]
    assert sizes([9, 9]) == [0, 0]
