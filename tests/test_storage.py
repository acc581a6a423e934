"""Files and folders appear whole or not at all, and never through a link."""

from __future__ import annotations

import contextlib
import os

import pytest

from keras_rsft._storage import (
    HEAD_STATE,
    NumberedFolder,
    highest_number,
    locked,
    numbered,
    open_place,
    replaced,
    write_new_file,
    written_whole,
)
from keras_rsft.errors import InvalidArgument


class Stop(BaseException):
    """Nothing catches it."""


@contextlib.contextmanager
def stopped():
    with pytest.raises(Stop):
        yield


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestFiles:
    def test_a_file_is_replaced_whole_or_stays(self, tmp_path):
        path = tmp_path / "state.json"
        path.write_text("old")

        def half(beside):
            beside.write_text("ha")
            raise Stop

        with pytest.raises(Stop):
            replaced(path, half)
        assert (path.read_text(), names(tmp_path)) == ("old", ["state.json"])
        replaced(path, lambda beside: beside.write_text("new"))
        assert (path.read_text(), names(tmp_path)) == ("new", ["state.json"])

    def test_a_link_is_replaced_and_not_followed(self, tmp_path):
        mine = tmp_path / "mine"
        mine.write_text("mine")
        link = tmp_path / "state.json"
        link.symlink_to(mine)
        replaced(link, lambda beside: beside.write_text("new"))
        assert not link.is_symlink()
        assert (mine.read_text(), link.read_text()) == ("mine", "new")

    def test_what_is_written_beside_cannot_be_foreseen(self, tmp_path):
        seen = set()
        for _ in range(3):
            replaced(
                tmp_path / "state",
                lambda beside: (seen.add(beside), beside.write_text("")),
            )
        assert len(seen) == 3
        assert all(path.name == "state" for path in seen)

    @pytest.mark.parametrize("has_links", [True, False])
    def test_a_new_file_never_replaces_one(self, tmp_path, monkeypatch, has_links):
        if not has_links:

            def refuse(*_):
                raise OSError("No hard links.")

            monkeypatch.setattr(os, "link", refuse)
        path = tmp_path / "folder" / "model.onnx"
        write_new_file(path, b"first")
        with pytest.raises(InvalidArgument, match="exists"):
            write_new_file(path, b"second")
        assert (path.read_bytes(), names(path.parent)) == (b"first", ["model.onnx"])

    def test_a_folder_appears_when_it_is_filled(self, tmp_path):
        target = tmp_path / "run"
        with stopped(), written_whole(target) as partial:
            (partial / "half").touch()
            raise Stop
        assert names(tmp_path) == []
        with written_whole(target) as partial:
            (partial / "whole").touch()
            assert not target.exists()
        assert names(target) == ["whole"]


def test_a_lock_is_held_once(tmp_path):
    path = tmp_path / ".lock"
    busy = InvalidArgument("Busy.")
    with (
        locked(path),
        pytest.raises(InvalidArgument, match="Busy"),
        locked(path, timeout=0.1, taken=busy),
    ):
        pytest.fail("It is held twice.")
    with locked(path, timeout=0, taken=busy):
        pass


def test_numbers(tmp_path):
    for name in ("model-2.onnx", "model-11.onnx", "model-x.onnx", "model-30.tflite"):
        (tmp_path / name).touch()
    assert highest_number(tmp_path, r"model-(\d+)\.onnx") == 11
    assert highest_number(tmp_path / "none", r"(\d+)") == 0
    folders = numbered(tmp_path, "run")
    assert [next(folders).name for _ in range(2)] == ["run-1", "run-2"]


class TestPlaces:
    def test_the_same_run_is_resumed_and_another_is_not(self, tmp_path):
        folder = NumberedFolder("run", tmp_path)
        with stopped(), open_place(folder, {"seed": 1}) as place:
            (place.unfinished / HEAD_STATE).write_bytes(b"state")
            raise Stop
        with open_place(folder, {"seed": 2}) as other:
            assert (other.folder.name, other.resumed) == ("run-2", False)
        with open_place(folder, {"seed": 1}) as place:
            assert (place.folder.name, place.resumed) == ("run-1", True)
            assert (place.unfinished / HEAD_STATE).read_bytes() == b"state"
            place.write(lambda run: (run / "results.json").touch())
        assert names(tmp_path) == ["run-1"]

    def test_what_a_killed_process_was_writing_is_removed(self, tmp_path):
        left = tmp_path / "run-1.unfinished" / ".partial-abc"
        left.mkdir(parents=True)
        with open_place(tmp_path / "run-1", {}) as place:
            assert names(place.unfinished) == [".lock", "identity.json"]

    def test_two_processes_get_two_numbers(self, tmp_path):
        folder = NumberedFolder("run", tmp_path)
        with open_place(folder, {}) as one, open_place(folder, {}) as other:
            assert one.folder != other.folder
        assert names(tmp_path) == []
