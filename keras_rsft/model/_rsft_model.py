"""The model that lets only accepted samples change its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras.src.trainers.data_adapters.tf_dataset_adapter import make_class_weight_map_fn

from keras_rsft.errors import InvalidArgument
from keras_rsft.model._losses import LossScorer
from keras_rsft.model._metrics import AcceptanceGuard, SelectionMetric
from keras_rsft.policies import _listed, _threshold  # noqa: F401 (registered)
from keras_rsft.policies._policy import Policy

_BACKEND = keras.backend.backend()
if _BACKEND == "tensorflow":
    from keras_rsft.model._tensorflow import TensorFlowStep as BackendStep
elif _BACKEND == "jax":
    from keras_rsft.model._jax import JaxStep as BackendStep
elif _BACKEND == "torch":
    from keras_rsft.model._torch import TorchStep as BackendStep
else:
    raise ImportError(
        "keras_rsft trains under Keras's backends tensorflow, jax and torch. Received: "
        f"{_BACKEND}. Set KERAS_BACKEND=tensorflow, or leave it out."
    )


@keras.saving.register_keras_serializable(package="keras_rsft")
class RSFTModel(BackendStep):
    """Wraps a Keras model so that only accepted samples change its weights.

    Compiled, fitted, evaluated, saved and loaded like any `keras.Model`. The
    logs of training have `acceptance_rate` (fraction of the samples that were
    accepted, in [0, 1]) and `accepted_loss` (mean loss of the accepted ones)
    beside `loss` (mean loss of all samples whose loss is finite).

    At sample level the gradient is that of the mean data loss over the accepted
    samples, whatever reduction the loss has; sample and class weights weigh the
    accepted samples and never decide acceptance. What layers add to the loss, of
    weights or of activations, is that of the whole batch. A step that accepts nothing
    changes no variable of the model or the optimizer and runs no backward pass.
    At level `"element"` the same holds for what the loss has a value for within a
    sample: pixels, boxes, time steps; of binary cross-entropy each label.

    It trains on each of Keras's backends that have gradients: TensorFlow, JAX and
    PyTorch, with the same weights up to rounding.

    Made and compiled in the scope of a `tf.distribute.MirroredStrategy` or
    `MultiWorkerMirroredStrategy`, with its policy, it trains as on one device: one
    decision on the batch of all replicas, normalised by the number that all accept.

    A data set may say which training sample each row is, for policies and for a
    `RejectionLedger`: it then yields `(x, y, sample_weight or None, sample_index)`,
    with int32 indices `(batch,)` in [0, n).

    Args:
        model: Any `keras.Model`; it is used, not copied, and stays available
            as `.model`.
        policy: A `Policy`, e.g. `LossThreshold(1.5)`.

    Raises:
        TypeError: If `policy` is not a `Policy`, or `model` not a `keras.Model`.

    Example:
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> head = rsft.build_head(dim=2, num_classes=2)
        >>> model = rsft.RSFTModel(head, rsft.KeepFraction(0.5))
        >>> model.compile("sgd", "sparse_categorical_crossentropy")
        >>> log = model.fit(np.eye(4, 2), np.arange(4) % 2, verbose=0)
        >>> log.history["acceptance_rate"]
        [0.5]
    """

    def __init__(self, model: keras.Model, policy: Policy, **kwargs: Any):
        if not isinstance(model, keras.Model):
            raise TypeError(
                f"`model` must be a `keras.Model`. Received: {type(model).__name__}."
            )
        if not isinstance(policy, Policy):
            raise TypeError(
                "`policy` must be a `keras_rsft` policy such as `LossThreshold(1.5)`. "
                f"Received: {type(policy).__name__}."
            )
        kwargs.setdefault("dtype", model.dtype_policy)
        super().__init__(**kwargs)
        self.model = model
        self.policy = policy
        self.selection = SelectionMetric()
        self._scorer = None
        self.built = model.built

    @property
    def output_names(self) -> Any:
        """Names of the wrapped model's outputs: keys of `loss` and `metrics`."""
        return getattr(self.model, "output_names", None)

    def build(self, input_shape: Any) -> None:
        if not self.model.built:
            inputs = keras.tree.map_shape_structure(keras.KerasTensor, input_shape)
            self.model(inputs)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.model(inputs, training=training)

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Configures training; takes what `keras.Model.compile` takes."""
        super().compile(optimizer, loss, loss_weights, *args, **kwargs)
        self._scorer = LossScorer(self, loss, loss_weights)

    def export(self, *args: Any, **kwargs: Any) -> None:
        """Exports the wrapped model; takes what `keras.Model.export` takes."""
        self.model.export(*args, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: Any = True,
        class_weight: dict[int, float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains like `keras.Model.fit`, and warns if nothing is accepted."""
        if class_weight is not None and _has_index(x):
            weighted, class_weight = make_class_weight_map_fn(class_weight), None
            x = x.map(lambda x, y, weight, index: (*weighted(x, y, weight), index))
        x = self.ready_for_training(x)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            guard = AcceptanceGuard()
            guard.set_model(self)
            callbacks.callbacks.append(guard)
        else:
            given = keras.tree.flatten(callbacks) if callbacks is not None else []
            callbacks = [*given, AcceptanceGuard()]
        try:
            return super().fit(
                x, y, batch_size, epochs, verbose, callbacks, validation_split,
                validation_data, shuffle, class_weight, *args, **kwargs,
            )  # fmt: skip
        finally:  # A ledger is of one fit, also where that fails.
            if self._recorder is not None:
                self.record_with(None)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Predicts like `keras.Model.predict`, also of data with sample indices."""
        if _has_index(x):
            x = x.map(lambda inputs, *rest: (inputs, None))
        return super().predict(x, *args, **kwargs)

    def record_with(self, recorder: Callable[[Any, Any, Any], None] | None) -> None:
        """Has each training step report what it decided, as `RejectionLedger` does.

        Args:
            recorder: Called while a step is traced, with `sample_index` int32,
                `per_sample_loss` float32 and `accept_mask` bool, each `(batch,)`.
                None stops it, as does the end of `fit`. At level `"element"` a
                sample has its mean loss, and is accepted if half its elements are.
                What it writes to are Keras variables, which it lists as `variables`:
                JAX must know of them.
        """
        self._recorder = recorder
        self.train_function = None  # Traced anew, with or without it.

    def make_train_function(self, force: bool = False) -> None:
        if self.policy.needs_ledger and self._recorder is None:
            raise InvalidArgument(
                f"{type(self.policy).__name__} learns from a ledger. Received: none. "
                "Give `fit` a `RejectionLedger` among its callbacks."
            )
        self._make_slots()
        return super().make_train_function(force)

    def selection_totals(self) -> dict[str, float]:
        """Returns the sums of the selection since the last reset of metrics.

        Returns:
            `accepted`, `samples` and `nonfinite` (numbers of samples, or elements),
            `accepted_loss_sum`, and `lowest_loss_rejected`: the lowest loss that
            was compared with the threshold in steps that accepted nothing,
            infinity if there was none.
        """
        samples, accepted, loss_sum, finite, _ = self.selection.totals.numpy().tolist()
        return {
            "accepted": accepted,
            "samples": samples,
            "accepted_loss_sum": loss_sum,
            "nonfinite": samples - finite,
            "lowest_loss_rejected": float(self.selection.lowest.numpy()),
        }

    def save_own_variables(self, store: Any) -> None:
        """Saves the states of random layers, which Keras itself does not."""
        for number, state in enumerate(self._random_states()):
            store[f"random_state_{number}"] = state.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Restores the states of random layers, so that training resumes alike."""
        for number, state in enumerate(self._random_states()):
            key = f"random_state_{number}"
            if key in store:
                state.assign(store[key][...])

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "model": keras.saving.serialize_keras_object(self.model),
            "policy": keras.saving.serialize_keras_object(self.policy),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> RSFTModel:
        parts = {
            part: keras.saving.deserialize_keras_object(config[part], custom_objects)
            for part in ("model", "policy")
        }
        return cls(**(config | parts))

    def _random_states(self) -> list[Any]:
        return [v for v in self.model.variables if v.name == "seed_generator_state"]


def _has_index(data: Any) -> bool:
    """Says whether data are a `tf.data.Dataset` of batches with sample indices."""
    spec = getattr(data, "element_spec", None)
    return hasattr(data, "map") and isinstance(spec, tuple) and len(spec) == 4
