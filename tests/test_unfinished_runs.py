"""Where an unfinished run lies: whose it is, what is kept, and a full disk."""

from __future__ import annotations

import errno
import json
import os

import filelock
import pytest
from same_run import assert_same_run

from keras_rsft import _storage
from keras_rsft._storage import NumberedFolder
from keras_rsft.cli._commands import data_name
from keras_rsft.config import PolicyConfig
from keras_rsft.data._labels import add_label_noise
from keras_rsft.errors import InvalidArgument, TrainingStalled
from keras_rsft.training import _resume as resume
from keras_rsft.training._resume import read_state

pytestmark = pytest.mark.usefixtures("eager")

EPOCHS = 5


class TestPlaces:
    @pytest.mark.slow
    def test_a_number_is_taken_once_and_an_unfinished_run_found(
        self, fit_photos, tmp_path, stop_at
    ):
        numbered = NumberedFolder("run", tmp_path)
        assert fit_photos(numbered, epochs=1).folder == tmp_path / "run-1"
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(numbered)
        # Another run neither goes on with it nor takes its number.
        assert fit_photos(numbered, epochs=2).folder == tmp_path / "run-3"
        assert fit_photos(numbered).folder == tmp_path / "run-2"
        assert fit_photos(numbered).folder == tmp_path / "run-4"
        assert not list(tmp_path.glob("*.unfinished"))

    @pytest.mark.parametrize(
        "name, called",
        [("photos", "photos"), ("x" * 244, "x" * 200), ("ä" * 127, "ä" * 100)],
    )
    def test_a_folder_is_named_after_the_data_as_far_as_there_is_room(
        self, name, called, tmp_path
    ):
        (tmp_path / name).mkdir()
        assert data_name(str(tmp_path / name)) == called
        (tmp_path / f".partial-compare-{called}-12345.unfinished-12345678").mkdir()

    def test_an_unfinished_run_with_other_settings_is_not_touched(
        self, fit_photos, tmp_path, stop_at
    ):
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "run")
        state = tmp_path / "run.unfinished" / "training.npz"
        before = state.read_bytes()
        with pytest.raises(InvalidArgument, match="with other settings"):
            fit_photos(tmp_path / "run", seed=1)
        assert state.read_bytes() == before

    def test_other_labels_are_another_run(
        self, fit_photos, noisy_photos, tmp_path, stop_at
    ):
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "run")
        clean = add_label_noise(noisy_photos, "symmetric:0.1", seed=4)
        with pytest.raises(InvalidArgument, match="with other data"):
            fit_photos(tmp_path / "run", data=clean)

    def test_a_begun_run_without_a_state_is_anybodys(self, fit_photos, tmp_path):
        unfinished = tmp_path / "run.unfinished"
        unfinished.mkdir()
        (unfinished / "identity.json").write_text('{"half": ')
        (unfinished / "run").mkdir()
        (unfinished / "run" / "model.keras").write_bytes(b"half")
        assert fit_photos(tmp_path / "run", epochs=1).folder.is_dir()
        assert not unfinished.exists()

    def test_what_another_process_holds_is_not_taken(self, fit_photos, tmp_path):
        (tmp_path / "run-1.unfinished").mkdir()
        with filelock.FileLock(tmp_path / "run-1.unfinished" / ".lock"):
            with pytest.raises(InvalidArgument, match="Another process"):
                fit_photos(tmp_path / "run-1", epochs=1)
            numbered = NumberedFolder("run", tmp_path)
            assert fit_photos(numbered, epochs=1).folder == tmp_path / "run-2"

    def test_a_folder_of_the_users_is_not_touched(self, fit_photos, tmp_path):
        mine = tmp_path / "run-1.unfinished" / "thesis.txt"
        mine.parent.mkdir()
        mine.write_text("mine")
        with pytest.raises(InvalidArgument, match="no unfinished run"):
            fit_photos(tmp_path / "run-1", epochs=1)
        fit_photos(NumberedFolder("run", tmp_path), epochs=1)
        assert mine.read_text() == "mine"

    def test_killed_just_before_it_was_cleared_away(self, fit_photos, tmp_path):
        numbered = NumberedFolder("run", tmp_path)
        first = fit_photos(numbered, epochs=1)
        results = (first.folder / "results.json").read_bytes()
        (tmp_path / "run-1.unfinished").mkdir()
        (tmp_path / "run-1.unfinished" / "identity.json").write_text("{}")
        fit_photos(numbered, epochs=1)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"run-1", "run-2"}
        assert (first.folder / "results.json").read_bytes() == results

    def test_an_error_of_the_user_leaves_nothing(self, fit_photos, tmp_path):
        hopeless = PolicyConfig(threshold=1e-6, warmup_epochs=0)
        with (
            pytest.warns(UserWarning, match="accepted no"),
            pytest.raises(TrainingStalled),
        ):
            fit_photos(tmp_path / "run", policy=hopeless)
        assert list(tmp_path.iterdir()) == []


class TestFullDisk:
    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            OSError("Can't write data (file write failed: errno = 28, ...)"),
        ],
        ids=["the system's", "HDF5's"],
    )
    def test_says_so_and_goes_on_once_there_is_room(
        self, fit_photos, whole_run, tmp_path, monkeypatch, error
    ):
        def full(*_):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(_storage, "installed_versions", full)
            with pytest.raises(OSError, match="Make room, and run the same"):
                fit_photos(tmp_path / "run")
        unfinished = tmp_path / "run.unfinished"
        assert read_state(unfinished / "training.npz").epochs_done == EPOCHS
        assert not (unfinished / "run").exists()
        assert_same_run(fit_photos(tmp_path / "run"), whole_run)

    def test_a_state_that_does_not_fit_leaves_the_one_before(
        self, fit_photos, tmp_path, stop_at, monkeypatch
    ):
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "run")
        path = tmp_path / "run.unfinished" / "training.npz"
        before = path.read_bytes()

        def half(beside, state):
            beside.write_bytes(before[:50])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(beside))

        stop_at(4)
        with monkeypatch.context() as patched:
            patched.setattr(resume, "write_state", half)
            with pytest.raises(KeyboardInterrupt):
                fit_photos(tmp_path / "run")
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.glob(".partial-*")] == []


def test_the_identity_is_readable(fit_photos, tmp_path, stop_at):
    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        fit_photos(tmp_path / "run")
    kept = json.loads((tmp_path / "run.unfinished" / "identity.json").read_text())
    assert kept["settings"]["epochs"] == EPOCHS
    assert set(kept["versions"]) == {"keras_rsft", "keras", "tensorflow", "numpy"}
