"""Folders, CSV files and names: what is found in them, what is refused."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from made_images import (
    SPLIT_NAMES,
    all_ids,
    indices_of,
    named_labels,
    png,
    write,
    write_table,
)
from PIL import Image

from keras_rsft.data._images import SUFFIXES, decode_pixels
from keras_rsft.data._sources import load_images, load_texts
from keras_rsft.errors import DataError, InvalidArgument


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
        write(folder / "cat" / "._01.png")  # What macOS leaves beside 01.png.
        write(folder / "cat" / ".DS_Store")
        data = load_images(folder)
        assert len(all_ids(data)) == 60
        assert data.unread_files == {".txt": 1, ".db": 1, ".md": 1, "hidden": 1}
        (note,) = data.notes
        assert note == "4 files were not read: 1 .md, 1 hidden, 1 .txt, 1 .db."

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
        assert data.unread_files == {".txt": 1}
        assert data.notes == ("1 file was not read: 1 .txt.",)

    @pytest.mark.parametrize(
        "train, validation, test",
        [
            ("Training", "Validation", "Testing"),
            ("seg_train", "seg_dev", "seg_test"),
            ("train2017", "val2017", "test2017"),
            ("Train Set", "valid-set", "TestSet"),
            ("pets-training", "PETS-VAL", "pets-holdout"),
            ("training", "validation", "evaluation"),
        ],
    )
    @pytest.mark.parametrize("again", ["", "{}", "images"])
    def test_usual_names_of_splits(self, tmp_path, train, validation, test, again):
        if "set" in test.lower() and train == "Train Set":
            train, test = "Train Set", "Test Set"
        for name, count in ((train, 4), (validation, 2), (test, 3)):
            for label in ("a", "b"):
                for number in range(count):
                    inner = tmp_path / name / again.format(name)
                    write(inner / label / f"{number}.png")
        data = load_images(tmp_path)
        assert [len(getattr(data, s)) for s in SPLIT_NAMES] == [8, 4, 6]
        assert data.class_names == ("a", "b")

    @pytest.mark.parametrize(
        "outer, inner",
        [
            (("trainval", "test"), ("a", "b")),
            (("fold1", "fold2"), ("a", "b")),
            (("a", "b"), ("train", "test")),
        ],
    )
    def test_levels_that_are_taken_for_none_are_told(self, tmp_path, outer, inner):
        for name in outer:
            for other in inner:
                for number in range(4):
                    write(tmp_path / name / other / f"{number}.png")
        data = load_images(tmp_path)
        assert data.class_names == tuple(sorted(outer))
        (note,) = data.notes
        assert f"holds the folders {', '.join(sorted(inner))}:" in note
        shutil.rmtree(tmp_path / outer[0] / inner[1])  # A class may be sorted further.
        assert load_images(tmp_path).notes == ()

    def test_one_folder_around_all_is_gone_through(self, tmp_path):
        for split, count in (("Training", 4), ("Testing", 2)):
            for label in ("a", "b"):
                for number in range(count):
                    write(tmp_path / "archive" / split / label / f"{number}.png")
        write(tmp_path / "readme.md")
        write(tmp_path / "archive" / "licence.txt")
        data = load_images(tmp_path)
        assert len(data.test) == 4
        assert data.test.ids[0] == "archive/Testing/a/0.png"
        assert data.unread_files == {".md": 1, ".txt": 1}
        shutil.rmtree(tmp_path / "archive" / "Testing")
        (tmp_path / "archive" / "Training").rename(tmp_path / "archive" / "photos")
        shutil.move(tmp_path / "archive" / "photos", tmp_path / "photos")
        shutil.rmtree(tmp_path / "archive")
        assert load_images(tmp_path).class_names == ("a", "b")

    @pytest.mark.parametrize(
        "folders, message",
        [
            (("train/a", "test/a", "boat/a"), r"\(test, train\) with others \(boat\)"),
            (("Training/a", "Testing/a", "unlabelled/x"), "Move the others away"),
            (("seg_train/a", "seg_test/a", "seg_pred"), "seg_pred"),
            (("train/a", "train/b", "extra/a"), r"\(train\) with others \(extra\)"),
            (("test/a", "val/a"), "a folder `train`"),
        ],
    )
    def test_a_mixture_of_splits_and_classes_is_refused(
        self, tmp_path, folders, message
    ):
        for folder in folders:
            write(tmp_path / folder / "1.png")
        with pytest.raises(DataError, match=message):
            load_images(tmp_path)

    @pytest.mark.parametrize(
        "names",
        [
            ("train", "boat", "car"),
            ("test tube", "train station", "dog"),
            ("train", "bus", "training shoes"),
            ("valve", "trainer", "testament"),
        ],
    )
    def test_classes_may_be_called_so(self, tmp_path, names):
        for name in names:
            for number in range(3):
                write(tmp_path / name / f"{number}.png")
        assert load_images(tmp_path).class_names == tuple(sorted(names))

    def test_a_class_that_train_lacks_is_named(self, tmp_path):
        for path in ("train/a", "train/b", "test/a", "test/zebra"):
            write(tmp_path / path / "1.png")
        with pytest.raises(DataError, match="'zebra' in test"):
            load_images(tmp_path)

    def test_an_empty_class_is_named(self, folder):
        write(folder / "yak" / "photo.psd")
        message = r"yak\. Received: none, and 1 other files: 1 .psd\. Images end in"
        with pytest.raises(DataError, match=message):
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
        with pytest.raises(
            DataError, match=r"None of the 2 files.*relative to /.*image-dir"
        ):
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
        message = f"'img/in.png', which is a link to {outside}, in .*line 3"
        with pytest.raises(DataError, match=message):
            load_images(table)

    def test_a_folder_that_is_reached_by_a_link_is_fine(self, table, tmp_path):
        write_table(table, "path,label", "img/0.png,a", "img/1.png,b")
        (tmp_path / "alias").symlink_to(table.parent)
        assert len(all_ids(load_images(tmp_path / "alias" / table.name))) == 2

    @pytest.mark.parametrize(
        "lines, message",
        [
            (["file,class"], r"'path', 'label' in line 1. It has: 'file', 'class'"),
            (["path;class", "img/0.png;a"], "It has: 'path', 'class'.*--label-column"),
            (["path,label,label", "img/0.png,a,b"], "line 1, has the column 'label' 2"),
            (["path,label,split,split", "img/0.png,a,,"], "the column 'split' 2 times"),
            ([""], "It has: none"),
            (["path,label"], "no row below the header"),
            (["path,label", "img/0.png,"], "value in column 'label' of .*line 2"),
            (["path,label", "img/0.png"], "value in column 'label' of .*line 2"),
            (["path,label", ",a"], "value in column 'path' of .*line 2"),
            (["path,label", "img/0.png,a", "img//0.png,b"], "line 3 has been listed"),
            (["path,label,split", "img/0.png,a,dove"], "'dove' in .*line 2"),
            (["path,label", "img,a"], "is not a file, in .*line 2"),
            (["path,label", "img/0.png,cat, big"], "line 2, has more cells.*quotes"),
            (["path,label", "img/0\0.png,a"], "stay inside it"),
            (["path,label", "img/1.png,b", 'img/0.png,"a'], "that begins in line 3"),
            (["path,label", 'img/1.png,"b', 'img/0.png,a"'], "2 lines .* line 2"),
            (["path,label", "img/1.png,b", 'img/0.png,a"'], "quote too many.* line 3"),
            (["path,label", '"img/0.png,a', 'x",b'], "column 'path' runs.* line 2"),
            (["path;label", "img/0.png;cat; big"], "line 2, has more.*';' in it"),
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

    @pytest.mark.parametrize("separator", [";", "\t", "|"])
    def test_other_separators_are_recognised(self, table, separator):
        rows = [f"img/{n}.png,{label}" for n, label in enumerate(self.LABELS)]
        lines = [line.replace(",", separator) for line in ("path,label,note", *rows)]
        write_table(table, *lines, f'"img/4.png"{separator}red{separator}"a, b"')
        data = load_images(table, validation_fraction=0, test_fraction=0)
        assert data.class_names == ("blue", "red")
        assert len(data.train) == 5

    @pytest.mark.parametrize(
        "prefix",
        [
            "",
            "{folder}/",
            "/content/drive/My Drive/pets/",
            "C:\\Users\\me\\pets\\",
            "../elsewhere/",
            "{other}/",
            "https://example.org/pets/",
        ],
    )
    @pytest.mark.parametrize("suffix", ["", ".png"])
    def test_paths_below_a_folder_that_is_named(self, tmp_path, prefix, suffix):
        folder = tmp_path / "pets"
        for name in ("a", "b"):
            write(folder / name / "1.png")
        for name in ("a", "b"):
            write(tmp_path / "other" / name / "1.png")
        prefix = prefix.format(folder=folder, other=tmp_path / "other")
        inner = "\\" if "\\" in prefix else "/"
        ending = "" if suffix else ".png"
        rows = [f"{prefix}{one}{inner}1{ending},{one}" for one in ("a", "b")]
        table = write_table(tmp_path / "tables" / "t.csv", "path,label", *rows)
        options = {"image_dir": folder, "image_suffix": suffix}
        assert all_ids(load_images(table, **options)) == ["a/1.png", "b/1.png"]
        columns = {"path": [row.split(",")[0] for row in rows], "label": ["a", "b"]}
        data = load_images(columns, **options)
        assert all_ids(data) == ["a/1.png", "b/1.png"]
        assert data.train.read_error(0) is None

    def test_a_folder_of_images_that_is_none_is_refused(self, table):
        write_table(table, "path,label", "img/0.png,a", "img/1.png,b")
        with pytest.raises(InvalidArgument, match="image_dir"):
            load_images(table, image_dir=table.parent / "nothing")

    def test_a_missing_file_stays_listed_below_a_folder(self, table):
        rows = ["/far/img/0.png,a", "/far/img/1.png,b", "/far/img/9.png,a"]
        write_table(table, "path,label", *rows)
        data = load_images(
            table, image_dir=table.parent, validation_fraction=0, test_fraction=0
        )
        assert data.train.ids.tolist() == ["far/img/9.png", "img/0.png", "img/1.png"]
        assert "No such file" in data.train.read_error(0)

    def test_one_long_path_is_left_out_and_told(self, table):
        rows = ["img/0.png,a", f"{'p' * 100_000},a", "img/1.png,b"]
        write_table(table, "path,label", *rows)
        data = load_images(table, validation_fraction=0, test_fraction=0)
        assert data.train.ids.itemsize <= 4 * 9
        assert data.notes == (
            f"1 rows of {table} were left out: their paths are longer than 1,024 "
            "characters (line 3).",
        )
        long = {"path": ["img/0.png", "p" * 2000], "label": ["a", "b"]}
        with pytest.raises(DataError, match=r"longer than 1,024.*row 1"):
            load_images(long, image_dir=table.parent)

    def test_classes_that_hardly_differ_are_told(self, tmp_path):
        groups = [
            ["cat", "CAT", "cat\u200b", "c\u00adat"],
            ["caf\u00e9", "cafe\u0301"],
            ["01", "1.0", "1"],
            ["big dog", "big\u00a0dog"],
            ["stra\u00dfe", "STRASSE"],
            ["\u2764", "\u2764\ufe0f", "\u2764\u3164"],
            ["red_fox", "Red-Fox", "red fox", '"""red fox"""'],
            ["5e-1", ".5", "0.50", "\u0660.5"],
            ["3", "3."],
        ]
        names = [name for group in groups for name in group]
        names += ["cats", "11", "-1", "_", "+", "1_1"]
        rows = [f"{at}.png,{name}" for at, name in enumerate(names)]
        for at in range(len(names)):
            write(tmp_path / f"{at}.png")
        data = load_images(write_table(tmp_path / "t.csv", "path,label", *rows))
        assert data.num_classes == len(names)
        (note,) = data.notes
        groups[6][3] = '"red fox"'
        for group in groups:
            assert " and ".join(map(ascii, sorted(group))) in note
        for name in ("cats", "11", "-1", "_", "+", "1_1"):
            assert repr(name) not in note

    def test_a_class_of_missing_labels_is_told(self, table):
        write_table(table, "path,label", "img/0.png,a", "img/1.png,nan")
        assert load_images(table).notes == (
            "A class is called nan. If the label is missing there, leave these samples "
            "out.",
        )

    @pytest.mark.parametrize("name", ["Split", "subset", "Usage"])
    def test_a_column_of_splits_that_is_not_read_is_told(self, table, name):
        rows = [f"img/{at}.png,{at % 2},Training" for at in range(4)]
        write_table(table, f"path,label,{name}", *rows)
        (note,) = load_images(table).notes
        assert note.startswith(f"The column {name!r}, which begins with 'Training'")
        assert load_images(table, split_column=name).notes == ()
        assert load_images(table, split_column=None).notes == ()
        columns = {"text": ["p", "q"], "label": ["a", "b"], name: ["train", "train"]}
        assert load_texts(columns).notes == (note.replace("Training", "train"),)

    def test_another_encoding_is_explained(self, table):
        table.write_bytes("path,label\nimg/0.png,Größe\n".encode("latin-1"))
        with pytest.raises(DataError, match="another encoding in line 2"):
            load_images(table)
        table.write_bytes("path,label\nimg/0.png,a\n".encode("utf-16"))
        with pytest.raises(DataError, match="another encoding in line 1"):
            load_images(table)

    def test_a_pipe_is_not_read(self, table):
        os.mkfifo(table.parent / "pipe.png")
        write_table(table, "path,label", "img/0.png,a", "pipe.png,b")
        with pytest.raises(DataError, match="is not a file"):
            load_images(table)
        paths = [str(table.parent / name) for name in ("img/0.png", "pipe.png")]
        with pytest.raises(DataError, match=r"pipe.png is not a file, in row 1"):
            load_images({"path": paths, "label": ["a", "b"]})


class TestMoreKinds:
    """TIFF and AVIF, which Pillow reads; HEIC needs one more package."""

    @pytest.fixture
    def photos(self, tmp_path):
        colours = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
        self.pixels = np.kron(colours, np.ones((8, 8, 1), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 3
        image = Image.fromarray(self.pixels)
        clear = image.convert("RGBA")
        clear.putalpha(0)
        for name in "ab":
            folder = tmp_path / "photos" / name
            folder.mkdir(parents=True)
            image.save(folder / "1.png")
            image.save(folder / "2.tif")
            image.rotate(180).save(folder / "3.TIFF", exif=exif.tobytes())
            clear.save(folder / "4.tif")
            Image.fromarray(self.pixels[..., 0] * np.uint16(256)).save(folder / "5.tif")
            image.convert("CMYK").save(folder / "6.tif")
        return tmp_path / "photos"

    def test_are_read_as_they_look(self, photos):
        data = load_images(photos, validation_fraction=0, test_fraction=0)
        images = [image.numpy() for _, image in data.train.images((24, 32))]
        assert len(images) == 12
        for turned in images[:3]:
            np.testing.assert_array_equal(turned, self.pixels)
        assert (images[3] == 255).all()
        np.testing.assert_array_equal(images[4][..., 2], self.pixels[..., 0])
        assert np.abs(images[5] - self.pixels).max() <= 1
        assert (decode_pixels(tf.constant(data.train.encoded(3))) == 255).numpy().all()

    def test_damaged_and_huge_ones_are_named(self, photos, monkeypatch):
        write(photos / "a" / "7.tif", b"II*\0")
        data = load_images(photos, validation_fraction=0, test_fraction=0)
        assert indices_of(data.train.images(8)) == [0, 1, 2, 3, 4, 5, *range(7, 13)]
        reason = "Pillow cannot read the file: cannot identify image file."
        assert data.train.read_error(6) == reason
        monkeypatch.setattr("keras_rsft.data._images.MAX_PIXELS", 24 * 32 - 1)
        assert data.train.read_error(1) == (
            "Pillow cannot read the file: An image of 32 x 24 pixels; the most is 767."
        )

    def test_without_pillow_they_are_told(self, photos, monkeypatch):
        monkeypatch.setattr(
            "keras_rsft.data._images.readable_suffixes", lambda: SUFFIXES
        )
        assert load_images(photos).notes == (
            "10 files were not read: 8 .tif, 2 .tiff. Install keras_rsft[images] to "
            "read TIFF, HEIC and AVIF.",
        )


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
        np.testing.assert_array_equal(stored, image)
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
