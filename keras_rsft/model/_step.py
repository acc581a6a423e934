"""One training step: forward, decide, and update if something is accepted."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_rsft.errors import InvalidArgument
from keras_rsft.model._data import HOW_TO_NUMBER
from keras_rsft.model._losses import LEFT_OUT, aligned, within
from keras_rsft.model._metrics import SELECTION_METRICS, SelectionMetric, selection_sums
from keras_rsft.policies._policy import Policy

Data = tuple[Any, Any, Any]  # Inputs, targets, sample weights or None.
Change = Callable[[], Any]  # Changes variables; returns whether the weights changed.


class Pass(NamedTuple):
    """A forward pass, and the updates that it holds back."""

    minimised: Sequence[Any] = ()
    per_sample: Any = None
    pending: Any = None
    losses: Any = None
    weighted: Any = None
    labels: Any = None
    sample_index: Any = None
    penalties: Sequence[Any] = ()
    batch_loss: Any = None
    y_pred: Any = None
    tape: Any = None
    first_row: Any = None
    row_count: Any = None

    def targets(self) -> list[Any]:
        per_sample = [] if self.per_sample is None else [self.per_sample]
        return [*self.minimised, *per_sample]

    def own(self, values: Any) -> Any:
        """Returns this device's part of values of all rows."""
        if self.first_row is None:
            return values
        return values[self.first_row : self.first_row + self.row_count]

    def shown_loss(self) -> Any:
        """Returns the loss for the log, a scalar of what is finite."""
        finite = ops.isfinite(self.weighted)
        total = ops.sum(ops.where(finite, self.weighted, 0.0))
        mean = ops.divide_no_nan(total, ops.sum(ops.cast(finite, "float32")))
        shown = mean
        if self.penalties:
            shown = sum(self.penalties, mean)
            shown = ops.where(ops.isfinite(shown), shown, mean)
        if self.batch_loss is None:
            return shown
        return ops.where(ops.isfinite(self.batch_loss), self.batch_loss, shown)


class TrainingStep(keras.Model):
    model: keras.Model
    policy: Policy
    selection: SelectionMetric
    _scorer: Any
    # Those of a backend: a pass forward, one back from the gradients of its
    # `targets`, and a choice between two changes of variables.
    recorded: Callable[[Callable[[], Pass]], Pass]
    gradients: Callable[[Pass, list[Any]], list[Any]]
    branch: Callable[..., None]
    _recorder: Callable[[Any, Any, Any], None] | None = None

    def ready_for_training(self, data: Any) -> Any:
        """Checks that the model can be trained; returns the data as that needs it."""
        return data

    def train_on(self, data: Any) -> dict[str, Any]:
        batch = unpack(data)
        x, y, sample_weight, _ = batch
        recorded = self.recorded(lambda: self._scored(*batch))
        whole = self._of_all_replicas(recorded)
        accept_mask = self.policy(whole.losses, whole.labels, whole.sample_index)
        if not self.trainable_variables:
            warnings.warn("The model has no trainable weights.", stacklevel=2)
        changed = self._update_if_accepted(recorded, whole, accept_mask, batch[:3])
        # All are rejected where the gradient was not finite.
        accept_mask = ops.logical_and(accept_mask, changed)
        self._record(whole, accept_mask)
        for variable, value in held_back(recorded, self.metrics_variables):
            variable.assign(value)  # Those of layers.
        labels = None if whole.labels is None else whole.own(whole.labels)
        sums, of_classes = selection_sums(
            recorded.losses, whole.own(accept_mask), labels
        )
        self._loss_tracker.add(whole.shown_loss(), sums[3])
        self.selection.update_state(sums, of_classes)
        return self.compute_metrics(x, y, recorded.y_pred, sample_weight)

    def reject(self, whole: Pass) -> None:
        """Leaves everything as it was, and notes what the lowest loss was."""
        self.selection.note_rejected(whole.losses, self.policy.level)

    @property
    def _takes_all_or_nothing(self) -> bool:
        policy = self.policy
        return policy.level == "batch" or policy.accepts_every_finite_sample

    def _scored(self, x: Any, y: Any, sample_weight: Any, sample_index: Any) -> Pass:
        """Runs the model; returns what is judged, and what may be minimised."""
        y_pred, pending = self._forward(x)
        losses = weighted = self._scorer(y, y_pred)
        if sample_weight is not None:
            weighted = self._scorer(y, y_pred, sample_weight)
            usable = ops.logical_or(ops.isfinite(weighted), losses == LEFT_OUT)
            losses = ops.where(usable, losses, float("nan"))
        replicated = self._is_replicated()
        by_batch = self._takes_all_or_nothing and not replicated
        compute = None
        if by_batch or (sample_weight is not None and not replicated):
            parts = x, y, y_pred, sample_weight
            compute = functools.partial(self.compute_loss, *parts)
        if len(self._scorer.outputs) > 1:
            batch_loss = self._log_outputs(y, y_pred, compute)
        else:
            batch_loss = None if compute is None else compute()
        penalties = self._penalties()
        return Pass(
            minimised=[batch_loss] if by_batch else penalties,
            per_sample=None if by_batch else weighted,
            pending=pending,
            losses=losses,
            weighted=weighted,
            labels=_labels_of(y, losses),
            sample_index=sample_index,
            penalties=penalties,
            batch_loss=batch_loss,
            y_pred=y_pred,
        )

    def _log_outputs(self, y: Any, y_pred: Any, compute: Any) -> Any:
        if not self._compile_loss.built:
            with keras.StatelessScope():  # It has made its metrics after that.
                self._compile_loss(y, y_pred)
        return self._compile_loss.log(self._scorer.outputs, compute)

    def _finite_pass(self, losses: Any, accept_mask: Any, data: Data) -> Pass:
        """Repeats the forward pass; samples with no finite loss are overwritten."""
        usable = ops.isfinite(losses)
        if len(losses.shape) > 1:
            axes = within(losses)
            nothing_judged = ops.all(ops.equal(losses, LEFT_OUT), axis=axes)
            usable = ops.logical_or(ops.any(usable, axis=axes), nothing_judged)
        rows = ops.arange(ops.shape(usable)[0], dtype="int32")
        # A replica may have no row: there is then none to copy.
        first_usable = ops.argmax(ops.pad(ops.cast(usable, "int32"), ((0, 1),)))
        rows = ops.where(usable, rows, ops.cast(first_usable, "int32"))
        x, y, sample_weight = keras.tree.map_structure(
            lambda part: None if part is None else self.taken(part, rows, usable), data
        )

        def only_accepted(values: Any) -> Any:
            accepted = aligned(accept_mask, values) > 0
            return ops.where(accepted, values, ops.zeros_like(values))

        def scored() -> Pass:
            y_pred, pending = self._forward(x)
            if len(accept_mask.shape) > 1:  # No gradient at all through the others.
                y_pred = keras.tree.map_structure(only_accepted, y_pred)
            weighted = self._scorer(y, y_pred, sample_weight)
            return Pass(self._penalties(), weighted, pending)

        return self.recorded(scored)

    def taken(self, part: Any, rows: Any, usable: Any) -> Any:
        """Returns some rows of a batch; `usable` says which of them are their own."""
        return ops.take(part, rows, axis=0)

    def _forward(self, x: Any) -> tuple[Any, keras.StatelessScope | None]:
        """Runs the model, holding back what the pass would change in it."""
        with keras.StatelessScope(collect_losses=True) as pending:
            y_pred = self(x, training=True)
        if pending.losses:
            self.add_loss(pending.losses)
        return y_pred, pending

    def _is_whole(self) -> bool:
        """Says whether all layers have their weights."""
        return all(layer.built for layer in self.model._flatten_layers())

    def _penalties(self) -> list[Any]:
        return [ops.sum(ops.cast(added, "float32")) for added in self.losses]

    def _is_replicated(self) -> bool:
        return False

    def _of_all_replicas(self, recorded: Pass) -> Pass:
        return recorded

    def _record(self, whole: Pass, accept_mask: Any) -> None:
        if self._recorder is None:
            return
        if whole.sample_index is None:
            raise InvalidArgument(
                "A ledger must be told which samples a batch holds. Received: data "
                f"without sample indices. {HOW_TO_NUMBER}"
            )
        losses = whole.losses
        if len(losses.shape) > 1:
            axes, finite = within(losses), ops.isfinite(losses)
            sums = ops.sum(ops.where(finite, losses, 0.0), axis=axes)
            judged = ops.cast(ops.not_equal(losses, LEFT_OUT), "int32")
            accepted = ops.sum(ops.cast(accept_mask, "int32"), axis=axes)
            losses = sums / ops.sum(ops.cast(finite, "float32"), axis=axes)
            enough = 2 * accepted >= ops.sum(judged, axis=axes)
            accept_mask = ops.logical_and(accepted > 0, enough)
        self._recorder(whole.sample_index, losses, accept_mask)

    def _update_if_accepted(
        self, recorded: Pass, whole: Pass, accept_mask: Any, data: Data
    ) -> Any:
        """Changes the weights, or notes that this batch was rejected as a whole."""
        accepts_any = ops.any(accept_mask)

        def apply(passed: Pass) -> Any:
            gradients = self._gradients(passed, whole, accept_mask)
            states = held_back(passed, self.model.variables)
            finite = self.are_finite([*gradients, *(value for _, value in states)])

            def change() -> Any:
                for variable, value in states:
                    variable.assign(value)
                self.apply_gradients(gradients)
                return finite

            def leave() -> Any:
                self.note_not_finite()
                return finite

            return self.branch(finite, change, leave, rare=True)

        def repeat() -> Any:
            return apply(self._finite_pass(recorded.losses, accept_mask, data))

        def reject() -> Any:
            self.reject(whole)
            return ops.zeros_like(accepts_any)

        update = functools.partial(apply, recorded)
        if self.policy.level == "batch":  # Accepted, so all its losses are finite.
            return self.branch(accepts_any, update, reject)
        finite = ops.isfinite(whole.losses)
        if self.policy.level == "element":
            finite = ops.logical_or(finite, ops.equal(whole.losses, LEFT_OUT))
        return self.branch(
            ops.logical_and(accepts_any, ops.all(finite)),
            update,
            functools.partial(self.branch, accepts_any, repeat, reject),
            rare=True,
        )

    def _gradients(
        self, recorded: Pass, whole: Pass, accept_mask: Any, share: Any = 1.0
    ) -> list[Any]:
        """Runs the backward pass; `share` is the device's of what layers add."""
        if not self.trainable_variables:
            return []
        seeds = [share * ops.ones_like(target) for target in recorded.minimised]
        if recorded.per_sample is not None:
            seed = ops.cast(accept_mask, "float32")
            seed /= ops.sum(seed)
            weights = self.policy.weights_of(whole.sample_index)
            seeds.append(whole.own(seed if weights is None else seed * weights))
        seeds = [self.optimizer.scale_loss(seed) for seed in seeds]
        return self.gradients(recorded, seeds)

    def are_finite(self, values: Sequence[Any]) -> Any:
        """Says of gradients and states, None for those not reached, if all are."""
        # Of a sum: the quickest, as it writes nothing of their size.
        sums = [
            ops.sum(ops.cast(value, "float32"))
            for value in values
            if value is not None and keras.backend.is_float_dtype(_dtype_of(value))
        ]
        return ops.isfinite(ops.sum(ops.stack(sums))) if sums else ops.isfinite(0.0)

    def note_not_finite(self) -> None:
        """Counts a step that changed nothing because its gradient was not finite."""
        self.selection.steps_not_finite.assign_add(1.0)
        scaled = isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer)
        if scaled and self.optimizer.built:  # It is not without trainable weights.
            self.optimizer._stateful_handle_non_finite_grads()  # Lowers its scale.

    def _make_slots(self) -> None:
        """Makes the optimizer's variables before they are used in a branch."""
        variables = self.trainable_variables
        if self.optimizer is None or not variables or not self._is_whole():
            return
        if not self.optimizer.built:
            self.optimizer.build(variables)
        optimizer: Any = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        if not optimizer.use_ema or optimizer.iterations.numpy() > 0:
            return
        # Keras copies the averages over the weights when training ends, even if no
        # step was applied; from zero on they would wipe out the model.
        averages = optimizer._model_variables_moving_average
        for variable, average in zip(variables, averages, strict=True):
            # A copy: JAX gives up what a step was given, and cannot do so twice.
            average.assign(variable.numpy())

    def apply_gradients(self, gradients: list[Any]) -> None:
        pairs = zip(gradients, self.trainable_variables, strict=True)
        reached = [(gradient, v) for gradient, v in pairs if gradient is not None]
        if reached:
            self.optimizer.apply([g for g, _ in reached], [v for _, v in reached])


class SymbolicBuild(TrainingStep):
    """Builds from the first three parts of a batch, under JAX and PyTorch."""

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        def first_parts() -> Iterator[tuple[int, int, list[Any]]]:
            for begin, end, batches in iterator:
                listed = isinstance(batches, (list, tuple))
                batch = batches[0] if listed else next(batches)
                yield begin, end, [unpack(batch)[:3]]

        given = None if iterator is None else first_parts()
        super()._symbolic_build(iterator=given, data_batch=data_batch)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, *rest: Any, **named: Any
    ) -> Any:
        """Builds the scorer with the losses of Keras."""
        if not self._scorer.built:
            self._scorer(y, y_pred)
        return super().compute_loss(x, y, y_pred, *rest, **named)


def unpack(data: Any) -> tuple[Any, Any, Any, Any]:
    """Returns inputs, targets, weights and sample indices, None where missing."""
    if not (isinstance(data, (tuple, list)) and len(data) == 4):
        return (*keras.utils.unpack_x_y_sample_weight(data), None)
    sample_index = data[3]
    dtype = keras.backend.standardize_dtype(sample_index.dtype)
    if not (keras.backend.is_int_dtype(dtype) and len(sample_index.shape) == 1):
        raise InvalidArgument(
            "The fourth part of a batch must be the sample indices, whole numbers of "
            f"shape (batch,). Received: {dtype} of shape {sample_index.shape}."
        )
    return tuple(data)


def held_back(recorded: Pass, variables: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Returns those of some variables that a pass would change, with their values."""
    values = [(v, recorded.pending.get_current_value(v)) for v in variables]
    return [(v, value) for v, value in values if value is not None]


def _dtype_of(value: Any) -> str:
    return keras.backend.standardize_dtype(value.dtype)


def unselected(logs: dict[str, Any]) -> dict[str, Any]:
    """Returns the logs of an evaluation, in which nothing is selected."""
    return {k: v for k, v in logs.items() if k not in SELECTION_METRICS}


def _labels_of(y: Any, losses: Any) -> Any:
    """Returns the targets' classes, int32 of the shape of `losses`, or None."""
    rank = len(losses.shape)
    if isinstance(y, (dict, list, tuple)) or y is None or len(y.shape) > rank + 1:
        return None
    if len(y.shape) == rank + 1:
        if (y.shape[-1] or 0) > 1 or (rank > 1 and y.shape[-1] != 1):
            return ops.cast(ops.argmax(y, axis=-1), "int32")
        y = ops.squeeze(y, axis=-1) if rank > 1 else ops.reshape(y, (-1,))
    if len(y.shape) != rank or not keras.backend.is_int_dtype(y.dtype):
        return None
    return ops.cast(y, "int32")
