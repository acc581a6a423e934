"""Looks ahead before a run: is rejection likely to help, how long will it take."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_rsft._progress import progress_bar
from keras_rsft._runtime import require_tensorflow_backend
from keras_rsft._stats import NORMAL_QUANTILE, paired_share_interval
from keras_rsft.config import FeatureConfig, PolicyConfig, TrainConfig
from keras_rsft.data._splits import stratified_sample
from keras_rsft.errors import InvalidArgument, TrainingStalled
from keras_rsft.features._extract import (
    FrozenBackbone,
    extract_features,
    seconds_per_image,
)
from keras_rsft.features._store import FeatureSet
from keras_rsft.label_quality._audit import Estimate, LabelQuality, audit_labels
from keras_rsft.training._features import (
    SplitFeatures,
    feature_passes,
    load_configured,
    resolve,
)
from keras_rsft.training._head import predicted_classes, train_head

DEFAULT_SAMPLE = 1000
_PLAIN = "accept-all"
_LEAST_IMAGES = 4


@dataclasses.dataclass(frozen=True)
class Pilot:
    """What a sample of the training images says about a run to come.

    Attributes:
        num_images: Images of the sample.
        largest_class: Name of the class with most training images, and their number.
        smallest_class: The same of the class with fewest.
        noise_rate: Estimated fraction of wrong labels, with the ends of its 95 %
            interval, which covers the chance of the sample and no error of the method.
            None where the labels cannot be judged.
        reason: Why no label is rejected by `auto`, or None.
        policy: The policy that was tried.
        plain_accuracy: Fraction of given labels in [0, 1] that plain fine-tuning of
            half of the sample gets right in the other half, both ways round.
        policy_accuracy: The same with the policy; None where it was not tried, as it
            would reject nothing, or where it accepted nothing.
        plain_accuracy_right: Accuracy of plain fine-tuning by right labels, known or
            estimated, with the ends of its 95 % interval; None where no label can be
            judged.
        policy_accuracy_right: The same with the policy.
        gain: How much more accurate the policy is, sample by sample, with the ends of
            its 95 % interval: by right labels, or by the given ones where no label
            can be judged.
        images_left: Images whose features are not cached yet, with all augmentations.
        pass_seconds: Expected time of the pass over them.
        training_seconds: Expected time of examining the labels and training the head,
            and the plain one where it was asked for.
        verdict: Whether rejection is likely to help, in one sentence.
    """

    num_images: int
    largest_class: tuple[str, int]
    smallest_class: tuple[str, int]
    noise_rate: tuple[float, float, float] | None
    reason: str | None
    policy: str
    plain_accuracy: float
    policy_accuracy: float | None
    plain_accuracy_right: Estimate | None
    policy_accuracy_right: Estimate | None
    gain: tuple[float, float, float] | None
    images_left: int
    pass_seconds: float
    training_seconds: float
    verdict: str


def run_pilot(
    data: Any,
    *,
    features: FeatureConfig | str | None = None,
    settings: TrainConfig | None = None,
    sample: int = DEFAULT_SAMPLE,
    with_plain: bool = False,
    progress: bool = True,
) -> Pilot:
    """Tries a run on a stratified sample of the training images.

    Two heads of the run's settings are trained on one half of the sample and judged
    on the other, then the other way round: one plainly, one with the policy (`auto`
    where the run's is `accept-all`). They are judged by right labels, known or
    estimated. Rejection is called likely to help, or to harm, where the 95 % interval
    of the paired difference leaves out 0. A policy `auto` that finds nothing to reject
    is not tried.

    Times are those of a few batches and of these heads, without unfrozen layers.

    Args:
        data: Loaded images or texts, or what `load_data` takes: `(x, y)`, a
            `tf.data.Dataset`, a DataFrame, a folder and so on.
        features: As in `finetune`, like the settings.
        settings: How the run will train. Default: `TrainConfig()`.
        sample: Most images to look at, at least 4. Default 1000.
        with_plain: Whether the run will train a plain head too, which takes as long
            again. Default False.
        progress: Show progress bars. Default True.

    Returns:
        What the sample tells. No run folder is written.

    Raises:
        InvalidArgument: If an argument cannot be used.
        DataError: If the images cannot be used.
        WeightsUnavailable: If the backbone's weights cannot be downloaded or read.
    """
    require_tensorflow_backend("`run_pilot`")
    settings = settings or TrainConfig()
    data, config = resolve(data, features, progress=progress)
    labels = data.train.labels
    if min(sample, len(labels)) < _LEAST_IMAGES:
        raise InvalidArgument(
            f"A pilot needs {_LEAST_IMAGES} training images. Received: "
            f"sample={sample} of {len(labels)}."
        )
    frozen = FrozenBackbone(load_configured(config))
    images = data.train.take(stratified_sample(labels, sample, seed=settings.seed))
    passes = feature_passes(frozen, data, config, seed=settings.seed)
    waiting = [work for work in passes if not work.is_done]
    left = sum(work.augmentations * len(work.split) for work in waiting)
    sampled = extract_features(
        frozen,
        images,
        cache_dir=config.cache_dir,
        cache_dtype=config.cache_dtype,
        progress=progress,
    )
    started = time.perf_counter()
    label_quality = audit_labels(
        sampled,
        num_classes=data.num_classes,
        seed=settings.seed,
        progress=progress,
    )
    examining = (time.perf_counter() - started) * max(1.0, len(labels) / len(sampled))
    policy = PolicyConfig() if settings.policy.name == _PLAIN else settings.policy
    rejects_nothing = policy.name == "auto" and label_quality.reason is not None
    # The halves have no validation split to end a training by.
    halves = dataclasses.replace(settings, early_stopping=None)
    rejecting = None
    with progress_bar(
        "Training pilot heads",
        total=2 if rejects_nothing else 4,
        unit="heads",
        visible=progress,
    ) as advance:
        plainly = dataclasses.replace(halves, policy=PolicyConfig(_PLAIN))
        plain, start_seconds, step_seconds = _cross_tried(
            sampled, data.class_names, plainly, advance
        )
        if not rejects_nothing:
            halves = dataclasses.replace(halves, policy=policy)
            with contextlib.suppress(TrainingStalled):
                rejecting, *_ = _cross_tried(sampled, data.class_names, halves, advance)
    steps = settings.epochs * math.ceil(len(labels) / settings.batch_size)
    heads = 1 + (with_plain and settings.policy.name != _PLAIN)
    training = heads * (start_seconds + steps * step_seconds)
    names, counts = data.class_names, np.bincount(labels, minlength=data.num_classes)
    most, least = int(counts.argmax()), int(counts.argmin())
    judge = label_quality  # Of each label by the other samples alone.
    if sampled.clean_labels is not None:
        judge = judge.with_right_labels(sampled.clean_labels)
    given = None if rejecting is None else rejecting == sampled.labels
    gain = None if rejecting is None else _gain(judge, sampled, plain, rejecting)
    return Pilot(
        num_images=len(sampled),
        largest_class=(names[most], int(counts[most])),
        smallest_class=(names[least], int(counts[least])),
        noise_rate=(
            share_interval(1.0 - label_quality.right_probability)
            if label_quality.can_judge
            else None
        ),
        reason=label_quality.reason,
        policy=str(policy.name),
        plain_accuracy=float(np.mean(plain == sampled.labels)),
        policy_accuracy=None if given is None else float(given.mean()),
        plain_accuracy_right=judge.accuracy(plain),
        policy_accuracy_right=None if rejecting is None else judge.accuracy(rejecting),
        gain=gain,
        images_left=left,
        pass_seconds=left * seconds_per_image(frozen, images) if left else 0.0,
        training_seconds=training + examining * (settings.policy.name == "auto"),
        verdict=verdict(str(policy.name), label_quality.reason, gain),
    )


def verdict(
    policy: str, reason: str | None, gain: tuple[float, float, float] | None
) -> str:
    if policy == "auto" and reason is not None:
        return f"Rejection changes nothing here. {reason}: auto keeps every sample."
    if gain is None:
        return (
            f"With {policy} the pilot accepted no sample in the end: raise "
            "`--threshold` or `--warmup-epochs`, or leave both out."
        )
    mean, low, high = (100 * value for value in gain)
    numbers = (
        f"{mean:+.1f} points with {policy} in the pilot ({low:+.1f} to {high:+.1f})"
    )
    if low > 0:
        return f"Rejection is likely to help: {numbers}."
    if high < 0:
        return f"Rejection is likely to do harm: {numbers}."
    return f"The pilot cannot tell whether rejection helps: {numbers}."


def _gain(
    judge: LabelQuality, sample: FeatureSet, plain: np.ndarray, rejecting: np.ndarray
) -> tuple[float, float, float]:
    """Returns how much more accurate the second is, by right labels if possible."""
    right = sample.with_right_labels().labels
    if sample.clean_labels is None and (found := judge.gain(rejecting, plain)):
        return found
    return paired_gain(plain == right, rejecting == right)


def paired_gain(plain: np.ndarray, rejecting: np.ndarray) -> tuple[float, float, float]:
    """Returns how much more often the second is right, with its 95 % interval."""
    won = int(np.count_nonzero(rejecting & ~plain))
    lost = int(np.count_nonzero(plain & ~rejecting))
    count = len(plain)
    return (won - lost) / count, *paired_share_interval(won, lost, count)


def share_interval(probabilities: np.ndarray) -> tuple[float, float, float]:
    """Returns the mean of probabilities with its 95 % interval, inside [0, 1]."""
    mean = float(np.mean(probabilities, dtype=np.float64))
    half = NORMAL_QUANTILE * math.sqrt(mean * (1 - mean) / len(probabilities))
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)


def _cross_tried(
    sample: FeatureSet,
    class_names: tuple[str, ...],
    settings: TrainConfig,
    advance: Callable[[int], None],
) -> tuple[np.ndarray, float, float]:
    """Returns the classes predicted of held-out samples, and two durations."""
    predicted = np.zeros(len(sample), np.int64)
    half = stratified_sample(sample.labels, len(sample) // 2, seed=settings.seed)
    chosen = np.zeros(len(sample), bool)
    chosen[half] = True
    clocks = []
    # A review knows the held-out half too, which no head may learn from.
    sample = sample.with_labels(sample.labels)
    nothing = sample.take(np.arange(0))
    for rows in (chosen, ~chosen):
        train, held_out = (sample.take(np.flatnonzero(part)) for part in (rows, ~rows))
        clock = _EpochClock()
        trained = train_head(
            SplitFeatures(train, nothing, nothing, class_names),
            settings,
            callbacks=[clock],
            progress=False,
        )
        predicted[~rows] = predicted_classes(trained.model, held_out)
        steps = math.ceil(len(train) / settings.batch_size)
        clocks.append(clock.seconds(steps))
        advance(1)
    start, step = np.mean(clocks, axis=0)
    return predicted, float(start), float(step)


class _EpochClock(keras.callbacks.Callback):
    def on_train_begin(self, logs: dict | None = None) -> None:
        self._times = [time.perf_counter()]

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._times.append(time.perf_counter())

    def seconds(self, steps: int) -> tuple[float, float]:
        """Returns the seconds of the start, and of a step; the first epoch has both."""
        begin, first, *later = self._times
        if not later:
            return 0.0, (first - begin) / steps
        step = (later[-1] - first) / (len(later) * steps)
        return max(first - begin - step * steps, 0.0), step
