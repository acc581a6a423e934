"""Label smoothing and mix-up: what is learnt from accepted samples, and only there."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_rsft.errors import InvalidArgument
from keras_rsft.model import RSFTModel, SoftTargets, TwoPassRSFTModel
from keras_rsft.model.soft_targets import partners
from keras_rsft.policies import AcceptAll, AcceptListed, LossThreshold

SCORES = "sparse_categorical_crossentropy"
BOTH = {"label_smoothing": 0.1, "mix_up": 0.4}


def head(dim=8, classes=3):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((dim,)), keras.layers.Dense(classes, activation="softmax")]
    )


def fitted(data, policy, soft=None, *, model=RSFTModel, epochs=1, **options):
    wrapped = model(head(), policy, soft_targets=soft)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    wrapped.compile(optimizer, SCORES, **options)
    fit(wrapped, data, epochs)
    return wrapped


def fit(model, data, epochs=1):
    return model.fit(
        *data, batch_size=16, shuffle=False, verbose=0, epochs=epochs
    ).history


def state_of(model):
    """Weights, slots and the generator's state, without the counters of a policy."""
    sources = (model.model, model.optimizer, *filter(None, [model.soft_targets]))
    return [np.array(v.numpy()) for source in sources for v in source.variables]


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:Epoch 1 accepted no sample")
@pytest.mark.parametrize("level", ["sample", "batch"])
@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=["graph", "eager"])
def test_a_rejected_step_changes_nothing(small_data, level, options):
    policy = LossThreshold(1e9, level=level)
    model = fitted(small_data, policy, SoftTargets(**BOTH), **options)
    learnt = (*model.trainable_variables, model.soft_targets.seed_generator.state)
    before = [np.array(v.numpy()) for v in learnt]
    fit(model, small_data)
    pairs = zip(before, learnt, strict=True)
    assert not any(np.array_equal(a, b.numpy()) for a, b in pairs)
    before = state_of(model)
    policy.threshold.assign(1e-9)
    assert fit(model, small_data)["acceptance_rate"] == [0.0]
    assert_equal(state_of(model), before)


@pytest.mark.parametrize("policy", [AcceptAll, lambda: LossThreshold(1.2)])
def test_nothing_soft_is_training_as_it_was_to_the_bit(small_data, policy):
    plain = fitted(small_data, policy(), epochs=3)
    nothing = SoftTargets(label_smoothing=0.0, mix_up=0.0)
    soft = fitted(small_data, policy(), nothing, epochs=3)
    assert_equal(state_of(plain), state_of(soft)[: len(state_of(plain))])


@pytest.mark.parametrize("policy", [AcceptAll, lambda: LossThreshold(1.2)])
def test_mixed_with_a_share_of_one_nothing_is_mixed(small_data, policy, monkeypatch):
    """Equal but for rounding: the samples pass through a second forward pass."""
    plain = fitted(small_data, policy(), epochs=3)
    monkeypatch.setattr(keras.random, "beta", lambda *_, **__: tf.constant(1.0))
    mixed = fitted(small_data, policy(), SoftTargets(mix_up=0.4), epochs=3)
    for a, b in zip(plain.model.weights, mixed.model.weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def one_step(data, accept, soft):
    """Returns a head's weights after one step of plain gradient descent."""
    x, y = data
    model = RSFTModel(head(), AcceptListed(accept), soft_targets=soft)
    model.compile(keras.optimizers.SGD(0.5), SCORES)
    index = np.arange(len(x), dtype="int32")
    batch = tf.data.Dataset.from_tensors((x, y.astype("int32"), None, index))
    model.fit(batch, verbose=0)
    return [np.array(w) for w in model.model.weights]


def descended(x, targets):
    """Returns the same by hand, for soft targets `(n, classes)`."""
    model = head()
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.categorical_crossentropy(targets, model(x)))
    gradients = tape.gradient(loss, [w.value for w in model.trainable_variables])
    return [
        np.array(w) - 0.5 * g.numpy()
        for w, g in zip(model.weights, gradients, strict=True)
    ]


def test_accepted_samples_are_mixed_with_accepted_ones(small_data):
    x, y = small_data[0][:16].copy(), small_data[1][:16]
    accept = np.arange(16) % 3 != 0
    mix = SoftTargets(mix_up=0.4, seed=5).draw(accept)  # The first draw of its seed.
    share, partner = float(mix.share), np.array(mix.partner)
    assert 0 < share < 1
    assert accept[partner[accept]].all()
    one_hot = np.eye(3)[y]
    mixed_x = share * x + (1 - share) * x[partner]
    mixed_y = share * one_hot + (1 - share) * one_hot[partner]
    x[0] = np.nan  # Rejected: no trace of it is left.
    found = one_step((x, y), accept, SoftTargets(mix_up=0.4, seed=5))
    for a, b in zip(found, descended(mixed_x[accept], mixed_y[accept]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_smoothed_as_keras_smooths(small_data):
    x, y = small_data[0][:16], small_data[1][:16]
    accept = np.arange(16) % 3 != 0
    smoothed = 0.8 * np.eye(3)[y] + 0.2 / 3
    found = one_step((x, y), accept, SoftTargets(label_smoothing=0.2))
    for a, b in zip(found, descended(x[accept], smoothed[accept]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_smoothing_of_logits_and_of_weighted_samples(small_data):
    x, y = small_data
    keras.utils.set_random_seed(0)
    logits = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    model = RSFTModel(
        logits, LossThreshold(1e9), soft_targets=SoftTargets(label_smoothing=0.3)
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    weights = np.linspace(0.5, 2, len(x)).astype("float32")
    expected = weights * keras.losses.categorical_crossentropy(
        np.eye(3)[y], logits(x), from_logits=True, label_smoothing=0.3
    )
    found = model._learnt_loss(tf.constant(y), logits(x), tf.constant(weights))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_samples_are_judged_and_shown_by_the_plain_loss(small_data):
    shown = []
    for soft in (None, SoftTargets(label_smoothing=0.9)):
        model = RSFTModel(head(), LossThreshold(1.0), soft_targets=soft)
        model.compile(keras.optimizers.SGD(0.0), SCORES)
        shown.append((fit(model, small_data), model.evaluate(*small_data, verbose=0)))
    assert 0 < shown[0][0]["acceptance_rate"][0] < 1
    assert shown[0] == shown[1]


@pytest.mark.parametrize("accepted", [0, 1, 2, 7, 12])
def test_partners_are_a_permutation_within_each_kind(accepted):
    rng = np.random.default_rng(accepted)
    mask = rng.permutation(np.arange(12) < accepted)
    found = {
        tuple(np.array(partners(mask, rng.random(12, np.float32)))) for _ in range(50)
    }
    for one in map(np.array, found):
        assert sorted(one) == list(range(12))
        np.testing.assert_array_equal(mask[one], mask)
    assert len(found) > 1 or accepted == 12 or accepted == 0


def test_two_passes_learn_the_same(small_data):
    one, two = (
        fitted(small_data, LossThreshold(1.1), SoftTargets(**BOTH), model=model)
        for model in (RSFTModel, TwoPassRSFTModel)
    )
    for a, b in zip(one.model.weights, two.model.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_under_xla_mix_up_is_trained_without_it(small_data):
    with pytest.warns(UserWarning, match="jit_compile=False"):
        fitted(small_data, AcceptAll(), SoftTargets(mix_up=0.4), jit_compile=True)
    soft = SoftTargets(label_smoothing=0.1)
    assert fitted(small_data, AcceptAll(), soft, jit_compile=True).jit_compile


def test_saved_it_goes_on_as_if_it_had_not_been(small_data, tmp_path):
    model = fitted(small_data, LossThreshold(1.2), SoftTargets(**BOTH, seed=3))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.soft_targets.get_config() == model.soft_targets.get_config()
    optimizer = keras.optimizers.SGD(0.05)
    for one in (model, loaded):
        one.compile(type(optimizer).from_config(optimizer.get_config()), SCORES)
        fit(one, small_data, 2)
    assert_equal(state_of(model), state_of(loaded))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"label_smoothing": 1.0}, r"in \[0, 1\)"),
        ({"label_smoothing": float("nan")}, r"in \[0, 1\)"),
        ({"mix_up": -1.0}, "at least 0"),
        ({"mix_up": float("inf")}, "at least 0"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(InvalidArgument, match=message):
        SoftTargets(**options)


class TestRefused:
    def test_elements(self, small_data):
        policy = LossThreshold(1.0, level="element")
        with pytest.raises(InvalidArgument, match="whole samples"):
            fitted(small_data, policy, SoftTargets(mix_up=0.4))

    def test_replicas(self, small_data):
        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
        refused = pytest.raises(InvalidArgument, match="on one device")
        with strategy.scope(), refused:
            fitted(small_data, AcceptAll(), SoftTargets(mix_up=0.4))

    def test_another_loss_than_the_one_that_is_smoothed(self, small_data):
        model = RSFTModel(
            head(), AcceptAll(), soft_targets=SoftTargets(label_smoothing=0.1)
        )
        model.compile("sgd", "mse")
        with pytest.raises(InvalidArgument, match="CategoricalCrossentropy"):
            fit(model, small_data)

    def test_inputs_that_cannot_be_mixed(self):
        keras.utils.set_random_seed(0)
        model = RSFTModel(
            keras.Sequential(
                [
                    keras.Input((4,), dtype="int32"),
                    keras.layers.Embedding(5, 3),
                    keras.layers.Flatten(),
                    keras.layers.Dense(3, activation="softmax"),
                ]
            ),
            AcceptAll(),
            soft_targets=SoftTargets(mix_up=0.4),
        )
        model.compile("sgd", SCORES)
        with pytest.raises(InvalidArgument, match="inputs that are floats"):
            fit(model, (np.ones((16, 4), "int32"), np.zeros(16, "int32")))

    def test_something_else(self):
        with pytest.raises(TypeError, match="SoftTargets"):
            RSFTModel(head(), AcceptAll(), soft_targets=0.1)
