"""A run that was stopped and started again: the same to the last bit, whole or not."""

from __future__ import annotations

import keras
import pytest
from same_run import assert_same_run

from keras_rsft.config import PolicyConfig
from keras_rsft.data._labels import apply_corrections
from keras_rsft.errors import InvalidArgument
from keras_rsft.training import _resume as resume
from keras_rsft.training._resume import read_state

pytestmark = pytest.mark.usefixtures("eager")

EPOCHS = 5


@pytest.fixture
def reviewed(noisy_photos, tmp_path):
    """Returns the data after a review of the first training images."""

    train, names = noisy_photos.train, noisy_photos.class_names

    def reviewed(*decisions):
        rows = [
            f"{train.ids[at]},{names[train.labels[at]]},{decision},"
            for at, decision in enumerate(decisions)
        ]
        path = tmp_path.with_name(f"{tmp_path.name}-{'-'.join(decisions)}.csv")
        header = "id,given_label,decision,new_label"
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return apply_corrections(noisy_photos, path)

    return reviewed


class Killed(BaseException):
    """Nothing catches it, so that nothing is tidied up: a stand-in for `kill -9`."""


class TestGoesOn:
    @pytest.mark.parametrize(
        "stopped_after", [1, pytest.param(3, marks=pytest.mark.slow), EPOCHS]
    )
    def test_equal_to_the_run_that_was_never_stopped(
        self, fit_photos, whole_run, tmp_path, stop_at, stopped_after
    ):
        stop_at(stopped_after)
        with pytest.raises(KeyboardInterrupt) as stop:
            fit_photos(tmp_path / "stopped")
        assert f"{stopped_after} of {EPOCHS} epochs are kept" in stop.value.__notes__[0]
        assert not (tmp_path / "stopped").exists()
        begun = []
        again = fit_photos(
            tmp_path / "stopped", on_begin=lambda *how: begun.append(how)
        )
        assert_same_run(again, whole_run)
        assert begun == [(tmp_path / "stopped", True)]
        assert [path.name for path in tmp_path.iterdir()] == ["stopped"]

    @pytest.mark.parametrize(
        "policy",
        [
            PolicyConfig("auto"),
            pytest.param(
                PolicyConfig("running-threshold", warmup_epochs=1),
                marks=pytest.mark.slow,
            ),
            pytest.param(
                PolicyConfig("loss-mixture", warmup_epochs=1), marks=pytest.mark.slow
            ),
            pytest.param(
                PolicyConfig("keep-fraction", warmup_epochs=4), marks=pytest.mark.slow
            ),
        ],
        ids=lambda choice: choice.name,
    )
    def test_what_policies_have_learnt_is_kept(
        self, fit_photos, tmp_path, stop_at, policy
    ):
        changes = {"policy": policy, "optimizer": "adam"}
        whole = fit_photos(tmp_path / "whole", **changes)
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "stopped", **changes)
        assert_same_run(fit_photos(tmp_path / "stopped", **changes), whole)

    @pytest.mark.slow
    def test_the_plain_head_is_the_same(self, fit_photos, tmp_path, stop_at):
        whole = fit_photos(tmp_path / "whole", with_plain=True)
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "stopped", with_plain=True)
        with pytest.raises(InvalidArgument, match="with other with_plain"):
            fit_photos(tmp_path / "stopped")
        again = fit_photos(tmp_path / "stopped", with_plain=True)
        assert again.against_plain is not None
        assert_same_run(again, whole)

    def test_after_a_review(self, fit_photos, reviewed, tmp_path, stop_at):
        changes = {
            "data": reviewed("keep", "drop"),
            "policy": PolicyConfig("loss-mixture", warmup_epochs=1),
        }
        whole = fit_photos(tmp_path / "whole", **changes)
        stop_at(3)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "stopped", **changes)
        # Which label was looked at counts, also where the label stays as it was.
        for decisions in (["keep", "keep"], ["drop"]):
            with pytest.raises(InvalidArgument, match="with other data"):
                fit_photos(
                    tmp_path / "stopped", **changes | {"data": reviewed(*decisions)}
                )
        assert_same_run(fit_photos(tmp_path / "stopped", **changes), whole)

    def test_callbacks_that_are_made_of_the_ledger(self, fit_photos, tmp_path, stop_at):
        seen = []

        class Losses(keras.callbacks.Callback):
            def __init__(self, ledger):
                super().__init__()
                self.ledger = ledger

            def on_epoch_end(self, epoch, logs=None):
                losses, _ = self.ledger.last_epoch
                histograms = self.ledger.loss_histograms
                seen.append((epoch, len(histograms), float(losses.sum())))

        def made(ledger):
            return [Losses(ledger)]

        whole = fit_photos(tmp_path / "whole", callbacks=made)
        unstopped, seen[:] = list(seen), []
        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "stopped", callbacks=made)
        with pytest.raises(InvalidArgument, match="with other callbacks"):
            fit_photos(tmp_path / "stopped", callbacks=lambda ledger: [])
        assert_same_run(fit_photos(tmp_path / "stopped", callbacks=made), whole)
        assert seen == unstopped

    def test_a_function_that_makes_other_callbacks_begins_anew(
        self, fit_photos, tmp_path, stop_at
    ):
        seen = []

        def made(ledger):
            note = keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda epoch, logs: seen.append(epoch)
            )
            return [note, keras.callbacks.TerminateOnNaN()][: 1 + bool(seen)]

        stop_at(2)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "run", callbacks=made)
        fit_photos(tmp_path / "run", callbacks=made)
        assert seen == [0, 1, *range(EPOCHS)]

    def test_only_the_epochs_that_are_left_are_trained(
        self, fit_photos, tmp_path, stop_at
    ):
        seen = []

        class Epochs(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                seen.append(epoch)

        stop_at(3)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "run", callbacks=[Epochs()])
        fit_photos(tmp_path / "run", callbacks=[Epochs()])
        assert seen == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(
        "stopped_after", [2, pytest.param(4, marks=pytest.mark.slow)]
    )
    def test_callbacks_remember(self, fit_photos, tmp_path, stop_at, stopped_after):
        # Loss never falls by 10, so training ends after epoch 4, the first one's
        # weights come back, and the learning rate falls twice.
        def callbacks():
            return [
                keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=10),
                keras.callbacks.EarlyStopping(
                    "loss", patience=3, min_delta=10, restore_best_weights=True
                ),
            ]

        whole = fit_photos(tmp_path / "whole", callbacks=callbacks())
        assert len(whole.history["loss"]) == 4
        stop_at(stopped_after)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "stopped", callbacks=callbacks())
        assert_same_run(fit_photos(tmp_path / "stopped", callbacks=callbacks()), whole)

    def test_killed_it_goes_on_from_the_last_state_on_disk(
        self, fit_photos, whole_run, tmp_path, stop_at, monkeypatch
    ):
        monkeypatch.setattr(resume, "TIMES_ITS_COST", 0.0)
        monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
        stop_at(3, Killed)
        with pytest.raises(Killed):
            fit_photos(tmp_path / "killed")
        state = read_state(tmp_path / "killed.unfinished" / "training.npz")
        assert state.epochs_done == 3
        assert_same_run(fit_photos(tmp_path / "killed"), whole_run)

    def test_a_quick_training_is_not_slowed_down_by_writing(
        self, fit_photos, tmp_path, monkeypatch
    ):
        def write(*_):
            raise AssertionError("Written after less than ten seconds.")

        monkeypatch.setattr(resume, "write_state", write)
        fit_photos(tmp_path / "run")

    def test_a_damaged_state_is_not_read(self, fit_photos, tmp_path, stop_at):
        stop_at(3)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "run")
        path = tmp_path / "run.unfinished" / "training.npz"
        content = path.read_bytes()
        for damaged in (b"", b"hello", content[:-100]):
            path.write_bytes(damaged)
            assert read_state(path) is None
        assert len(fit_photos(tmp_path / "run").history["loss"]) == EPOCHS

    def test_other_features_begin_anew(
        self, fit_photos, tmp_path, stop_at, monkeypatch
    ):
        stop_at(3)
        with pytest.raises(KeyboardInterrupt):
            fit_photos(tmp_path / "run")
        path = tmp_path / "run.unfinished" / "training.npz"
        state = read_state(path)
        state.belongs_to["features"] = ["of", "another base"]
        resume.write_state(path, state)
        losses = []
        note = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: losses.append(epoch)
        )
        monkeypatch.setattr(
            "keras_rsft.training._resume.options_of", lambda callback: "none"
        )
        with pytest.raises(InvalidArgument, match="with other callbacks"):
            fit_photos(tmp_path / "run", callbacks=[note])
        assert len(fit_photos(tmp_path / "run").history["loss"]) == EPOCHS
