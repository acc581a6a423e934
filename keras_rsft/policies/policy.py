"""What all policies are: Keras layers that turn losses into a mask.

They have no trainable weights. Their numbers (a live threshold, the steps seen) are
variables, which are saved with the model and can be changed without a retrace.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import keras
from keras import ops

from keras_rsft.errors import InvalidArgument
from keras_rsft.policies.decisions import with_class_floor
from keras_rsft.variable_updates import assign_after


class Policy(keras.layers.Layer):
    """Turns the losses of a training batch into a mask of accepted samples.

    A subclass implements `decide` and, where it has constructor arguments,
    `get_config`. All variables are made in `__init__`.

    Args:
        class_floor: Least share of each class's samples in a batch to accept, in
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
        ...     def decide(self, per_sample_loss, step, labels=None, sample_index=None):
        ...         middle = keras.ops.quantile(per_sample_loss, 0.5)
        ...         return per_sample_loss < middle
        >>> losses = np.array([3.0, 1.0, 2.0], "float32")
        >>> np.asarray(BelowTheMedian()(losses)).tolist()
        [False, True, False]
    """

    level = "sample"
    levels: tuple[str, ...] = ("sample",)
    needs_ledger = False
    accepts_every_finite_sample = False

    def __init__(
        self, *, class_floor: float = 0.0, level: str | None = None, **kwargs: Any
    ):
        kwargs.setdefault("dtype", "float32")
        super().__init__(trainable=False, **kwargs)
        if not 0 <= class_floor <= 1:
            raise InvalidArgument(
                "`class_floor` must be in [0, 1]. "
                f"Received: class_floor={class_floor}. Use 0 for no floor."
            )
        self.class_floor = float(class_floor)
        if level is not None:
            self.level = self._known(level)
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

    def decide(
        self,
        per_sample_loss: Any,
        step: Any,
        labels: Any = None,
        sample_index: Any = None,
    ) -> Any:
        """Returns a boolean mask of the shape of `per_sample_loss`.

        At level `"element"` these are the elements of the whole batch in one row, and
        `sample_index` is None.

        Args:
            per_sample_loss: Float32 tensor of shape `(batch,)`.
            step: int32 scalar tensor, batches judged before this one.
            labels: int32 tensor of shape `(batch,)`, the classes given; None where
                the targets are not classes.
            sample_index: int32 tensor of shape `(batch,)`, which training samples
                these are; None where the data set does not say.

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
        if self.level != "element":
            return self._judge(per_sample_loss, labels, sample_index)
        if labels is not None:
            labels = ops.reshape(labels, (-1,))
        accept_mask = self._judge(ops.reshape(per_sample_loss, (-1,)), labels, None)
        return ops.reshape(accept_mask, ops.shape(per_sample_loss))

    def _judge(self, per_sample_loss: Any, labels: Any, sample_index: Any) -> Any:
        step = ops.convert_to_tensor(self.steps_seen)
        accept_mask = self.decide(per_sample_loss, step, labels, sample_index)
        if self.class_floor > 0:
            accept_mask = with_class_floor(
                accept_mask, per_sample_loss, self.require(labels), self.class_floor
            )
        accept_mask = ops.logical_and(accept_mask, ops.isfinite(per_sample_loss))
        if self.level == "batch":
            accept_mask = ops.logical_and(accept_mask, ops.all(accept_mask))
        assign_after(self.steps_seen, step + 1, per_sample_loss)
        return accept_mask

    def note_steps_seen(self, steps: int) -> None:
        """Says that a number of training batches were judged before now.

        For a model whose training is not gone through again: its warm-up is over.

        Args:
            steps: Training batches, at least 0.
        """
        self.steps_seen.assign(steps)

    def threshold_in_use(self) -> float | None:
        """Returns the loss that the last batch's samples had to be below.

        None where the policy has no such number for all samples, or did not use it
        yet: during the warm-up everything is accepted.
        """
        return None

    def after_warmup(self, number: Any, warmup_steps: int) -> float | None:
        """Returns a number if it is finite and the last batch came after the warm-up.

        Args:
            number: Scalar tensor or variable.
            warmup_steps: Steps at the start that do not count, at least 0.
        """
        value = float(ops.convert_to_numpy(number))
        begun = int(ops.convert_to_numpy(self.steps_seen)) > warmup_steps
        return value if begun and math.isfinite(value) else None

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Makes a variable, as every Keras layer does, but never a trainable one."""
        return super().add_weight(*args, **kwargs | {"trainable": False})

    def add_live_number(self, name: str, value: float) -> Any:
        """Returns a float32 scalar variable: saved, and changed without a retrace.

        Args:
            name: The variable's name.
            value: Its first value.
        """
        return self.add_weight(
            name=name,
            shape=(),
            dtype="float32",
            initializer=keras.initializers.Constant(float(value)),
        )

    def require(self, labels: Any) -> Any:
        """Returns the labels.

        Args:
            labels: Integer tensor, or None.

        Raises:
            InvalidArgument: If there are none.
        """
        if labels is None:
            raise InvalidArgument(
                f"{type(self).__name__} judges class by class. Received: targets that "
                f"are not classes. Give one integer or one-hot row for each "
                f"{'element' if self.level == 'element' else 'sample'}."
            )
        return labels

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.pop("trainable", None)
        if len(self.levels) > 1:
            config["level"] = self.level
        return config | {"class_floor": self.class_floor}

    def _known(self, level: str) -> str:
        if level not in self.levels:
            raise InvalidArgument(
                f"`level` of {type(self).__name__} must be one of {self.levels}. "
                f"Received: level={level!r}. Elements within a sample are judged by "
                "LossThreshold, KeepFraction, SelfPaced and RunningThreshold."
            )
        return level


def is_positive(value: Any) -> bool:
    """Says whether a value is a number above 0, infinity included."""
    return (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and not math.isnan(value)
        and value > 0
    )


def whole_number(name: str, value: Any, *, least: int = 0) -> int:
    """Returns a number of steps or epochs, or raises InvalidArgument."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InvalidArgument(
            f"`{name}` must be a whole number, at least {least}. "
            f"Received: {name}={value!r}."
        )
    return int(value)
