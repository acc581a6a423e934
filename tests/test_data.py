"""Sources, splits and readers, on small data sets that the tests write."""

from __future__ import annotations

import collections
import dataclasses
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keras_rsft.data import decode_image, load_images
from keras_rsft.data.partition import (
    TEST,
    TRAIN,
    VALIDATION,
    assign_splits,
    sorted_names,
    split_counts,
)
from keras_rsft.errors import DataError, InvalidArgument

SPLIT_NAMES = ("train", "validation", "test")


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value % 256, np.uint8)).save(file, "PNG")
    return file.getvalue()


def value_of(image) -> int:
    """The grey value of an image of one colour; resizing leaves 1e-6 of error."""
    return round(float(image[0, 0, 0]))


def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content or png(len(str(path))))
    return path


@pytest.fixture
def folder(tmp_path):
    """Twenty images of each of three classes; each is of its own grey value."""
    root = tmp_path / "photos"
    for label, name in enumerate(("cat", "dog", "owl")):
        for number in range(20):
            write(root / name / f"{number:02}.png", png(80 * label + number))
    return root


def write_table(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def all_ids(data) -> list[str]:
    return sorted(i for name in SPLIT_NAMES for i in getattr(data, name).ids.tolist())


def named_labels(data, split: str) -> dict[str, str]:
    part = getattr(data, split)
    names = [data.class_names[label] for label in part.labels]
    return dict(zip(part.ids.tolist(), names, strict=True))


def indices_of(dataset) -> list[int]:
    return [int(index) for index, _ in dataset]


class TestFolder:
    def test_each_class_is_cut_into_three(self, folder):
        data = load_images(folder)
        assert data.class_names == ("cat", "dog", "owl")
        assert data.num_classes == 3
        assert data.source == str(folder)
        for name, count in zip(SPLIT_NAMES, (14, 3, 3), strict=True):
            split = getattr(data, name)
            assert split.name == name
            assert np.bincount(split.labels).tolist() == [count] * 3
            assert split.labels.dtype == np.int32
            assert split.clean_labels is None
            assert split.ids.tolist() == sorted(split.ids.tolist())
        assert len(set(all_ids(data))) == 60

    def test_labels_and_pixels_belong_to_the_ids(self, folder):
        data = load_images(folder)
        for id_, label in named_labels(data, "validation").items():
            assert id_.split("/")[0] == label
        for index, image in data.validation.images((6, 8)):
            name, number = data.validation.ids[int(index)].split("/")
            value = 80 * data.class_names.index(name) + int(number[:2])
            assert np.all(image.numpy() == value)

    def test_fractions_and_seed_are_used(self, folder):
        data = load_images(folder, validation_fraction=0.5, test_fraction=0)
        assert (len(data.train), len(data.validation), len(data.test)) == (30, 30, 0)
        assert indices_of(data.test.images(8)) == []
        one, two = load_images(folder, split_seed=1), load_images(folder, split_seed=2)
        assert one.test.ids.tolist() != two.test.ids.tolist()
        again = load_images(folder, split_seed=1)
        assert one.test.ids.tolist() == again.test.ids.tolist()

    def test_another_place_gives_the_same_splits(self, folder, tmp_path):
        before = load_images(folder)
        moved = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
        after = load_images(moved)
        for name in SPLIT_NAMES:
            one, two = getattr(before, name), getattr(after, name)
            assert one.ids.tolist() == two.ids.tolist()
            assert one.fingerprint == two.fingerprint

    def test_adding_an_image_moves_few_others(self, folder):
        before = load_images(folder)
        write(folder / "cat" / "new.png")
        after = load_images(folder)
        for name in SPLIT_NAMES:
            old, new = set(getattr(before, name).ids), set(getattr(after, name).ids)
            assert len(old - new) <= 2

    def test_names_of_any_kind(self, tmp_path):
        names = ["a b.JPG", "Größe.png", "図.Jpeg", "deep/er/x.gif", "q'?\".webp"]
        for name in names:
            write(tmp_path / "chat à" / name)
        write(tmp_path / "Hund" / "1.bmp")
        data = load_images(tmp_path, validation_fraction=0, test_fraction=0)
        expected = sorted([*(f"chat à/{name}" for name in names), "Hund/1.bmp"])
        assert data.train.ids.tolist() == expected
        assert data.class_names == ("Hund", "chat à")
        assert indices_of(data.train.images(4)) == list(range(6))
        assert data.train.read_error(0) is None

    def test_other_files_are_ignored_and_counted(self, folder):
        write(folder / "cat" / "notes.txt")
        write(folder / "cat" / ".hidden.png")
        write(folder / "dog" / "deep" / "Thumbs.db")
        write(folder / "readme.md")
        write(folder / ".cache" / "x.png")
        data = load_images(folder)
        assert len(all_ids(data)) == 60
        assert data.ignored_files == 5

    def test_links_are_followed_and_loops_are_not(self, folder, tmp_path):
        other = write(tmp_path / "store" / "far.png")
        (folder / "cat" / "link.png").symlink_to(other)
        (folder / "cat" / "more").symlink_to(tmp_path / "store")
        (folder / "cat" / "up").symlink_to(folder)
        (folder / "cat" / "self.png").symlink_to(folder / "cat" / "self.png")
        (folder / "cat" / "gone.png").symlink_to(tmp_path / "nothing.png")
        (folder / "bat").symlink_to(folder / "cat")
        (tmp_path / "store" / "back").symlink_to(folder / "cat")
        ids = all_ids(load_images(folder))
        cats = [id_ for id_ in ids if id_.startswith("cat/")]
        assert len(cats) == 22
        assert {"cat/link.png", "cat/more/far.png"} < set(cats)
        assert sum(id_.startswith("bat/") for id_ in ids) == 22

    def test_two_links_to_each_other_end(self, folder):
        (folder / "cat" / "sub").mkdir()
        (folder / "dog" / "sub").mkdir()
        (folder / "cat" / "sub" / "dog").symlink_to(folder / "dog")
        (folder / "dog" / "sub" / "cat").symlink_to(folder / "cat")
        ids = all_ids(load_images(folder))
        assert sum(id_.startswith("cat/") for id_ in ids) == 40

    def test_numbers_as_class_names_are_sorted_by_value(self, tmp_path):
        for name in ("10", "9", "1"):
            write(tmp_path / name / "x.png")
        assert load_images(tmp_path).class_names == ("1", "9", "10")

    def test_a_single_image_of_a_class_goes_to_train(self, folder):
        write(folder / "yak" / "only.png")
        data = load_images(folder)
        assert "yak/only.png" in data.train.ids
        assert data.class_names[3] == "yak"

    @pytest.mark.parametrize("name", ["validation", "val", "valid", "Val"])
    def test_split_folders(self, tmp_path, name):
        for split, count in (("train", 4), (name, 2), ("test", 3)):
            for label in ("a", "b"):
                for number in range(count):
                    write(tmp_path / split / label / f"{number}.png")
        data = load_images(tmp_path)
        assert [len(getattr(data, s)) for s in SPLIT_NAMES] == [8, 4, 6]
        assert data.class_names == ("a", "b")
        assert data.validation.ids[0] == f"{name}/a/0.png"

    def test_a_missing_split_is_cut_from_train_alone(self, tmp_path):
        for split, count in (("train", 20), ("test", 5)):
            for label in ("a", "b"):
                for number in range(count):
                    write(tmp_path / split / label / f"{number}.png")
        write(tmp_path / "readme.txt")
        data = load_images(tmp_path)
        assert [len(getattr(data, s)) for s in SPLIT_NAMES] == [34, 6, 10]
        assert all(id_.startswith("train/") for id_ in data.validation.ids)
        assert all(id_.startswith("test/") for id_ in data.test.ids)
        assert data.ignored_files == 1

    def test_split_names_among_others_are_classes(self, tmp_path):
        for name in ("train", "test", "boat"):
            write(tmp_path / name / "deep" / "1.png")
        assert load_images(tmp_path).class_names == ("boat", "test", "train")

    def test_a_class_that_train_lacks_is_named(self, tmp_path):
        for path in ("train/a", "train/b", "test/a", "test/zebra"):
            write(tmp_path / path / "1.png")
        with pytest.raises(DataError, match="'zebra' in test"):
            load_images(tmp_path)

    def test_an_empty_class_is_named(self, folder):
        write(folder / "yak" / "photo.tiff")
        with pytest.raises(DataError, match=r"yak\. Received: none, and 1 other"):
            load_images(folder)

    def test_one_class_is_not_enough(self, tmp_path):
        write(tmp_path / "cat" / "1.png")
        with pytest.raises(DataError, match=r"two classes or more.*only 'cat'"):
            load_images(tmp_path)

    def test_images_without_class_folders_are_refused(self, tmp_path):
        write(tmp_path / "1.png")
        with pytest.raises(DataError, match="one folder for each class"):
            load_images(tmp_path)

    def test_two_folders_for_one_split_are_refused(self, tmp_path):
        for split in ("train", "val", "valid"):
            write(tmp_path / split / "a" / "1.png")
        with pytest.raises(DataError, match="train, val, valid"):
            load_images(tmp_path)

    def test_a_name_that_is_not_utf8_is_refused(self, folder):
        try:
            write(folder / "cat" / os.fsdecode(b"\xff.png"))
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
        with pytest.raises(DataError, match="valid UTF-8"):
            load_images(folder)


class TestTable:
    LABELS = ("red", "blue", "blue", "red")

    @pytest.fixture
    def table(self, tmp_path):
        for number in range(4):
            write(tmp_path / "img" / f"{number}.png", png(number))
        return tmp_path / "labels.csv"

    def test_path_and_label(self, table):
        rows = [f"img/{n}.png,{label}" for n, label in enumerate(self.LABELS)]
        write_table(table, "path,label", *rows)
        data = load_images(table, validation_fraction=0, test_fraction=0)
        assert data.class_names == ("blue", "red")
        assert data.train.ids.tolist() == [f"img/{n}.png" for n in range(4)]
        assert data.train.labels.tolist() == [1, 0, 0, 1]
        assert data.train.encoded(2) == png(2)

    def test_columns_by_name_splits_and_clean_labels(self, table):
        write_table(
            table,
            "\ufefffile,given,part,right",
            "img/3.png, red ,test,blue",
            '"img/0.png",red,train,red',
            "",
            "img/1.png,blue,,red",
            "./img/2.png,blue,val,blue",
        )
        data = load_images(
            table,
            path_column="file",
            label_column="given",
            split_column="part",
            clean_label_column="right",
        )
        assert data.train.ids.tolist() == ["img/0.png", "img/1.png"]
        assert data.train.labels.tolist() == [1, 0]
        assert data.train.clean_labels.tolist() == [1, 1]
        assert data.validation.ids.tolist() == ["img/2.png"]
        assert data.test.labels.tolist() == [1]
        assert data.test.clean_labels.tolist() == [0]

    def test_split_column_can_be_ignored(self, table):
        rows = [f"img/{n}.png,{label},?" for n, label in enumerate(self.LABELS)]
        write_table(table, "path,label,split", *rows)
        assert len(all_ids(load_images(table, split_column=None))) == 4

    def test_numbers_are_sorted_by_value(self, table):
        write_table(table, "path,label", "img/0.png,10", "img/1.png,9", "img/2.png,-1")
        assert load_images(table).class_names == ("-1", "9", "10")

    def test_a_missing_file_is_left_out_when_reading(self, table):
        write_table(table, "path,label", "img/0.png,a", "img/1.png,b", "img/9.png,a")
        train = load_images(table, validation_fraction=0, test_fraction=0).train
        assert indices_of(train.images(8)) == [0, 1]
        assert train.read_error(2).startswith("The file cannot be opened: No such file")

    def test_only_missing_files_are_an_error(self, table):
        write_table(table, "path,label", "pics/0.png,a", "pics/1.png,b")
        with pytest.raises(DataError, match=r"None of the 2 files.*relative to the"):
            load_images(table)

    @pytest.mark.parametrize(
        "path", ["../out.png", "/etc/hosts", "img/../../out.png", "..", "way/out.png"]
    )
    def test_a_path_outside_the_folder_is_refused(self, tmp_path, path):
        inner = tmp_path / "inner"
        write(tmp_path / "out.png")
        write(inner / "img" / "0.png")
        (inner / "way").symlink_to(tmp_path)
        table = write_table(inner / "t.csv", "path,label", "img/0.png,a", f"{path},b")
        with pytest.raises(DataError, match=r"stay inside it.*line 3"):
            load_images(table)

    def test_a_linked_file_outside_is_refused_and_inside_is_not(self, tmp_path):
        inner = tmp_path / "inner"
        outside = write(tmp_path / "out.png")
        real = write(inner / "img" / "0.png")
        (inner / "img" / "in.png").symlink_to(real)
        table = write_table(
            inner / "t.csv", "path,label", "img/0.png,a", "img/in.png,b"
        )
        assert len(all_ids(load_images(table))) == 2
        (inner / "img" / "in.png").unlink()
        (inner / "img" / "in.png").symlink_to(outside)
        with pytest.raises(DataError, match="stay inside it"):
            load_images(table)

    def test_a_folder_that_is_reached_by_a_link_is_fine(self, table, tmp_path):
        write_table(table, "path,label", "img/0.png,a", "img/1.png,b")
        (tmp_path / "alias").symlink_to(table.parent)
        assert len(all_ids(load_images(tmp_path / "alias" / table.name))) == 2

    @pytest.mark.parametrize(
        "lines, message",
        [
            (["file,class"], r"no column 'path', 'label'. It has: 'file', 'class'"),
            (["path;label", "img/0.png;a"], "It has: 'path;label'"),
            ([""], "It has: none"),
            (["path,label"], "no row below the header"),
            (["path,label", "img/0.png,"], "value in column 'label' of .*line 2"),
            (["path,label", "img/0.png"], "value in column 'label' of .*line 2"),
            (["path,label", ",a"], "value in column 'path' of .*line 2"),
            (["path,label", "img/0.png,a", "img//0.png,b"], "line 3 has been listed"),
            (["path,label,split", "img/0.png,a,dev"], "'dev' in .*line 2"),
            (["path,label", "img,a"], "is not a file, in .*line 2"),
            (["path,label", "img/0\0.png,a"], "stay inside it"),
            (["path,label", 'img/0.png,"a'], "comma-separated table in UTF-8"),
            (["path,label,split", "img/0.png,a,test"], "'a' in test"),
            (["path,label", "img/0.png,a"], "two classes or more"),
        ],
    )
    def test_wrong_tables_are_explained(self, table, lines, message):
        write_table(table, *lines)
        with pytest.raises(DataError, match=message):
            load_images(table)

    def test_an_option_that_names_no_column_is_explained(self, table):
        write_table(table, "path,label", "img/0.png,a", "img/1.png,b")
        for option in ("split_column", "clean_label_column"):
            with pytest.raises(DataError, match="no column 'nope'"):
                load_images(table, **{option: "nope"})

    def test_a_clean_label_must_be_given_and_a_known_class(self, table):
        options = {"clean_label_column": "clean"}
        write_table(table, "path,label,clean", "img/0.png,a,a", "img/1.png,b,")
        with pytest.raises(DataError, match=r"column 'clean' of .*line 3"):
            load_images(table, **options)
        write_table(table, "path,label,clean", "img/0.png,a,a", "img/1.png,b,c")
        with pytest.raises(DataError, match="'c' in the clean labels"):
            load_images(table, **options)

    def test_another_encoding_is_explained(self, table):
        table.write_bytes("path,label\nimg/0.png,Größe\n".encode("latin-1"))
        with pytest.raises(DataError, match="UTF-8"):
            load_images(table)

    def test_a_pipe_is_not_read(self, table):
        os.mkfifo(table.parent / "pipe.png")
        write_table(table, "path,label", "img/0.png,a", "pipe.png,b")
        with pytest.raises(DataError, match="is not a file"):
            load_images(table)


class TestOtherSources:
    def test_digits(self):
        data = load_images("digits")
        assert data.class_names == tuple("0123456789")
        ids = all_ids(data)
        assert (len(ids), ids[0], ids[-1]) == (1797, "digits/0000", "digits/1796")
        assert [len(getattr(data, s)) for s in SPLIT_NAMES] == [1259, 269, 269]

    def test_digits_pixels_and_file(self):
        from sklearn.datasets import load_digits

        train = load_images("digits").train
        number = int(train.ids[7].split("/")[1])
        grey = np.round(load_digits().images[number] * (255 / 16))
        _, image = next(iter(train.images(8, start=7)))
        np.testing.assert_array_equal(image, np.stack([grey] * 3, axis=-1))
        stored = np.asarray(Image.open(io.BytesIO(train.encoded(7))))
        np.testing.assert_array_equal(stored, grey)
        assert train.labels[7] == load_digits().target[number]

    def test_a_folder_called_digits_is_reached_by_its_path(self, tmp_path, monkeypatch):
        for name in ("a", "b"):
            write(tmp_path / "digits" / name / "1.png")
        monkeypatch.chdir(tmp_path)
        assert load_images("./digits").class_names == ("a", "b")
        assert load_images(Path("digits")).class_names == ("a", "b")
        assert len(load_images("digits").class_names) == 10

    @pytest.mark.parametrize(
        "name, message",
        [
            ("photo", r"Did you mean '.*photos'\?"),
            ("digit", r"Did you mean|does not exist"),
            ("no/such/place", "Neither does"),
            ("photos/cat/00.png", "another kind of file"),
        ],
    )
    def test_an_unknown_source_is_explained(self, folder, name, message):
        with pytest.raises(InvalidArgument, match=message):
            load_images(folder.parent / name)

    def test_a_misspelt_name_is_suggested(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InvalidArgument, match=r"Did you mean 'digits'\?"):
            load_images("digit")

    @pytest.mark.parametrize(
        "validation, test", [(-0.1, 0.1), (1.0, 0), (0.5, 0.5), (float("nan"), 0)]
    )
    def test_wrong_fractions_are_refused(self, validation, test):
        with pytest.raises(InvalidArgument, match="validation_fraction"):
            load_images("digits", validation_fraction=validation, test_fraction=test)


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
        views = {int(i): v.numpy() for i, v in train.images(8, views=3, seed=4)}
        assert views[0].shape == (3, 8, 8, 3)
        later = {int(i): v for i, v in train.images(8, views=3, seed=4, start=4)}
        np.testing.assert_array_equal(views[4], later[4])
        np.testing.assert_array_equal(views[0][0], views[1][0])
        assert np.abs(views[0][1:] - views[1][1:]).mean() > 1

    @pytest.mark.parametrize(
        "options",
        [{"start": -1}, {"start": 43}, {"start": 0.5}, {"views": 0}, {"seed": 2**63}],
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
        pixels = reader._pixels.copy()
        pixels[3, 0, 0] += 1
        changed = dataclasses.replace(train, reader=type(reader)(train.ids, pixels))
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
    assert split_counts(count, *fractions) == expected


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


@settings(deadline=None, max_examples=60)
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
            validation_fraction=fractions[0],
            test_fraction=fractions[1],
            split_seed=seed,
        )

    splits = assign(np.arange(len(ids)))
    for label, count in collections.Counter(labels).items():
        found = collections.Counter(splits[np.array(labels) == label].tolist())
        validation, test = split_counts(count, *fractions)
        assert (found[VALIDATION], found[TEST]) == (validation, test)
        assert found[TRAIN] == count - validation - test >= 1
    positions = list(range(len(ids)))
    order.shuffle(positions)
    np.testing.assert_array_equal(assign(np.array(positions)), splits[positions])


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 80), fractions=fraction_pairs, seed=st.integers(0, 99))
def test_one_more_image_moves_at_most_one_at_each_border(count, fractions, seed):
    def assign(number):
        return assign_splits(
            np.array([f"{n}" for n in range(number)]),
            np.zeros(number, int),
            validation_fraction=fractions[0],
            test_fraction=fractions[1],
            split_seed=seed,
        )

    assert np.count_nonzero(assign(count) != assign(count + 1)[:count]) <= 2
