"""Texts from files to splits: what is read, what is refused, and what an id is."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from made_texts import HOSTILE_TEXTS, sentences, write_table

from keras_rsft.data._labels import add_label_noise
from keras_rsft.data._sources import MAX_BYTES, load_images, load_texts
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.features._thumbnails import MAX_CHARACTERS, excerpt_of, write_excerpts

ONE_SPLIT = {"validation_fraction": 0.0, "test_fraction": 0.0}


def all_texts(split):
    return [value.numpy().decode() for _, value in split.inputs(())]


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path / "texts.csv", sentences())


class TestTable:
    def test_texts_with_their_labels(self, table):
        data = load_texts(table)
        assert data.kind == "texts"
        assert data.class_names == ("animals", "cooking", "money")
        sizes = [len(split) for split in (data.train, data.validation, data.test)]
        assert sizes == [42, 9, 9]
        known = dict(sentences())
        texts = all_texts(data.train)
        assert len(texts) == 42
        for text, label in zip(texts, data.train.labels, strict=True):
            assert known[text] == data.class_names[label]

    def test_a_part_of_the_texts_in_order(self, table):
        split = load_texts(table).train
        indices = [int(index) for index, _ in split.inputs((), start=5, stop=9)]
        assert indices == [5, 6, 7, 8]
        with pytest.raises(InvalidArgument, match="stop"):
            split.inputs((), start=5, stop=99)

    def test_hostile_texts_come_back_as_they_are(self, tmp_path):
        rows = [(text, str(n % 2)) for n, text in enumerate(HOSTILE_TEXTS)]
        data = load_texts(write_table(tmp_path / "t.csv", rows), **ONE_SPLIT)
        assert sorted(all_texts(data.train)) == sorted(HOSTILE_TEXTS)

    def test_an_id_stays_where_rows_are_moved_or_added(self, table, tmp_path):
        before = load_texts(table)
        rows = [("A new text.", "money"), *reversed(sentences())]
        after = load_texts(write_table(tmp_path / "more.csv", rows))
        assert set(before.train.ids) < set(
            np.concatenate([after.train.ids, after.validation.ids, after.test.ids])
        )
        moved = set(before.test.ids) ^ set(after.test.ids)
        assert len(moved) <= 2  # Only those at the borders of a split.

    def test_a_text_that_comes_again_has_an_id_of_its_own(self, tmp_path):
        rows = [("Same.", "a"), ("Same.", "b"), ("Other.", "a")]
        ids = load_texts(write_table(tmp_path / "t.csv", rows), **ONE_SPLIT).train.ids
        assert len(set(ids)) == 3
        assert sum(one.endswith("-2") for one in ids) == 1

    @pytest.mark.parametrize("id_column", [None, "key"])
    def test_a_text_that_comes_again_is_in_one_split(self, id_column, tmp_path):
        rows = [
            (f"{copy} {n}", f"Text {n}.{' ' * copy}", f"{n % 2}")
            for n in range(100)
            for copy in range(2)
        ]
        path = write_table(tmp_path / "t.csv", rows, ("key", "text", "label"))
        data = load_texts(path, id_column=id_column)
        texts = [
            {text.strip() for text in all_texts(split)}
            for split in (data.train, data.validation, data.test)
        ]
        assert [len(part) for part in texts] == [72, 14, 14]
        assert len(set().union(*texts)) == 100

    def test_ids_of_a_column(self, tmp_path):
        header = ("key", "text", "label")
        rows = [("k1", "One.", "a"), ("k2", "Two.", "b")]
        path = write_table(tmp_path / "t.csv", rows, header)
        data = load_texts(path, id_column="key", **ONE_SPLIT)
        assert data.train.ids.tolist() == ["k1", "k2"]
        path = write_table(tmp_path / "u.csv", [*rows, ("k1", "Three.", "b")], header)
        with pytest.raises(DataError, match=r"id of its own.*'k1'.*line 4"):
            load_texts(path, id_column="key")

    def test_columns_of_splits_and_right_labels(self, tmp_path):
        header = ("words", "said", "right", "split")
        rows = [("One.", "a", "a", "train"), ("Two.", "b", "a", ""),
                ("Three.", "b", "b", "test"), ("Four.", "b", "b", "val")]  # fmt: skip
        data = load_texts(
            write_table(tmp_path / "t.csv", rows, header),
            text_column="words",
            label_column="said",
            clean_label_column="right",
        )
        assert all_texts(data.test) == ["Three."]
        assert all_texts(data.validation) == ["Four."]
        assert int(np.sum(data.train.labels != data.train.clean_labels)) == 1

    @pytest.mark.parametrize(
        "content, said",
        [
            ("text,label\n", "no row"),
            ("words,label\nOne.,a\n", "no column 'text'"),
            ("text,label\nOne, two.,a\n", "line 2, has more cells.*quotes"),
            ("text,label\n,a\n ,b\n", "has no text"),
            ("text,label\nOne.,\nTwo.,b\n", "Expected a value in column 'label'"),
            ("text,label\nOne.,a\nTwo.,a\n", "two classes"),
            ('text,label\n"' + "x" * 10_000_001, "field limit"),
        ],
    )
    def test_what_is_no_table_of_texts(self, content, said, tmp_path):
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(DataError, match=said):
            load_texts(tmp_path / "t.csv")

    def test_a_text_that_is_too_long_is_left_out_and_costs_no_other(self, tmp_path):
        limit = csv.field_size_limit()
        rows = [("x" * 200_000, "a"), ("y" * (MAX_BYTES + 1), "a"), ("One.", "b")]
        train = load_texts(write_table(tmp_path / "t.csv", rows), **ONE_SPLIT).train
        assert sorted(map(len, all_texts(train))) == [4, 200_000]
        errors = {train.read_error(index) for index in range(3)}
        assert errors == {None, "The text has more than 1 MB."}
        assert csv.field_size_limit() == limit

    def test_a_table_in_another_encoding(self, tmp_path):
        (tmp_path / "t.csv").write_bytes("text,label\nGrüße,a\nb,b\n".encode("latin-1"))
        with pytest.raises(DataError, match="UTF-8"):
            load_texts(tmp_path / "t.csv")

    def test_no_such_file(self, tmp_path):
        with pytest.raises(InvalidArgument, match=r"\.csv file with a column of texts"):
            load_texts(tmp_path / "none.csv")

    def test_an_empty_text_is_listed_and_cannot_be_read(self, tmp_path):
        rows = [("One.", "a"), ("", "a"), ("Two.", "b")]
        split = load_texts(write_table(tmp_path / "t.csv", rows), **ONE_SPLIT).train
        assert len(split) == 3
        assert sorted(all_texts(split)) == ["One.", "Two."]
        reasons = [split.read_error(index) for index in range(3)]
        assert reasons.count("The text is empty.") == 1
        assert reasons.count(None) == 2


class TestFolder:
    @pytest.fixture
    def root(self, tmp_path):
        for number, (text, label) in enumerate(sentences()):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{number:02}.txt").write_text(text)
        (tmp_path / "money" / "notes.md").write_text("no text of the set")
        return tmp_path

    def test_a_folder_a_class(self, root):
        data = load_texts(root)
        assert data.class_names == ("animals", "cooking", "money")
        assert data.unread_files == {".md": 1}
        assert all(one.endswith(".txt") for one in data.train.ids)
        known = dict(sentences())
        first = data.train.text(0)
        assert known[first] == data.class_names[data.train.labels[0]]

    def test_files_that_cannot_be_read(self, root):
        (root / "money" / "a.txt").write_bytes(b"Gr\xfc\xdfe")
        (root / "money" / "b.txt").write_bytes(b"x" * (MAX_BYTES + 1))
        (root / "money" / "c.txt").write_bytes(b" \n")
        (root / "money" / "d.txt").write_bytes("\ufeffWith a mark.".encode())
        split = load_texts(root, **ONE_SPLIT).train
        assert len(all_texts(split)) == 61
        place = {name: at for at, name in enumerate(split.ids.tolist())}
        said = [split.read_error(place[f"money/{one}.txt"]) for one in "abcd"]
        assert said[0] == "The text is not UTF-8: byte 2 is 0xfc."
        assert said[1:3] == ["The text has more than 1 MB.", "The text is empty."]
        assert said[3] is None
        assert split.text(place["money/d.txt"]) == "With a mark."
        (root / "money" / "d.txt").unlink()
        assert "cannot be opened" in split.read_error(place["money/d.txt"])

    def test_a_folder_of_images_is_none_of_texts(self, photo_folder):
        with pytest.raises(DataError, match=r"Expected texts .* end in \.txt"):
            load_texts(photo_folder)


class TestSplit:
    def test_the_fingerprint_is_that_of_the_texts(self, table, tmp_path):
        one = load_texts(table, **ONE_SPLIT).train
        same = load_texts(write_table(tmp_path / "b.csv", sentences()), **ONE_SPLIT)
        assert one.fingerprint == same.train.fingerprint
        changed = [(text.replace("cat", "cats"), label) for text, label in sentences()]
        other = load_texts(write_table(tmp_path / "c.csv", changed), **ONE_SPLIT)
        assert one.fingerprint != other.train.fingerprint

    def test_labels_do_not_change_it(self, table):
        data = load_texts(table)
        noisy = add_label_noise(data, "symmetric:0.3", seed=0)
        assert noisy.kind == "texts"
        assert noisy.train.fingerprint == data.train.fingerprint
        assert int(np.sum(noisy.train.labels != data.train.labels)) == 13

    def test_a_base_for_images_and_views_are_refused(self, table):
        split = load_texts(table).train
        with pytest.raises(InvalidArgument, match="texts, and the backbone"):
            split.inputs((16, 16, 3))
        with pytest.raises(InvalidArgument, match="no augmentations"):
            split.inputs((), augmentations=2)

    def test_images_refuse_a_base_for_texts(self, photo_folder):
        with pytest.raises(InvalidArgument, match="images, and the backbone"):
            load_images(photo_folder).train.inputs(())

    def test_noise_made_of_images_is_refused(self, table):
        with pytest.raises(InvalidArgument, match=r"instance .* made of images.*texts"):
            add_label_noise(load_texts(table), "instance:0.3", seed=0)


class TestExcerpts:
    def test_a_long_text_is_shortened(self):
        assert excerpt_of("two\n\n words ") == "two words"
        assert excerpt_of("x" * MAX_CHARACTERS) == "x" * MAX_CHARACTERS
        shown = excerpt_of("y" * (MAX_CHARACTERS + 1))
        assert len(shown) == MAX_CHARACTERS
        assert shown.endswith("y…")

    def test_the_file_runs_nothing_in_a_spreadsheet(self, tmp_path):
        rows = [(text, str(n % 2)) for n, text in enumerate((*HOSTILE_TEXTS, ""))]
        data = load_texts(write_table(tmp_path / "t.csv", rows), **ONE_SPLIT)
        write_excerpts([data.train], {}, tmp_path)
        lines = (tmp_path / "texts.jsonl").read_text(encoding="utf-8").split("\n")
        assert len([line for line in lines if line]) == len(HOSTILE_TEXTS)
        cells = next(csv.reader([lines[0]]))
        assert not cells[0].startswith(("=", "+", "-", "@"))
