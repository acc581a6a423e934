"""Per-sample data losses for anything that `compile(loss=...)` takes.

Owns the scorer: it gives one number a sample, without weights, without
regularisation, before any loss scaling. It decides nothing.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_rsft.errors import InvalidArgument


class PerSampleLoss(keras.losses.Loss):
    """A loss of one output, reduced to one number a sample.

    Calls the wrapped loss's own `call`, never a copy made from its config.
    Several values a sample (of time steps, of pixels) are averaged, without
    those that a Keras mask leaves out.

    Args:
        loss: A `keras.losses.Loss`, a function `(y_true, y_pred) -> values`,
            or the name of a Keras loss.

    Raises:
        InvalidArgument: When called, if the loss returns a single number.
    """

    def __init__(self, loss: Any):
        super().__init__(name="per_sample_loss", reduction="none")
        self._loss = loss

    def call(self, y_true: Any, y_pred: Any) -> Any:
        loss = self._loss
        if isinstance(loss, str) and loss.lower() in ("crossentropy", "ce"):
            loss = _crossentropy_for(y_true, y_pred)
        loss = keras.losses.get(loss)
        if isinstance(loss, keras.losses.Loss):
            return loss.call(y_true, y_pred)
        return loss(*_same_rank(y_true, y_pred))

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        values = super().__call__(y_true, y_pred, sample_weight)
        if len(values.shape) == 0:
            raise InvalidArgument(
                "`loss` must return at least one value a sample, to choose between "
                "samples. Received: a loss that returns a single number. "
                "Return it without the mean over the batch."
            )
        means = _mean_of_each_row(values)
        mask = getattr(y_pred, "_keras_mask", None)
        if mask is None or len(values.shape) == 1:
            return means
        # Padding has a loss of 0: counted, it would make short samples look easy.
        share = _mean_of_each_row(keras.ops.cast(mask, means.dtype))
        return keras.ops.divide_no_nan(means, share)


class LossScorer:
    """Scores each sample by the data loss that a model was compiled with.

    A model without layers is compiled with the same losses, unreduced, so that
    Keras itself pairs losses with outputs (names, dicts, lists, loss weights).
    It is held here, outside of the trained model, so that it is not saved.

    Args:
        loss: What `compile` takes: a name, object or function, or a list or
            dict of them.
        loss_weights: What `compile` takes.
        output_names: Names of the model's outputs, or None if it has none.
    """

    def __init__(self, loss: Any, loss_weights: Any, output_names: Any):
        def unreduced(one_loss: Any) -> PerSampleLoss | None:
            return None if one_loss is None else PerSampleLoss(one_loss)

        self._model = keras.Model()
        self._model.output_names = output_names
        self._model.compile(
            optimizer=None,
            loss=keras.tree.map_structure(unreduced, loss),
            loss_weights=loss_weights,
        )

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Returns the loss of each sample.

        Args:
            y_true: Targets, in the structure that `fit` was given.
            y_pred: Predictions of the model.
            sample_weight: Weights that multiply the losses, or None.

        Returns:
            Float32 tensor of shape `(batch,)`, summed over the outputs.
        """
        values = self._model.compute_loss(
            y=y_true, y_pred=y_pred, sample_weight=sample_weight
        )
        return keras.ops.cast(values, "float32")


def _mean_of_each_row(values: Any) -> Any:
    return keras.ops.mean(values, axis=tuple(range(1, len(values.shape))))


def _crossentropy_for(y_true: Any, y_pred: Any) -> str:
    """Names the cross-entropy that Keras takes for the alias "crossentropy"."""
    if y_pred.shape[-1] == 1:
        return "binary_crossentropy"
    if len(y_true.shape) < len(y_pred.shape) or y_true.shape[-1] == 1:
        return "sparse_categorical_crossentropy"
    return "categorical_crossentropy"


def _same_rank(y_true: Any, y_pred: Any) -> tuple[Any, Any]:
    """Adds or drops a last axis of size 1, as Keras does before a loss function."""
    if len(y_true.shape) == len(y_pred.shape) + 1 and y_true.shape[-1] == 1:
        return keras.ops.squeeze(y_true, axis=-1), y_pred
    if len(y_pred.shape) == len(y_true.shape) + 1 and y_pred.shape[-1] == 1:
        return keras.ops.expand_dims(y_true, axis=-1), y_pred
    return y_true, y_pred
