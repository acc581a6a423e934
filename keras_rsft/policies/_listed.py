"""Policies that go by a list of samples made before training."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rsft.errors import InvalidArgument
from keras_rsft.policies._policy import Batch, Policy, is_positive, require
from keras_rsft.policies._rules import accept_below, accept_listed


@keras.saving.register_keras_serializable(package="keras_rsft")
class AcceptListed(Policy):
    """Accepts the training samples that a list, made before training, accepts.

    `fit` numbers the rows of arrays and of a `PyDataset`; a `tf.data.Dataset` is
    numbered by `with_ids`, or yields `(x, y, sample_weight or None, sample_index)`, as
    `TrainingBatches` does with `sample_index=True`. The list is saved with the model.

    Args:
        accept: Boolean array of shape `(n,)`, one entry a training sample; or the
            number `n`, to accept all of `n` samples.

    Raises:
        InvalidArgument: If `accept` is not as above, or accepts nothing; when
            called, if there is no `sample_index`.

    Example:
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> policy = rsft.AcceptListed(np.array([True, False, True]))
        >>> losses, sample_index = np.array([0.2, 0.2], "float32"), np.array([2, 1])
        >>> np.asarray(policy(losses, sample_index=sample_index)).tolist()
        [True, False]
    """

    needs_sample_index = True

    def __init__(self, accept: Any, **kwargs: Any):
        super().__init__(**kwargs)
        accept = _list_of(accept, if_count=True)
        if accept.ndim != 1 or accept.dtype != bool or not accept.any():
            raise InvalidArgument(
                "`accept` must be a boolean for each training sample, at least one of "
                f"them True. Received: shape {accept.shape}, dtype {accept.dtype}."
            )
        self.listed = _add_list(self, "listed", accept)

    def decide(self, batch: Batch) -> Any:
        return _entries(self, self.listed, batch.sample_index)

    def _accepted_in_warmup(self, batch: Batch) -> Any:
        return _entries(self, self.listed, batch.sample_index)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"accept": int(self.listed.shape[0])}


@keras.saving.register_keras_serializable(package="keras_rsft")
class AcceptReviewed(Policy):
    """Accepts what a person has reviewed, and of the rest what another policy does."""

    needs_sample_index = True

    def __init__(self, policy: Policy, reviewed: Any, **kwargs: Any):
        super().__init__(**kwargs)
        if policy.level != "sample":
            raise InvalidArgument(
                "Reviewed samples can be accepted one by one only. Received: "
                f"{type(policy).__name__} at level {policy.level!r}."
            )
        reviewed = _list_of(reviewed, if_count=False).astype(bool)
        self.policy = policy
        self.needs_ledger = policy.needs_ledger
        self.accepts_every_finite_sample = policy.accepts_every_finite_sample
        self.reviewed = _add_list(self, "reviewed", reviewed)

    def decide(self, batch: Batch) -> Any:
        accepted = self.policy(batch.losses, batch.labels, batch.sample_index)
        reviewed = _entries(self, self.reviewed, batch.sample_index)
        return ops.logical_or(accepted, reviewed)

    def weights_of(self, sample_index: Any) -> Any:
        return self.policy.weights_of(sample_index)

    def note_steps_seen(self, steps: int) -> None:
        super().note_steps_seen(steps)
        self.policy.note_steps_seen(steps)

    def threshold_in_use(self) -> float | None:
        return self.policy.threshold_in_use()

    def note_losses(self, losses: np.ndarray, epochs: int) -> None:
        self.policy.note_losses(losses, epochs)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "policy": keras.saving.serialize_keras_object(self.policy),
            "reviewed": int(self.reviewed.shape[0]),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AcceptReviewed:
        policy = keras.saving.deserialize_keras_object(config["policy"])
        return cls(**(config | {"policy": policy}))


@keras.saving.register_keras_serializable(package="keras_rsft")
class AutoPolicy(AcceptListed):
    """Accepts the samples whose label is likely right; the command line's default.

    Needs no clean labels and no noise rate, and keeps every sample where nothing
    looks wrong. `RSFTModel(model, "auto")` makes it of an audit of its own. By hand:

    ```python
    found = rsft.audit_labels(features, labels)
    print(found.describe())
    policy = rsft.AutoPolicy(
        found.accept_mask(), weights=found.weights, loss_limit=found.loss_limit
    )
    model = rsft.RSFTModel(head, policy)
    ```

    Args:
        accept: Boolean array of shape `(n,)`, one entry a training sample, such as
            `LabelQuality.accept_mask` gives; or the number of samples, to accept all
            of them.
        weights: Float array `(n,)` in [0, 1]: how much each sample counts where it is
            accepted, such as `LabelQuality.weights`. Default None: all count as much.
        loss_limit: After the warm-up, a sample must also have a loss below this:
            `LabelQuality.loss_limit` leaves out what a trained head finds no more
            likely than a guess. Of each class in a batch a tenth of the listed, but
            at least one, is accepted even so. Positive. Default: infinity.
        warmup_steps: As for every `Policy`; a new head needs an epoch or two.

    Raises:
        InvalidArgument: If an argument is not as above.

    Example:
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> policy = rsft.AutoPolicy(3, loss_limit=1.0)  # Nothing looked wrong.
        >>> losses = np.array([0.1, 2.0, 0.3], "float32")
        >>> np.asarray(policy(losses, sample_index=np.arange(3))).tolist()
        [True, False, True]
    """

    _arguments = ("loss_limit",)

    def __init__(
        self,
        accept: Any,
        *,
        weights: Any = None,
        loss_limit: float = math.inf,
        **kwargs: Any,
    ):
        super().__init__(accept, **kwargs)
        count = self.listed.shape[0]
        weights = np.asarray(np.ones(count) if weights is None else weights, np.float32)
        if weights.shape != (count,) or not ((weights >= 0) & (weights <= 1)).all():
            raise InvalidArgument(
                "`weights` must be a number in [0, 1] for each of the "
                f"{count} samples of `accept`. Received: shape {weights.shape}, "
                f"from {weights.min(initial=1)} to {weights.max(initial=0)}."
            )
        self.weights_listed = _add_list(self, "weights", weights)
        hint = "Use infinity for no limit."
        require(is_positive(loss_limit), "positive", hint, loss_limit=loss_limit)
        self.loss_limit = self.add_live_number("loss_limit", loss_limit)

    def decide(self, batch: Batch) -> Any:
        listed = super().decide(batch)
        if math.isinf(self._configured["loss_limit"]):  # The class floor adds nothing.
            return ops.logical_and(listed, accept_below(batch.losses, self.loss_limit))
        return accept_listed(listed, batch.losses, batch.labels, self.loss_limit)

    def weights_of(self, sample_index: Any) -> Any:
        return _entries(self, self.weights_listed, sample_index)

    def _loss_limit(self, step: Any) -> Any:
        return self.loss_limit


def require_same_count(policy: Policy, count: int | None) -> None:
    """Refuses to train on other samples than a policy's list is of."""
    listed = getattr(policy, "listed", getattr(policy, "reviewed", None))
    if listed is not None and count is not None and count != listed.shape[0]:
        raise InvalidArgument(
            f"{type(policy).__name__} has a list of {listed.shape[0]:,} training "
            f"samples. Received: {count:,}. It decided on other data: make a new "
            'RSFTModel of the same model and "auto".'
        )


def _list_of(given: Any, *, if_count: bool) -> np.ndarray:
    """Returns an array, of one value where a number of samples is given."""
    if isinstance(given, Integral) and not isinstance(given, bool):
        return np.full(int(given), if_count)
    return np.asarray(given)


def _add_list(policy: Policy, name: str, entries: np.ndarray) -> Any:
    return policy.add_weight(
        name=name,
        shape=entries.shape,
        dtype=str(entries.dtype),
        initializer=lambda shape, dtype: ops.convert_to_tensor(entries),
    )


def _entries(policy: Policy, listed: Any, sample_index: Any) -> Any:
    if sample_index is None:
        raise InvalidArgument(
            f"{type(policy).__name__} must be told which samples a batch holds. "
            "Received: data without sample indices. Give `fit` arrays or a "
            "`PyDataset`; number a `tf.data.Dataset` by `rsft.with_ids(dataset)`, "
            "before it is shuffled."
        )
    return ops.take(listed.value, sample_index, axis=0)
