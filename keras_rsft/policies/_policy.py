"""The base class of all policies."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_rsft.errors import InvalidArgument
from keras_rsft.policies._rules import after_warmup, with_class_floor


class Batch(NamedTuple):
    """What a policy decides on."""

    losses: Any
    labels: Any = None
    sample_index: Any = None
    step: Any = 0


class Policy(keras.layers.Layer):
    """Turns the losses of a training batch into a mask of accepted samples.

    A subclass implements `decide` and, where it has constructor arguments,
    `get_config`. All variables are made in `__init__`.

    Args:
        warmup_steps: Steps at the start in which the loss plays no part, at least 0:
            every finite sample is accepted, but for those that a list made before
            training leaves out. Default 0.
        class_floor: Minimum fraction of each class's samples in a batch to accept, in
            [0, 1], so that no class is dropped in silence; needs labels that are
            classes: integers or one-hot rows, not rows of several labels. Default 0:
            no floor. Not at level `"element"`.
        level: One of the class's `levels`. Default: `"sample"`.

    Attributes:
        level: `"sample"` if samples are accepted one by one, `"batch"` if the
            mask is equal for all samples of a batch, `"element"` if what the loss
            has a value for within a sample is accepted one by one: pixels, boxes,
            time steps, labels of a sample with several.
        levels: What `level` may be for this class.
        needs_ledger: True where the policy learns from a `RejectionLedger`.
        needs_sample_index: True where the policy must know which samples a batch holds.
        accepts_every_finite_sample: True where the policy never rejects a
            sample whose loss is finite.
        steps_seen: int32 scalar variable, training batches judged so far.

    Raises:
        InvalidArgument: If an argument is not as above, or a floor is asked for at
            level `"element"`.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> class BelowTheMedian(rsft.Policy):
        ...     def decide(self, batch):
        ...         return batch.losses < keras.ops.quantile(batch.losses, 0.5)
        >>> losses = np.array([3.0, 1.0, 2.0], "float32")
        >>> np.asarray(BelowTheMedian()(losses)).tolist()
        [False, True, False]
    """

    level = "sample"
    levels: tuple[str, ...] = ("sample",)
    needs_ledger = False
    needs_sample_index = False
    accepts_every_finite_sample = False
    _arguments: tuple[str, ...] = ()  # Of the constructor, kept under their names.

    def __init__(
        self,
        *,
        warmup_steps: int = 0,
        class_floor: float = 0.0,
        level: str | None = None,
        **kwargs: Any,
    ):
        kwargs.setdefault("dtype", "float32")
        super().__init__(trainable=False, **kwargs)
        self._configured: dict[str, float] = {}
        self.warmup_steps = whole_number("warmup_steps", warmup_steps)
        hint = "Use 0 for no floor."
        require(0 <= class_floor <= 1, "in [0, 1]", hint, class_floor=class_floor)
        self.class_floor = float(class_floor)
        if level not in (None, *self.levels):
            raise InvalidArgument(
                f"`level` of {type(self).__name__} must be one of {self.levels}. "
                f"Received: level={level!r}. Elements within a sample are judged by "
                "LossThreshold, KeepFraction, SelfPaced and RunningThreshold."
            )
        self.level = level or self.level
        if self.level == "element" and class_floor > 0:
            raise InvalidArgument(
                "`class_floor` ranks each sample of a batch among its class, which "
                "takes too long for all elements. Received: "
                f"class_floor={class_floor}, level='element'. Leave it out, or use "
                "RunningThreshold with `num_classes`."
            )
        self.steps_seen = self.add_weight(
            name="steps_seen", shape=(), dtype="int32", initializer="zeros"
        )
        self.built = True

    @property
    def judges_by_class(self) -> bool:
        """Whether each sample must have one class."""
        return self.class_floor > 0

    def decide(self, batch: Batch) -> Any:
        """Returns a boolean mask of the shape of `batch.losses`.

        What is not finite is rejected whatever it says, and in the warm-up it is not
        listened to.

        Args:
            batch: Named tuple of `losses`, float32 `(batch,)`; `labels`, int32
                `(batch,)`, the given classes, or None where the targets are not
                classes; `sample_index`, int32 `(batch,)`, which training samples these
                are, or None where the data set does not say; and `step`, an int32
                scalar, batches judged before this one. At level `"element"` the losses
                and labels are those of all elements in one row, and there is no
                `sample_index`.

        Raises:
            NotImplementedError: If a subclass does not implement it.
        """
        raise NotImplementedError

    def call(
        self, per_sample_loss: Any, labels: Any = None, sample_index: Any = None
    ) -> Any:
        """Returns the mask of `decide` over the floor, less what is never accepted.

        A loss that is not finite is rejected whatever `decide` says; at batch
        level it takes the whole batch with it.

        Args:
            per_sample_loss: Float32 tensor `(batch,)`; `(batch, ...)`, a value an
                element, at level `"element"`.
            labels: int32 tensor of the same shape, or None.
            sample_index: int32 tensor `(batch,)`, or None.
        """
        losses = per_sample_loss
        if self.level == "element":
            losses, sample_index = ops.reshape(losses, (-1,)), None
            labels = None if labels is None else ops.reshape(labels, (-1,))
        step = ops.convert_to_tensor(self.steps_seen)
        batch = Batch(losses, labels, sample_index, step)
        mask = self.decide(batch)
        if self.warmup_steps > 0:
            first = self._accepted_in_warmup(batch)
            mask = after_warmup(mask, first, step, self.warmup_steps)
        if self.class_floor > 0:
            labels = self._required_labels(batch)
            mask = with_class_floor(mask, losses, labels, self.class_floor)
        mask = ops.logical_and(mask, ops.isfinite(losses))
        if self.level == "batch":
            mask = ops.logical_and(mask, ops.all(mask))
        if keras.backend.backend() != "tensorflow":
            self.steps_seen.assign(step + 1)
        else:
            import tensorflow as tf

            with tf.control_dependencies([losses]):  # Once its losses are there.
                self.steps_seen.assign(step + 1)
        if self.level == "element":
            mask = ops.reshape(mask, ops.shape(per_sample_loss))
        return mask

    def weights_of(self, sample_index: Any) -> Any:
        """Returns how much each sample counts where it is accepted.

        The gradient is that of the sum of the accepted samples' losses, each times its
        weight, divided by their number.

        Args:
            sample_index: As in `call`.

        Returns:
            Float32 tensor `(batch,)`, or None: all count as much. Default: None.
        """
        return None

    def note_losses(self, losses: np.ndarray, epochs: int) -> None:
        """Takes the losses of the epochs so far, where the policy `needs_ledger`.

        Args:
            losses: Float array `(n,)`, the mean loss of each sample.
            epochs: Epochs that they cover, at least 1.
        """

    def note_steps_seen(self, steps: int) -> None:
        """Says that a number of training batches were judged before now.

        For a model whose training is not gone through again: its warm-up is over.

        Args:
            steps: Training batches, at least 0.
        """
        self.steps_seen.assign(steps)

    def threshold_in_use(self) -> float | None:
        """Returns the loss that the last batch's samples had to be below.

        None where the policy has no such number for all samples, or during the
        warm-up, in which the loss is not used yet.
        """
        seen = int(ops.convert_to_numpy(self.steps_seen))
        limit = self._loss_limit(seen - 1) if seen > self.warmup_steps else None
        value = math.inf if limit is None else float(ops.convert_to_numpy(limit))
        return value if math.isfinite(value) else None

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Makes a variable, as every Keras layer does, but never a trainable one."""
        return super().add_weight(*args, **kwargs | {"trainable": False})

    def add_live_number(self, name: str, value: float) -> Any:
        """Returns a float32 scalar variable: saved, and changed without a retrace.

        Args:
            name: The variable's name.
            value: Its first value.
        """
        self._configured[name] = float(value)
        initial = keras.initializers.Constant(float(value))
        return self.add_weight(
            name=name, shape=(), dtype="float32", initializer=initial
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.pop("trainable", None)
        if len(self.levels) > 1:
            config["level"] = self.level
        names = ("warmup_steps", "class_floor", *self._arguments)
        live = self._configured  # Not what became of it since.
        own = {name: live.get(name, getattr(self, name)) for name in names}
        return config | own

    def _accepted_in_warmup(self, batch: Batch) -> Any:
        return ops.ones_like(batch.losses, dtype="bool")

    def _loss_limit(self, step: Any) -> Any:
        """The scalar or variable that `threshold_in_use` shows after the warm-up."""
        return None

    def _required_labels(self, batch: Batch) -> Any:
        if batch.labels is None:
            raise InvalidArgument(
                f"{type(self).__name__} judges class by class. Received: targets that "
                f"are not classes. Give one integer or one-hot row for each "
                f"{'element' if self.level == 'element' else 'sample'}."
            )
        return batch.labels


def require(holds: bool, needed: str, hint: str = "", **argument: Any) -> None:
    """Raises InvalidArgument that says what an argument must be, and is."""
    if not holds:
        ((name, value),) = argument.items()
        sentence = f"`{name}` must be {needed}. Received: {name}={value!r}. {hint}"
        raise InvalidArgument(sentence.rstrip())


def is_positive(value: Any) -> bool:
    """Says whether a value is a number above 0, infinity included."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and value > 0  # NaN is not.


def whole_number(name: str, value: Any, *, least: int = 0) -> int:
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    needed = f"a whole number, at least {least}"
    require(is_whole and value >= least, needed, **{name: value})
    return int(value)
