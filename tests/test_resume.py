"""A run that was stopped and started again: the same to the last bit, whole or not."""

from __future__ import annotations

import errno
import json
import os

import filelock
import keras
import numpy as np
import pytest

from keras_rsft.data import add_label_noise, load_images
from keras_rsft.errors import InvalidArgument, TrainingStalled
from keras_rsft.finetuning import (
    NumberedFolder,
    TrainingSettings,
    checkpoint,
    finetune,
    run_folder,
)
from keras_rsft.finetuning.checkpoint import TrainingCheckpoint, read_state
from keras_rsft.policy_choice import PolicyChoice

TABLES = ("metrics.csv", "ledger.csv", "acceptance_by_class.csv", "samples.csv")
EPOCHS = 5


@pytest.fixture(scope="module")
def noisy(photo_folder):
    return add_label_noise(load_images(str(photo_folder)), "symmetric:0.25", seed=0)


@pytest.fixture(scope="module")
def fit_to(noisy, tiny_base_file, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def fit(output, *, data=noisy, callbacks=(), on_begin=None, **changes):
        options = {"policy": PolicyChoice(threshold=0.8), "epochs": EPOCHS}
        options |= {"batch_size": 8, "learning_rate": 0.05} | changes
        return finetune(
            data, backbone=str(tiny_base_file), settings=TrainingSettings(**options),
            output=output, cache_dir=cache, progress=False, callbacks=callbacks,
            on_begin=on_begin,
        )  # fmt: skip

    return fit


class Killed(BaseException):
    """Nothing catches it, so that nothing is tidied up: a stand-in for `kill -9`."""


@pytest.fixture
def stop_at(monkeypatch):
    """Has training stop after an epoch, once: politely, or killed."""

    def stop_at(epoch, error=KeyboardInterrupt):
        end_epoch = TrainingCheckpoint.on_epoch_end

        def stopping(self, number, logs=None):
            end_epoch(self, number, logs)
            if number + 1 == epoch:
                monkeypatch.setattr(TrainingCheckpoint, "on_epoch_end", end_epoch)
                raise error

        monkeypatch.setattr(TrainingCheckpoint, "on_epoch_end", stopping)

    return stop_at


def assert_same_run(one, other):
    for mine, theirs in ((one.model, other.model), (one.head, other.head)):
        for a, b in zip(mine.variables, theirs.variables, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())
    slots = zip(
        one.head.optimizer.variables, other.head.optimizer.variables, strict=True
    )
    for a, b in slots:
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert one.history == other.history
    for name in TABLES:
        contents = [(run.folder / name).read_bytes() for run in (one, other)]
        assert contents[0] == contents[1], name


class TestGoesOn:
    @pytest.mark.parametrize("stopped_after", [1, 3, EPOCHS])
    def test_equal_to_the_run_that_was_never_stopped(
        self, fit_to, tmp_path, stop_at, stopped_after
    ):
        whole = fit_to(tmp_path / "whole")
        stop_at(stopped_after)
        with pytest.raises(KeyboardInterrupt) as stop:
            fit_to(tmp_path / "stopped")
        assert f"{stopped_after} of {EPOCHS} epochs are kept" in stop.value.__notes__[0]
        assert not (tmp_path / "stopped").exists()
        begun = []
        again = fit_to(tmp_path / "stopped", on_begin=lambda *how: begun.append(how))
        assert_same_run(again, whole)
        assert begun == [(tmp_path / "stopped", True)]
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "stopped"}

    @pytest.mark.parametrize(
        "policy",
        [
            PolicyChoice("auto"),
            PolicyChoice("loss-mixture", warmup_epochs=1),
            PolicyChoice("running-threshold", warmup_epochs=1),
            PolicyChoice("keep-fraction", warmup_epochs=4),
        ],
        ids=lambda choice: choice.name,
    )
    def test_what_policies_have_learnt_is_kept(self, fit_to, tmp_path, stop_at, policy):
        changes = {"policy": policy, "optimizer": "adam"}
        whole = fit_to(tmp_path / "whole", **changes)
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_to(tmp_path / "stopped", **changes)
        assert_same_run(fit_to(tmp_path / "stopped", **changes), whole)

    def test_only_the_epochs_that_are_left_are_trained(self, fit_to, tmp_path, stop_at):
        seen = []

        class Epochs(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                seen.append(epoch)

        stop_at(3)
        with pytest.raises(KeyboardInterrupt):
            fit_to(tmp_path / "run", callbacks=[Epochs()])
        fit_to(tmp_path / "run", callbacks=[Epochs()])
        assert seen == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("stopped_after", [2, 3, 4])
    def test_callbacks_remember(self, fit_to, tmp_path, stop_at, stopped_after):
        # Loss never falls by 10, so training ends after epoch 4, the first one's
        # weights come back, and the learning rate falls twice.
        def callbacks():
            return [
                keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=10),
                keras.callbacks.EarlyStopping(
                    "loss", patience=3, min_delta=10, restore_best_weights=True
                ),
            ]

        whole = fit_to(tmp_path / "whole", callbacks=callbacks())
        assert len(whole.history["loss"]) == 4
        stop_at(stopped_after)
        with pytest.raises(KeyboardInterrupt):
            fit_to(tmp_path / "stopped", callbacks=callbacks())
        assert_same_run(fit_to(tmp_path / "stopped", callbacks=callbacks()), whole)

    def test_killed_it_goes_on_from_the_last_state_on_disk(
        self, fit_to, tmp_path, stop_at, monkeypatch
    ):
        whole = fit_to(tmp_path / "whole")
        monkeypatch.setattr(checkpoint, "TIMES_ITS_COST", 0.0)
        monkeypatch.setattr(TrainingCheckpoint.__init__, "__kwdefaults__",
                            {"seconds_between": 0.0})  # fmt: skip
        stop_at(3, Killed)
        with pytest.raises(Killed):
            fit_to(tmp_path / "killed")
        state = read_state(tmp_path / "killed.unfinished" / "training.npz")
        assert state.epochs_done == 3
        assert_same_run(fit_to(tmp_path / "killed"), whole)

    def test_a_quick_training_is_not_slowed_down_by_writing(
        self, fit_to, tmp_path, monkeypatch
    ):
        def write(*_):
            raise AssertionError("Written after less than ten seconds.")

        monkeypatch.setattr(checkpoint, "write_state", write)
        fit_to(tmp_path / "run")

    @pytest.mark.parametrize("damage", ["truncated", "empty", "not ours"])
    def test_a_damaged_state_is_not_read(self, fit_to, tmp_path, stop_at, damage):
        stop_at(3)
        with pytest.raises(KeyboardInterrupt):
            fit_to(tmp_path / "run")
        path = tmp_path / "run.unfinished" / "training.npz"
        content = path.read_bytes()
        path.write_bytes(
            {"truncated": content[:-100], "empty": b"", "not ours": b"hello"}[damage]
        )
        assert read_state(path) is None
        assert len(fit_to(tmp_path / "run").history["loss"]) == EPOCHS

    def test_other_features_begin_anew(self, fit_to, tmp_path, stop_at, monkeypatch):
        stop_at(3)
        with pytest.raises(KeyboardInterrupt):
            fit_to(tmp_path / "run")
        path = tmp_path / "run.unfinished" / "training.npz"
        state = read_state(path)
        state.belongs_to["features"] = ["of", "another base"]
        checkpoint.write_state(path, state)
        losses = []
        note = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: losses.append(epoch)
        )
        monkeypatch.setattr(
            "keras_rsft.finetuning.run.options_of", lambda callback: "none"
        )
        with pytest.raises(InvalidArgument, match="with other callbacks"):
            fit_to(tmp_path / "run", callbacks=[note])
        assert len(fit_to(tmp_path / "run").history["loss"]) == EPOCHS


class TestPlaces:
    def test_a_number_is_taken_once_and_an_unfinished_run_found(
        self, fit_to, tmp_path, stop_at
    ):
        numbered = NumberedFolder("run", tmp_path)
        assert fit_to(numbered, epochs=1).folder == tmp_path / "run-1"
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_to(numbered)
        # Another run neither goes on with it nor takes its number.
        assert fit_to(numbered, epochs=2).folder == tmp_path / "run-3"
        assert fit_to(numbered).folder == tmp_path / "run-2"
        assert fit_to(numbered).folder == tmp_path / "run-4"
        assert not list(tmp_path.glob("*.unfinished"))

    def test_an_unfinished_run_with_other_settings_is_not_touched(
        self, fit_to, tmp_path, stop_at
    ):
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_to(tmp_path / "run")
        state = tmp_path / "run.unfinished" / "training.npz"
        before = state.read_bytes()
        with pytest.raises(InvalidArgument, match="with other settings"):
            fit_to(tmp_path / "run", seed=1)
        assert state.read_bytes() == before

    def test_other_labels_are_another_run(self, fit_to, noisy, tmp_path, stop_at):
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_to(tmp_path / "run")
        clean = add_label_noise(noisy, "symmetric:0.1", seed=4)
        with pytest.raises(InvalidArgument, match="with other data"):
            fit_to(tmp_path / "run", data=clean)

    def test_a_begun_run_without_a_state_is_anybodys(self, fit_to, tmp_path):
        unfinished = tmp_path / "run.unfinished"
        unfinished.mkdir()
        (unfinished / "identity.json").write_text('{"half": ')
        (unfinished / "run").mkdir()
        (unfinished / "run" / "model.keras").write_bytes(b"half")
        assert fit_to(tmp_path / "run", epochs=1).folder.is_dir()
        assert not unfinished.exists()

    def test_what_another_process_holds_is_not_taken(self, fit_to, tmp_path):
        (tmp_path / "run-1.unfinished").mkdir()
        with filelock.FileLock(tmp_path / "run-1.unfinished" / ".lock"):
            with pytest.raises(InvalidArgument, match="Another process"):
                fit_to(tmp_path / "run-1", epochs=1)
            numbered = NumberedFolder("run", tmp_path)
            assert fit_to(numbered, epochs=1).folder == tmp_path / "run-2"

    def test_a_folder_of_the_users_is_not_touched(self, fit_to, tmp_path):
        mine = tmp_path / "run-1.unfinished" / "thesis.txt"
        mine.parent.mkdir()
        mine.write_text("mine")
        with pytest.raises(InvalidArgument, match="no unfinished run"):
            fit_to(tmp_path / "run-1", epochs=1)
        fit_to(NumberedFolder("run", tmp_path), epochs=1)
        assert mine.read_text() == "mine"

    def test_killed_just_before_it_was_cleared_away(self, fit_to, tmp_path):
        numbered = NumberedFolder("run", tmp_path)
        first = fit_to(numbered, epochs=1)
        results = (first.folder / "results.json").read_bytes()
        (tmp_path / "run-1.unfinished").mkdir()
        (tmp_path / "run-1.unfinished" / "identity.json").write_text("{}")
        fit_to(numbered, epochs=1)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"run-1", "run-2"}
        assert (first.folder / "results.json").read_bytes() == results

    def test_an_error_of_the_user_leaves_nothing(self, fit_to, tmp_path):
        hopeless = PolicyChoice(threshold=1e-6, warmup_epochs=0)
        with (
            pytest.warns(UserWarning, match="accepted no"),
            pytest.raises(TrainingStalled),
        ):
            fit_to(tmp_path / "run", policy=hopeless)
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
        self, fit_to, tmp_path, monkeypatch, error
    ):
        whole = fit_to(tmp_path / "whole")

        def full(*_):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(run_folder, "_versions", full)
            with pytest.raises(OSError, match="Make room, and run the same"):
                fit_to(tmp_path / "run")
        unfinished = tmp_path / "run.unfinished"
        assert read_state(unfinished / "training.npz").epochs_done == EPOCHS
        assert not (unfinished / "run").exists()
        assert_same_run(fit_to(tmp_path / "run"), whole)

    def test_a_state_that_does_not_fit_leaves_the_one_before(
        self, fit_to, tmp_path, stop_at, monkeypatch
    ):
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_to(tmp_path / "run")
        path = tmp_path / "run.unfinished" / "training.npz"
        before = path.read_bytes()

        def half(beside, state):
            beside.write_bytes(before[:50])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(beside))

        stop_at(4)
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "write_state", half)
            with pytest.raises(KeyboardInterrupt):
                fit_to(tmp_path / "run")
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.glob(".partial-*")] == []


def test_the_identity_is_readable(fit_to, tmp_path, stop_at):
    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        fit_to(tmp_path / "run")
    kept = json.loads((tmp_path / "run.unfinished" / "identity.json").read_text())
    assert kept["settings"]["epochs"] == EPOCHS
    assert set(kept["versions"]) == {"keras_rsft", "keras", "tensorflow", "numpy"}
