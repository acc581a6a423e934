"""Some variables learn at a share of the learning rate, whatever the optimizer."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_rsft.training._unfreeze import with_two_rates


def moved(optimizer, steps=1, **options):
    """Applies the gradient 2 to two variables that begin at 1, the first slow."""
    slow, fast = (keras.Variable([1.0], name=name) for name in ("slow", "fast"))
    two = with_two_rates(optimizer, slow_variables=1, slow_rate=0.1, **options)
    for _ in range(steps):
        two.apply([np.float32([2.0])] * 2, [slow, fast])
    return [float(variable.numpy()[0]) - 1 for variable in (slow, fast)]


class TestByHand:
    def test_sgd(self):
        # Steps of 0.5 x 2, and a tenth of that.
        optimizer = keras.optimizers.SGD(0.5)
        assert moved(optimizer) == pytest.approx([-0.1, -1.0])

    def test_sgd_with_momentum(self):
        # First -1, then 0.9 x -1 - 1.
        optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
        assert moved(optimizer, steps=2) == pytest.approx([-0.29, -2.9])

    def test_adam(self):
        # A first step of Adam is the learning rate, whatever the gradient: scaling
        # the gradient would not have made it smaller.
        optimizer = keras.optimizers.Adam(0.01)
        assert moved(optimizer) == pytest.approx([-0.001, -0.01], rel=1e-4)

    def test_weight_decay_is_slow_too(self):
        # Without a gradient in effect: 0.5 x 0.4 x 1, and a tenth of that, then SGD.
        optimizer = keras.optimizers.SGD(0.5, weight_decay=0.4)
        assert moved(optimizer) == pytest.approx([-0.1 - 0.02, -1.0 - 0.2])

    def test_all_gradients_are_clipped_together(self):
        # The norm of (2, 2) is clipped to 1: each is 1 / sqrt(2).
        optimizer = keras.optimizers.SGD(1.0, global_clipnorm=1.0)
        each = -(2**-0.5)
        assert moved(optimizer) == pytest.approx([0.1 * each, each])


@pytest.mark.parametrize(
    "name", ["Adam", "AdamW", "RMSprop", "Nadam", "Lion", "Adagrad"]
)
def test_equal_rates_change_nothing_and_slow_ones_do(name):
    def weights(slow_rate):
        start = [keras.Variable(np.float32([1.0, -2.0])) for _ in range(2)]
        optimizer = getattr(keras.optimizers, name)(0.01)
        if slow_rate is not None:
            optimizer = with_two_rates(optimizer, slow_variables=1, slow_rate=slow_rate)
        for step in range(3):
            optimizer.apply([np.float32([0.3, step])] * 2, start)
        return np.array([one.numpy() for one in start])

    np.testing.assert_array_equal(weights(1.0), weights(None))
    slow, plain = weights(0.1), weights(None)
    np.testing.assert_array_equal(slow[1], plain[1])
    start = np.float32([1.0, -2.0])
    assert np.all(np.abs(slow[0] - start) < np.abs(plain[0] - start))
