"""Training on several devices of one process equals training on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from made_features import split_features

from keras_rsft._runtime import Cluster, check_strategy
from keras_rsft.errors import InvalidArgument
from keras_rsft.features._batches import BatchShare, TrainingBatches, batches_of
from keras_rsft.features._extract import FrozenBackbone
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._threshold import AcceptAll, KeepFraction

SCORES = "sparse_categorical_crossentropy"
CASES = (
    "batch", "sample", "keep", "auto", "running", "mixture", "nan",
    "nan, all else accepted", "mixed_bfloat16", "mixed_float16", "nothing",
)  # fmt: skip


@pytest.fixture(scope="module")
def compared():
    """What `three_devices.py` prints, from a process that has three devices."""
    program = Path(__file__).with_name("three_devices.py")
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_three_devices_train_like_one(compared, case):
    found = compared[case]
    half = case.startswith("mixed")
    assert found["variables"] < 1e-5
    assert found["copies"] == 0
    assert found["history"] < (1e-3 if half else 1e-5)
    assert found["ledger"] < (1e-2 if half else 1e-4)
    nothing = case == "nothing"
    assert found["unchanged"] == nothing
    assert any(rate > 0 for rate in found["rates"]) != nothing


@pytest.mark.slow
def test_features_and_whole_runs_are_the_same(compared):
    assert compared["features"] == {"equal": True, "devices": 3}
    assert compared["run"]["variables"] < 1e-5
    assert compared["run"]["accepted"]


@pytest.fixture(scope="module")
def strategy():
    return tf.distribute.MirroredStrategy(["CPU:0"])


def made_model(**options):
    head = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model = RSFTModel(head, options.pop("policy", AcceptAll)())
    model.compile(
        options.pop("optimizer", "sgd"), options.pop("loss", SCORES), **options
    )
    return model


@pytest.mark.parametrize(
    "options, said",
    [
        ({"steps_per_execution": 2}, "steps_per_execution=1"),
        ({"jit_compile": True}, "jit_compile=False"),
        (
            {"optimizer": lambda: keras.optimizers.SGD(gradient_accumulation_steps=2)},
            "gradient_accumulation_steps",
        ),
        (
            {
                "optimizer": lambda: keras.optimizers.SGD(
                    use_ema=True, ema_overwrite_frequency=2
                )
            },
            "ema_overwrite_frequency",
        ),
        (
            {"loss": keras.losses.SparseCategoricalCrossentropy(reduction="sum")},
            "sum_over_batch_size",
        ),
        ({"policy": lambda: KeepFraction(0.5, level="element")}, "level='sample'"),
        ({"loss": [SCORES, "mse"]}, "Several outputs"),
    ],
)
def test_what_keras_cannot_do_is_refused(strategy, options, said):
    options = dict(options)
    with strategy.scope():
        if "optimizer" in options:
            options["optimizer"] = options["optimizer"]()
        model = made_model(**options)
    with pytest.raises(InvalidArgument, match=said):
        model.fit(np.zeros((4, 4)), np.zeros(4), verbose=0)


@pytest.mark.filterwarnings("ignore:Epoch 1")
def test_a_gradient_that_is_not_finite_changes_nothing(strategy):
    class Root(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(1,), initializer="ones")

        def call(self, x):  # Its gradient is NaN at 0.
            return x + keras.ops.sqrt(keras.ops.square(self.scale * x))

    with strategy.scope():
        network = [keras.Input((4,)), Root(), keras.layers.BatchNormalization()]
        network.append(keras.layers.Dense(3))
        model = RSFTModel(keras.Sequential(network), AcceptAll())
        adam = keras.optimizers.Adam()
        model.compile(adam, keras.losses.SparseCategoricalCrossentropy(True))
        adam.build(model.trainable_variables)
    seen = []
    x = np.random.default_rng(0).normal(size=(4, 4))
    for rows in (x, x * (np.arange(4) > 0)[:, None]):
        history = model.fit(rows, np.arange(4) % 3, verbose=0).history
        state = [v.numpy() for v in [*model.model.variables, *adam.variables]]
        steps = model.selection_totals()["steps_not_finite"]
        seen.append((state, history["acceptance_rate"], steps))
    (trained, *good), (after, *bad) = seen
    assert good == [[1.0], 0]
    assert bad == [[0.0], 1]
    for value, other in zip(after, trained, strict=True):
        np.testing.assert_array_equal(value, other)


def test_a_model_made_outside_of_the_scope_is_refused(strategy):
    model = made_model(policy=lambda: KeepFraction(0.5))
    with strategy.scope(), pytest.raises(InvalidArgument, match="in the scope"):
        model.fit(np.zeros((4, 4)), np.zeros(4), verbose=0)


class TestShare:
    @pytest.mark.parametrize("rows, batch_size", [(23, 8), (17, 8), (16, 8), (9, 5)])
    def test_gives_each_row_to_one_replica_in_order(self, rows, batch_size):
        replicas = 5
        parts = []
        for replica in range(replicas):
            share = BatchShare(replicas, first=replica, count=1)
            (own,) = share.of_order((tf.range(rows),), batch_size)
            parts.append(own.numpy())
        for start in range(0, rows, batch_size):
            batch = range(start, min(start + batch_size, rows))
            got = [row for part in parts for row in part if row in batch]
            assert got == list(batch)

    def test_batches_are_those_of_one_process(self, tmp_path):
        train = split_features(tmp_path).train
        options = {"batch_size": 16, "seed": 3, "sample_index": True}
        whole = [
            batch[3].numpy() for batch in TrainingBatches(train, **options).dataset
        ]
        mine = [
            TrainingBatches(train, **options, share=BatchShare(3, first, count)).dataset
            for first, count in ((0, 2), (2, 1))
        ]
        first, second = ([e[3].numpy() for e in part] for part in mine)
        # 101 rows: six batches of 16 and one of 5, which is the first replica's.
        assert [len(part) for part in first] == [5, 5] * 6 + [5]
        assert [len(part) for part in second] == [6] * 6
        for number, batch in enumerate(whole[:6]):
            joined = [*first[2 * number : 2 * number + 2], second[number]]
            np.testing.assert_array_equal(np.concatenate(joined), batch)
        np.testing.assert_array_equal(first[-1], whole[-1])

    def test_needs_a_row_for_each_replica(self, tmp_path):
        features = split_features(tmp_path).test
        with pytest.raises(InvalidArgument, match="at least their number, 3"):
            batches_of(features, batch_size=2, share=BatchShare(3, 0, 3))


def test_several_workers_are_those_of_tf_config():
    cluster = {"worker": ["a:1", "b:1"]}
    config = {"cluster": cluster, "task": {"type": "worker", "index": 1}}
    environment = {"TF_CONFIG": json.dumps(config)}
    assert check_strategy("multiworker", environment) == Cluster(("a:1", "b:1"), 1)
    assert check_strategy("mirrored", environment) == Cluster()  # Needs none.
    with pytest.raises(InvalidArgument, match="TF_CONFIG"):
        check_strategy("multiworker", {})
    with pytest.raises(InvalidArgument, match="strategy"):
        check_strategy("mirored")


def test_the_command_line_needs_tf_config(call, monkeypatch, folder):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    status, _, err = call("fit", folder, "--strategy", "multiworker")
    assert status == 2
    assert "TF_CONFIG" in err


def test_a_part_of_the_base_is_trained_on_one_device(call, folder):
    status, _, err = call("fit", folder, "--strategy", "mirrored", "--unfreeze", "1")
    assert status == 2
    assert "--strategy" in err


def test_one_device_runs_the_base_as_before(tiny_base):
    frozen = FrozenBackbone(tiny_base)
    images = [np.full((2, 16, 16, 3), 10.0 * n, "float32") for n in range(3)]
    pairs = list(frozen.over(enumerate(images)))
    assert [number for number, _ in pairs] == [0, 1, 2]
    for (_, features), batch in zip(pairs, images, strict=True):
        np.testing.assert_array_equal(features, frozen.forward(batch).numpy())
