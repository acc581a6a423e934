"""Label noise: exact counts, never the same class, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_rsft.data._labels import (
    add_label_noise,
    asymmetric_noise,
    instance_noise,
    parse_noise,
    symmetric_noise,
    thumbnails_of,
)
from keras_rsft.data._samples import ArrayReader, ImageData, ImageSplit
from keras_rsft.errors import InvalidArgument


def make_split(name: str, labels: list[int], clean: list[int] | None = None):
    ids = np.array([f"{name}/{number:04}" for number in range(len(labels))])
    return ImageSplit(
        name,
        ids,
        np.array(labels, np.int32),
        None if clean is None else np.array(clean, np.int32),
        ArrayReader(ids, np.zeros((len(ids), 2, 2, 1), np.uint8)),
    )


def make_data(train=None, clean=None) -> ImageData:
    train = [0, 1, 2] * 20 if train is None else train
    return ImageData(
        make_split("train", train, clean),
        make_split("validation", [0, 1, 2] * 4),
        make_split("test", [0, 1, 2] * 3),
        ("a", "b", "c"),
        "made",
    )


many_labels = st.lists(st.integers(0, 4), max_size=80)
rates = st.floats(0.001, 0.999)
seeds = st.integers(0, 2**32)


@given(labels=many_labels, rate=rates, seed=seeds)
def test_symmetric_moves_the_exact_count_to_other_classes(labels, rate, seed):
    labels = np.array(labels, np.int32)
    rng = np.random.default_rng(seed)
    noisy = symmetric_noise(labels, rate, num_classes=5, rng=rng)
    assert np.count_nonzero(noisy != labels) == round(rate * len(labels))
    assert noisy.dtype == np.int32
    assert np.all((noisy >= 0) & (noisy < 5))


@given(labels=many_labels, rate=rates, seed=seeds)
def test_asymmetric_moves_the_exact_count_of_each_class_to_the_next(labels, rate, seed):
    labels = np.array(labels, np.int32)
    rng = np.random.default_rng(seed)
    noisy = asymmetric_noise(labels, rate, num_classes=5, rng=rng)
    for label in range(5):
        after = noisy[labels == label]
        moved = after[after != label]
        assert len(moved) == round(rate * len(after))
        assert np.all(moved == (label + 1) % 5)


def test_symmetric_reaches_every_other_class_equally():
    labels = np.zeros(6000, np.int32)
    rng = np.random.default_rng(0)
    noisy = symmetric_noise(labels, 0.5, num_classes=4, rng=rng)
    counts = np.bincount(noisy, minlength=4)
    assert counts[0] == 3000
    # 1000 each; four standard deviations of a binomial are about 103.
    assert np.all(np.abs(counts[1:] - 1000) < 110)


@given(labels=many_labels, rate=rates, seed=seeds)
def test_instance_moves_the_exact_count_to_other_classes(labels, rate, seed):
    labels = np.array(labels, np.int32)
    rng = np.random.default_rng(seed)
    thumbnails = rng.normal(size=(len(labels), 12))
    noisy = instance_noise(
        labels, rate, num_classes=5, rng=rng, thumbnails=thumbnails, seed=seed
    )
    assert np.count_nonzero(noisy != labels) == round(rate * len(labels))
    assert noisy.dtype == np.int32
    assert np.all((noisy >= 0) & (noisy < 5))


def test_instance_noise_gives_images_alike_the_same_wrong_class():
    """In two splits as well: the matrices depend on the seed alone."""
    rng = np.random.default_rng(0)
    one, other = 1000 * rng.normal(size=(2, 12))  # The softmax is an argmax.
    thumbnails = np.array([one, other] * 50)
    labels = np.zeros(100, np.int32)
    seen = {0: set(), 1: set()}
    for split_seed in range(2):
        noisy = instance_noise(
            labels,
            0.5,
            num_classes=9,
            rng=np.random.default_rng(split_seed),
            thumbnails=thumbnails,
            seed=4,
        )
        for sample in np.flatnonzero(noisy):
            seen[sample % 2].add(int(noisy[sample]))
    assert [len(classes) for classes in seen.values()] == [1, 1]
    assert seen[0] != seen[1]


def test_thumbnails_are_standardised_and_zero_without_contrast():
    ids = np.array(["a", "b"])
    pixels = np.zeros((2, 16, 16, 1), np.uint8)
    pixels[0, :8] = 200
    labels = np.zeros(2, np.int32)
    split = ImageSplit("train", ids, labels, None, ArrayReader(ids, pixels))
    thumbnails = thumbnails_of(split)
    assert thumbnails.shape == (2, 192)
    assert thumbnails[0].mean() == pytest.approx(0, abs=1e-5)
    assert thumbnails[0].std() == pytest.approx(1, abs=1e-5)
    assert np.all(thumbnails[0, :96] > 0)  # The bright upper half.
    assert np.all(thumbnails[0, 96:] < 0)
    np.testing.assert_array_equal(thumbnails[1], 0)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "instance"])
def test_same_seed_gives_the_same_labels(kind):
    data = make_data()
    one, two, other = (
        add_label_noise(data, f"{kind}:0.4", seed=seed) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one.train.labels, two.train.labels)
    assert np.any(one.train.labels != other.train.labels)


def test_noise_does_not_change_between_versions():
    """Pinned: a published number must stay the number of the same labels."""
    data = make_data([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    noisy = add_label_noise(data, "symmetric:0.3", seed=0).train.labels
    moved = np.flatnonzero(noisy != data.train.labels)
    assert moved.tolist() == [5, 6, 9]
    assert noisy[moved].tolist() == [0, 1, 1]


def test_only_the_named_splits_change_and_each_by_itself():
    data = make_data()
    noisy = add_label_noise(data, "symmetric:0.5", seed=1)
    for name in ("validation", "test"):
        split, before = getattr(noisy, name), getattr(data, name).labels
        assert split.labels is before
        assert split.clean_labels is before
    both = add_label_noise(data, "symmetric:0.5", seed=1, splits=("validation", "test"))
    assert both.train.labels is data.train.labels
    assert np.count_nonzero(both.validation.labels != data.validation.labels) == 6
    alone = add_label_noise(data, "symmetric:0.5", seed=1, splits=("test",))
    np.testing.assert_array_equal(both.test.labels, alone.test.labels)


def test_old_labels_become_the_clean_ones():
    data = make_data()
    noisy = add_label_noise(data, "asymmetric:0.25", seed=0)
    np.testing.assert_array_equal(noisy.train.clean_labels, data.train.labels)
    assert data.train.clean_labels is None


def test_known_clean_labels_stay():
    data = make_data([0, 1, 2, 2], clean=[0, 1, 2, 0])
    noisy = add_label_noise(data, "symmetric:0.5", seed=0)
    np.testing.assert_array_equal(noisy.train.clean_labels, [0, 1, 2, 0])


def test_fingerprint_and_ids_stay():
    data = make_data()
    noisy = add_label_noise(data, "symmetric:0.5", seed=0)
    assert noisy.train.fingerprint == data.train.fingerprint
    np.testing.assert_array_equal(noisy.train.ids, data.train.ids)


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("symmetric:0.3", ("symmetric", 0.3)),
        ("asymmetric:.25", ("asymmetric", 0.25)),
        ("instance:0.4", ("instance", 0.4)),
    ],
)
def test_a_spec_is_read(spec, expected):
    assert parse_noise(spec) == expected


@pytest.mark.parametrize(
    "spec",
    [
        *("", "0.3", "symmetric", "symmetric:", "uniform:0.3", "Symmetric:0.3", None),
        *("symmetric:0", "symmetric:1", "asymmetric:-0.1", "symmetric:30%"),
        *("symmetric:nan", "symmetric:inf", "symmetric:0.3:1"),
    ],
)
def test_a_bad_spec_names_the_accepted_forms(spec):
    with pytest.raises(InvalidArgument, match='"symmetric:RATE" or "asymmetric:RATE"'):
        add_label_noise(make_data(), spec, seed=0)


@pytest.mark.parametrize("seed", [-1, 1.5, None, "0", 2**63])
def test_a_bad_seed_is_refused(seed):
    with pytest.raises(InvalidArgument, match="seed"):
        add_label_noise(make_data(), "symmetric:0.3", seed=seed)


@pytest.mark.parametrize("splits", ["train", ("training",), ("train", "all")])
def test_bad_splits_are_refused(splits):
    with pytest.raises(InvalidArgument, match="splits"):
        add_label_noise(make_data(), "symmetric:0.3", seed=0, splits=splits)
