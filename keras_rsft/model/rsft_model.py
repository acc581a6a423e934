"""The training step that lets only accepted samples change the weights.

Owns `RSFTModel`: a `keras.Model` that wraps any other, with the forward pass,
the conditional update and serialisation. Which samples are accepted is decided
in `policies.py`; data, features and run folders are other rooms' business.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_rsft.errors import InvalidArgument
from keras_rsft.model.batch import (
    require_index,
    symbolic_input,
    symbolic_inputs,
    unpack,
)
from keras_rsft.model.elements import (
    all_judged_finite,
    labels_of,
    noted,
    only_accepted,
    rejected_overwritten,
)
from keras_rsft.model.moving_averages import seed_moving_averages
from keras_rsft.model.per_sample_loss import LossScorer
from keras_rsft.model.recorded_pass import Pass, shown_loss
from keras_rsft.model.replica_rules import is_replicated, ready_for_replicas
from keras_rsft.model.replica_trainer import ReplicaTrainer
from keras_rsft.model.replicas import replica_test_step, replica_train_step
from keras_rsft.model.selection import (
    SELECTION_METRICS,
    AcceptanceGuard,
    SelectionMetric,
    selection_sums,
)
from keras_rsft.model.soft_targets import LearnsSoftTargets
from keras_rsft.policies import Policy


@keras.saving.register_keras_serializable(package="keras_rsft")
class RSFTModel(ReplicaTrainer, LearnsSoftTargets, keras.Model):
    """Wraps a Keras model so that only accepted samples change its weights.

    Compiled, fitted, evaluated, saved and loaded like any `keras.Model`. The
    logs of training have `acceptance_rate` (share of the samples that were
    accepted, in [0, 1]) and `accepted_loss` (mean loss of the accepted ones)
    beside `loss` (mean loss of all samples whose loss is finite).

    At sample level the gradient is that of the mean data loss over the accepted
    samples, whatever reduction the loss has; sample and class weights weigh the
    accepted samples and never decide acceptance. A step that accepts nothing
    changes no variable of the model or the optimizer and runs no backward pass.
    At level `"element"` the same holds for what the loss has a value for within a
    sample: pixels, boxes, time steps; of binary cross-entropy each label.

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
        soft_targets: `SoftTargets`: label smoothing and mix-up. Default: none.

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
        self._scorer = LossScorer(
            loss, loss_weights, self.output_names, level=self.policy.level
        )

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
        x = ready_for_replicas(self, x)
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
                None stops it, as does the end of `fit`. At level `"element"` a
                sample has its mean loss, and is accepted if half its elements are.
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
        if is_replicated(self.distribute_strategy):
            return replica_train_step(self, data)
        x, y, sample_weight, sample_index = unpack(data)
        if not self.model.built:  # Nothing can be made inside a `tf.cond`.
            self.model(keras.tree.map_structure(symbolic_input, x))
            self._make_slots()
        selects = self._selects_within_batch
        with tf.GradientTape() as tape:
            y_pred, pending = self._forward(x)
            per_sample_loss = weighted_loss = self._scorer(y, y_pred)
            if selects and (sample_weight is not None or self._softens):
                weighted_loss = self._learnt_loss(y, y_pred, sample_weight)
            batch_loss = None
            if not selects or sample_weight is not None:
                batch_loss = self.compute_loss(x, y, y_pred, sample_weight)
            minimised = self._penalties() if selects else [batch_loss]
        to_select = weighted_loss if selects else None
        recorded = Pass(tape, minimised, to_select, pending, batch_loss)
        labels = labels_of(y, per_sample_loss)
        accept_mask = self.policy(per_sample_loss, labels, sample_index)
        if self._recorder is not None:
            require_index(sample_index)
            self._recorder(sample_index, *noted(per_sample_loss, accept_mask))

        if self.trainable_variables:
            data = x, y, sample_weight
            self._update_if_accepted(recorded, per_sample_loss, accept_mask, data)
        else:
            warnings.warn("The model has no trainable weights.", stacklevel=2)
        seen = x, y, y_pred, sample_weight
        return self._log_step(recorded, per_sample_loss, accept_mask, seen)

    def _log_step(
        self,
        recorded: Pass,
        per_sample_loss: tf.Tensor,
        accept_mask: tf.Tensor,
        seen: tuple[Any, Any, Any, Any],
    ) -> dict[str, Any]:
        """Updates the metrics and returns them for the log."""
        sums = selection_sums(per_sample_loss, accept_mask)
        shown = shown_loss(recorded, sums)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(shown, sample_weight=sums[0])
        self.selection.update_state(sums)
        return self.compute_metrics(*seen)

    def test_step(self, data: Any) -> dict[str, Any]:
        if is_replicated(self.distribute_strategy):
            logs = replica_test_step(self, data)
        else:
            logs = super().test_step(unpack(data)[:3])
        return {k: v for k, v in logs.items() if k not in SELECTION_METRICS}

    def selection_totals(self) -> dict[str, float]:
        """Returns the sums of the selection since the last reset of metrics.

        Returns:
            `accepted`, `samples` and `nonfinite` (numbers of samples, or elements),
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
        config = {"soft_targets": None} | config
        for part in ("model", "policy", "soft_targets"):
            config[part] = keras.saving.deserialize_keras_object(
                config[part], custom_objects=custom_objects
            )
        return cls(**config)

    @property
    def _selects_within_batch(self) -> bool:
        policy = self.policy
        if self._softens:  # Which Keras's own loss of the batch does not know.
            return True
        return policy.level != "batch" and not policy.accepts_every_finite_sample

    def _random_states(self) -> list[Any]:
        return [v for v in self.model.variables if v.name == "seed_generator_state"]

    def _make_slots(self) -> None:
        """Makes the optimizer's variables before they are used in a branch."""
        variables = self.trainable_variables
        if self.optimizer is None or not variables:
            return
        with tf.init_scope(), self.distribute_strategy.scope():
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

    def _penalties(self) -> list[tf.Tensor]:
        """Returns what the layers add to the loss: regularisation."""
        return [tf.reduce_sum(tf.cast(added, tf.float32)) for added in self.losses]

    def _update_if_accepted(
        self,
        recorded: Pass,
        per_sample_loss: tf.Tensor,
        accept_mask: tf.Tensor,
        data: tuple[Any, Any, Any],
    ) -> None:
        """Changes the weights, or notes that this batch was rejected as a whole."""
        accepts_any = tf.reduce_any(accept_mask)

        def update() -> None:
            mixes = self._mixes
            learnt = self._finite_pass(accept_mask, data) if mixes else recorded
            self._apply(learnt, accept_mask)

        def reject() -> None:
            self.selection.note_rejected(per_sample_loss, self.policy.level)

        def repeat() -> None:
            self._apply(self._finite_pass(accept_mask, data), accept_mask)

        def reject_or_repeat() -> None:
            tf.cond(accepts_any, repeat, reject)

        if self.policy.level == "batch":  # Accepted, so all its losses are finite.
            tf.cond(accepts_any, update, reject)
            return
        if not tf.executing_eagerly():
            # Rare, so it is kept apart: TensorFlow would otherwise unfold it into
            # the graph, and walk through its dead operations in every step.
            reject_or_repeat = tf.function(
                reject_or_repeat,
                autograph=False,
                experimental_attributes={"_noinline": True},
            )
        all_finite = all_judged_finite(per_sample_loss)
        tf.cond(tf.logical_and(accepts_any, all_finite), update, reject_or_repeat)

    def _apply(self, recorded: Pass, accept_mask: tf.Tensor) -> None:
        """Runs the backward pass and changes the weights, the slots and the state."""
        targets = list(recorded.minimised)
        seeds = [tf.ones_like(target) for target in targets]
        if recorded.per_sample is not None:
            accepted = tf.cast(accept_mask, tf.float32)
            targets.append(recorded.per_sample)  # By its share of the mean:
            seeds.append(accepted / tf.reduce_sum(accepted))
        variables = self.trainable_variables
        gradients = recorded.tape.gradient(
            targets,
            [variable.value for variable in variables],
            output_gradients=[self.optimizer.scale_loss(seed) for seed in seeds],
        )
        for variable in self.model.variables:
            value = recorded.pending.get_current_value(variable)
            if value is not None:
                variable.assign(value)
        reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
        self.optimizer.apply(
            [gradients[i] for i in reached], [variables[i] for i in reached]
        )

    def _finite_pass(self, accept_mask: tf.Tensor, data: tuple[Any, Any, Any]) -> Pass:
        """Repeats the forward pass without what was rejected, masked or not."""
        return self._recorded_pass(rejected_overwritten(data, accept_mask), accept_mask)

    def _recorded_pass(
        self, data: tuple[Any, Any, Any], accept_mask: tf.Tensor
    ) -> Pass:
        """Returns a pass of its own over these inputs, targets and weights."""
        x, y, sample_weight = data
        mix = self._draw_mix(accept_mask)
        with tf.GradientTape() as tape:
            y_pred, pending = self._forward(x if mix is None else mix.of(x))
            y_pred = only_accepted(y_pred, accept_mask)
            weighted_loss = self._learnt_loss(y, y_pred, sample_weight, mix)
            penalties = self._penalties()
        return Pass(tape, penalties, weighted_loss, pending)
