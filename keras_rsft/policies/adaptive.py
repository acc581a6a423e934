"""Policies whose threshold moves while the model learns."""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rsft.errors import InvalidArgument
from keras_rsft.policies.decisions import (
    accept_below,
    grown_threshold,
    running_moments,
    running_percentile,
    threshold_from_moments,
    threshold_from_percentile,
)
from keras_rsft.policies.policy import Policy, is_positive, whole_number


@keras.saving.register_keras_serializable(package="keras_rsft")
class SelfPaced(Policy):
    """Accepts losses below a threshold that grows, until all are easy enough.

    Source: Kumar, Packer and Koller, "Self-paced learning for latent variable
    models", NeurIPS 2010 (its age parameter, which grows by a factor).

    Args:
        threshold: Threshold at the first step, positive, in the loss's units.
        growth: Factor, at least 1. Default 1.3.
        growth_steps: Steps in which the threshold grows by it, at least 1.
        max_threshold: Where it stops, positive. Default: infinity.
        warmup_steps: Steps at the start in which every finite sample is accepted,
            and the threshold does not grow yet. Default 0.
        class_floor: As for every `Policy`.
        level: `"sample"`, or `"element"` for all elements of the batch together.
            Default `"sample"`.

    Raises:
        InvalidArgument: If an argument is out of its range.

    Example:
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> losses = np.array([0.5, 1.5], "float32")
        >>> policy = rsft.SelfPaced(1.0, growth=2.0, growth_steps=1)
        >>> np.asarray(policy(losses)).tolist()
        [True, False]
        >>> np.asarray(policy(losses)).tolist()  # Below 2 in the second step.
        [True, True]
    """

    levels = ("sample", "element")

    def __init__(
        self,
        threshold: float,
        *,
        growth: float = 1.3,
        growth_steps: int,
        max_threshold: float = math.inf,
        warmup_steps: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        for name, value in (("threshold", threshold), ("max_threshold", max_threshold)):
            if not is_positive(value):
                raise InvalidArgument(
                    f"`{name}` must be a positive number. Received: {name}={value}."
                )
        if not 1 <= growth < math.inf:
            raise InvalidArgument(
                "`growth` must be a factor of at least 1. "
                f"Received: growth={growth}. Use 1.0 for a fixed threshold."
            )
        self.growth = float(growth)
        self.growth_steps = whole_number("growth_steps", growth_steps, least=1)
        self.max_threshold = float(max_threshold)
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
        accept_mask = accept_below(per_sample_loss, self._threshold_at(step))
        return ops.logical_or(accept_mask, ops.less(step, self.warmup_steps))

    def threshold_in_use(self) -> float | None:
        return self.after_warmup(
            self._threshold_at(self.steps_seen - 1), self.warmup_steps
        )

    def _threshold_at(self, step: Any) -> Any:
        grown = grown_threshold(
            ops.maximum(step - self.warmup_steps, 0),
            self.threshold,
            self.growth,
            self.growth_steps,
        )
        return ops.minimum(grown, self.max_threshold)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "threshold": self._configured_threshold,
            "growth": self.growth,
            "growth_steps": self.growth_steps,
            "max_threshold": self.max_threshold,
            "warmup_steps": self.warmup_steps,
        }


@keras.saving.register_keras_serializable(package="keras_rsft")
class RunningThreshold(Policy):
    """Accepts losses below their running mean plus some deviations, or percentile.

    With `num_classes` each class is compared with its own statistics, so that a hard
    class is not rejected for being hard. Sources: Dedeoglu, Kesgin and Amasyali,
    "Adaptive-k", Frontiers of Computer Science 2024, for a threshold found while
    training; Jiang et al., "MentorNet", ICML 2018, for a running percentile of the
    loss; Patel and Sastry, "Adaptive sample selection for robust learning under
    label noise" (BARE), WACV 2023, for statistics of each class.

    The first sample of a class is not below its own mean: with `num_classes`, let
    `warmup_steps` cover the first samples of each class.

    Args:
        deviations: Standard deviations above the mean, any finite number. Default 0.
        percentile: Share of the losses, in (0, 1], whose largest is the threshold;
            None, the default, for mean and deviations.
        momentum: Share of the old statistics kept in a step, in [0, 1). Default 0.95.
        num_classes: Number of classes to keep apart, or None for one threshold.
        warmup_steps: Steps at the start in which every finite sample is accepted;
            the statistics run meanwhile. Default 0.
        class_floor: As for every `Policy`.
        level: `"sample"`, or `"element"` for all elements of the batch together.
            Default `"sample"`.

    Attributes:
        statistics: Variable of a row for each group, see `running_moments` and
            `running_percentile`.

    Raises:
        InvalidArgument: If an argument is out of its range; when called with
            `num_classes`, if the targets are not classes.

    Example:
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> losses = np.array([1.0, 2.0, 6.0], "float32")  # Their mean is 3.
        >>> np.asarray(rsft.RunningThreshold()(losses)).tolist()
        [True, True, False]
    """

    levels = ("sample", "element")

    def __init__(
        self,
        deviations: float = 0.0,
        *,
        percentile: float | None = None,
        momentum: float = 0.95,
        num_classes: int | None = None,
        warmup_steps: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not math.isfinite(deviations):
            raise InvalidArgument(
                f"`deviations` must be finite. Received: deviations={deviations}."
            )
        if percentile is not None and (deviations != 0 or not 0 < percentile <= 1):
            raise InvalidArgument(
                "`percentile` must be in (0, 1], and without `deviations`. Received: "
                f"percentile={percentile}, deviations={deviations}."
            )
        if not 0 <= momentum < 1:
            raise InvalidArgument(
                f"`momentum` must be in [0, 1). Received: momentum={momentum}."
            )
        if num_classes is not None and num_classes < 1:
            raise InvalidArgument(
                "`num_classes` must be at least 1, or None for one threshold. "
                f"Received: num_classes={num_classes}."
            )
        self.deviations = float(deviations)
        self.percentile = percentile
        self.momentum = float(momentum)
        self.num_classes = num_classes
        self.warmup_steps = whole_number("warmup_steps", warmup_steps)
        self.statistics = self.add_weight(
            name="statistics",
            shape=(num_classes or 1, 3 if percentile is None else 2),
            dtype="float32",
            initializer="zeros",
        )

    @property
    def judges_by_class(self) -> bool:
        return super().judges_by_class or self.num_classes is not None

    def decide(
        self,
        per_sample_loss: Any,
        step: Any,
        labels: Any = None,
        sample_index: Any = None,
    ) -> Any:
        del sample_index
        if self.num_classes is None:
            groups = ops.zeros_like(per_sample_loss, dtype="int32")
        else:
            groups = self.require(labels)
        members = ops.transpose(ops.one_hot(groups, self.num_classes or 1))
        thresholds = self._moved_thresholds(per_sample_loss, members)
        accept_mask = accept_below(per_sample_loss, ops.take(thresholds, groups))
        return ops.logical_or(accept_mask, ops.less(step, self.warmup_steps))

    def _moved_thresholds(self, per_sample_loss: Any, members: Any) -> Any:
        """Takes a batch into the statistics; returns each group's threshold."""
        seen = (self.statistics.value, per_sample_loss, members)
        if self.percentile is None:
            self.statistics.assign(running_moments(*seen, self.momentum))
            return threshold_from_moments(self.statistics.value, self.deviations)
        self.statistics.assign(
            running_percentile(*seen, self.percentile, self.momentum)
        )
        return threshold_from_percentile(self.statistics.value)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "deviations": self.deviations,
            "percentile": self.percentile,
            "momentum": self.momentum,
            "num_classes": self.num_classes,
            "warmup_steps": self.warmup_steps,
        }


@keras.saving.register_keras_serializable(package="keras_rsft")
class LossMixture(Policy):
    """Accepts what belongs to the lower of two components of the samples' losses.

    After each epoch a `RejectionLedger` hands over the samples' mean losses, and two
    Gaussians are fitted to them. Sources: Arazo et al., "Unsupervised label noise
    modeling and loss correction", ICML 2019; Li, Socher and Hoi, "DivideMix", ICLR
    2020 (Gaussians). Until then, and where the losses do not separate, every sample
    is accepted.

    Args:
        probability: Least probability of the lower component to accept, in (0, 1).
            Default 0.5.
        warmup_epochs: Epochs before the first fit, at least 1. Default 2.
        class_floor: As for every `Policy`.

    Attributes:
        threshold: Live loss threshold; infinite while everything is accepted.

    Raises:
        InvalidArgument: If an argument is out of its range.

    Example:
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> policy = rsft.LossMixture()
        >>> losses = np.concatenate([np.linspace(0, 0.5, 20), np.linspace(2, 3, 10)])
        >>> policy.note_losses(losses, epochs=2)
        >>> np.asarray(policy(np.array([0.4, 2.5], "float32"))).tolist()
        [True, False]
    """

    needs_ledger = True

    def __init__(
        self, probability: float = 0.5, *, warmup_epochs: int = 2, **kwargs: Any
    ):
        super().__init__(**kwargs)
        if not 0 < probability < 1:
            raise InvalidArgument(
                "`probability` must be in (0, 1). "
                f"Received: probability={probability}. Use 0.5, for example."
            )
        self.probability = float(probability)
        self.warmup_epochs = whole_number("warmup_epochs", warmup_epochs, least=1)
        self.threshold = self.add_live_number("threshold", math.inf)

    def decide(
        self,
        per_sample_loss: Any,
        step: Any,
        labels: Any = None,
        sample_index: Any = None,
    ) -> Any:
        del step, labels, sample_index
        return accept_below(per_sample_loss, self.threshold)

    def threshold_in_use(self) -> float | None:
        return self.after_warmup(self.threshold, 0)

    def note_losses(self, losses: np.ndarray, epochs: int) -> None:
        """Moves the threshold by the losses of the epochs so far.

        Args:
            losses: Float array `(n,)`, the mean loss of each sample.
            epochs: Epochs that they cover, at least 1.
        """
        if epochs >= self.warmup_epochs:
            self.threshold.assign(mixture_threshold(losses, self.probability))

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "probability": self.probability,
            "warmup_epochs": self.warmup_epochs,
        }


def mixture_threshold(losses: np.ndarray, probability: float) -> float:
    """Fits two Gaussians to losses and finds where the lower one gives way.

    Args:
        losses: Float array `(n,)`; what is not finite is left out.
        probability: Posterior probability of the lower component, in (0, 1).

    Returns:
        The first loss with less than that probability; infinity, with a warning,
        where the losses do not fall into two groups.

    Raises:
        ImportError: Without scikit-learn.
    """
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise ImportError(
            'LossMixture needs scikit-learn: pip install "keras_rsft[demo]"'
        ) from error
    values = np.sort(losses[np.isfinite(losses)].astype(np.float64))
    top = np.quantile(values, 0.99) if len(values) else 0.0
    if len(np.unique(values)) < 3 or top <= 0:
        warnings.warn("Too few different losses to fit a mixture to.", stacklevel=2)
        return math.inf
    # A few huge losses would be a group of their own.
    scaled = np.minimum(values, top)[:, None] / top
    one, two = (
        GaussianMixture(n, reg_covar=5e-4, random_state=0).fit(scaled) for n in (1, 2)
    )
    lower = int(np.argmin(two.means_))
    probabilities = two.predict_proba(scaled)[:, lower]
    # Above the lower mean only: far from it the wider component may take over.
    above = scaled[:, 0] > two.means_[lower, 0]
    given_way = np.flatnonzero(above & (probabilities < probability))
    if two.bic(scaled) >= one.bic(scaled) or len(given_way) == 0:
        warnings.warn(
            "The losses do not fall into two groups: every sample is accepted.",
            stacklevel=2,
        )
        return math.inf
    return float(values[given_way[0]])
