"""The training step that lets only accepted samples change the weights.

Owns `RSFTModel`: a `keras.Model` that wraps any other, with the forward pass,
the conditional update and serialisation. Which samples are accepted is decided
in `policies.py`; data, features and run folders are other rooms' business.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_rsft.errors import InvalidArgument
from keras_rsft.model.batch import (
    class_labels,
    require_index,
    symbolic_input,
    symbolic_inputs,
    unpack,
)
from keras_rsft.model.moving_averages import seed_moving_averages
from keras_rsft.model.per_sample_loss import LossScorer
from keras_rsft.model.selection import (
    SELECTION_METRICS,
    AcceptanceGuard,
    SelectionMetric,
    selection_sums,
)
from keras_rsft.policies import Policy


class _Pass(NamedTuple):
    """A recorded forward pass: its tape, what to minimise, and pending updates."""

    tape: tf.GradientTape
    objective: Any
    pending: keras.StatelessScope


@keras.saving.register_keras_serializable(package="keras_rsft")
class RSFTModel(keras.Model):
    """Wraps a Keras model so that only accepted samples change its weights.

    Compiled, fitted, evaluated, saved and loaded like any `keras.Model`. The
    logs of training have `acceptance_rate` (share of the samples that were
    accepted, in [0, 1]) and `accepted_loss` (mean loss of the accepted ones)
    beside `loss` (mean loss of all samples whose loss is finite).

    At sample level the gradient is that of the mean data loss over the accepted
    samples, whatever reduction the loss has; sample and class weights weigh the
    accepted samples and never decide acceptance. A step that accepts nothing
    changes no variable of the model or the optimizer and runs no backward pass.

    A data set may say which training sample each row is, for policies and for a
    `RejectionLedger`: it then yields `(x, y, sample_weight or None, sample_index)`,
    with int32 indices `(batch,)` in [0, n).

    Args:
        model: Any `keras.Model`; it is used, not copied, and stays available
            as `.model`.
        policy: A `Policy`, e.g. `LossThreshold(1.5)`.

    Raises:
        TypeError: If `policy` is not a `Policy`, or `model` not a `keras.Model`.
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
        self._scorer: LossScorer | None = None
        self._recorder: Callable[[Any, Any, Any], None] | None = None
        self.built = model.built

    @property
    def output_names(self) -> Any:
        """Names of the wrapped model's outputs: keys of `loss` and `metrics`."""
        return getattr(self.model, "output_names", None)

    def build(self, input_shape: Any) -> None:
        if not self.model.built:
            self.model(symbolic_inputs(input_shape))
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
        self._scorer = LossScorer(loss, loss_weights, self.output_names)

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
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains like `keras.Model.fit`, and warns if nothing is accepted."""
        if self.distribute_strategy.num_replicas_in_sync > 1:
            raise ValueError(
                "RSFTModel.fit trains on one device. Received: a strategy with "
                f"{self.distribute_strategy.num_replicas_in_sync} replicas. "
                "Build the model outside of the strategy's scope."
            )
        if isinstance(callbacks, keras.callbacks.CallbackList):
            guard = AcceptanceGuard()
            guard.set_model(self)
            callbacks.callbacks.append(guard)
        else:
            given = keras.tree.flatten(callbacks) if callbacks is not None else []
            callbacks = [*given, AcceptanceGuard()]
        try:
            return super().fit(
                x, y, batch_size, epochs, verbose, callbacks=callbacks, **kwargs
            )
        finally:  # A ledger is of one fit, also where that fails.
            if self._recorder is not None:
                self.record_with(None)

    def record_with(self, recorder: Callable[[Any, Any, Any], None] | None) -> None:
        """Has each training step report what it decided, as `RejectionLedger` does.

        Args:
            recorder: Called while a step is traced, with `sample_index` int32,
                `per_sample_loss` float32 and `accept_mask` bool, each `(batch,)`.
                None stops it, as does the end of `fit`.
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

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight, sample_index = unpack(data)
        if not self.model.built:  # Nothing can be made inside a `tf.cond`.
            self.model(keras.tree.map_structure(symbolic_input, x))
            self._make_slots()
        with tf.GradientTape() as tape:
            y_pred, pending = self._forward(x)
            per_sample_loss = self._scorer(y, y_pred)
            if self._selects_within_batch and sample_weight is None:
                batch_loss = tf.reduce_mean(per_sample_loss) + self._penalty()
            else:
                batch_loss = self.compute_loss(x, y, y_pred, sample_weight)
            accept_mask = self.policy(
                tf.stop_gradient(per_sample_loss), class_labels(y), sample_index
            )
            if self._selects_within_batch:
                weighted_loss = per_sample_loss
                if sample_weight is not None:
                    weighted_loss = self._scorer(y, y_pred, sample_weight)
                objective = self._accepted_loss(weighted_loss, accept_mask)
            else:
                objective = batch_loss
            objective = self.optimizer.scale_loss(objective)
        recorded = _Pass(tape, objective, pending)
        if self._recorder is not None:
            require_index(sample_index)
            self._recorder(sample_index, per_sample_loss, accept_mask)

        def update() -> None:
            self._apply(recorded, per_sample_loss, accept_mask, (x, y, sample_weight))

        def reject() -> None:
            self.selection.note_rejected(per_sample_loss, self.policy.level)

        if self.trainable_variables:
            tf.cond(tf.reduce_any(accept_mask), update, reject)
        else:
            warnings.warn("The model has no trainable weights.", stacklevel=2)
        self._update_trackers(batch_loss, per_sample_loss, accept_mask)
        return self.compute_metrics(x, y, y_pred, sample_weight)

    def test_step(self, data: Any) -> dict[str, Any]:
        logs = super().test_step(unpack(data)[:3])
        return {k: v for k, v in logs.items() if k not in SELECTION_METRICS}

    def selection_totals(self) -> dict[str, float]:
        """Returns the sums of the selection since the last reset of metrics.

        Returns:
            `accepted`, `samples` and `nonfinite` (numbers of samples),
            `accepted_loss_sum`, and `lowest_loss_rejected`: the lowest loss that
            was compared with the threshold in steps that accepted nothing,
            infinity if there was none.
        """
        totals = self.selection.totals.numpy().tolist()
        samples, accepted, loss_sum, finite, _ = totals
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
        """Restores the states of random layers, so that training goes on alike."""
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
        config = dict(config)
        for part in ("model", "policy"):
            config[part] = keras.saving.deserialize_keras_object(
                config[part], custom_objects=custom_objects
            )
        return cls(**config)

    @property
    def _selects_within_batch(self) -> bool:
        policy = self.policy
        return policy.level == "sample" and not policy.accepts_every_finite_sample

    def _random_states(self) -> list[Any]:
        return [v for v in self.model.variables if v.name == "seed_generator_state"]

    def _make_slots(self) -> None:
        """Makes the optimizer's variables before they are used in a branch."""
        variables = self.trainable_variables
        if self.optimizer is None or not variables:
            return
        with tf.init_scope():
            if not self.optimizer.built:
                self.optimizer.build(variables)
            seed_moving_averages(self.optimizer, variables)

    def _forward(self, x: Any) -> tuple[Any, keras.StatelessScope]:
        """Runs the model, holding back what the pass would change in it.

        BatchNorm statistics and random seeds are updated in the forward pass,
        before the decision; `_apply` writes them once the batch is accepted.
        """
        with keras.StatelessScope(collect_losses=True) as pending:
            y_pred = self(x, training=True)
        if pending.losses:
            self.add_loss(pending.losses)
        return y_pred, pending

    def _accepted_loss(
        self, weighted_loss: tf.Tensor, accept_mask: tf.Tensor
    ) -> tf.Tensor:
        """Returns the mean over the accepted samples, plus regularisation."""
        accepted_count = tf.reduce_sum(tf.cast(accept_mask, tf.float32))
        loss = tf.math.divide_no_nan(
            tf.reduce_sum(tf.where(accept_mask, weighted_loss, 0.0)), accepted_count
        )
        return loss + self._penalty()

    def _penalty(self) -> tf.Tensor | float:
        """Returns the sum of what the layers add to the loss, regularisation."""
        return sum(tf.reduce_sum(tf.cast(added, tf.float32)) for added in self.losses)

    def _apply(
        self,
        recorded: _Pass,
        per_sample_loss: tf.Tensor,
        accept_mask: tf.Tensor,
        data: tuple[Any, Any, Any],
    ) -> None:
        """Runs the backward pass and changes the weights, the slots and the state."""
        reached: list[Any] = []  # Filled while the branches are traced.

        # Rare, so it is kept apart: TensorFlow would otherwise unfold it into the
        # graph, and walk through its dead operations in every step.
        @tf.function(autograph=False, experimental_attributes={"_noinline": True})
        def repeat_with_finite_rows() -> tuple[list[tf.Tensor], list[tf.Tensor]]:
            return self._backward(self._finite_pass(accept_mask, data), reached)

        if self.policy.level == "batch":  # Accepted, so all its losses are finite.
            gradients, state = self._backward(recorded, reached)
        else:
            gradients, state = tf.cond(
                tf.reduce_all(tf.math.is_finite(per_sample_loss)),
                lambda: self._backward(recorded, reached),
                repeat_with_finite_rows,
            )
        for variable, value in zip(
            self._pending_variables(recorded.pending), state, strict=True
        ):
            variable.assign(value)
        self.optimizer.apply(gradients, reached)

    def _backward(
        self, recorded: _Pass, reached: list[Any]
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Returns gradients and pending state; names the variables in `reached`."""
        variables = self.trainable_variables
        gradients = recorded.tape.gradient(
            recorded.objective, [variable.value for variable in variables]
        )
        reached[:] = [
            v
            for v, gradient in zip(variables, gradients, strict=True)
            if gradient is not None
        ]
        state = [
            tf.convert_to_tensor(recorded.pending.get_current_value(variable))
            for variable in self._pending_variables(recorded.pending)
        ]
        return [gradient for gradient in gradients if gradient is not None], state

    def _pending_variables(self, pending: keras.StatelessScope) -> list[Any]:
        return [
            variable
            for variable in self.model.variables
            if pending.get_current_value(variable) is not None
        ]

    def _finite_pass(self, accept_mask: tf.Tensor, data: tuple[Any, Any, Any]) -> _Pass:
        """Repeats the forward pass with every rejected row overwritten.

        A NaN in one row would reach the gradients of all, since 0 x NaN is NaN:
        masking the loss is not enough. Rejected rows become copies of the first
        accepted one, and stay masked.
        """
        rows = tf.range(tf.size(accept_mask))
        first_accepted = tf.argmax(tf.cast(accept_mask, tf.int32), output_type=tf.int32)
        rows = tf.where(accept_mask, rows, first_accepted)
        x, y, sample_weight = keras.tree.map_structure(
            lambda part: None if part is None else tf.gather(part, rows), data
        )
        with tf.GradientTape() as tape:
            y_pred, pending = self._forward(x)
            weighted_loss = self._scorer(y, y_pred, sample_weight)
            objective = self._accepted_loss(weighted_loss, accept_mask)
            objective = self.optimizer.scale_loss(objective)
        return _Pass(tape, objective, pending)

    def _update_trackers(
        self,
        batch_loss: tf.Tensor,
        per_sample_loss: tf.Tensor,
        accept_mask: tf.Tensor,
    ) -> None:
        sums = selection_sums(per_sample_loss, accept_mask)
        _, _, _, finite_count, finite_loss = tf.unstack(sums)
        finite_mean = tf.math.divide_no_nan(finite_loss, finite_count)
        # A rejected NaN must not reach the log: it would set off TerminateOnNaN.
        shown = tf.where(tf.math.is_finite(batch_loss), batch_loss, finite_mean)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(shown, sample_weight=tf.size(per_sample_loss))
        self.selection.update_state(sums)
