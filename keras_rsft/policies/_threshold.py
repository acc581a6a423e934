"""Policies that judge a sample by its loss."""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rsft.config import PolicyConfig
from keras_rsft.errors import InvalidArgument
from keras_rsft.policies import _rules as rules
from keras_rsft.policies._policy import (
    Batch,
    Policy,
    is_positive,
    require,
    whole_number,
)


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

    def decide(self, batch: Batch) -> Any:
        return ops.ones_like(batch.losses, dtype="bool")


@keras.saving.register_keras_serializable(package="keras_rsft")
class LossThreshold(Policy):
    """Accepts what has a loss strictly below a fixed threshold.

    With `level="batch"` and `warmup_steps=0` this is the batch-level rule: a batch
    whose mean loss is not below the threshold is rejected.
    The threshold is live: `policy.threshold.assign(value)` takes effect at the
    next step.

    Args:
        threshold: Positive number in the loss's units. Under cross-entropy a uniform
            guess on `k` classes costs `ln(k)`: 0.69 for 2, 2.3 for 10, 4.6 for 100.
            Think in multiples of it. A new head starts near `ln(k)`, so that a
            threshold below rejects everything unless there is a warm-up, which must
            last until every class is learnt: a class that is rejected from then on is
            never learnt. `fit` warns of that.
        level: `"sample"` judges each sample by its own loss, `"batch"` all
            samples of a batch by their mean loss, `"element"` each element of a
            sample (pixel, box, label) by its own. Default `"sample"`.
        warmup_steps: As for every `Policy`.
        class_floor: As for every `Policy`.

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

    levels: tuple[str, ...] = ("sample", "batch", "element")
    _arguments: tuple[str, ...] = ("threshold",)

    def __init__(self, threshold: float, **kwargs: Any):
        super().__init__(**kwargs)
        hint = "A new head on k classes starts with a loss near ln(k)."
        positive = is_positive(threshold)
        require(positive, "a positive number", hint, threshold=threshold)
        self.threshold = self.add_live_number("threshold", threshold)

    def decide(self, batch: Batch) -> Any:
        by_batch = self.level == "batch"
        judge = rules.accept_batch_below if by_batch else rules.accept_below
        return judge(batch.losses, self._loss_limit(batch.step))

    def _loss_limit(self, step: Any) -> Any:
        return self.threshold


@keras.saving.register_keras_serializable(package="keras_rsft")
class KeepFraction(Policy):
    """Keeps a fixed fraction of each batch: the smallest losses.

    Source: Han et al., "Co-teaching: Robust training of deep neural networks
    with extremely noisy labels", NeurIPS 2018 (the small-loss rule and its
    ramp, with one network).

    Args:
        keep_fraction: Fraction kept after the ramp, in (0, 1]; one minus the
            fraction of wrong labels is a good value.
        ramp_steps: Steps over which the kept fraction falls from 1 to
            `keep_fraction`, after the warm-up; at least 0. Default 0: no ramp.
        warmup_steps: As for every `Policy`.
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
    _arguments = ("keep_fraction", "ramp_steps")

    def __init__(self, keep_fraction: float, *, ramp_steps: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        is_share = is_positive(keep_fraction) and keep_fraction <= 1
        hint = "Use 1.0 to keep every sample."
        require(is_share, "in (0, 1]", hint, keep_fraction=keep_fraction)
        self.ramp_steps = whole_number("ramp_steps", ramp_steps)
        self.keep_fraction = self.add_live_number("keep_fraction", keep_fraction)

    def decide(self, batch: Batch) -> Any:
        since = ops.maximum(batch.step - self.warmup_steps, 0)
        share = rules.ramped_keep_fraction(since, self.keep_fraction, self.ramp_steps)
        return rules.keep_smallest(batch.losses, share)


@keras.saving.register_keras_serializable(package="keras_rsft")
class SelfPaced(LossThreshold):
    """Accepts losses below a threshold that grows, until all are easy enough.

    Source: Kumar, Packer and Koller, "Self-paced learning for latent variable
    models", NeurIPS 2010 (its age parameter, which grows by a factor).

    Args:
        threshold: Threshold at the first step, positive, in the loss's units.
        growth: Factor, at least 1. Default 1.3.
        growth_steps: Steps in which the threshold grows by it, at least 1.
        max_threshold: Where it stops, positive. Default: infinity.
        warmup_steps: As for every `Policy`; the threshold does not grow yet.
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
    _arguments = ("threshold", "growth", "growth_steps", "max_threshold")

    def __init__(
        self,
        threshold: float,
        *,
        growth: float = 1.3,
        growth_steps: int,
        max_threshold: float = math.inf,
        **kwargs: Any,
    ):
        super().__init__(threshold, **kwargs)
        positive = is_positive(max_threshold)
        require(positive, "a positive number", max_threshold=max_threshold)
        hint = "Use 1.0 for a fixed threshold."
        require(1 <= growth < math.inf, "a factor of at least 1", hint, growth=growth)
        self.growth = float(growth)
        self.growth_steps = whole_number("growth_steps", growth_steps, least=1)
        self.max_threshold = float(max_threshold)

    def _loss_limit(self, step: Any) -> Any:
        since = ops.maximum(step - self.warmup_steps, 0)
        grown = rules.grown_threshold(
            since, self.threshold, self.growth, self.growth_steps
        )
        return ops.minimum(grown, self.max_threshold)


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
        percentile: Fraction of the losses, in (0, 1], whose largest is the threshold;
            None, the default, for mean and deviations.
        momentum: Fraction of the old statistics kept in a step, in [0, 1). Default
            0.95.
        num_classes: Number of classes to keep apart, or None for one threshold.
        warmup_steps: As for every `Policy`; the statistics run meanwhile.
        class_floor: As for every `Policy`.
        level: `"sample"`, or `"element"` for all elements of the batch together.
            Default `"sample"`.

    Attributes:
        statistics: Variable of a row for each group: running weight, mean and
            variance; with `percentile` the running weight and weighted percentile.

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
    _arguments = ("deviations", "percentile", "momentum", "num_classes")

    def __init__(
        self,
        deviations: float = 0.0,
        *,
        percentile: float | None = None,
        momentum: float = 0.95,
        num_classes: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        require(math.isfinite(deviations), "finite", deviations=deviations)
        if percentile is not None and (deviations != 0 or not 0 < percentile <= 1):
            raise InvalidArgument(
                "`percentile` must be in (0, 1], and without `deviations`. Received: "
                f"percentile={percentile}, deviations={deviations}."
            )
        require(0 <= momentum < 1, "in [0, 1)", momentum=momentum)
        needed = "at least 1, or None for one threshold"
        counts = num_classes is None or num_classes >= 1
        require(counts, needed, num_classes=num_classes)
        self.deviations = float(deviations)
        self.percentile = percentile
        self.momentum = float(momentum)
        self.num_classes = num_classes
        self.statistics = self.add_weight(
            name="statistics",
            shape=(num_classes or 1, 3 if percentile is None else 2),
            dtype="float32",
            initializer="zeros",
        )

    @property
    def judges_by_class(self) -> bool:
        return super().judges_by_class or self.num_classes is not None

    def decide(self, batch: Batch) -> Any:
        if self.num_classes is None:
            groups = ops.zeros_like(batch.losses, dtype="int32")
        else:
            groups = self._required_labels(batch)
        members = ops.transpose(ops.one_hot(groups, self.num_classes or 1))
        seen = (self.statistics.value, batch.losses, members)
        if self.percentile is None:
            updated = rules.running_moments(*seen, self.momentum)
            limits = rules.threshold_from_moments(updated, self.deviations)
        else:
            updated = rules.running_percentile(*seen, self.percentile, self.momentum)
            limits = rules.threshold_from_percentile(updated)
        self.statistics.assign(updated)
        return rules.accept_below(batch.losses, ops.take(limits, groups))


@keras.saving.register_keras_serializable(package="keras_rsft")
class LossMixture(LossThreshold):
    """Accepts what belongs to the lower of two components of the samples' losses.

    After each epoch a `RejectionLedger` hands over the samples' mean losses, and two
    Gaussians are fitted to them. Sources: Arazo et al., "Unsupervised label noise
    modeling and loss correction", ICML 2019; Li, Socher and Hoi, "DivideMix", ICLR
    2020 (Gaussians). Until then, and where the losses do not separate, every sample
    is accepted.

    Args:
        probability: Least probability of the lower component to accept, in (0, 1).
            Default 0.5.
        warmup_steps: As for every `Policy`; nothing is fitted before the end of the
            epoch in which it ends. Default: two epochs.
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

    levels = ("sample",)
    needs_ledger = True
    _arguments = ("probability",)

    def __init__(
        self,
        probability: float = 0.5,
        *,
        warmup_steps: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(math.inf, warmup_steps=warmup_steps or 0, **kwargs)
        self._least_epochs = 2 if warmup_steps is None else 1
        inside, hint = 0 < probability < 1, "Use 0.5, for example."
        require(inside, "in (0, 1)", hint, probability=probability)
        self.probability = float(probability)

    def note_losses(self, losses: np.ndarray, epochs: int) -> None:
        steps = int(ops.convert_to_numpy(self.steps_seen))
        if epochs >= self._least_epochs and steps >= self.warmup_steps:
            self.threshold.assign(mixture_threshold(losses, self.probability))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return config | ({"warmup_steps": None} if self._least_epochs > 1 else {})


def mixture_threshold(losses: np.ndarray, probability: float) -> float:
    """Returns the first loss at which the lower of two Gaussians is less probable."""
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise ImportError(
            "LossMixture needs scikit-learn, in the extra demo: "
            'pip install "keras_rsft[demo]"'
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


def build_policy(
    choice: PolicyConfig, *, num_classes: int, steps_per_epoch: int
) -> Policy:
    """Returns the policy that a choice by name, not `"auto"`, means for a data set."""
    steps = round(choice.warmup_epochs * steps_per_epoch)
    threshold = choice.threshold
    if threshold is None:
        threshold = choice.relative_threshold * math.log(num_classes)
    options: dict[str, Any] = {"class_floor": choice.class_floor, "warmup_steps": steps}
    match choice.name:
        case "accept-all":
            return AcceptAll()
        case "loss-threshold":
            return LossThreshold(threshold, level=choice.level, **options)
        case "keep-fraction":
            del options["warmup_steps"]
            share: Any = choice.keep_fraction
            return KeepFraction(share, ramp_steps=steps, **options)
        case "self-paced":
            return SelfPaced(threshold, growth_steps=steps_per_epoch, **options)
        case "running-threshold":
            return RunningThreshold(num_classes=num_classes, **options)
        case "loss-mixture":
            epochs = math.ceil(choice.warmup_epochs)
            return LossMixture(**options | {"warmup_steps": epochs * steps_per_epoch})
    raise KeyError(choice.name)
