"""Arrays, `tf.data`, `PyDataset`s and tables: read as files are, or refused at once."""

from __future__ import annotations

import csv
import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from made_images import SPLIT_NAMES, all_ids, named_labels

import keras_rsft as rsft
from keras_rsft.cli._commands import _data_of
from keras_rsft.cli._main import build_parser
from keras_rsft.cli._render import Output
from keras_rsft.data._images import decode_pixels
from keras_rsft.data._labels import COLUMNS
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.report._page import next_command
from keras_rsft.report._record import read_run

pytestmark = pytest.mark.usefixtures("eager")

WHOLE = {"validation_fraction": 0, "test_fraction": 0}
X = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), np.uint8)
Y = np.arange(12) % 3
Tensors = tf.data.Dataset.from_tensor_slices


def pixels_of(data, split="train"):
    images = list(getattr(data, split).images((6, 5)))
    assert [int(index) for index, _ in images] == list(range(len(images)))
    return np.stack([image.numpy() for _, image in images])


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, batches=3, size=4):
        super().__init__()
        self.x, self.y, self.batches, self.size = x, y, batches, size

    def __len__(self):
        return self.batches

    def __getitem__(self, index):
        if index * self.size >= len(self.x):
            raise IndexError(index)
        part = slice(index * self.size, (index + 1) * self.size)
        return self.x[part], self.y[part]


class ClassLabel:
    names = ("ant", "bee", "cow")


class Rows:
    """What a data set of Hugging Face looks like from outside."""

    def __init__(self, **columns):
        self._columns = columns
        self.column_names = list(columns)
        self.features = {"label": ClassLabel()}

    def __len__(self):
        return len(self._columns["label"])

    def __getitem__(self, key):
        if isinstance(key, str):
            return self._columns[key]
        return {name: column[key] for name, column in self._columns.items()}

    def __iter__(self):
        return (self[row] for row in range(len(self)))


class Frame:
    """What a DataFrame of any package looks like from outside."""

    def __init__(self, columns):
        self._columns = columns
        self.columns = list(columns)

    def __len__(self):
        return len(next(iter(self._columns.values())))

    def __getitem__(self, name):
        return self._columns[name]


@pytest.fixture(scope="session")
def photos(photo_folder):
    """The photos as a folder's PNG files decode: ids, pixels, names of classes."""
    ids = sorted(str(p.relative_to(photo_folder)) for p in photo_folder.glob("*/*.png"))
    files = [(photo_folder / one).read_bytes() for one in ids]
    x = np.stack([decode_pixels(tf.constant(file)).numpy() for file in files])
    return ids, x, np.array([one.split("/")[0] for one in ids])


class TestImages:
    @pytest.mark.parametrize(
        "convert",
        [
            lambda x: x,
            list,
            tf.constant,
            lambda x: x.astype(np.int64),
            lambda x: x.astype(np.float16),
            lambda x: x.astype(np.float64),
            lambda x: x / 255,
            lambda x: x.astype(np.float32) * np.float32(1 / 255),
            lambda x: np.concatenate([x, np.full_like(x[..., :1], 255)], axis=-1),
        ],
    )
    @pytest.mark.filterwarnings("ignore:The images of the arrays")
    def test_of_any_type_are_the_pixels_of_bytes(self, convert):
        data = rsft.load_data(convert(X), Y, **WHOLE)
        np.testing.assert_array_equal(pixels_of(data), X)
        assert data.train.labels.tolist() == Y.tolist()
        assert data.train.ids.tolist() == [f"{row}" for row in range(12)]
        assert tf.io.decode_png(data.train.encoded(3)).numpy().tolist() == X[3].tolist()

    @pytest.mark.parametrize("grey", [X[..., 0], X[..., :1]])
    def test_one_channel_becomes_three(self, grey):
        data = rsft.load_data(grey, Y, **WHOLE)
        np.testing.assert_array_equal(pixels_of(data), X[..., [0, 0, 0]])

    @pytest.mark.parametrize("scale", [1, 1.0, 255.0])
    @pytest.mark.filterwarnings("ignore:The images of the arrays")
    def test_of_four_channels_are_put_on_white(self, scale):
        x = np.tile(np.array([[[200, 100, 0, 51]]], np.uint8), (12, 4, 4, 1))
        data = rsft.load_data(x / scale if scale != 1 else x, Y, **WHOLE)
        np.testing.assert_allclose(pixels_of(data)[3, 2, 1], [244, 224, 204], atol=1e-3)

    def test_floats_are_not_rounded(self):
        x = X * np.float32(0.77)
        np.testing.assert_array_equal(pixels_of(rsft.load_data(x, Y, **WHOLE)), x)

    def test_what_was_assumed_is_said(self):
        with pytest.warns(UserWarning, match=r"float32 in \[0, 1\].*multiplied by 255"):
            rsft.load_data((X / 255).astype(np.float32), Y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rsft.load_data(X.astype(np.float32), Y)

    def test_a_memory_map_is_not_copied(self, tmp_path):
        X.tofile(tmp_path / "x.bin")
        x = np.memmap(tmp_path / "x.bin", np.uint8, "r", shape=X.shape)
        data = rsft.load_data(x, Y)
        assert np.shares_memory(data.train.reader._images, x)
        assert np.shares_memory(data.test.reader._images, x)

    def test_equal_images_go_to_one_split(self):
        x = np.repeat(X, 4, axis=0)
        data = rsft.load_data(x, np.repeat(Y, 4), validation_fraction=0.3)
        splits = {int(id_) // 4: set() for name in SPLIT_NAMES for id_ in all_ids(data)}
        for name in SPLIT_NAMES:
            for id_ in getattr(data, name).ids:
                splits[int(id_) // 4].add(name)
        assert all(len(names) == 1 for names in splits.values())
        assert len(data.validation)

    def test_the_fingerprint_tells_pixels_shapes_and_scales_apart(self):
        black = np.zeros((12, 6, 4), np.uint8)
        found = {
            rsft.load_data(x, Y).fingerprint
            for x in (X, 255 - X, black, black.reshape(12, 4, 6), black[..., None])
        }
        assert len(found) == 5
        assert rsft.load_data(X.copy(), Y).fingerprint in found
        assert rsft.load_images("digits").fingerprint is None


class TestLabels:
    @pytest.mark.parametrize(
        "labels, names",
        [
            (Y, "012"),
            (Y.astype(np.uint8)[:, np.newaxis], "012"),
            (Y.tolist(), "012"),
            (tf.constant(Y), "012"),
            (np.eye(3)[Y], "012"),
            (np.eye(4, dtype=np.float32)[Y], "0123"),
            (Y + 9, ("9", "10", "11")),
            (np.array(["ant", "bee", "cow"])[Y], ("ant", "bee", "cow")),
            ([["ant", "bee", "cow"][label] for label in Y], ("ant", "bee", "cow")),
            (np.array([b"ant", b"bee", b"cow"])[Y], ("ant", "bee", "cow")),
            (np.array(["ant", "bee", "cow"], object)[Y], ("ant", "bee", "cow")),
            (np.array(["9", "10", "11"])[Y], ("9", "10", "11")),
        ],
    )
    def test_of_any_kind(self, labels, names):
        data = rsft.load_data((X, labels), **WHOLE)
        assert data.class_names == tuple(names)
        assert data.train.labels.tolist() == Y.tolist()
        assert data.train.labels.dtype == np.int32

    @pytest.mark.parametrize("labels", [Y % 2 == 1, np.float32(Y % 2)[:, np.newaxis]])
    def test_of_two_classes(self, labels):
        data = rsft.load_data((X, labels), **WHOLE)
        assert data.train.labels.tolist() == (Y % 2).tolist()

    def test_of_a_series(self):
        pandas = pytest.importorskip("pandas")
        names = pandas.Series([["ant", "bee", "cow"][label] for label in Y])
        for labels in (names, names.astype("category"), names.astype("object")):
            assert rsft.load_data((X, labels), **WHOLE).train.labels.tolist() == list(Y)

    def test_names_may_be_given(self):
        names = ["zebra", "yak", "cow"]
        data = rsft.load_data((X, Y), class_names=names, **WHOLE)
        assert data.class_names == tuple(names)
        assert named_labels(data, "train")["2"] == "cow"
        strings = np.array(names)[Y]
        data = rsft.load_data((X, strings), class_names=names, **WHOLE)
        assert data.train.labels.tolist() == Y.tolist()


class TestSplits:
    def test_missing_ones_are_held_out_and_given_ones_stay(self):
        data = rsft.load_data((X, Y))
        assert [len(getattr(data, name)) for name in SPLIT_NAMES] == [6, 3, 3]
        assert data.cut == ("validation", "test")
        data = rsft.load_data((X, Y), validation_data=(X[:2], Y[:2]))
        assert data.validation.ids.tolist() == ["validation/0", "validation/1"]
        assert (data.validation.name, data.cut) == ("validation", ("test",))
        np.testing.assert_array_equal(pixels_of(data, "validation"), X[:2])
        data = rsft.load_data(
            (X, Y), validation_data=(X[:2], Y[:2]), test_data=(X[2:3], Y[2:3])
        )
        assert [len(getattr(data, name)) for name in SPLIT_NAMES] == [12, 2, 1]

    def test_of_another_kind_and_order_of_classes(self):
        names = np.array(["cow", "bee", "ant"])
        stream = Tensors((X, Y)).batch(5)
        stream.class_names = names.tolist()
        held_out = Rows(image=list(X), label=Y)
        data = rsft.load_data((X, names[Y]), validation_data=stream, test_data=held_out)
        for split in ("validation", "test"):
            found = [data.class_names[label] for label in getattr(data, split).labels]
            wanted = names if split == "validation" else np.array(ClassLabel.names)
            assert found == wanted[Y].tolist()

    def test_numbers_mean_the_names_of_the_training_samples(self):
        stream = Tensors((X, Y))
        stream.class_names = ["zebra", "yak", "cow"]
        data = rsft.load_data(stream, validation_data=(X, Y))
        assert data.validation.labels.tolist() == Y.tolist()

    def test_loaded_data_can_be_a_split(self, photo_folder, photos):
        loaded = rsft.load_images(photo_folder, **WHOLE)
        data = rsft.load_data(photos[1:], validation_data=loaded)
        assert len(data.validation) == 36
        with pytest.raises(InvalidArgument, match="must be one split"):
            rsft.load_data(photos[1:], test_data=rsft.load_images(photo_folder))
        trusted = rsft.trust_splits(loaded, ["train"])
        data = rsft.load_data(photos[1:], validation_data=trusted)
        assert data.validation.clean_labels.tolist() == loaded.train.labels.tolist()

    def test_splits_by_name(self):
        parts = {"train": (X, Y), "valid": (X[:3], Y[:3]), "unsupervised": (X, Y)}
        data = rsft.load_data(parts)
        assert [len(getattr(data, name)) for name in SPLIT_NAMES] == [9, 3, 3]

    def test_ids_may_be_given(self):
        ids = np.arange(100, 112)
        data = rsft.load_data((X, Y), ids=ids)
        assert all_ids(data) == [str(one) for one in ids]

    @pytest.mark.parametrize(
        "given, error, message",
        [
            ((X, Y + 9), DataError, "Without one: '10' in `validation_data`"),
            ((["a", "b"], [0, 1]), InvalidArgument, "must be images.*Received: texts"),
            (Tensors((X, Y)).repeat(), InvalidArgument, "no end"),
            ((X[:3], Y[:2]), DataError, "3 samples and 2 labels"),
        ],
    )
    def test_that_do_not_fit_are_refused(self, given, error, message):
        with pytest.raises(error, match=message):
            rsft.load_data((X, Y), validation_data=given)

    def test_a_split_that_is_there_is_not_replaced(self, photo_folder):
        loaded = rsft.load_images(photo_folder)
        with pytest.raises(InvalidArgument, match="have a validation split already"):
            rsft.load_data(loaded, validation_data=(X, Y))
        pair = (X[:2], ["red", "blue"])
        data = rsft.load_data(photo_folder, validation_data=pair)
        assert [len(getattr(data, name)) for name in SPLIT_NAMES] == [30, 2, 6]
        assert data.fingerprint is not None


class TestStreams:
    @pytest.mark.parametrize(
        "stream",
        [
            Tensors((X, Y)),
            Tensors((X, Y)).batch(5),
            Tensors((X, np.eye(3)[Y])),
            Tensors((X, np.eye(3)[Y])).batch(5),
            Tensors((X.astype(np.float32), Y)).batch(1),
            Tensors({"image": X, "label": Y, "tfds_id": Y}).batch(5),
            Batches(X, Y),
            Batches(X / 255, np.eye(3)[Y]),
            Rows(image=list(X), label=Y),
        ],
    )
    @pytest.mark.filterwarnings("ignore:The images of the Batches")
    def test_of_any_kind(self, stream):
        data = rsft.load_data(stream, **WHOLE)
        np.testing.assert_array_equal(pixels_of(data), X)
        assert data.train.labels.tolist() == Y.tolist()
        part = data.train.take(np.array([2, 3, 7]))
        assert [int(index) for index, _ in part.images(4, start=1)] == [1, 2]
        np.testing.assert_array_equal(pixels_of_split(part), X[[2, 3, 7]])
        encoded = part.reader.all_encoded()
        decoded = [tf.io.decode_png(one).numpy() for one in encoded]
        np.testing.assert_array_equal(decoded, X[[2, 3, 7]])

    @pytest.mark.parametrize("batched", [False, True])
    def test_of_grey_images(self, batched):
        stream = Tensors((X[..., 0], Y))
        data = rsft.load_data(stream.batch(5) if batched else stream, **WHOLE)
        np.testing.assert_array_equal(pixels_of(data), X[..., [0, 0, 0]])

    def test_images_of_many_sizes(self):
        def rows():
            for row in range(12):
                yield X[row, : 2 + row % 4], Y[row]

        signature = (tf.TensorSpec((None, 5, 3), tf.uint8), tf.TensorSpec((), tf.int64))
        stream = tf.data.Dataset.from_generator(rows, output_signature=signature)
        data = rsft.load_data(stream, **WHOLE)
        assert len(pixels_of(data)) == 12

    def test_each_pass_reads_from_the_source(self):
        """A data set larger than memory is never in memory."""
        read = []

        class Counted(Batches):
            def __getitem__(self, index):
                read.append(index)
                return super().__getitem__(index)

        data = rsft.load_data(Counted(X, Y), **WHOLE)
        del read[:]
        pixels_of(data)
        assert read == [0, 1, 2]

    def test_pictures_of_other_modes(self):
        from PIL import Image

        pictures = [
            Image.fromarray(X[0]).convert(mode)
            for mode in ("P", "L", "RGBA", "CMYK", "1", "RGB")
        ]
        data = rsft.load_data(Rows(image=pictures, label=Y[:6]), **WHOLE)
        found = pixels_of(data)
        np.testing.assert_array_equal(found[2], X[0])
        np.testing.assert_array_equal(found[1][..., 0], np.asarray(pictures[1]))

    def test_pictures_are_upright_and_on_white(self):
        from PIL import Image

        tall = np.repeat(np.repeat(X[0], 2, axis=0), 3, axis=1)[:8, :4]
        turned = Image.fromarray(np.rot90(tall))
        turned.getexif()[0x0112] = 6
        clear = Image.fromarray(tall).convert("RGBA")
        clear.putalpha(0)
        data = rsft.load_data(Rows(image=[turned, clear], label=Y[:2]), **WHOLE)
        found = list(data.train.reader.pixels())
        np.testing.assert_array_equal(found[0], tall)
        assert (found[1] == 255).all()

    def test_ids_are_file_names_or_tell_another_order(self, photo_folder, photos):
        named = keras.utils.image_dataset_from_directory(
            photo_folder, shuffle=False, image_size=(20, 16), verbose=False
        )
        data = rsft.load_data(named, **WHOLE)
        assert data.train.ids.tolist() == photos[0]
        assert data.class_names == ("blue", "green", "red")
        one = rsft.load_data(Tensors((X, Y)), **WHOLE)
        other = rsft.load_data(Tensors((X[::-1], Y[::-1])), **WHOLE)
        numbers = [id_.split("-")[0] for id_ in one.train.ids]
        assert numbers == [f"{row}" for row in range(12)]
        assert not set(one.train.ids) & set(other.train.ids)

    def test_a_shuffled_one_is_refused_at_once(self, photo_folder):
        shuffled = keras.utils.image_dataset_from_directory(photo_folder, verbose=False)
        with pytest.raises(InvalidArgument, match=r"another order.*shuffle=False"):
            rsft.load_data(shuffled)
        with pytest.raises(InvalidArgument, match="reshuffle_each_iteration=False"):
            rsft.load_data(Tensors((X, Y)).shuffle(12))
        once = iter(zip(X, Y, strict=True))
        signature = (tf.TensorSpec((6, 5, 3), tf.uint8), tf.TensorSpec((), tf.int64))
        stream = tf.data.Dataset.from_generator(
            lambda: once, output_signature=signature
        )
        with pytest.raises(InvalidArgument, match="an earlier end in another pass"):
            rsft.load_data(stream)
        fixed = Tensors((X, Y)).shuffle(12, reshuffle_each_iteration=False)
        assert len(rsft.load_data(fixed, **WHOLE).train) == 12

    @pytest.mark.parametrize("change", ["pixels", "end"])
    def test_a_later_change_is_refused_in_the_pass(self, change, tiny_base, tmp_path):
        x = np.random.default_rng(1).integers(0, 256, (80, 8, 8, 3), np.uint8)
        passes = []

        def rows():
            passes.append(0)
            for row in range(80):
                changed = row == 60 and len(passes) > 2
                if changed and change == "end":
                    return
                yield x[row] + np.uint8(changed), row % 2

        signature = (tf.TensorSpec((8, 8, 3), tf.uint8), tf.TensorSpec((), tf.int64))
        stream = tf.data.Dataset.from_generator(rows, output_signature=signature)
        data = rsft.load_data(stream, **WHOLE)
        with pytest.raises(InvalidArgument, match="has other samples, another"):
            rsft.extract_features(tiny_base, data.train, cache_dir=tmp_path)


def pixels_of_split(split):
    return np.stack([image.numpy() for _, image in split.images((6, 5))])


class TestTables:
    @pytest.fixture
    def columns(self, photo_folder, photos):
        ids, _, names = photos
        return {"path": [str(photo_folder / one) for one in ids], "label": list(names)}

    @pytest.mark.parametrize("package", ["pandas", "polars", None, dict])
    def test_of_paths(self, package, columns, photo_folder):
        if package is None:
            table = Frame(columns)
        elif package is dict:
            table = columns
        else:
            table = pytest.importorskip(package).DataFrame(columns)
        data = rsft.load_data(table, **WHOLE)
        folder = rsft.load_images(photo_folder, **WHOLE)
        assert data.train.ids.tolist() == columns["path"]
        assert named_labels(data, "train") == dict(zip(*columns.values(), strict=True))
        np.testing.assert_array_equal(pixels_of(data), pixels_of(folder))
        assert data.train.read_error(0) is None
        assert data.fingerprint is not None

    def test_of_relative_paths_and_columns_of_other_names(
        self, columns, photo_folder, photos, monkeypatch
    ):
        monkeypatch.chdir(photo_folder)
        table = Frame(
            {"file": photos[0], "kind": columns["label"], "split": ["x"] * 36}
        )
        data = rsft.load_images(
            table, path_column="file", label_column="kind", split_column=None, **WHOLE
        )
        monkeypatch.chdir("/")
        assert data.train.ids.tolist() == photos[0]
        assert len(pixels_of(data)) == 36

    def test_the_column_of_splits_is_used(self, columns):
        columns["split"] = ["train", "val", "test"] * 12
        data = rsft.load_data(Frame(columns))
        assert [len(getattr(data, name)) for name in SPLIT_NAMES] == [12, 12, 12]
        with pytest.raises(InvalidArgument, match="must be one split"):
            rsft.extract_features(None, Frame(columns))

    @pytest.mark.parametrize("package", ["pandas", "polars", None])
    def test_of_texts(self, package):
        columns = {"text": [f"Sentence {n}." for n in range(12)], "label": Y.tolist()}
        make = pytest.importorskip(package).DataFrame if package else Frame
        data = rsft.load_data(make(columns), **WHOLE)
        pairs = rsft.load_data((columns["text"], Y), **WHOLE)
        stream = rsft.load_data(Tensors((columns["text"], Y)).batch(5), **WHOLE)
        for one in (data, pairs, stream):
            assert one.kind == "texts"
            assert one.train.ids.tolist() == data.train.ids.tolist()
            assert one.train.labels.tolist() == data.train.labels.tolist()
            for at in range(12):
                assert (
                    columns["label"][int(one.train.text(at)[9:-1])]
                    == (one.train.labels[at])
                )

    def test_of_texts_with_named_classes(self):
        table = Rows(text=[f"Sentence {n}." for n in range(12)], label=Y.tolist())
        data = rsft.load_data(table, **WHOLE)
        assert data.class_names == ClassLabel.names
        table = Rows(text=["One.", "Two."], label=[0, -1])
        with pytest.raises(DataError, match=r"\[0, 3\). Received: -1 in row 1"):
            rsft.load_data(table)

    def test_equal_texts_have_ids_of_their_own(self):
        data = rsft.load_data((["Same."] * 2 + ["Other."], [0, 1, 1]), **WHOLE)
        assert len(set(data.train.ids)) == 3
        assert len(set(data.train.reader.copy_names())) == 2

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"label": [1.5] * 36}, "Received: 1.5 in row 0 of the Frame"),
            ({"label": [0] * 35 + [-1]}, r"\[0, inf\). Received: -1 in row 35"),
            ({"label": [None] + ["a"] * 35}, "value in column 'label' of row 0"),
            ({"label": [float("nan")] * 36}, "value in column 'label' of row 0"),
            ({"path": ["a.png"] * 36}, "row 1 of the Frame has been listed before"),
            ({"path": [f"{n}.png" for n in range(36)]}, "None of the 36 files"),
            ({"path": [], "label": []}, "no row in the Frame"),
        ],
    )
    def test_bad_values(self, columns, change, message):
        with pytest.raises(DataError, match=message):
            rsft.load_data(Frame(columns | change))

    def test_missing_columns(self, columns):
        with pytest.raises(InvalidArgument, match="Expected a column 'path' or 'text'"):
            rsft.load_data(Frame({"file": columns["path"]}))
        with pytest.raises(DataError, match="no column 'label' in the Frame"):
            rsft.load_data(Frame({"path": columns["path"]}))

    def test_columns_that_do_not_fit(self, columns):
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(columns)
        frame.insert(0, "label", "a", allow_duplicates=True)
        with pytest.raises(DataError, match="more than one column 'label' in the Dat"):
            rsft.load_data(frame)
        with pytest.raises(DataError, match="must be of one length"):
            rsft.load_images(columns | {"label": ["a"]})


def one_batch(x, y):
    return Tensors((x, y)).batch(12)


def with_nan():
    x = X.astype(np.float32)
    x[7, 1, 1, 1] = np.nan
    return x


class TestBadInput:
    """Each is refused in one sentence, before any backbone is loaded."""

    @pytest.mark.parametrize(
        "given, message",
        [
            ((X, Y[:-1]), "12 samples and 11 labels"),
            ((X[:0], Y[:0]), "must not be empty"),
            (([], []), "must not be empty"),
            ((with_nan(), Y), "NaN or infinity in image 7 of the arrays"),
            ((X / np.inf - np.inf, Y), "NaN or infinity in image 0"),
            ((X / 127.5 - 1, Y), r"from -1 to 1 .*\(x \+ 1\) \* 127.5"),
            ((X * 257.0, Y), "from 0 to"),
            ((X.astype(int) - 1, Y), "np.clip"),
            ((X / 255, Y - 1), "at least 0. Received: -1 in row 0"),
            ((X, Y.astype(float)), r"float64. Cast whole.*y.astype\(int\)"),
            ((X, np.where(Y, Y, np.nan)), "float64. Cast whole"),
            ((X, np.eye(3)[Y] * 0.9), "float64"),
            ((X, np.ones((12, 3), int)), "One-hot labels must have one 1"),
            ((X, np.zeros((12, 2, 2), int)), r"shape \(12, 2, 2\)"),
            ((X, [["a", "b"]] * 12), r"shape \(12, 2\)"),
            ((X, [None, *"abcabcabcab"]), "Received: None in row 0"),
            ((X, np.array(["a", 1] * 6, object)), "all integers or all strings"),
            ((X, ["", *"abcabcabcab"]), "not empty. Received: ''"),
            ((X, [[1], [1, 2]] * 6), "labels cannot be made an array"),
            ((X, Y * 0), "two classes"),
            ((X.astype(object), Y), "object. Cast them"),
            ((X > 9, Y), "bool. Cast them"),
            ((X.astype(str), Y), "Cast them"),
            ((X[..., :2], Y), "1, 3 or 4 channels.*Choose the channels"),
            ((np.concatenate([X, X], -1)[..., :5], Y), "1, 3 or 4 channels"),
            ((np.moveaxis(X, -1, 1), Y), "np.moveaxis"),
            ((X[:, 0, 0], Y), r"\(height, width\)"),
            ((X[:, :0], Y), r"shape \(0, 5, 3\)"),
            (([X[0], X[1, :3]] * 6, Y), "Give images of several sizes as a tf.data"),
            ((["a", None] * 6, Y), "Texts must be strings. Received: None in row 1"),
            (Tensors((X, Y)).take(0), "no sample in the tf.data.Dataset"),
            (one_batch(with_nan(), Y), "image 7 of the tf.data.Dataset"),
            (one_batch(X, Y.astype(float)), "float64. Cast whole"),
            (one_batch(X[..., :2], Y), "1, 3 or 4 channels"),
            (one_batch(X, np.zeros((12, 2, 2), int)), "Labels must be one integer"),
            (Batches(X, Y, batches=5), "5 batches by its `__len__`, but no batch 3"),
            (Batches(X, Y[:-1]), "4 samples, labels of shape"),
            (Tensors((X, Y)).map(lambda x, y: (x, y // 0)), "cannot be read to its"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:divide by zero", "ignore:The images of")
    def test_in_the_samples(self, given, message):
        with pytest.raises(DataError, match=message) as found:
            rsft.load_data(given)
        assert str(found.value)[-1] in ".`"

    @pytest.mark.parametrize(
        "given, message",
        [
            (((image, 0) for image in X), "generator can be read only once"),
            ((iter(X), Y), "iterator can be read only once"),
            (X, r"ndarray without labels. Give \(x, y\)"),
            (list(X), r"list without labels. Give \(x, y\)"),
            ((X, Y, Y), "tuple of 3; sample weights are not taken"),
            (7, "Received: int."),
            ((7, Y), "Received: int as the images"),
            ((["a.png", "b.JPG"], [0, 1]), "load_data\\({'path': x, 'label': y}\\)"),
            (Tensors((X, Y)).repeat(), r"no end. Leave out `.repeat\(\)`"),
            (Batches(X, Y, batches=None), "no end. Give it a `__len__`"),
            (Tensors((X, Y, Y)), "3 parts"),
            (Tensors(X), "1 parts"),
            (Tensors({"img": X, "label": Y}), "a dict of img, label"),
        ],
    )
    def test_of_another_kind(self, given, message):
        with pytest.raises(InvalidArgument, match=message):
            rsft.load_data(given)

    @pytest.mark.parametrize(
        "ids", [["a"] * 12, ["a", "b"], ["", *map(str, range(11))]], ids=str
    )
    def test_in_the_ids(self, ids):
        with pytest.raises(InvalidArgument, match="`ids` must be 12 different ids"):
            rsft.load_data(X, Y, ids=ids)

    def test_classes_out_of_range(self):
        with pytest.raises(DataError, match=r"in \[0, 2\), the number of classes"):
            rsft.load_data(X, Y, class_names=["a", "b"])
        with pytest.raises(DataError, match="one of 'a', 'b', and"):
            rsft.load_data(X, np.array(["a", "b", "c"])[Y], class_names=["a", "b"])

    def test_what_a_folder_knows_itself(self, photo_folder):
        with pytest.raises(InvalidArgument, match="Leave them out"):
            rsft.load_data(photo_folder, ids=["a"])

    def test_the_doors_of_files_name_this_one(self):
        for load in (rsft.load_images, rsft.load_texts):
            with pytest.raises(
                InvalidArgument, match=r"tuple. For arrays.*`load_data`"
            ):
                load((X, Y))

    def test_texts_for_a_backbone_of_images(self, tiny_base_file):
        with pytest.raises(InvalidArgument, match="The data are texts"):
            rsft.audit((["One.", "Two."] * 6, Y), features=str(tiny_base_file))


class TestEqualPhotosGiveEqualResults:
    @pytest.fixture(scope="class")
    @classmethod
    def by_folder(cls, photo_folder, tiny_base_file):
        return rsft.audit(photo_folder, features=str(tiny_base_file), progress=False)

    @pytest.mark.parametrize("kind", ["arrays", "floats", "stream", "batches"])
    @pytest.mark.filterwarnings("ignore:The images of the arrays")
    def test_to_the_last_bit(
        self, kind, photos, photo_folder, tiny_base_file, by_folder
    ):
        ids, x, y = photos
        made = {
            "arrays": lambda: (x, y),
            "floats": lambda: (x / 255, y),
            "stream": lambda: Tensors((x.astype(np.float32), y)).batch(7),
            "batches": lambda: Batches(x, y, batches=9),
        }
        data = rsft.load_data(made[kind](), ids=ids)
        found = rsft.audit(data, features=str(tiny_base_file), progress=False)
        for name in SPLIT_NAMES:
            ours, theirs = (getattr(one.features, name) for one in (found, by_folder))
            assert ours.ids.tolist() == theirs.ids.tolist()
            np.testing.assert_array_equal(ours.features, theirs.features)
        ours, theirs = found.label_quality, by_folder.label_quality
        np.testing.assert_array_equal(ours.right_probability, theirs.right_probability)
        assert found.finding == by_folder.finding
        assert found.results["label_quality"] == by_folder.results["label_quality"]


class TestWork:
    """One call, from arrays to a run folder with pictures and a page."""

    @pytest.fixture(scope="class")
    @classmethod
    def parts(cls, photos):
        _, x, y = photos
        order = np.random.default_rng(0).permutation(36)
        x, y = x[order], y[order].copy()
        y[:3] = np.where(y[:3] == "red", "blue", "red")
        return (x[:24], y[:24]), (x[24:], y[24:])

    @pytest.fixture
    def options(self, tiny_base_file, tmp_path):
        features = rsft.FeatureConfig(str(tiny_base_file), cache_dir=tmp_path / "cache")
        settings = rsft.TrainConfig(epochs=2, batch_size=8, learning_rate=0.05)
        return {"features": features, "settings": settings, "progress": False}

    @pytest.mark.parametrize("streamed", [False, True])
    def test_the_round_of_a_review(
        self, parts, options, tmp_path, monkeypatch, streamed
    ):
        train, validation = parts
        data = Tensors(train).batch(5) if streamed else train
        folder = tmp_path / "elsewhere" / "first"
        run = rsft.finetune(
            data, validation_data=validation, test_data=validation, output=folder,
            with_plain=False, **options,
        )  # fmt: skip
        kind = "tf.data.Dataset" if streamed else "arrays"
        assert (
            run.config["data"] == f"the {kind} (not repeatable from the command line)"
        )
        record = read_run(folder)
        assert len(record.ledger.ids) == 48
        for at in (0, 23, 24, 47):
            assert record.thumbnail(record.ledger.ids[at]).startswith(b"\xff\xd8")
        with (folder / "previews.csv").open() as file:
            assert sum(int(row["bytes"]) > 0 for row in csv.DictReader(file)) == 48
        assert "rsft.finetune(" in Path(rsft.write_report(run)).read_text()

        downloads = tmp_path / "home" / "Downloads"
        downloads.mkdir(parents=True)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
        first = record.ledger.ids[0]
        given = train[1][0]
        with (downloads / "corrections.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerow([first, given, "relabel", "green"])
        asked = rsft.load_data(data, validation_data=validation, test_data=validation)
        line = next_command(record)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        again = eval(line, {"rsft": rsft, "data": asked})
        assert again.folder == tmp_path / "runs" / "reviewed-1"
        assert again.config["epochs"] == 2
        assert again.config["policy"] == run.config["policy"]
        assert again.against_before.run == str(folder)
        label = again.class_names[again.features.train.labels[0]]
        assert (again.features.train.ids[0], label) == (first, "green")

    def test_a_stopped_run_resumes_with_the_same_pixels_alone(
        self, parts, options, tmp_path, stop_at
    ):
        def fit(x, **changed):
            begun = []
            rsft.finetune(
                (x, parts[0][1]), output=tmp_path / "run", with_plain=False,
                on_begin=lambda *how: begun.append(how[1]), **options | changed,
            )  # fmt: skip
            return begun

        stop_at(1)
        with pytest.raises(KeyboardInterrupt):
            fit(parts[0][0])
        with pytest.raises(InvalidArgument, match="not finished, with other data"):
            fit(255 - parts[0][0])
        tensorflow = dataclasses.replace(options["features"], engine="tensorflow")
        assert fit(parts[0][0].copy(), features=tensorflow) == [True]

    def test_every_verb_takes_them(self, parts, options, tiny_base_file, tmp_path):
        train, validation = parts
        shared = options | {"validation_data": validation}
        found = rsft.compare(train, methods=["plain"], seeds=1, **shared)
        assert found.config["fingerprint"]
        options["features"] = dataclasses.replace(options["features"], backbone=None)
        ranked = rsft.rank_backbones(
            train, [tiny_base_file], features=options["features"], progress=False
        )
        assert ranked.num_images == 16
        backbone = rsft.load_backbone(str(tiny_base_file))
        features = rsft.extract_features(backbone, train, cache_dir=tmp_path)
        assert len(features) == 24
        assert features.ids[-1] == "23"

    def test_no_command_loads_them_again(self):
        named = "the arrays (not repeatable from the command line)"
        run = SimpleNamespace(folder="run", config={"data": named, "fingerprint": "0"})
        with pytest.raises(DataError, match="was trained on the arrays"):
            _data_of(run, build_parser(), Output(command="export"))

    def test_the_pilot_takes_them(self, parts, options):
        assert rsft.run_pilot(parts[0], **options).num_images == 16

    @pytest.mark.slow
    def test_a_search_takes_them(self, parts, options, tmp_path):
        rsft.search(
            parts[0], validation_data=Tensors(parts[1]), output=tmp_path / "search",
            max_trials=2, **options,
        )  # fmt: skip
        record = read_run(tmp_path / "search")
        assert "not repeatable" in record.config["data"][0]["data"]
