"""What a forward pass leaves for the update that may follow it."""

from __future__ import annotations

from typing import NamedTuple

import keras
import tensorflow as tf


class Pass(NamedTuple):
    """A forward pass, and the updates that it holds back.

    `tape` is None where the pass only judged. `minimised` are the tensors to minimise.
    Of `per_sample`, if it is not None, the mean over the accepted samples is
    minimised too.
    """

    tape: tf.GradientTape | None
    minimised: list[tf.Tensor]
    per_sample: tf.Tensor | None
    pending: keras.StatelessScope
