"""Policies that judge a sample by its loss in the batch."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_rsft.errors import InvalidArgument
from keras_rsft.policies.decisions import (
    accept_batch_below,
    accept_below,
    keep_smallest,
    ramped_keep_fraction,
)
from keras_rsft.policies.policy import Policy, is_positive, whole_number


@keras.saving.register_keras_serializable(package="keras_rsft")
class AcceptAll(Policy):
    """Plain fine-tuning: every sample with a finite loss is accepted.

    Args:
        **kwargs: As for every `Policy`; a `class_floor` changes nothing here.

    Example:
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> losses = np.array([0.2, 1.6, np.nan], "float32")
        >>> np.asarray(rsft.AcceptAll()(losses)).tolist()
        [True, True, False]
    """

    accepts_every_finite_sample = True

    def decide(
        self,
        per_sample_loss: Any,
        step: Any,
        labels: Any = None,
        sample_index: Any = None,
    ) -> Any:
        del step, labels, sample_index
        return ops.ones_like(per_sample_loss, dtype="bool")


@keras.saving.register_keras_serializable(package="keras_rsft")
class LossThreshold(Policy):
    """Accepts what has a loss strictly below a fixed threshold.

    With `level="batch"` and `warmup_steps=0` this is the rule of the RSFT
    article: a batch whose mean loss is not below the threshold is skipped.
    The threshold is live: `policy.threshold.assign(value)` takes effect at the
    next step.

    Args:
        threshold: Positive number in the loss's units. A new head on `k`
            classes starts near `ln(k)`; a threshold below that rejects
            everything unless there is a warm-up.
        level: `"sample"` judges each sample by its own loss, `"batch"` all
            samples of a batch by their mean loss, `"element"` each element of a
            sample (pixel, box, label) by its own. Default `"sample"`.
        warmup_steps: Steps at the start in which every finite sample is
            accepted, at least 0. Default 0.

    Raises:
        InvalidArgument: If an argument is out of its range.

    Example:
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> losses = np.array([0.2, 1.6, np.nan], "float32")
        >>> np.asarray(rsft.LossThreshold(1.5)(losses)).tolist()
        [True, False, False]
        >>> by_batch = rsft.LossThreshold(1.5, level="batch")
        >>> np.asarray(by_batch(losses[:2])).tolist()  # Their mean is 0.9.
        [True, True]
    """

    levels = ("sample", "batch", "element")

    def __init__(
        self,
        threshold: float,
        *,
        level: str = "sample",
        warmup_steps: int = 0,
        **kwargs: Any,
    ):
        super().__init__(level=level, **kwargs)
        if not is_positive(threshold):
            raise InvalidArgument(
                "`threshold` must be a positive number. "
                f"Received: threshold={threshold}. A new head on k classes "
                "starts with a loss near ln(k)."
            )
        self.warmup_steps = whole_number("warmup_steps", warmup_steps)
        self.threshold = self.add_live_number("threshold", threshold)
        self._configured_threshold = float(threshold)

    def decide(
        self,
        per_sample_loss: Any,
        step: Any,
        labels: Any = None,
        sample_index: Any = None,
    ) -> Any:
        del labels, sample_index
        judge = accept_batch_below if self.level == "batch" else accept_below
        accept_mask = judge(per_sample_loss, self.threshold)
        if self.warmup_steps == 0:
            return accept_mask
        return ops.logical_or(accept_mask, ops.less(step, self.warmup_steps))

    def threshold_in_use(self) -> float | None:
        return self.after_warmup(self.threshold, self.warmup_steps)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "threshold": self._configured_threshold,
            "warmup_steps": self.warmup_steps,
        }


@keras.saving.register_keras_serializable(package="keras_rsft")
class KeepFraction(Policy):
    """Keeps a fixed share of each batch: the smallest losses.

    Source: Han et al., "Co-teaching: Robust training of deep neural networks
    with extremely noisy labels", NeurIPS 2018 (the small-loss rule and its
    ramp, with one network).

    Args:
        keep_fraction: Share kept after the ramp, in (0, 1]; one minus the
            share of wrong labels is a good value.
        ramp_steps: Steps over which the kept share falls from 1 to
            `keep_fraction`, at least 0. Default 0: no ramp.
        level: `"sample"`, or `"element"` for all elements of the batch together.
            Default `"sample"`.
        class_floor: As for every `Policy`.

    Raises:
        InvalidArgument: If an argument is out of its range.

    Example:
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> losses = np.array([0.2, 3.0, 0.4, 1.0], "float32")
        >>> np.asarray(rsft.KeepFraction(0.5)(losses)).tolist()
        [True, False, True, False]
    """

    levels = ("sample", "element")

    def __init__(self, keep_fraction: float, *, ramp_steps: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        if not is_positive(keep_fraction) or keep_fraction > 1:
            raise InvalidArgument(
                "`keep_fraction` must be in (0, 1]. "
                f"Received: keep_fraction={keep_fraction}. "
                "Use 1.0 to keep every sample."
            )
        self.ramp_steps = whole_number("ramp_steps", ramp_steps)
        self.keep_fraction = self.add_live_number("keep_fraction", keep_fraction)
        self._configured_keep_fraction = float(keep_fraction)

    def decide(
        self,
        per_sample_loss: Any,
        step: Any,
        labels: Any = None,
        sample_index: Any = None,
    ) -> Any:
        del labels, sample_index
        keep_fraction = ramped_keep_fraction(step, self.keep_fraction, self.ramp_steps)
        return keep_smallest(per_sample_loss, keep_fraction)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "keep_fraction": self._configured_keep_fraction,
            "ramp_steps": self.ramp_steps,
        }
