"""Features in half the space, and those that exceed memory."""

from __future__ import annotations

import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rsft.data._labels import apply_corrections
from keras_rsft.data._sources import load_images
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.features import _batches as batches
from keras_rsft.features._batches import TrainingBatches
from keras_rsft.features._extract import extract_features


@pytest.fixture
def data(photo_folder):
    return load_images(str(photo_folder))


class TestFloat16:
    def test_half_the_disk_and_nearly_the_same_values(self, tiny_base, data, tmp_path):
        full = extract_features(tiny_base, data.train, cache_dir=tmp_path)
        half = extract_features(
            tiny_base, data.train, cache_dir=tmp_path, cache_dtype="float16"
        )
        assert half.path != full.path
        assert 2 * half.path.stat().st_size == full.path.stat().st_size
        assert half.features.dtype == np.float16
        np.testing.assert_array_equal(half.features, full.features.astype(np.float16))
        for part in (half.chunks(7), half.moments()):
            assert {values.dtype for values in part} == {np.dtype(np.float32)}

    @pytest.mark.parametrize("limit", [2**28, 0], ids=["memory", "disk"])
    def test_batches_are_float32(self, synthetic, monkeypatch, limit):
        monkeypatch.setattr(batches, "MAX_BYTES_IN_MEMORY", limit)
        cached = synthetic(rows=11, augmentations=3, dtype=np.float16)
        fed = TrainingBatches(cached, batch_size=4, seed=0)
        values = np.concatenate([x for x, _ in fed.dataset])
        assert values.dtype == np.float32
        rows = values[:, 0] / 4
        assert sorted((rows // 3).astype(int)) == list(range(11))
        np.testing.assert_array_equal(values, rows[:, None] * 4 + np.arange(4))

    @pytest.mark.parametrize("limit", [2**28, 0], ids=["memory", "disk"])
    def test_what_a_review_left_of_them(self, synthetic, monkeypatch, limit):
        monkeypatch.setattr(batches, "MAX_BYTES_IN_MEMORY", limit)
        monkeypatch.setattr(batches, "WINDOW_BYTES", max(limit, 40 * 8))
        monkeypatch.setattr(batches, "STRETCH_BYTES", 5 * 8)
        left = np.setdiff1d(np.arange(203), [0, 50, 51, 202])
        cached = synthetic(rows=203, augmentations=2, dtype=np.float16).take(left)
        assert cached.num_bytes == 199 * 2 * 4 * 2
        assert cached.features.dtype == np.float16
        plain = np.concatenate(list(cached.chunks(7)))
        np.testing.assert_array_equal(plain[:, 0], left * 8)
        fed = TrainingBatches(cached, batch_size=8, seed=0, sample_index=True)
        seen = []
        for values, labels, _, index in fed.dataset:
            rows = values.numpy()[:, 0] / 4
            np.testing.assert_array_equal(rows // 2, left[index.numpy()])
            np.testing.assert_array_equal(labels, cached.labels[index.numpy()])
            seen += index.numpy().tolist()
        assert sorted(seen) == list(range(199))

    def test_a_review_needs_no_pass(self, tiny_base, data, tmp_path, monkeypatch):
        options = {"cache_dir": tmp_path, "cache_dtype": "float16"}
        cached = extract_features(tiny_base, data.train, **options)
        path = tmp_path / "review.csv"
        name = data.class_names[data.train.labels[2]]
        path.write_text(
            f"id,given_label,decision,new_label\n{data.train.ids[2]},{name},drop,\n"
        )
        after = extract_features(
            tiny_base, apply_corrections(data, path).train, **options
        )
        assert (after.path, after.dtype) == (cached.path, "float16")
        np.testing.assert_array_equal(
            after.features, np.delete(cached.features, 2, axis=0)
        )

    def test_a_feature_that_is_too_large_is_refused(self, data, tmp_path):
        images = keras.Input((4, 4, 3))
        pooled = keras.layers.GlobalAveragePooling2D()(images)
        base = keras.Model(images, keras.layers.Rescaling(1e4)(pooled))
        with pytest.raises(DataError, match="float16 cannot hold"):
            extract_features(
                base, data.train, cache_dir=tmp_path, cache_dtype="float16"
            )
        assert len(extract_features(base, data.train, cache_dir=tmp_path)) > 0

    def test_an_unknown_precision(self, tiny_base, data, tmp_path):
        with pytest.raises(InvalidArgument, match="Did you mean 'float16'"):
            extract_features(
                tiny_base, data.train, cache_dir=tmp_path, cache_dtype="flot16"
            )


class TestStretches:
    @pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
    @pytest.mark.parametrize("stretch", [1, 8, 100])
    @pytest.mark.parametrize("window", [1, 40, 5000])
    def test_each_sample_comes_once(self, count, stretch, window):
        order = shuffled(count, stretch=stretch, window=window)
        assert sorted(order) == list(range(count))

    def test_a_window_is_of_whole_stretches_from_all_over(self):
        order = shuffled(1024, stretch=8, window=128)
        for start in range(0, 1024, 128):
            window = order[start : start + 128]
            stretches, sizes = np.unique(window // 8, return_counts=True)
            assert set(sizes) == {8}
            assert np.ptp(stretches) > 64  # Of 128: from both halves of the file.
            assert np.any(np.diff(window) != 1)  # And shuffled once more.
            assert np.mean(np.diff(window) == 1) < 0.1

    def test_depends_on_the_seed_alone(self):
        orders = [shuffled(500, stretch=4, window=50, seed=seed) for seed in (0, 0, 1)]
        np.testing.assert_array_equal(orders[0], orders[1])
        assert np.any(orders[0] != orders[2])

    @pytest.mark.parametrize("views", [1, 3])
    def test_rows_come_right_when_read_in_windows(self, synthetic, monkeypatch, views):
        monkeypatch.setattr(batches, "MAX_BYTES_IN_MEMORY", 0)
        monkeypatch.setattr(batches, "WINDOW_BYTES", 40 * 16)  # 40 rows.
        monkeypatch.setattr(batches, "STRETCH_BYTES", 5 * 16)
        monkeypatch.setattr(batches, "BLOCK_BYTES", 100)
        cached = synthetic(rows=203, augmentations=views)
        fed = TrainingBatches(cached, batch_size=8, seed=0, sample_index=True)
        seen = []
        for values, labels, _, index in fed.dataset:
            rows = values.numpy()[:, 0] / 4
            np.testing.assert_array_equal(rows // views, index)
            np.testing.assert_array_equal(labels, cached.labels[index.numpy()])
            np.testing.assert_array_equal(values, rows[:, None] * 4 + np.arange(4))
            seen += index.numpy().tolist()
        np.testing.assert_array_equal(seen, fed.order(0)[0])
        assert sorted(seen) == list(range(203))

    def test_a_file_that_was_cut_short_is_an_error(self, synthetic, monkeypatch):
        monkeypatch.setattr(batches, "MAX_BYTES_IN_MEMORY", 0)
        cached = synthetic(rows=50)
        with cached.path.open("r+b") as file:
            file.truncate(25 * 16 + 3)
        fed = TrainingBatches(cached, batch_size=8, seed=0)
        with pytest.raises(tf.errors.OpError, match="shorter than they should be"):
            list(fed.dataset)

    def test_short_reads_are_resumed(self, synthetic, monkeypatch):
        cached = synthetic(rows=6)
        whole = os.preadv

        def short(descriptor, places, offset):
            return whole(descriptor, [places[0][:7]], offset)

        monkeypatch.setattr(os, "preadv", short)
        places = np.zeros((3, 16), np.uint8)
        with cached.path.open("rb") as file:
            batches._read_into(file.fileno(), list(places), 32)
        np.testing.assert_array_equal(places.view(np.float32), cached.features[2:5])


class TestAlignedArray:
    """TensorFlow copies what is not aligned: a window of features twice."""

    @pytest.mark.parametrize("rows, dim", [(1, 1), (3, 5), (1000, 77), (70_000, 33)])
    def test_becomes_a_tensor_without_a_copy(self, rows, dim):
        addresses = []

        def made():
            cached.append(batches._aligned_array(rows, dim, np.dtype(np.float16)))
            addresses.append(cached[-1].ctypes.data)
            return cached[-1]

        def seen(values):
            addresses.append(values.ctypes.data)
            return np.int32(len(values))

        cached = []
        data = tf.data.Dataset.range(3)
        data = data.map(lambda _: tf.numpy_function(made, [], tf.float16))
        data = data.map(lambda values: tf.numpy_function(seen, [values], tf.int32))
        assert [int(count) for count in data] == 3 * [rows]
        assert addresses[::2] == addresses[1::2]
        assert cached[0].shape == (rows, dim)
        assert cached[0].flags.c_contiguous
        assert cached[0].flags.writeable


def shuffled(count, *, stretch, window, seed=0):
    order = batches.shuffled_by_stretches(
        count, tf.constant([seed, 0]), stretch_rows=stretch, window_rows=window
    )
    return order.numpy()
