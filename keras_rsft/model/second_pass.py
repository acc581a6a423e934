"""A training step that decides without a backward pass in mind, then learns from few.

The usual step records one forward pass over all samples and runs backward through it,
also where half of them were rejected: cost F + B. Here a forward pass over all decides,
and a second one, recorded, and the backward pass see the accepted samples only: cost
F + a (F + B) at an acceptance rate of a. Where B is 2 F, that is less below 2/3.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_rsft.backend_in_use import require_tensorflow_backend
from keras_rsft.errors import InvalidArgument
from keras_rsft.model.batch import class_labels, symbolic_input, unpack
from keras_rsft.model.rsft_model import RSFTModel
from keras_rsft.policies import Policy

# Below this share of accepted samples, lately, two passes are made. Measured, two begin
# to win between 0.5 (ResNet50's last block) and 0.65 (all of it); see
# `tests/benchmarks/partly_trainable.py`.
BREAK_EVEN = 0.5
_MEMORY = 0.9


@keras.saving.register_keras_serializable(package="keras_rsft")
class TwoPassRSFTModel(RSFTModel):
    """An `RSFTModel` that runs backward through the accepted samples alone.

    The same weights as those of an `RSFTModel`, up to rounding, in less time where much
    is rejected and the model is large. Each step looks at the share that was accepted
    lately: from 50 % on it is an `RSFTModel`'s step. At batch and element level, and
    where everything is accepted, it always is.

    For models in which a sample's output and loss depend on nothing but the sample: a
    BatchNorm that learns, a Dropout and an activity regularizer are refused, and layers
    of your own must keep to it.
    Not for XLA, whose batches have a fixed size: it is switched off. Under Keras's
    TensorFlow backend alone.

    Args:
        model: As in `RSFTModel`.
        policy: As in `RSFTModel`.

    Raises:
        InvalidArgument: If a layer depends on other samples, penalises activations or
            draws at random, `jit_compile=True` is compiled, or the backend is not
            TensorFlow.
    """

    def __init__(self, model: keras.Model, policy: Policy, **kwargs: Any):
        require_tensorflow_backend("A TwoPassRSFTModel", instead="Use `RSFTModel`.")
        super().__init__(model, policy, **kwargs)
        self.supports_jit = False
        self.recent_acceptance = self.add_weight(
            name="recent_acceptance",
            shape=(),
            initializer="ones",
            trainable=False,
            dtype="float32",
        )

    def compile(self, *args: Any, jit_compile: Any = "auto", **kwargs: Any) -> None:
        if jit_compile is True:
            raise InvalidArgument(
                "A second pass sees as many samples as were accepted, which XLA cannot "
                "compile. Received: jit_compile=True. Use `RSFTModel` for it."
            )
        super().compile(*args, jit_compile=False, **kwargs)

    def make_train_function(self, force: bool = False) -> None:
        hindrance = what_forbids_two_passes(self.model)
        if hindrance is not None:
            raise InvalidArgument(
                f"A second pass would not see what the first one saw: {hindrance}. "
                "Use `RSFTModel`."
            )
        return super().make_train_function(force)

    def train_step(self, data: Any) -> dict[str, Any]:
        import tensorflow as tf

        if not self._selects_within_batch or self.policy.level == "element":
            return super().train_step(data)
        if not self.model.built:  # Nothing can be made inside a `tf.cond`.
            x = unpack(data)[0]
            self.model(keras.tree.map_structure(symbolic_input, x))
            self._make_slots()
        one_pass = super().train_step
        before = tf.identity(self.selection.totals.value)
        logs = tf.cond(
            self.recent_acceptance < BREAK_EVEN,
            lambda: self._in_two_passes(data),
            lambda: one_pass(data),
        )
        with tf.control_dependencies(list(logs.values())):
            samples, accepted, *_ = tf.unstack(self.selection.totals.value - before)
            share = tf.math.divide_no_nan(accepted, samples)
            self.recent_acceptance.assign(
                _MEMORY * self.recent_acceptance + (1 - _MEMORY) * share
            )
        return logs

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        store["recent_acceptance"] = self.recent_acceptance.numpy()

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(store)
        self.recent_acceptance.assign(store["recent_acceptance"][()])

    def _in_two_passes(self, data: Any) -> dict[str, Any]:
        import tensorflow as tf

        x, y, sample_weight, sample_index = unpack(data)
        scored = self._scored(x, y, sample_weight)
        per_sample_loss = scored.judged
        accept_mask = self.policy(per_sample_loss, class_labels(y), sample_index)
        self._note(sample_index, per_sample_loss, accept_mask)

        def update() -> None:
            accepted = keras.tree.map_structure(
                lambda part: (
                    None if part is None else tf.boolean_mask(part, accept_mask)
                ),
                (x, y, sample_weight),
            )
            all_accepted = tf.boolean_mask(accept_mask, accept_mask)
            recorded = self._recorded_pass(accepted, all_accepted)
            self._apply(recorded, all_accepted)

        def reject() -> None:
            self.selection.note_rejected(per_sample_loss, self.policy.level)

        tf.cond(tf.reduce_any(accept_mask), update, reject)
        return self._log_step(scored, accept_mask, (x, y, sample_weight))


def what_forbids_two_passes(model: keras.Model) -> str | None:
    """Says which layer makes a second pass differ from the first, or None.

    Args:
        model: Any model; its own layers are known, of others the best is assumed.
    """
    for layer in model._flatten_layers():
        batch_norm = isinstance(layer, keras.layers.BatchNormalization)
        if batch_norm and layer.trainable:
            return f"{layer.name} normalises by the batch"
        if getattr(layer, "activity_regularizer", None) is not None:
            return f"{layer.name} penalises the activations of all samples"
        draws = any(one.name == "seed_generator_state" for one in layer.variables)
        is_layer = not isinstance(layer, keras.Model)
        if is_layer and draws and getattr(layer, "rate", 1.0) != 0:
            return f"{layer.name} draws at random"
    return None
