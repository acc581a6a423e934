"""One training step: forward, decide, and change the weights if something is accepted.

Owns what the step does, whatever the backend. How a backend finds gradients and takes
a branch is in `tensorflow_step.py`, `jax_step.py` and `torch_step.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_rsft.model.batch import require_index
from keras_rsft.model.elements import (
    all_judged_finite,
    labels_of,
    noted,
    only_accepted,
    unusable_overwritten,
)
from keras_rsft.model.moving_averages import seed_moving_averages
from keras_rsft.model.recorded_pass import Pass, shown_loss
from keras_rsft.model.selection import selection_sums
from keras_rsft.model.soft_targets import Mix

Batch = tuple[Any, Any, Any, Any]


class TrainingStep:
    """The step of an `RSFTModel`; goes before `keras.Model` among a class's bases.

    A backend's class has `train_step` and `test_step` as Keras wants them there, and
    the four methods at the end.
    """

    _recorder: Callable[[Any, Any, Any], None] | None = None

    def ready_for_training(self, data: Any) -> Any:
        """Checks that the model can be trained; returns the data as that needs it."""
        return data

    def train_on(self, batch: Batch) -> dict[str, Any]:
        """Takes one training step.

        Args:
            batch: Inputs, targets, weights or None, sample indices or None.

        Returns:
            The logs of the step.
        """
        x, y, sample_weight, sample_index = batch
        recorded = self.recorded(lambda: self._scored(x, y, sample_weight))
        per_sample_loss = recorded.judged
        labels = labels_of(y, per_sample_loss)
        accept_mask = self.policy(per_sample_loss, labels, sample_index)
        self._note(sample_index, per_sample_loss, accept_mask)
        if self.trainable_variables:
            data = x, y, sample_weight
            self._update_if_accepted(recorded, accept_mask, data)
        else:
            warnings.warn("The model has no trainable weights.", stacklevel=2)
        return self._log_step(recorded, accept_mask, (x, y, sample_weight))

    def _scored(self, x: Any, y: Any, sample_weight: Any) -> Pass:
        """Runs the model; returns what is judged, and what may be minimised."""
        selects = self._selects_within_batch
        y_pred, pending = self._forward(x)
        per_sample_loss = weighted_loss = self._scorer(y, y_pred)
        if sample_weight is not None:
            weighted_loss = self._scorer(y, y_pred, sample_weight)
        learnt = weighted_loss
        if self._softens:
            learnt = self._learnt_loss(y, y_pred, sample_weight)
        batch_loss = None
        if not selects or sample_weight is not None:
            batch_loss = self.compute_loss(x, y, y_pred, sample_weight)
        penalties = self._penalties()
        return Pass(
            minimised=penalties if selects else [batch_loss],
            per_sample=learnt if selects else None,
            pending=pending,
            batch_loss=batch_loss,
            judged=per_sample_loss,
            weighted=weighted_loss,
            penalties=penalties,
            y_pred=y_pred,
        )

    def _scored_accepted(
        self, data: tuple[Any, Any, Any], accept_mask: Any, mix: Mix | None
    ) -> Pass:
        """Does so for a batch in which what the mask rejects has no part."""
        x, y, sample_weight = data
        y_pred, pending = self._forward(x if mix is None else mix.of(x))
        y_pred = only_accepted(y_pred, accept_mask)
        weighted_loss = self._learnt_loss(y, y_pred, sample_weight, mix)
        return Pass(self._penalties(), weighted_loss, pending)

    def _note(self, sample_index: Any, per_sample_loss: Any, accept_mask: Any) -> None:
        if self._recorder is not None:
            require_index(sample_index)
            self._recorder(sample_index, *noted(per_sample_loss, accept_mask))

    def _update_if_accepted(
        self, recorded: Pass, accept_mask: Any, data: tuple[Any, Any, Any]
    ) -> None:
        """Changes the weights, or notes that this batch was rejected as a whole."""
        accepts_any = ops.any(accept_mask)

        def again() -> Pass:
            return self._finite_pass(recorded.judged, accept_mask, data)

        def update() -> None:
            learnt = again() if self._mixes else recorded
            self._apply(learnt, accept_mask)

        def reject() -> None:
            self.reject(recorded)

        def repeat() -> None:
            self._apply(again(), accept_mask)

        def reject_or_repeat() -> None:
            self.branch(accepts_any, repeat, reject)

        if self.policy.level == "batch":  # Accepted, so all its losses are finite.
            self.branch(accepts_any, update, reject)
            return
        usual = ops.logical_and(accepts_any, all_judged_finite(recorded.judged))
        self.branch(usual, update, reject_or_repeat, rare=True)

    def reject(self, recorded: Pass) -> None:
        """Leaves everything as it was, and notes what the lowest loss was."""
        self.selection.note_rejected(recorded.judged, self.policy.level)

    def _apply(self, recorded: Pass, accept_mask: Any) -> None:
        """Runs the backward pass and changes the weights, the slots and the state."""
        seeds = [ops.ones_like(target) for target in recorded.minimised]
        if recorded.per_sample is not None:
            accepted = ops.cast(accept_mask, "float32")
            seeds.append(accepted / ops.sum(accepted))  # Its share of the mean.
        seeds = [self.optimizer.scale_loss(seed) for seed in seeds]
        gradients = self.gradients(recorded, seeds)
        for variable in self.model.variables:
            value = recorded.pending.get_current_value(variable)
            if value is not None:
                variable.assign(value)
        self.apply_gradients(gradients)

    def _finite_pass(
        self, judged: Any, accept_mask: Any, data: tuple[Any, Any, Any]
    ) -> Pass:
        """Repeats the forward pass without the samples that have no finite loss."""
        return self._recorded_pass(unusable_overwritten(data, judged), accept_mask)

    def _recorded_pass(self, data: tuple[Any, Any, Any], accept_mask: Any) -> Pass:
        """Returns a pass of its own over these inputs, targets and weights."""
        mix = self._draw_mix(accept_mask)
        return self.recorded(lambda: self._scored_accepted(data, accept_mask, mix))

    def _log_step(
        self, recorded: Pass, accept_mask: Any, data: tuple[Any, Any, Any]
    ) -> dict[str, Any]:
        """Updates the metrics and returns them for the log."""
        x, y, sample_weight = data
        sums = selection_sums(recorded.judged, accept_mask)
        shown = shown_loss(recorded)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(shown, sample_weight=sums[0])
        self.selection.update_state(sums)
        return self.compute_metrics(x, y, recorded.y_pred, sample_weight)

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

    def _penalties(self) -> list[Any]:
        """Returns what the layers add to the loss: regularisation."""
        return [ops.sum(ops.cast(added, "float32")) for added in self.losses]

    @property
    def _selects_within_batch(self) -> bool:
        policy = self.policy
        if self._softens:  # Which Keras's own loss of the batch does not know.
            return True
        return policy.level != "batch" and not policy.accepts_every_finite_sample

    def _make_slots(self) -> None:
        """Makes the optimizer's variables before they are used in a branch."""
        variables = self.trainable_variables
        if self.optimizer is None or not variables:
            return
        if not self.optimizer.built:
            self.optimizer.build(variables)
        seed_moving_averages(self.optimizer, variables)

    def recorded(self, score: Callable[[], Pass]) -> Pass:
        """Runs a forward pass so that `gradients` can go back through it.

        Args:
            score: Runs the model and its losses.
        """
        raise NotImplementedError

    def gradients(self, recorded: Pass, seeds: list[Any]) -> list[Any]:
        """Runs the backward pass.

        Args:
            recorded: What `recorded` returned.
            seeds: The gradients of its targets: each of `minimised`, and then of
                `per_sample` if that is not None.

        Returns:
            A gradient for each trainable variable, None for those not reached.
        """
        raise NotImplementedError

    def branch(
        self,
        condition: Any,
        when_true: Callable[[], None],
        when_false: Callable[[], None],
        *,
        rare: bool = False,
    ) -> None:
        """Runs one of two functions, which change variables and return nothing.

        Args:
            condition: Boolean scalar tensor.
            when_true: Run if it is True.
            when_false: Run if not.
            rare: Whether the condition is seldom False.
        """
        raise NotImplementedError

    def apply_gradients(self, gradients: list[Any]) -> None:
        """Has the optimizer change the weights that the backward pass reached."""
        variables = self.trainable_variables
        reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
        self.optimizer.apply(
            [gradients[i] for i in reached], [variables[i] for i in reached]
        )
