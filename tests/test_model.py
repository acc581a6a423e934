"""The rules of rejection: what a training step may change, and what it must."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from made_counter import BackwardCounter

from keras_rsft._ledger import RejectionLedger
from keras_rsft.errors import InvalidArgument
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._listed import AcceptListed
from keras_rsft.policies._threshold import (
    AcceptAll,
    KeepFraction,
    LossMixture,
    LossThreshold,
    RunningThreshold,
    SelfPaced,
)

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "ema": lambda: keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "clipnorm": lambda: keras.optimizers.SGD(0.05, momentum=0.9, clipnorm=0.1),
    # At its default scale the first steps overflow: they change nothing here, and
    # statistics of BatchNorm in stock Keras.
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), initial_scale=64.0
    ),
}
MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 3},
    "mixed_bfloat16": {},
    "mixed_float16": {},
}
SCORES = "sparse_categorical_crossentropy"


def assert_equal(values, expected):
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_array_equal(value, other)


def fit(model, data, **options):
    """Fits without shuffling or printing."""
    options = {"batch_size": 16, "shuffle": False, "verbose": 0} | options
    return model.fit(*data, **options).history


# Each optimizer at both levels and each mode; the slow tests have more pairs.
REJECTION_CASES = [
    ("sgd", "graph", "sample"), ("sgd", "eager", "batch"),
    ("momentum", "xla", "sample"), ("momentum", "graph", "batch"),
    ("momentum", "mixed_float16", "sample"), ("adam", "eager", "sample"),
    ("adam", "steps_per_execution", "batch"), ("adamw", "graph", "sample"),
    ("adamw", "mixed_bfloat16", "batch"), ("ema", "eager", "sample"),
    ("ema", "graph", "batch"), ("accumulation", "graph", "sample"),
    ("accumulation", "mixed_float16", "batch"), ("clipnorm", "eager", "sample"),
    ("clipnorm", "graph", "batch"),
]  # fmt: skip
MORE_CASES = [
    (optimizer, mode, level)
    for optimizer, mode in [
        *((name, "graph") for name in OPTIMIZERS if name != "scaled"),
        *(("momentum", mode) for mode in MODES if mode != "graph"),
        ("accumulation", "mixed_float16"),
        ("adamw", "mixed_bfloat16"),
    ]
    for level in ("sample", "batch")
    if (optimizer, mode, level) not in REJECTION_CASES
]


@pytest.mark.filterwarnings("ignore:Epoch 1 accepted no sample")
@pytest.mark.parametrize(
    "optimizer, mode, level",
    REJECTION_CASES
    + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES],
)
def test_rejected_batch_changes_no_variable(
    optimizer, mode, level, small_data, make_model, values_of, dtype_policy,
    compile_options,
):  # fmt: skip
    if mode.startswith("mixed"):
        dtype_policy(mode)
    counter = BackwardCounter()
    wrapped = make_model(counter)
    model = RSFTModel(wrapped, LossThreshold(1e9, level=level))
    optimizer = OPTIMIZERS[optimizer]()
    if mode == "mixed_float16":  # At its default scale the first steps overflow.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
    model.compile(optimizer, SCORES, **compile_options(**MODES[mode]))

    at_first = values_of(wrapped)
    fit(model, small_data)  # Three accepted steps: slots and averages are not zero.
    trained = values_of(wrapped, model.optimizer)
    changed = [
        not np.array_equal(a, b) for a, b in zip(at_first, trained, strict=False)
    ]
    assert all(changed), "BatchNorm, Dropout's seed and every weight are in play"
    assert counter.passes == 3

    model.policy.threshold.assign(1e-9)
    history = fit(model, small_data)
    assert_equal(values_of(wrapped, model.optimizer), trained)
    assert counter.passes == 3, "no backward pass ran"
    assert history["acceptance_rate"] == [0.0]
    assert np.isnan(history["accepted_loss"]).all(), "0 would be the best there is"
    assert np.isfinite(history["loss"][0])
    assert int(model.policy.steps_seen.numpy()) == 6


@pytest.mark.filterwarnings("ignore:Epoch 1 accepted no sample")
@pytest.mark.only_under("torch", reason="PyTorch alone draws without Keras's seeds")
def test_a_rejected_batch_gives_back_what_it_drew(small_data):
    import torch

    layers = [keras.layers.Dropout(0.5), keras.layers.Dense(3, activation="softmax")]
    model = RSFTModel(keras.Sequential([keras.Input((8,)), *layers]), AcceptAll())
    model.compile("sgd", SCORES)
    states = []
    for policy in (AcceptAll(), LossThreshold(1e-9)):
        model.policy = policy
        before = torch.get_rng_state()
        model.train_on_batch(*(part[:16] for part in small_data))
        states.append(torch.equal(torch.get_rng_state(), before))
    assert states == [False, True]


def mixture_that_rejects_all():
    policy = LossMixture()
    policy.threshold.assign(1e-9)
    return policy


@pytest.mark.filterwarnings("ignore:Epoch 1 accepted no sample")
@pytest.mark.parametrize(
    "policy, eagerly",
    [
        (lambda: SelfPaced(1e-9, growth_steps=10), True),
        (lambda: RunningThreshold(-1e3), True),
        (lambda: RunningThreshold(-1e3, num_classes=3), False),
        (lambda: AcceptListed(np.arange(100) == 99), False),
        (mixture_that_rejects_all, True),
    ],
)
def test_a_rejected_batch_changes_no_variable_whatever_rejected_it(
    policy, eagerly, small_data, make_model, values_of
):
    x, y = small_data
    wrapped = make_model()
    model = RSFTModel(wrapped, AcceptAll())
    model.compile(OPTIMIZERS["momentum"](), SCORES, run_eagerly=eagerly)
    fit(model, small_data)  # So that momentum is not zero.
    trained = values_of(wrapped, model.optimizer)
    model.policy = policy()
    index = np.arange(len(x), dtype="int32")
    batches = tf.data.Dataset.from_tensor_slices((x, y, index)).batch(16)
    ledger = RejectionLedger(index.astype(str), y)
    history = model.fit(
        batches.map(lambda x, y, i: (x, y, None, i)), verbose=0, callbacks=[ledger]
    ).history
    assert history["acceptance_rate"] == [0.0]
    assert_equal(values_of(wrapped, model.optimizer), trained)


def test_policies_and_models_are_checked(make_model):
    with pytest.raises(TypeError, match=r"`policy` must be .* Received: float"):
        RSFTModel(make_model(), 1.5)
    with pytest.raises(TypeError, match=r"`model` must be .* Received: Dense"):
        RSFTModel(keras.layers.Dense(3), AcceptAll())


@pytest.fixture
def exact_graphs():
    """Keeps the graph compiler from reordering sums: they are rounded differently."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    yield
    tf.config.optimizer.set_experimental_options(
        {"arithmetic_optimization": True, **before}
    )


def train_beside_stock_keras(policy, optimizer, options, data, make_model, values_of):
    """Trains the same model without and with the wrapper; compares the logs."""
    runs = []
    for wrap in (lambda m: m, lambda m: RSFTModel(m, policy)):
        wrapped = make_model()
        model = wrap(wrapped)
        model.compile(OPTIMIZERS[optimizer](), SCORES, metrics=["accuracy"], **options)
        history = fit(model, data, epochs=2, validation_data=data)
        runs.append((values_of(wrapped, model.optimizer), history))
    (stock, stock_logs), (ours, our_logs) = runs
    assert our_logs.pop("acceptance_rate") == [1.0, 1.0]
    np.testing.assert_allclose(our_logs.pop("accepted_loss"), stock_logs["loss"], 1e-6)
    assert set(our_logs) == set(stock_logs)  # No val_acceptance_rate.
    for name in stock_logs:
        np.testing.assert_allclose(our_logs[name], stock_logs[name], 1e-6)
    return ours, stock


@pytest.mark.parametrize(
    "policy, optimizer, mode",
    [
        ("AcceptAll", "ema", "eager"),
        ("AcceptAll", "accumulation", "eager"),
        ("LossThreshold", "momentum", "graph"),
        ("LossThreshold", "adamw", "eager"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("AcceptAll", "adamw", "steps_per_execution"),
                ("AcceptAll", "scaled", "mixed_float16"),
                ("AcceptAll", "momentum", "graph"),
                ("AcceptAll", "accumulation", "graph"),
                ("AcceptAll", "momentum", "mixed_bfloat16"),
                ("LossThreshold", "adam", "mixed_bfloat16"),
            ]
        ),
    ],
)
def test_accepting_everything_equals_stock_keras(
    policy,
    optimizer,
    mode,
    small_data,
    make_model,
    values_of,
    dtype_policy,
    exact_graphs,
    compile_options,
):
    if mode.startswith("mixed"):
        dtype_policy(mode)
    policy = AcceptAll() if policy == "AcceptAll" else LossThreshold(1e9)
    ours, stock = train_beside_stock_keras(
        policy,
        optimizer,
        compile_options(**MODES[mode]),
        small_data,
        make_model,
        values_of,
    )
    if keras.backend.backend() == "jax":  # XLA orders sums as it likes.
        for value, other in zip(ours, stock, strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)
    else:
        assert_equal(ours, stock)


@pytest.mark.parametrize("mode", ["graph", pytest.param("xla", marks=pytest.mark.slow)])
def test_compiled_graphs_equal_stock_keras_to_rounding(
    mode, small_data, make_model, values_of, compile_options
):
    options = compile_options(**MODES[mode])
    ours, stock = train_beside_stock_keras(
        AcceptAll(), "momentum", options, small_data, make_model, values_of
    )
    for value, other in zip(ours, stock, strict=True):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Epoch 1. 1 of 8 samples")
@pytest.mark.parametrize("policy", [AcceptAll, lambda: KeepFraction(1.0)])
def test_a_label_that_is_not_finite_is_rejected(policy, small_data):
    x = small_data[0][:8]
    target = np.ones((8, 1), "float32")
    target[3] = np.nan
    head = keras.layers.Dense(1, kernel_initializer="zeros")
    model = RSFTModel(keras.Sequential([keras.Input((8,)), head]), policy())
    model.compile(keras.optimizers.SGD(0.5), "mse", run_eagerly=True)
    history = fit(model, (x, target))
    others = np.delete(x, 3, axis=0)  # d/dw of (0 - 1)^2 is -2x
    np.testing.assert_allclose(
        model.model.get_weights()[0][:, 0], others.mean(axis=0), atol=1e-6
    )
    assert history["loss"] == [1.0]


@pytest.mark.parametrize(
    "steps_per_execution", [1, 2, pytest.param(5, marks=pytest.mark.slow)]
)
def test_the_logs_cover_the_epoch(steps_per_execution, compile_options):
    losses = np.linspace(0.1, 2.2, 22).astype("float32")  # Batches of 8, 8 and 6.
    model = RSFTModel(
        keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)]),
        LossThreshold(1.75),
    )
    model.model.set_weights([np.zeros((1, 1))])
    options = compile_options(steps_per_execution=steps_per_execution)
    model.compile(keras.optimizers.SGD(0.0), "mae", **options)
    history = fit(model, (np.ones((22, 1)), losses), batch_size=8)
    assert history["acceptance_rate"][0] == pytest.approx(17 / 22)  # 0.1 to 1.7
    assert history["accepted_loss"][0] == pytest.approx(0.9, 1e-6)
    assert history["loss"][0] == pytest.approx(1.15, 1e-6)
    totals = model.selection_totals()
    assert totals == pytest.approx(
        {
            "accepted": 17,
            "samples": 22,
            "accepted_loss_sum": 15.3,
            "loss_sum": 25.3,
            "nonfinite": 0,
            "lowest_loss_rejected": float("inf"),
            "steps_not_finite": 0,
        },
        1e-6,
    )


@pytest.mark.parametrize(
    "steps_per_execution, known_size", [(1, True), (2, True), (2, False)]
)
def test_steps_are_counted_once(
    steps_per_execution, known_size, small_data, compile_options
):
    x, y = small_data
    data = tf.data.Dataset.from_tensor_slices((x, np.eye(3)[y])).batch(
        16, drop_remainder=True
    )
    if not known_size:
        data = data.filter(lambda x, y: True)
    inner = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    model = RSFTModel(inner, AcceptAll())
    options = compile_options(steps_per_execution=steps_per_execution)
    model.compile("sgd", "mse", **options)
    model.fit(data, epochs=2, verbose=0)
    assert int(model.policy.steps_seen.numpy()) == 6
    assert int(model.optimizer.iterations.numpy()) == 6


def test_a_loss_of_one_number_is_refused(small_data):
    model = RSFTModel(keras.Sequential([keras.layers.Dense(3)]), LossThreshold(1.0))
    model.compile("sgd", lambda y_true, y_pred: keras.ops.mean(y_pred))
    with pytest.raises(InvalidArgument, match=r"at least one value a sample.*Received"):
        fit(model, small_data)


def test_padding_does_not_make_a_sample_easy():
    # Constant predictions of 1/3: every real time step has a loss of ln 3.
    words = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    inner = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Embedding(2, 5, mask_zero=True),
            keras.layers.Dense(3, activation="softmax", kernel_initializer="zeros"),
        ]
    )
    model = RSFTModel(inner, LossThreshold(1.0))
    model.compile("sgd", SCORES, run_eagerly=True)
    with pytest.warns(UserWarning, match=r"lowest loss judged was 1\.099"):
        fit(model, (words, np.zeros((3, 4))))


def test_a_callback_list_gets_the_guard_too(small_data):
    inner = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, "softmax")])
    model = RSFTModel(inner, LossThreshold(1e-9))
    model.compile("sgd", SCORES, run_eagerly=True)
    callbacks = keras.callbacks.CallbackList(add_history=True, model=model)
    with pytest.warns(UserWarning, match="Epoch 1 accepted no sample"):
        fit(model, small_data, callbacks=callbacks)
