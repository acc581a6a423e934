"""Saving, going on, and the callbacks of Keras around an RSFTModel."""

from __future__ import annotations

import csv
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._threshold import AcceptAll, KeepFraction, LossThreshold

SCORES = "sparse_categorical_crossentropy"


def compiled(inner, policy=None, *, run_eagerly=True, **optimizer_options):
    model = RSFTModel(inner, policy or LossThreshold(1.1, warmup_steps=2))
    optimizer = keras.optimizers.Adam(0.02, **optimizer_options)
    model.compile(optimizer, SCORES, metrics=["accuracy"], run_eagerly=run_eagerly)
    return model


def fit(model, data, epochs=2, **options):
    options = {"batch_size": 16, "shuffle": False, "verbose": 0} | options
    return model.fit(*data, epochs=epochs, **options).history


def assert_same(one, other):
    values = zip(one.variables, other.variables, strict=True)
    assert all(np.array_equal(a, b) for a, b in values)
    slots = zip(one.optimizer.variables, other.optimizer.variables, strict=True)
    assert all(np.array_equal(a, b) for a, b in slots)


class TestKerasFile:
    def test_goes_on_bit_for_bit(self, make_model, small_data, tmp_path):
        model = compiled(make_model(), run_eagerly=False)
        fit(model, small_data)
        model.policy.threshold.assign(0.9)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
        assert float(loaded.policy.threshold) == pytest.approx(0.9)
        assert int(loaded.policy.steps_seen) == 6
        assert_same(loaded, model)
        assert fit(loaded, small_data) == fit(model, small_data)
        assert_same(loaded, model)

    @pytest.mark.parametrize(
        "policy",
        [
            AcceptAll(),
            LossThreshold(0.7, level="batch", warmup_steps=3),
            KeepFraction(0.6, ramp_steps=4),
        ],
        ids=lambda policy: type(policy).__name__,
    )
    def test_configs_come_back(self, policy, make_model):
        model = RSFTModel(make_model(), policy)
        copy = RSFTModel.from_config(model.get_config())
        assert type(copy.policy) is type(policy)
        numbers = {"name", "dtype"}
        mine, its = policy.get_config(), copy.policy.get_config()
        assert {k: v for k, v in mine.items() if k not in numbers} == {
            k: v for k, v in its.items() if k not in numbers
        }
        assert copy.policy.level == policy.level

    def test_weights_alone(self, make_model, small_data, tmp_path):
        model = compiled(make_model())
        fit(model, small_data)
        model.save_weights(tmp_path / "model.weights.h5")
        fresh = compiled(make_model())
        fresh.load_weights(tmp_path / "model.weights.h5")
        np.testing.assert_array_equal(
            fresh.predict(small_data[0], verbose=0),
            model.predict(small_data[0], verbose=0),
        )

    @pytest.mark.parametrize("kind", ["nested", "built lazily"])
    def test_any_structure_comes_back(self, kind, make_model, small_data, tmp_path):
        head = keras.layers.Dense(3, activation="softmax")
        if kind == "nested":
            inputs = keras.Input((8,))
            inner = keras.Model(inputs, head(make_model()(inputs)))
        else:
            inner = keras.Sequential([keras.layers.Dropout(0.5, seed=1), head])
        model = compiled(inner)
        fit(model, small_data)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert_same(loaded, model)
        assert fit(loaded, small_data) == fit(model, small_data)

    def test_an_unknown_class_is_named(self, small_data, tmp_path):
        class Unknown(keras.Model):
            def call(self, inputs):
                return inputs

        model = RSFTModel(Unknown(), AcceptAll())
        model(small_data[0])
        model.save(tmp_path / "model.keras")
        with pytest.raises(TypeError, match="Could not locate class 'Unknown'"):
            keras.saving.load_model(tmp_path / "model.keras")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "imported", ["import keras_rsft", "from keras_rsft import RSFTModel"]
    )
    def test_loads_in_a_fresh_process(self, make_model, small_data, tmp_path, imported):
        model = compiled(make_model())
        fit(model, small_data)
        model.save(tmp_path / "model.keras")
        program = textwrap.dedent(f"""
            import keras
            {imported}
            model = keras.saving.load_model({str(tmp_path / "model.keras")!r})
            print(type(model).__name__, int(model.policy.steps_seen))
        """)
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert result.stdout.split() == ["RSFTModel", "6"]


def test_what_is_exported_is_the_wrapped_model(make_model, small_data, tmp_path):
    model = compiled(make_model())
    fit(model, small_data, epochs=1)
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    expected = model.predict(small_data[0], verbose=0)
    np.testing.assert_allclose(exported.serve(small_data[0]), expected, atol=1e-5)


class TestCallbacks:
    def test_an_interrupted_run_resumes_bit_for_bit(
        self, make_model, small_data, tmp_path
    ):
        whole = compiled(make_model())
        fit(whole, small_data, epochs=4)

        def stop(epoch, logs):
            if epoch == 2:
                raise KeyboardInterrupt

        cut = compiled(make_model())
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        note = keras.callbacks.LambdaCallback(on_epoch_begin=stop)
        with pytest.raises(KeyboardInterrupt):
            fit(cut, small_data, epochs=4, callbacks=[backup, note])
        resumed = compiled(make_model())
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        fit(resumed, small_data, epochs=4, callbacks=[backup])
        assert_same(resumed, whole)

    def test_checkpoint_csv_and_schedules(self, make_model, small_data, tmp_path):
        model = compiled(make_model())
        rates = []
        history = fit(
            model,
            small_data,
            epochs=3,
            validation_data=small_data,
            callbacks=[
                keras.callbacks.ModelCheckpoint(
                    tmp_path / "best.keras", monitor="val_loss", save_best_only=True
                ),
                keras.callbacks.CSVLogger(tmp_path / "log.csv"),
                keras.callbacks.LearningRateScheduler(lambda epoch: 0.02 / (epoch + 1)),
                keras.callbacks.ReduceLROnPlateau("accepted_loss", mode="min"),
                keras.callbacks.LambdaCallback(
                    on_epoch_end=lambda epoch, logs: rates.append(
                        float(model.optimizer.learning_rate)
                    )
                ),
            ],
        )
        best = keras.saving.load_model(tmp_path / "best.keras")
        loss = float(best.evaluate(*small_data, verbose=0)[0])
        assert loss == pytest.approx(min(history["val_loss"]), rel=1e-4)
        with (tmp_path / "log.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [float(row["acceptance_rate"]) for row in rows] == pytest.approx(
            history["acceptance_rate"]
        )
        assert rates == pytest.approx([0.02, 0.01, 0.02 / 3])

    def test_early_stopping_restores_the_best(self, make_model, small_data):
        model = compiled(make_model())
        stop = keras.callbacks.EarlyStopping(
            monitor="acceptance_rate", mode="max", patience=1, restore_best_weights=True
        )
        history = fit(model, small_data, epochs=20, callbacks=[stop])
        assert 2 <= len(history["loss"]) < 20
        assert stop.best == max(history["acceptance_rate"])

    def test_tensorboard(self, make_model, small_data, tmp_path):
        pytest.importorskip("tensorboard")
        board = keras.callbacks.TensorBoard(tmp_path / "logs")
        fit(compiled(make_model()), small_data, callbacks=[board])
        assert list(tmp_path.glob("logs/train/events*"))

    def test_a_rejected_nan_does_not_end_training(self, small_data):
        x = small_data[0].copy()
        x[5] = np.nan
        inner = keras.Sequential(
            [keras.Input((8,)), keras.layers.Dense(3, activation="softmax")]
        )
        callbacks = [keras.callbacks.TerminateOnNaN()]
        with pytest.warns(UserWarning, match="1 of 48 samples had a loss of NaN"):
            history = fit(compiled(inner), (x, small_data[1]), callbacks=callbacks)
        assert len(history["loss"]) == 2

    @pytest.mark.filterwarnings("ignore:Epoch . accepted no sample")
    @pytest.mark.parametrize("swap", [True, False])
    def test_averages_never_wipe_out_the_weights(self, make_model, small_data, swap):
        model = compiled(make_model(), LossThreshold(1e-9), use_ema=True)
        before = model.get_weights()
        callbacks = [keras.callbacks.SwapEMAWeights()] if swap else []
        fit(model, small_data, callbacks=callbacks, validation_data=small_data)
        for value, expected in zip(model.get_weights()[:8], before[:8], strict=True):
            np.testing.assert_array_equal(value, expected)
