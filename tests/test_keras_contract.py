"""What Keras promises holds for a wrapped model: losses logged, states, saving, export.

And what is not finite never reaches the weights, whatever it comes from.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_rsft._ledger import RejectionLedger
from keras_rsft.errors import InvalidArgument
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._listed import AutoPolicy
from keras_rsft.policies._threshold import (
    AcceptAll,
    KeepFraction,
    LossMixture,
    LossThreshold,
    RunningThreshold,
    SelfPaced,
)

SCORES = "sparse_categorical_crossentropy"
POLICIES = {
    "all": AcceptAll,
    "threshold": lambda: LossThreshold(1e9),
    "batch": lambda: LossThreshold(1e9, level="batch"),
    "keep": lambda: KeepFraction(0.7),
    "paced": lambda: SelfPaced(1e9, growth_steps=9),
    "running": lambda: RunningThreshold(9.0, warmup_steps=9),
    "auto": lambda: AutoPolicy(32),
    "mixture": LossMixture,
}
NOT_FINITE = "ignore:Epoch 1"


class Root(layers.Layer):
    """Adds what has a gradient of NaN where the last input is 0."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(1,), initializer="ones")

    def call(self, x):
        return x[:, :2] + ops.sqrt(ops.square(self.scale * x[:, 2:]))


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((3,)),
            Root(),
            layers.Dense(4),
            layers.BatchNormalization(),
            layers.Dropout(0.3, seed=1),
            layers.Dense(2),
            layers.Activation("softmax", dtype="float32"),
        ]
    )


def made_data(last):
    x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    x[:, 2] = last
    return x, np.arange(32) % 2


def states(model):
    variables = [*model.model.variables, *model.optimizer.variables]
    scale = "step_counter", "dynamic_scale"  # A loss scale is there to be lowered.
    return [v.numpy().copy() for v in variables if v.name not in scale]


def assert_same(values, others):
    for value, other in zip(values, others, strict=True):
        np.testing.assert_array_equal(value, other)


MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "several": {"steps_per_execution": 2},
    "mixed_float16": {},
    "mixed_bfloat16": {},
}


# A gradient that is not finite --------------------------------------------------------


@pytest.mark.filterwarnings(NOT_FINITE)
@pytest.mark.parametrize(
    "policy, mode",
    [
        ("all", "graph"), ("all", "xla"), ("all", "eager"), ("threshold", "several"),
        ("threshold", "mixed_float16"), ("batch", "graph"), ("keep", "xla"),
        ("paced", "eager"), ("running", "eager"), ("auto", "graph"),
        ("mixture", "eager"), ("all", "mixed_bfloat16"),
    ],
)  # fmt: skip
def test_a_gradient_that_is_not_finite_changes_nothing(
    policy, mode, dtype_policy, compile_options
):
    if mode.startswith("mixed"):
        dtype_policy(mode)
    model = RSFTModel(network(), POLICIES[policy]())
    optimizer = keras.optimizers.Adam(0.01)
    if mode == "mixed_float16":  # At its default scale the first steps overflow.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0)
    model.compile(optimizer, SCORES, **compile_options(**MODES[mode]))
    seen = []
    for last in (1.0, 0.0):
        x, y = made_data(last)
        ledger = RejectionLedger()
        options = {"batch_size": 16, "shuffle": False, "verbose": 0}
        history = model.fit(x, y, **options, callbacks=[ledger]).history
        assert np.isfinite(history["loss"]).all()
        steps = model.selection_totals()["steps_not_finite"]
        accepted = ledger.ledger.accepted.sum()
        seen.append((states(model), steps, history["acceptance_rate"][0], accepted))
    (trained, *good), (after, *bad) = seen
    assert good[0] == 0
    assert good[1] > 0.5
    assert bad == [2, 0, 0]
    assert_same(after, trained)


@pytest.mark.filterwarnings(NOT_FINITE)
def test_it_is_told_with_the_number_of_steps():
    model = RSFTModel(network(), AcceptAll())
    model.compile("sgd", SCORES, run_eagerly=True)
    x, y = made_data(1.0)
    x[3, 2] = 0
    with pytest.warns(
        UserWarning, match=r"Epoch 1: 1 steps changed nothing.*BatchNorm"
    ):
        history = model.fit(x, y, batch_size=16, shuffle=False, verbose=0).history
    assert history["acceptance_rate"] == [0.5]
    with pytest.warns(UserWarning, match="accepted no sample: no gradient was finite"):
        model.fit(*made_data(0.0), verbose=0)


@pytest.mark.filterwarnings(NOT_FINITE)
@pytest.mark.parametrize("policy", ["all", "threshold", "keep", "batch"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_rejects_its_sample(policy, value):
    x, y = made_data(1.0)
    outcomes = []
    for weights in (np.ones(32), np.where(np.arange(32) == 5, value, 1.0)):
        model = RSFTModel(keras.Sequential([layers.Dense(2)]), POLICIES[policy]())
        model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
        weights = weights.astype("float32")
        options = {"sample_weight": weights, "batch_size": 32, "verbose": 0}
        history = model.fit(x, np.eye(2)[y], **options).history
        outcomes.append((model.model.get_weights(), history))
    (_, whole), (weights, history) = outcomes
    assert all(np.isfinite(weight).all() for weight in weights)
    assert np.isfinite(history["loss"]).all() or policy == "batch"
    assert model.selection_totals()["nonfinite"] == 1
    rates = history["acceptance_rate"][0], whole["acceptance_rate"][0]
    assert rates[0] == (0 if policy == "batch" else pytest.approx(rates[1], abs=1 / 32))


@pytest.mark.filterwarnings(NOT_FINITE)
@pytest.mark.parametrize("policy", ["all", "threshold"])
def test_a_row_that_dropout_hides_does_not_wipe_the_model_out(policy):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 2)), rng.normal(size=(32, 1))
    x[5] = np.nan
    kinds = layers.Dense(1), layers.BatchNormalization(), layers.Dropout(0.5, seed=1)
    inner = keras.Sequential([keras.Input((2,)), *kinds, layers.Dense(1)])
    model = RSFTModel(inner, POLICIES[policy]())
    model.compile("adam", "mse", run_eagerly=True)
    before = states(model)
    history = model.fit(x, y, batch_size=32, verbose=0).history
    assert history["acceptance_rate"] == [0.0]
    assert model.selection_totals()["nonfinite"] < 32, "Dropout hides some"
    assert_same(states(model)[: len(before)], before)


def test_a_state_that_is_not_finite_changes_nothing():
    class Hidden(layers.Layer):
        def call(self, x):
            return ops.where(ops.isfinite(x), x, 0.0)

    inner = keras.Sequential(
        [keras.Input((2,)), layers.BatchNormalization(center=False, scale=False),
         Hidden(), layers.Dense(1)]
    )  # fmt: skip
    model = RSFTModel(inner, AcceptAll())
    model.compile("sgd", "mse", run_eagerly=True)
    before = states(model)
    x = np.ones((4, 2), "float32")
    x[0] = np.nan
    model.train_on_batch(x, np.ones((4, 1)))
    assert_same(states(model)[: len(before)], before)


def test_rows_of_an_embedding_are_looked_at_too():
    table = layers.Embedding(9, 3)
    inner = keras.Sequential([keras.Input((1,)), table, layers.Flatten(), Root()])
    model = RSFTModel(inner, LossThreshold(1e9))
    model.compile("sgd", "mse", run_eagerly=True)
    words = np.array([[1], [2]])
    table.set_weights([np.where(np.arange(27).reshape(9, 3) == 5, 0.0, 1.0)])
    before = states(model)
    model.train_on_batch(words, np.zeros((2, 2)))  # The last entry of the second is 0.
    assert model.selection_totals()["steps_not_finite"] == 1
    assert_same(states(model), before)


@pytest.mark.parametrize("options", [{"learning_rate": np.nan}, {"momentum": np.nan}])
def test_an_optimizer_with_nan_is_refused(options):
    model = RSFTModel(network(), AcceptAll())
    model.compile(keras.optimizers.SGD(**options), SCORES, run_eagerly=True)
    (name,) = options
    with pytest.raises(InvalidArgument, match=f"`{name}` of the optimizer.*SGD"):
        model.fit(*made_data(1.0), verbose=0)


# What is logged -----------------------------------------------------------------------


def constant_model(policy, **options):
    """Every loss is 4 where the input is finite."""
    dense = layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = RSFTModel(keras.Sequential([keras.Input((1,)), dense]), policy)
    model.compile(keras.optimizers.SGD(0.0), "mse", **options)
    return model


@pytest.mark.filterwarnings("ignore:Epoch")
@pytest.mark.parametrize(
    "policy, eagerly", [("all", False), ("threshold", True), ("batch", True)]
)
def test_the_loss_is_of_what_is_finite(policy, eagerly, tmp_path):
    model = constant_model(POLICIES[policy](), run_eagerly=eagerly)
    x, y = np.full((16, 1), 2.0), np.zeros((16, 1))
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    half = np.where(np.arange(16)[:, None] < 8, np.nan, x)
    assert model.fit(half, y, **options).history["loss"] == [4.0]
    uneven = np.where(np.arange(16)[:, None] == 5, np.nan, x)
    weights = np.where(np.arange(16) < 4, 3.0, 1.0)  # 4 of 12 and 11 of 4.
    history = model.fit(uneven, y, sample_weight=weights, **options).history
    assert history["loss"] == [pytest.approx((4 * 12 + 11 * 4) / 15)]

    class Spoil(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.model.layers[-1].kernel.assign([[np.nan if epoch else 1.0]])

    best = str(tmp_path / "best.keras")
    callbacks = [
        Spoil(),
        keras.callbacks.ModelCheckpoint(best, monitor="loss", save_best_only=True),
        keras.callbacks.TerminateOnNaN(),
    ]
    history = model.fit(x, y, epochs=4, callbacks=callbacks, **options).history
    np.testing.assert_array_equal(history["loss"], [4.0, np.nan])
    assert keras.models.load_model(best).get_weights()[0] == 1


def two_outputs():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    hidden = layers.Dense(4, activation="tanh")(inputs)
    outputs = {
        "a": layers.Dense(2, activation="softmax", name="a")(hidden),
        "b": layers.Dense(1, name="b")(hidden),
    }
    return keras.Model(inputs, outputs)


@pytest.mark.filterwarnings("ignore:Epoch 1")
@pytest.mark.parametrize(
    "policy, eagerly, weighted",
    [
        *((policy, True, False) for policy in POLICIES),
        ("all", False, False), ("keep", False, False), ("keep", False, True),
        ("all", True, True), ("batch", True, True), ("threshold", True, True),
    ],
)  # fmt: skip
def test_losses_of_outputs_are_those_of_keras(policy, eagerly, weighted):
    x, y = made_data(1.0)
    x, y = x[:28], {"a": y[:28], "b": x[:28, :1]}
    weights = {"a": np.linspace(0, 2, 28), "b": np.ones(28)} if weighted else None
    histories = []
    rules = POLICIES | {"auto": lambda: AutoPolicy(28)}
    for wrap in (lambda m: m, lambda m: RSFTModel(m, rules[policy]())):
        model = wrap(two_outputs())
        losses, options = (
            {"a": SCORES, "b": "mse"},
            {"loss_weights": {"a": 2.0, "b": 1.0}},
        )
        rate = keras.optimizers.SGD(0.0)
        model.compile(rate, losses, run_eagerly=eagerly, **options)
        options = {"batch_size": 8, "shuffle": False, "verbose": 0, "epochs": 2}
        if rules[policy] is LossMixture and len(histories):
            options["callbacks"] = [RejectionLedger(np.arange(28).astype(str), y["a"])]
        history = model.fit(
            x, y, sample_weight=weights, validation_data=(x, y), **options
        ).history
        histories.append(history)
    stock, ours = histories
    for name in stock:
        np.testing.assert_allclose(ours[name], stock[name], rtol=1e-5, err_msg=name)


@pytest.mark.filterwarnings("ignore:Epoch")
@pytest.mark.parametrize("policy", ["all", "threshold"])
def test_so_it_is_with_a_row_that_is_not_finite(policy):
    model = RSFTModel(two_outputs(), POLICIES[policy]())
    model.compile(keras.optimizers.SGD(0.0), {"a": SCORES, "b": "mse"})
    x, labels = made_data(1.0)
    y = {"a": labels, "b": x[:, :1].copy()}
    y["b"][[1, 3]] = np.nan
    history = model.fit(x, y, batch_size=32, verbose=0, epochs=2).history
    rows = np.delete(np.arange(32), [1, 3])
    found = model.model.predict(x, verbose=0)
    squares = np.square(found["b"] - x[:, :1])[rows]
    np.testing.assert_allclose(history["b_loss"], [squares.mean()] * 2, rtol=1e-5)
    chosen = -np.log(np.take_along_axis(found["a"], labels[:, None], 1))
    np.testing.assert_allclose(history["a_loss"], [chosen.mean()] * 2, rtol=1e-5)


class Seen(layers.Layer):
    def __init__(self):
        super().__init__()
        self.mean = keras.metrics.Mean(name="seen")

    def call(self, x):
        self.mean.update_state(ops.mean(x))
        return x


class Beside(keras.Model):
    """A model with a weight of its own beside a layer to be built."""

    def __init__(self):
        super().__init__()
        self.shift = self.add_weight(shape=(), initializer="zeros")
        self.dense = layers.Dense(1)

    def call(self, x):
        return self.dense(x) + self.shift


class Noting(Beside):
    def __init__(self):
        super().__init__()
        self.seen = keras.metrics.Mean(name="seen")

    def call(self, x):
        self.seen.update_state(ops.mean(x))
        return super().call(x)


@pytest.mark.only_under("tensorflow", "torch", reason="Keras's step under JAX fails")
@pytest.mark.parametrize("policy, eagerly", [("all", False), ("threshold", True)])
@pytest.mark.parametrize("kind", ["layer", "model"])
def test_metrics_of_layers_and_models_are_logged(policy, eagerly, kind):
    inner = keras.Sequential([Seen(), layers.Dense(1)]) if kind == "layer" else Noting()
    model = RSFTModel(inner, POLICIES[policy]())
    model.compile("adam", "mse", run_eagerly=eagerly)
    x, y = np.full((8, 2), 5.0), np.zeros((8, 1))
    history = model.fit(x, y, verbose=0, epochs=2, validation_data=(2 * x, y)).history
    assert (history["seen"], history["val_seen"]) == ([5.0, 5.0], [10.0, 10.0])


# Models of every make -----------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: keras.Sequential([layers.Dense(1)]), Beside])
@pytest.mark.parametrize("averages", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_model_that_its_first_batch_builds_has_all_slots(make, averages, scaled):
    x, y = made_data(1.0)
    found = []
    for wrapped in (False, True):
        keras.utils.set_random_seed(0)
        inner = make()
        optimizer = keras.optimizers.ScheduleFreeAdamW(0.1)
        if averages:
            optimizer = keras.optimizers.SGD(
                0.1, use_ema=True, ema_overwrite_frequency=1
            )
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale=2.0
            )
        model = RSFTModel(inner, LossThreshold(1e9)) if wrapped else inner
        # Keras's own graph reads the weights of ScheduleFree before it has them.
        model.compile(optimizer, "mse", jit_compile=False, run_eagerly=not wrapped)
        model.fit(x, y[:, None], batch_size=16, shuffle=False, verbose=0, epochs=2)
        found.append(inner.get_weights())
    for value, other in zip(*found, strict=True):
        if not averages:  # Those begin at the weights, in Keras at 0.
            np.testing.assert_allclose(value, other, atol=1e-5)
        assert np.isfinite(value).all()


@pytest.mark.filterwarnings("ignore:The model")
@pytest.mark.parametrize(
    "policy, eagerly", [("all", False), ("threshold", True), ("batch", True)]
)
@pytest.mark.parametrize("scaled", [True, False])
def test_states_change_without_trainable_weights(policy, eagerly, scaled):
    found = []
    x, _ = made_data(1.0)
    for wrap in (lambda m: m, lambda m: RSFTModel(m, POLICIES[policy]())):
        norm = layers.BatchNormalization(center=False, scale=False)
        inner = keras.Sequential([keras.Input((3,)), norm])
        model = wrap(inner)
        optimizer = keras.optimizers.SGD()
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(optimizer, "mse", run_eagerly=eagerly)
        model.fit(x, x, verbose=0)
        found.append(inner.get_weights())
    assert np.abs(found[0][0]).max() > 0
    for value, other in zip(*found, strict=True):
        np.testing.assert_allclose(value, other, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Epoch 1. 1 of 32 samples")
@pytest.mark.parametrize("policy", ["all", "threshold", "batch"])
def test_sparse_inputs_train_as_dense_ones(policy):
    sparse = pytest.importorskip("scipy.sparse")
    x = sparse.random(32, 9, density=0.3, random_state=0, dtype="float32", format="csr")
    y = (np.arange(32) % 2).astype("float32")[:, None]
    y[3] = np.nan
    found = []
    for given in (x, x.toarray()):
        keras.utils.set_random_seed(0)
        is_sparse = given is x
        inner = keras.Sequential([keras.Input((9,), sparse=is_sparse), layers.Dense(1)])
        model = RSFTModel(inner, POLICIES[policy]())
        model.compile("sgd", "mse", jit_compile=False)
        model.fit(given, y, batch_size=8, shuffle=False, verbose=0)
        found.append(inner.get_weights())
    for value, other in zip(*found, strict=True):
        np.testing.assert_allclose(value, other, atol=1e-6)


# Losses -------------------------------------------------------------------------------


class Doubled(keras.losses.MeanSquaredError):
    def __call__(self, y_true, y_pred, sample_weight=None):
        return 2 * super().__call__(y_true, y_pred, sample_weight)


@pytest.mark.parametrize("policy", ["all", "threshold"])
def test_a_loss_with_a_call_of_its_own_is_used(policy):
    x, y = made_data(1.0)
    found = []
    loss = Doubled()
    for wrap in (lambda m: m, lambda m: RSFTModel(m, POLICIES[policy]())):
        keras.utils.set_random_seed(0)
        inner = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
        model = wrap(inner)
        model.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=True)
        history = model.fit(x, y[:, None], verbose=0).history
        found.append((*inner.get_weights(), history["loss"][0]))
    for value, other in zip(*found, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)
    assert loss.reduction == "sum_over_batch_size"


def test_a_loss_of_a_structure_of_outputs():
    def both(y_true, y_pred):
        squares = [ops.square(t - p) for t, p in zip(y_true, y_pred, strict=True)]
        return ops.mean(squares[0] + squares[1], axis=-1)

    inputs = keras.Input((3,))
    one, two, three = (layers.Dense(1)(inputs) for _ in range(3))
    inner = keras.Model(inputs, {"p": (one, two), "q": three})
    start = inner.get_weights()
    found = []
    x, y = made_data(1.0)
    y = y[:, None].astype("float32")
    for wrap in (lambda m: m, lambda m: RSFTModel(m, LossThreshold(1e9))):
        inner.set_weights(start)
        model = wrap(inner)
        model.compile(keras.optimizers.SGD(0.1), {"p": both, "q": "mse"})
        history = model.fit(
            x, {"p": (y, y), "q": y}, batch_size=16, shuffle=False, verbose=0
        )
        found.append([*inner.get_weights(), history.history["p_loss"]])
    for value, other in zip(*found, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("policy", ["all", "threshold", "batch"])
def test_a_loss_of_another_number_of_values_is_refused(eagerly, policy):
    model = RSFTModel(
        keras.Sequential([keras.Input((3,)), layers.Dense(3)]), POLICIES[policy]()
    )
    model.compile(
        "sgd", lambda t, p: ops.mean(ops.square(t - p), axis=0), run_eagerly=eagerly
    )
    x, _ = made_data(1.0)
    with pytest.raises(InvalidArgument, match=r"a value for each sample.*\(3,\)"):
        model.fit(x[:16], x[:16], verbose=0)


def test_a_model_with_added_losses_alone_is_refused():
    model = RSFTModel(network(), AcceptAll())
    model.compile("sgd")
    with pytest.raises(InvalidArgument, match="`add_loss` is not of a sample"):
        model.fit(*made_data(1.0), verbose=0)


# What is overridden -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["compute_loss", "train_step", "test_step", "metrics", "compute_metrics", "fit"],
)
def test_what_a_wrapped_model_overrides_is_refused_by_name(name):
    kind = type("Own", (keras.Sequential,), {name: lambda self, *rest: None})
    with pytest.raises(InvalidArgument, match=f"what Own overrides: {name}"):
        RSFTModel(kind([layers.Dense(1)]), AcceptAll())


def test_what_a_subclass_overrides_is_used_or_refused():
    calls = []

    class Own(RSFTModel):
        def train_step(self, *data):
            calls.append("train_step")
            return super().train_step(*data)

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            calls.append("compute_metrics")
            return super().compute_metrics(x, y, y_pred, sample_weight)

    model = Own(network(), AcceptAll())
    model.compile("sgd", SCORES, run_eagerly=True)
    model.fit(*made_data(1.0), verbose=0)
    assert {"train_step", "compute_metrics"} == set(calls)
    kind = type("Other", (RSFTModel,), {"compute_loss": lambda self, *rest: 0.0})
    with pytest.raises(InvalidArgument, match="what Other overrides: compute_loss"):
        kind(network(), AcceptAll())


# Saving and export --------------------------------------------------------------------


def test_what_keras_asks_of_a_model_is_that_of_the_wrapped_one(tmp_path):
    inner = network()
    model = RSFTModel(inner, AcceptAll())
    assert (model.input_shape, model.output_shape) == ((None, 3), (None, 2))
    assert model.inputs == inner.inputs
    assert model.outputs == inner.outputs
    assert model.get_layer(inner.layers[0].name) is inner.layers[0]
    assert model.get_layer(index=1) is inner.layers[1]
    assert model.get_layer(inner.name) is inner
    with pytest.raises(ValueError, match="No such layer: nowhere"):
        model.get_layer("nowhere")
    for name in ("model.h5", tmp_path / "model.hdf5"):
        with pytest.raises(InvalidArgument, match=r"no place for a policy.*\.keras"):
            model.save(name)
    with pytest.raises(InvalidArgument, match=r"no place for a policy.*\.keras"):
        keras.saving.save_model(model, tmp_path / "model.h5")


@pytest.mark.only_under("tensorflow", reason="the SavedModel of TensorFlow's variables")
def test_an_export_holds_each_weight_once(tmp_path):
    import tensorflow as tf

    inner = keras.Sequential([keras.Input((200,)), layers.Dense(500)])
    model = RSFTModel(inner, AcceptAll())
    model.export(tmp_path / "exported", verbose=False)
    weights = sum(weight.nbytes for weight in inner.get_weights())
    stored = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert weights < stored < 1.2 * weights
    x = np.ones((2, 200), "float32")
    loaded = tf.saved_model.load(str(tmp_path / "exported"))
    served = loaded.serve(x).numpy()
    np.testing.assert_allclose(served, inner.predict(x, verbose=0), atol=1e-6)
