"""One pass of the backbone: cached, resumed, keyed, and fed to training in order."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rsft.backbones._build import build_classifier, build_head
from keras_rsft.data._samples import FileReader
from keras_rsft.data._sources import load_images
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.features import _batches as batches
from keras_rsft.features import _extract as extraction
from keras_rsft.features import _store
from keras_rsft.features._batches import TrainingBatches, batches_of
from keras_rsft.features._extract import FeaturePass, extract_features
from keras_rsft.features._store import FeatureSet, checksum_of
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._threshold import LossThreshold


@pytest.fixture
def data(photo_folder):
    return load_images(str(photo_folder))


def directly(base, split):
    images = np.stack([image for _, image in split.images((16, 16))])
    return base.predict(images, verbose=0)


class TestExtraction:
    def test_rows_are_the_bases_output_in_the_order_of_the_split(
        self, tiny_base, data, tmp_path
    ):
        cached = extract_features(
            tiny_base, data.train, cache_dir=tmp_path, batch_size=7
        )
        np.testing.assert_allclose(
            cached.features, directly(tiny_base, data.train), atol=1e-5
        )
        np.testing.assert_array_equal(cached.labels, data.train.labels)
        np.testing.assert_array_equal(cached.ids, data.train.ids)
        assert cached.unreadable == ()

    def test_an_empty_split_has_no_features(self, tiny_base, data, tmp_path):
        empty = data.train.take(np.array([], np.int64))
        cached = extract_features(tiny_base, empty, cache_dir=tmp_path)
        assert len(cached) == 0
        assert list(cached.chunks()) == []

    def test_weights_as_constants_give_the_same_features(
        self, tiny_base, data, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(extraction, "MIN_IMAGES_FOR_CONSTANTS", 10)
        assert len(data.train) > 10
        cached = extract_features(tiny_base, data.train, cache_dir=tmp_path)
        np.testing.assert_allclose(
            cached.features, directly(tiny_base, data.train), atol=1e-5
        )

    def test_a_second_call_does_not_run_the_base(
        self, tiny_base, data, tmp_path, monkeypatch
    ):
        first = extract_features(tiny_base, data.train, cache_dir=tmp_path)

        def never(*_):
            raise AssertionError("the base ran again")

        monkeypatch.setattr(extraction, "append_rows", never)
        again = extract_features(tiny_base, data.train, cache_dir=tmp_path)
        np.testing.assert_array_equal(first.features, again.features)

    @pytest.mark.parametrize("torn_bytes", [0, 5, 24 * 4 + 3])
    def test_an_interrupted_pass_resumes_after_the_last_whole_row(
        self, tiny_base, data, tmp_path, monkeypatch, torn_bytes
    ):
        whole = extract_features(tiny_base, data.train, cache_dir=tmp_path / "whole")
        written = []
        append = extraction._append

        def fail_after_six(file, values):
            if len(written) == 6:  # Three batches of features and of indices.
                file.write(b"x" * torn_bytes)
                file.flush()
                raise KeyboardInterrupt
            written.append(len(values))
            append(file, values)

        monkeypatch.setattr(extraction, "_append", fail_after_six)
        cut = tmp_path / "cut"
        with pytest.raises(KeyboardInterrupt):
            extract_features(tiny_base, data.train, cache_dir=cut, batch_size=4)
        monkeypatch.setattr(extraction, "_append", append)
        seen = []
        images = type(data.train).images

        def spy(split, size, *, start=0, **kwargs):
            seen.append(start)
            return images(split, size, start=start, **kwargs)

        monkeypatch.setattr(type(data.train), "images", spy)
        resumed = extract_features(tiny_base, data.train, cache_dir=cut, batch_size=4)
        assert seen == [12]
        np.testing.assert_allclose(resumed.features, whole.features, atol=1e-6)
        np.testing.assert_array_equal(resumed.ids, whole.ids)

    @pytest.mark.slow
    def test_killed_by_the_system_at_any_moment(
        self, photo_folder, tiny_base_file, tiny_base, data, tmp_path
    ):
        program = textwrap.dedent(f"""
            import os, sys
            from keras_rsft import extract_features, load_backbone, load_images
            from keras_rsft.features import _extract as extraction
            append, calls = extraction._append, []
            def kill_half_way(file, values):
                calls.append(1)
                if len(calls) == 4:
                    file.write(values.tobytes()[:5]); file.flush()
                    os.kill(os.getpid(), 9)
                append(file, values)
            extraction._append = kill_half_way
            extract_features(load_backbone({str(tiny_base_file)!r}),
                load_images({str(photo_folder)!r}).train,
                cache_dir={str(tmp_path)!r}, batch_size=4)
        """)
        killed = subprocess.run([sys.executable, "-c", program], capture_output=True)
        assert killed.returncode == -9
        resumed = extract_features(tiny_base, data.train, cache_dir=tmp_path)
        np.testing.assert_allclose(
            resumed.features, directly(tiny_base, data.train), atol=1e-5
        )

    def test_a_damaged_folder_is_computed_again(self, tiny_base, data, tmp_path):
        cached = extract_features(tiny_base, data.train, cache_dir=tmp_path)
        good = np.array(cached.features)
        with cached.path.open("r+b") as file:
            file.truncate(100)
        with pytest.warns(UserWarning, match="damaged or not complete"):
            again = extract_features(tiny_base, data.train, cache_dir=tmp_path)
        np.testing.assert_allclose(again.features, good, atol=1e-6)

    @pytest.mark.parametrize("change", ["zeros", "shuffled", "huge", "one bit"])
    def test_features_that_were_changed_are_computed_again(
        self, tiny_base, data, tmp_path, change
    ):
        cached = extract_features(tiny_base, data.train, cache_dir=tmp_path)
        good = np.array(cached.features)
        changed = {
            "zeros": np.zeros_like(good),
            "shuffled": good[::-1].copy(),
            "huge": np.full_like(good, 1e30),
            "one bit": good.copy(),
        }[change]
        if change == "one bit":
            changed.view(np.uint32)[3, 2] ^= 1
        changed.tofile(cached.path)
        with pytest.warns(UserWarning, match=r"features\.bin is not what was written"):
            again = extract_features(tiny_base, data.train, cache_dir=tmp_path)
        np.testing.assert_array_equal(again.features, good)

    @pytest.mark.parametrize(
        "change", [lambda i: i[::-1], lambda i: i * 0, lambda i: i - 1, lambda i: i + 9]
    )
    @pytest.mark.parametrize("known", [False, True])
    def test_an_index_is_of_these_samples_in_order(
        self, tiny_base, data, tmp_path, change, known
    ):
        cached = extract_features(tiny_base, data.train, cache_dir=tmp_path)
        path = cached.path.with_name("index.bin")
        change(np.fromfile(path, np.int64)).tofile(path)
        if known:  # By one who writes the checksum too.
            meta = json.loads(path.with_name("meta.json").read_text())
            meta["checksums"]["index.bin"] = checksum_of(path)
            path.with_name("meta.json").write_text(json.dumps(meta))
        said = "a sample" if known else r"index\.bin is not what was written"
        with pytest.warns(UserWarning, match=said):
            again = extract_features(tiny_base, data.train, cache_dir=tmp_path)
        np.testing.assert_array_equal(again.ids, cached.ids)

    def test_a_pass_does_not_go_on_from_a_damaged_index(
        self, tiny_base, data, tmp_path
    ):
        whole = extract_features(tiny_base, data.train, cache_dir=tmp_path / "whole")
        folder = FeaturePass(tiny_base, data.train, tmp_path / "cut").folder
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(parents=True)
        np.zeros((32, 6), np.float32).tofile(partial / "features.bin")
        np.full(32, 10**12).tofile(partial / "index.bin")
        found = extract_features(tiny_base, data.train, cache_dir=tmp_path / "cut")
        np.testing.assert_array_equal(found.features, whole.features)

    def test_a_file_is_verified_once_as_long_as_it_stays(
        self, tiny_base, data, tmp_path, monkeypatch
    ):
        read = []

        def spy(path):
            read.append(path.name)
            return checksum_of(path)

        extract_features(tiny_base, data.train, cache_dir=tmp_path)
        monkeypatch.setattr(_store, "checksum_of", spy)
        for _ in range(3):
            cached = extract_features(tiny_base, data.train, cache_dir=tmp_path)
        assert read == []
        os.utime(cached.path)
        for _ in range(3):
            extract_features(tiny_base, data.train, cache_dir=tmp_path)
        assert read == ["features.bin"]

    def test_unreadable_images_are_left_out_and_named(
        self, photo_folder, tiny_base, tmp_path
    ):
        folder = tmp_path / "photos"
        shutil.copytree(photo_folder, folder)
        (folder / "red" / "00.png").write_bytes(b"")
        (folder / "red" / "01.png").write_bytes(b"not an image")
        train = load_images(str(folder)).train
        broken = {"red/00.png", "red/01.png"} & set(train.ids)
        cached = extract_features(tiny_base, train, cache_dir=tmp_path / "cache")
        assert {name for name, _ in cached.unreadable} == broken
        assert len(cached) == len(train) - len(broken)
        assert broken
        assert not broken & set(cached.ids)
        assert all(reason for _, reason in cached.unreadable)

    @pytest.mark.parametrize("number", [0, 9, -1])
    def test_an_image_that_could_not_be_read_once_is_not_lost(
        self, number, tiny_base, data, tmp_path, monkeypatch
    ):
        train = data.train
        failing, load = str(train.ids[number]), FileReader.load

        def fails_in_the_first_pass(self, key):
            monkeypatch.setattr(FileReader, "load", load)
            fails = tf.strings.regex_full_match(key, failing)
            with tf.control_dependencies([tf.debugging.Assert(~fails, ["a disk"])]):
                return load(self, key)

        monkeypatch.setattr(FileReader, "load", fails_in_the_first_pass)
        with pytest.raises(OSError, match=r"second try.*same command") as caught:
            extract_features(tiny_base, train, cache_dir=tmp_path / "a", batch_size=4)
        assert caught.value.filename == failing
        cached, straight = (
            extract_features(tiny_base, train, cache_dir=tmp_path / name, batch_size=4)
            for name in "ab"
        )
        assert cached.unreadable == ()
        np.testing.assert_array_equal(cached.features, straight.features)

    def test_no_readable_image_is_an_error(self, photo_folder, tiny_base, tmp_path):
        folder = tmp_path / "photos"
        shutil.copytree(photo_folder, folder)
        for path in folder.rglob("*.png"):
            path.write_bytes(b"")
        train = load_images(str(folder)).train
        with pytest.raises(DataError, match=r"None of the \d+ images of 'train'"):
            extract_features(tiny_base, train, cache_dir=tmp_path / "cache")

    def test_a_full_disk_is_refused_before_the_pass(
        self, tiny_base, data, tmp_path, monkeypatch
    ):
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OSError, match="--cache-dir") as caught:
            extract_features(tiny_base, data.train, cache_dir=tmp_path)
        assert caught.value.errno == errno.ENOSPC

    def test_views_keep_the_plain_image_first(self, tiny_base, data, tmp_path):
        plain = extract_features(tiny_base, data.train, cache_dir=tmp_path)
        viewed = extract_features(
            tiny_base, data.train, cache_dir=tmp_path, augmentations=3
        )
        assert viewed.all_views.shape == (len(plain), 3, 6)
        np.testing.assert_allclose(viewed.features, plain.features, atol=1e-5)
        assert np.abs(viewed.all_views[:, 1] - viewed.all_views[:, 2]).max() > 1e-4


def key(backbone, split, **options):
    return FeaturePass(backbone, split, tempfile.gettempdir(), **options).folder.name


class TestSampleIndex:
    def test_refuses_empty_batches(self, synthetic):
        with pytest.raises(InvalidArgument, match="`batch_size` must be at least 1"):
            TrainingBatches(synthetic, batch_size=0, seed=0)

    def test_names_each_row_of_the_batches(self, synthetic):
        features = synthetic(rows=10, dim=4)
        batches_with = TrainingBatches(
            features, batch_size=4, seed=0, sample_index=True
        )
        for values, labels, weight, index in batches_with.dataset:
            assert weight is None
            assert index.dtype == tf.int32
            np.testing.assert_array_equal(values, features.features[index.numpy()])
            np.testing.assert_array_equal(labels, features.labels[index.numpy()])

    def test_comes_from_disk_too(self, synthetic, monkeypatch):
        monkeypatch.setattr(batches, "MAX_BYTES_IN_MEMORY", 0)
        self.test_names_each_row_of_the_batches(synthetic)


class TestKey:
    def test_does_not_depend_on_layer_names(self, tiny_base_file, data):
        from keras_rsft.backbones._load import load_backbone

        first, second = (load_backbone(str(tiny_base_file)) for _ in range(2))
        assert key(first, data.train) == key(second, data.train)

    def test_depends_on_weights_images_views_and_split(self, tiny_base, data):
        keys = {
            key(tiny_base, data.train),
            key(tiny_base, data.test),
            key(tiny_base, data.train, augmentations=2),
            key(tiny_base, data.train, augmentations=2, seed=1),
            key(tiny_base, data.train, cache_dtype="float16"),
        }
        kernel = next(w for w in tiny_base.weights if w.name == "kernel")
        kernel.assign(kernel + 1e-3)
        keys.add(key(tiny_base, data.train))
        assert len(keys) == 6

    def test_depends_on_preprocessing(self, data):
        def base(scale):
            layers = [keras.layers.Rescaling(scale), keras.layers.Flatten()]
            return keras.Sequential([keras.Input((4, 4, 3)), *layers])

        assert key(base(1 / 255), data.train) != key(base(1 / 127.5), data.train)

    def test_does_not_depend_on_labels_or_seed_of_a_single_view(self, tiny_base, data):
        relabelled = data.train.with_labels(np.zeros_like(data.train.labels))
        assert key(tiny_base, data.train) == key(tiny_base, relabelled, seed=5)


class TestFeatureSet:
    def test_moments(self, synthetic):
        mean, variance = synthetic(rows=10, dim=4).moments(chunk_rows=3)
        # Column c holds c, c + 4, ..., c + 36: mean c + 18, variance 16 * 8.25.
        np.testing.assert_allclose(mean, [18, 19, 20, 21])
        np.testing.assert_allclose(variance, 132)

    def test_a_dead_feature_gets_a_floor(self, tmp_path):
        values = np.stack([np.zeros(4), [0, 2, 0, 2]], axis=1).astype(np.float32)
        values.tofile(tmp_path / "f.bin")
        labels = np.zeros(4, np.int32)
        cached = FeatureSet(tmp_path / "f.bin", labels, labels.astype(str), dim=2)
        np.testing.assert_allclose(cached.moments()[1], [0.1 * 0.5, 1.0])

    def test_cannot_be_written_to(self, synthetic):
        with pytest.raises(ValueError, match="read-only"):
            synthetic().features[0, 0] = 1.0


class TestBatches:
    @pytest.mark.parametrize("limit", [2**28, 0], ids=["memory", "disk"])
    @pytest.mark.parametrize("views", [1, 3])
    def test_each_sample_comes_once_an_epoch_with_its_own_row(
        self, synthetic, monkeypatch, limit, views
    ):
        monkeypatch.setattr(batches, "MAX_BYTES_IN_MEMORY", limit)
        monkeypatch.setattr(batches, "BLOCK_BYTES", 100)  # Several blocks an epoch.
        cached = synthetic(rows=11, augmentations=views)
        fed = TrainingBatches(cached, batch_size=4, seed=0)
        assert fed.dataset.cardinality() == 3
        parts = list(fed.dataset)
        assert [len(labels) for _, labels in parts] == [4, 4, 3]
        values = np.concatenate([x for x, _ in parts])
        labels = np.concatenate([y for _, y in parts])
        rows = values[:, 0] / 4
        samples = (rows // views).astype(int)
        assert sorted(samples) == list(range(11))
        np.testing.assert_array_equal(labels, cached.labels[samples])
        np.testing.assert_array_equal(values, rows[:, None] * 4 + np.arange(4))

    def test_in_order_for_evaluation(self, synthetic):
        cached = synthetic(rows=11, augmentations=3)
        fed = batches.batches_of(cached, batch_size=4)
        assert fed.cardinality() == 3  # Else Keras warns that the data ran out.
        values = np.concatenate([x for x, _ in fed])
        np.testing.assert_array_equal(values, cached.features)
        np.testing.assert_array_equal(
            np.concatenate([y for _, y in fed]), cached.labels
        )

    def test_memory_and_disk_give_the_same_batches(self, synthetic, monkeypatch):
        def collect(limit):
            monkeypatch.setattr(batches, "MAX_BYTES_IN_MEMORY", limit)
            fed = TrainingBatches(synthetic(rows=50), batch_size=8, seed=3)
            return np.concatenate([x for x, _ in fed.dataset])

        np.testing.assert_array_equal(collect(2**28), collect(0))

    def test_the_order_depends_on_seed_and_epoch_alone(self, synthetic):
        cached = synthetic(rows=30)

        def epoch(seed, number):
            fed = TrainingBatches(cached, batch_size=30, seed=seed)
            fed.callback.on_epoch_begin(number)
            return next(iter(fed.dataset))[0].numpy()[:, 0].tolist()

        assert epoch(0, 2) == epoch(0, 2)
        assert epoch(0, 2) != epoch(0, 3)
        assert epoch(0, 2) != epoch(1, 2)

    def test_fit_tells_the_epoch(self, synthetic):
        fed = TrainingBatches(synthetic(rows=12), batch_size=12, seed=0)
        seen = []
        head = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        head.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
        note = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: seen.append(int(fed._epoch))
        )
        head.fit(
            fed.dataset,
            epochs=4,
            initial_epoch=1,
            verbose=0,
            callbacks=[fed.callback, note],
        )
        assert seen == [1, 2, 3]

    def test_evaluation_reads_the_plain_images_in_order(self, synthetic):
        cached = synthetic(rows=5, augmentations=2)
        values = np.concatenate([x for x, _ in batches_of(cached, batch_size=2)])
        np.testing.assert_array_equal(values, cached.features)


def test_cached_features_train_like_end_to_end(tiny_base, data, tmp_path):
    """Rule 7: the same weights within 1e-4."""
    cached = extract_features(tiny_base, data.train, cache_dir=tmp_path)
    images = np.stack([image for _, image in data.train.images((16, 16))])
    moments = cached.moments()

    def train(inputs, whole):
        head = build_head(6, 3, moments=moments)
        inner = build_classifier(tiny_base, 3, head=head) if whole else head
        model = RSFTModel(inner, LossThreshold(0.3, warmup_steps=6))
        model.compile(
            keras.optimizers.SGD(0.05, momentum=0.9), "sparse_categorical_crossentropy"
        )
        history = model.fit(
            inputs, data.train.labels, batch_size=8, epochs=5, shuffle=False, verbose=0
        )
        return head.get_weights(), history.history["acceptance_rate"]

    cached_weights, cached_rates = train(np.array(cached.features), whole=False)
    weights, rates = train(images, whole=True)
    assert cached_rates == rates
    assert any(0 < rate < 1 for rate in rates)
    for one, other in zip(cached_weights, weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


class TestPrecision:
    def test_what_is_asked_for_is_taken(self):
        assert extraction.choose_dtype("bfloat16") == "bfloat16"
        assert extraction.choose_dtype("float32") == "float32"

    def test_auto_follows_the_hardware(self, monkeypatch):
        monkeypatch.setattr(extraction, "_has_bfloat16", lambda: True)
        assert extraction.choose_dtype("auto") == "bfloat16"
        monkeypatch.setattr(extraction, "_has_bfloat16", lambda: False)
        assert extraction.choose_dtype("auto") == "float32"

    def test_unknown(self):
        with pytest.raises(InvalidArgument, match="float16"):
            extraction.choose_dtype("float16")

    def test_reading_the_flags(self, monkeypatch):
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: [])
        for flags, expected in [("fpu amx_bf16 sse", True), ("fpu sse", False)]:
            monkeypatch.setattr(
                extraction.Path, "read_text", lambda *_, flags=flags, **__: flags
            )
            assert extraction._has_bfloat16() is expected


def test_a_new_head_finds_all_classes_equally_likely():
    values = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    head = build_head(6, 3, moments=(np.ones(6), np.full(6, 2.0)))
    np.testing.assert_array_equal(head(values), np.full((4, 3), np.float32(1 / 3)))
