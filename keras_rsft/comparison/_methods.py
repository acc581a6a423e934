"""What each method of a comparison does, and the verdict on their outcomes."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft import _stats, config
from keras_rsft._stats import Interval
from keras_rsft.backbones._build import build_head
from keras_rsft.config import CLEAN_SUBSET, PLAIN, TrainConfig
from keras_rsft.errors import TrainingStalled
from keras_rsft.features._batches import TrainingBatches
from keras_rsft.label_quality._audit import LabelQuality
from keras_rsft.policies._rules import keep_smallest, ramped_keep_fraction
from keras_rsft.training import _head
from keras_rsft.training._features import SplitFeatures
from keras_rsft.training._head import head_probabilities, make_optimizer

# Verdict ------------------------------------------------------------------------------

REJECTED = ("wrong_labels_rejected", "right_labels_rejected")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one method did with one seed. Fractions are in [0, 1].

    `test_right` is what each test prediction counts by the right label: 0 or 1 where it
    is known, else its credit. `test_error` is half of the estimate's interval.
    """

    method: str
    seed: int
    seconds: float
    test_right: np.ndarray | None = dataclasses.field(
        default=None, repr=False, compare=False
    )
    acceptance_rate: float | None = None
    wrong_labels_rejected: float | None = None
    right_labels_rejected: float | None = None
    stalled: str | None = None
    test_accuracy_given: float | None = None
    test_error: float = 0.0
    predicted: np.ndarray | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    @property
    def test_accuracy(self) -> float | None:
        """Accuracy by the right test labels; None if the training stalled."""
        if self.test_right is None:
            return None
        return float(np.clip(np.mean(self.test_right, dtype=float), 0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class MethodSummary:
    test_accuracy: Interval | None
    test_accuracy_given: float | None
    difference_to_plain: Interval | None
    recovered: float | None
    acceptance_rate: float | None
    wrong_labels_rejected: float | None
    right_labels_rejected: float | None
    seconds: float
    stalled: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    winner: str | None
    tied: tuple[str, ...]
    sentence: str


def summarize(outcomes: Sequence[Outcome]) -> dict[str, MethodSummary]:
    complete = {
        name: right.mean(axis=1).tolist()
        for name, right in _complete_right(outcomes).items()
    }
    summaries = {}
    for name, mine in _by_method(outcomes).items():
        known = {}
        accuracies = [one for one in mine if one.test_accuracy is not None]
        for field in ("test_accuracy_given", "acceptance_rate", *REJECTED):
            values = (getattr(outcome, field) for outcome in mine)
            known[field] = [value for value in values if value is not None]
        difference = recovered = None
        if name in complete and PLAIN in complete and name != PLAIN:
            difference = _stats.paired_interval(complete[name], complete[PLAIN])
        if {name, PLAIN, CLEAN_SUBSET} <= complete.keys():
            compared = (complete[one] for one in (name, PLAIN, CLEAN_SUBSET))
            recovered = recovered_share(*map(statistics.fmean, compared))
        summaries[name] = MethodSummary(
            test_accuracy=_accuracy(accuracies) if accuracies else None,
            difference_to_plain=difference,
            recovered=recovered,
            seconds=statistics.fmean(outcome.seconds for outcome in mine),
            stalled=sum(outcome.stalled is not None for outcome in mine),
            **{
                field: statistics.fmean(values) if values else None
                for field, values in known.items()
            },
        )
    return summaries


def _accuracy(outcomes: Sequence[Outcome]) -> Interval:
    """Returns the mean over seeds; an estimate's own error widens the interval."""
    found = _stats.mean_interval([one.test_accuracy or 0.0 for one in outcomes])
    if (error := statistics.fmean(one.test_error for one in outcomes)) == 0:
        return found
    over_seeds = found.half_width if len(outcomes) > 1 else 0.0
    return Interval(found.mean, math.hypot(over_seeds, error))


def judge(outcomes: Sequence[Outcome], quality: LabelQuality | None = None) -> Verdict:
    """Says which method is ahead by more than chance, if one is.

    With the `quality` of the test labels, differences are estimates with their errors.
    """
    right = _complete_right(outcomes)
    right.pop(CLEAN_SUBSET, None)
    ranked = sorted(right, key=lambda name: -right[name].mean())
    if len(ranked) < 2:
        return Verdict(None, tuple(ranked), "There are not two methods to compare.")
    best, others = ranked[0], ranked[1:]
    leads = [_stats.paired_right_interval(right[best], right[one]) for one in others]
    if quality is not None and quality.can_judge and quality.reason is None:
        predicted = {
            name: [one.predicted for one in mine if one.predicted is not None]
            for name, mine in _by_method(outcomes).items()
        }
        leads = [_lead(quality, predicted[best], predicted[one]) for one in others]
    level = [name for name, lead in zip(others, leads, strict=True) if lead[0] <= 0]
    if not level:
        points = 100 * (right[best].mean() - right[others[0]].mean())
        low, high = (100 * end for end in leads[0])
        sentence = (
            f"{best} is ahead: {points:.1f} points over the next, {others[0]} "
            f"(95 % interval over seeds and test samples: {low:+.1f} to {high:+.1f})."
        )
        return Verdict(best, (best,), sentence)
    tied = (best, *level)
    names = f"{', '.join(tied[:-1])} and {tied[-1]}"
    reason = (
        "No method is ahead by more than what other seeds and test samples may change"
    )
    if len(right[best]) < 2:
        reason = "One seed cannot tell a lead from chance"
    return Verdict(None, tied, f"{reason}: {names} are tied.")


def _lead(
    quality: LabelQuality, ones: Sequence[np.ndarray], others: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Returns the 95 % interval of an estimated lead over seeds and test samples."""
    pairs = zip(ones, others, strict=True)
    gains = [found for pair in pairs if (found := quality.gain(*pair)) is not None]
    over_seeds = _stats.mean_interval([one.value for one in gains])
    error = statistics.fmean((one.high - one.low) / 2 for one in gains)
    half = math.hypot(over_seeds.half_width, error)
    return max(-1.0, over_seeds.mean - half), min(1.0, over_seeds.mean + half)


def recovered_share(method: float, plain: float, clean: float) -> float | None:
    """Returns the fraction of the accuracy lost to wrong labels that is recovered."""
    return (method - plain) / (clean - plain) if clean > plain else None


def _by_method(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.method, []).append(outcome)
    return groups


def _complete_right(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    """Returns `(seeds, n)`, in the order of seeds, of each method without a stall."""
    right = {}
    for name, mine in _by_method(outcomes).items():
        mine.sort(key=lambda outcome: outcome.seed)
        judged = [one.test_right for one in mine if one.test_right is not None]
        if len(judged) == len(mine):
            right[name] = np.stack(judged)
    return right


# Methods ------------------------------------------------------------------------------

# In multiples of ln(classes).
ARTICLE_THRESHOLD = 1.5
# Multiplied by the learning rate: forgets in some 300 steps at the default rate.
WEIGHT_DECAY_STRENGTH = 3.0
GCE_Q = 0.7
CO_TEACHING_RAMP_EPOCHS = 10
FOLDS = 5
# A rate estimate above this would leave co-teaching with next to nothing.
MAX_NOISE_RATE = 0.9
# Apart from the first head's seed, and from the neighbouring seeds of a comparison.
_SECOND_HEAD = 1_000_003


@dataclasses.dataclass(frozen=True)
class Trial:
    """One seed of a comparison: features with its labels, and how to train.

    Test predictions are judged by `judge`, None where it is by the given labels.
    """

    features: SplitFeatures
    settings: TrainConfig
    judge: LabelQuality | None = None

    @functools.cached_property
    def out_of_fold(self) -> tuple[np.ndarray, float]:
        """Out-of-fold probabilities of plain heads, and the seconds they took."""
        started = time.perf_counter()
        probabilities = out_of_fold_probabilities(self.features, self.settings)
        return probabilities, time.perf_counter() - started

    @functools.cached_property
    def audit(self) -> tuple[LabelQuality, float]:
        """The quality of the labels, and the seconds that the audit took."""
        started = time.perf_counter()
        found = _head.audit_splits(self.features, self.settings.seed, progress=False)
        return found, time.perf_counter() - started


# The test predictions of a method, and which training samples it accepts in the end
# (None where it has no such notion), with the fraction accepted.
Trained = tuple[np.ndarray, np.ndarray | None, float | None]


def run_method(name: str, trial: Trial) -> Outcome:
    """Trains one method with one seed; a training that stalls is an outcome too."""
    # Computed once for the methods that share it, and counted for each of them.
    seconds = 0.0
    if name in (config.CLEANLAB, "co-teaching"):
        seconds = trial.out_of_fold[1]
    elif name in (config.EARLY_STOPPING, config.AUTO, config.AUTO_WEIGHT_DECAY):
        seconds = trial.audit[1]
    started = time.perf_counter() - seconds
    predicted = accepted = acceptance_rate = stalled = None
    try:
        with warnings.catch_warnings():
            # The outcome reports it once, instead of a warning in each epoch.
            warnings.filterwarnings("ignore", message=".*accepted no sample")
            predicted, accepted, acceptance_rate = _METHODS[name](trial)
    except TrainingStalled as error:
        stalled, acceptance_rate = str(error), 0.0
    seconds = time.perf_counter() - started
    rejected: dict[str, Any] = {}
    train = trial.features.train
    if accepted is not None and train.clean_labels is not None:
        rejected = _head.rejected_shares(train, accepted)
        del rejected["wrong_labels"]
    judged = {} if predicted is None else _judged(predicted, trial)
    return Outcome(
        method=name,
        seed=trial.settings.seed,
        seconds=seconds,
        acceptance_rate=acceptance_rate,
        stalled=stalled,
        **judged,
        **rejected,
    )


def _judged(predicted: np.ndarray, trial: Trial) -> dict[str, Any]:
    """Returns which test predictions are right, as far as the labels are known."""
    test, judge = trial.features.test, trial.judge
    given_right = predicted == test.labels
    judged: dict[str, Any] = {
        "predicted": predicted,
        "test_right": given_right,
        "test_accuracy_given": float(given_right.mean()),
    }
    if test.clean_labels is not None:
        judged["test_right"] = predicted == test.clean_labels
    elif judge is not None and (found := judge.accuracy(predicted)) is not None:
        judged["test_right"] = _head.credited_to(judge.credits, predicted)
        judged["test_error"] = (found.high - found.low) / 2
    return judged


def _policy(
    trial: Trial,
    name: str,
    *,
    best_epoch: bool = False,
    decayed: bool = False,
    **changes: Any,
) -> Trained:
    """Trains with a policy by name, with the parameters of the trial's settings."""
    choice = dataclasses.replace(trial.settings.policy, name=name, **changes)
    settings = dataclasses.replace(trial.settings, policy=choice)
    if decayed:
        settings = dataclasses.replace(settings, weight_decay=WEIGHT_DECAY_STRENGTH)
    if best_epoch:
        settings = dataclasses.replace(settings, early_stopping=settings.epochs)
    audited = best_epoch or name == config.AUTO
    trained = _head.train_head(
        trial.features,
        settings,
        progress=False,
        label_quality=trial.audit[0] if audited else None,
    )
    predicted = _test_predictions(trained.model, trial)
    return predicted, trained.accepted, trained.results["acceptance_rate"]


def _article(trial: Trial) -> Trained:
    """The batch-level rule: a fixed threshold on the batch's mean loss."""
    changes: dict[str, Any] = {"level": "batch", "warmup_epochs": 0.0}
    if trial.settings.policy.threshold is None:
        changes["relative_threshold"] = ARTICLE_THRESHOLD
    return _policy(trial, "loss-threshold", **changes)


def _gce(trial: Trial) -> Trained:
    """The generalised cross-entropy loss, `(1 - p**0.7) / 0.7`."""
    loss = keras.losses.CategoricalGeneralizedCrossEntropy(q=GCE_Q)
    head = train_stock(trial.features, trial.settings, loss)
    return _test_predictions(head, trial), None, None


def _co_teaching(trial: Trial) -> Trained:
    """Co-teaching, given an estimate of the noise rate, never the true one."""
    train = trial.features.train
    rate = estimated_noise_rate(train.labels, trial.out_of_fold[0])
    head, chosen = train_co_teaching(trial.features, trial.settings, noise_rate=rate)
    return _test_predictions(head, trial), chosen, float(chosen.mean())


def _cleanlab(trial: Trial) -> Trained:
    """Filter once, then plain: on what cleanlab does not call a label issue."""
    config.require_cleanlab()
    from cleanlab.filter import find_label_issues

    train = trial.features.train
    issues = find_label_issues(train.labels, trial.out_of_fold[0], n_jobs=1)
    return _on_subset(trial, ~issues)


def _on_subset(trial: Trial, accepted: np.ndarray) -> Trained:
    if not accepted.any():
        raise TrainingStalled("No sample was left to train on.")
    part = trial.features.train.take(np.flatnonzero(accepted))
    features = dataclasses.replace(trial.features, train=part)
    trial = dataclasses.replace(trial, features=features)
    predicted, _, _ = _policy(trial, "accept-all")
    return predicted, accepted, float(accepted.mean())


# Weight decay: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
_METHODS: dict[str, Callable[[Trial], Trained]] = {
    PLAIN: lambda trial: _policy(trial, "accept-all"),
    config.EARLY_STOPPING: lambda trial: _policy(trial, "accept-all", best_epoch=True),
    config.WEIGHT_DECAY: lambda trial: _policy(trial, "accept-all", decayed=True),
    "article": _article,
    "loss-threshold": lambda trial: _policy(trial, "loss-threshold", level="sample"),
    "keep-fraction": lambda trial: _policy(trial, "keep-fraction"),
    config.AUTO: lambda trial: _policy(trial, config.AUTO),
    config.AUTO_WEIGHT_DECAY: lambda trial: _policy(trial, config.AUTO, decayed=True),
    "gce": _gce,
    "co-teaching": _co_teaching,
    config.CLEANLAB: _cleanlab,
    # Plain on the samples whose label is right, which no method can know.
    CLEAN_SUBSET: lambda trial: _on_subset(
        trial, trial.features.train.labels == trial.features.train.clean_labels
    ),
}


def missing_methods(features: SplitFeatures, settings: TrainConfig) -> dict[str, str]:
    """Returns the methods that cannot run on this data, each with the reason."""
    missing = {}
    if settings.weight_decay is not None:
        for name in (config.WEIGHT_DECAY, config.AUTO_WEIGHT_DECAY):
            missing[name] = "every method here has a weight decay already."
    if not len(features.validation):
        missing[config.EARLY_STOPPING] = "it needs a validation split."
    if not config.has_cleanlab():
        missing[config.CLEANLAB] = 'it needs `pip install "keras_rsft[compare]"`.'
    train = features.train
    if train.clean_labels is None:
        missing[CLEAN_SUBSET] = "the right labels are not known."
    elif (train.labels == train.clean_labels).all():
        missing[CLEAN_SUBSET] = "all labels are right."
    return missing


def _test_predictions(head: keras.Model, trial: Trial) -> np.ndarray:
    probabilities = head_probabilities(head, trial.features.test)
    if not np.isfinite(probabilities).all():
        raise TrainingStalled("The weights became NaN or infinite.")
    return probabilities.argmax(axis=-1)


# -- Baselines that no policy expresses -----------------------------------------


def train_co_teaching(
    features: SplitFeatures, settings: TrainConfig, *, noise_rate: float
) -> tuple[keras.Model, np.ndarray]:
    """Trains two heads, each on the samples that have a small loss for the other."""
    train = features.train
    heads, optimizers = [], []
    for seed in (settings.seed, (settings.seed + _SECOND_HEAD) % 2**31):
        heads.append(_new_head(features))
        kernel = heads[-1].get_layer("scores").kernel
        # Heads that begin alike stay alike, and have nothing to teach each other. A
        # tenth of the usual weights is better than all of them.
        kernel.assign(0.1 * keras.initializers.GlorotUniform(seed)(kernel.shape))
        optimizers.append(make_optimizer(settings))
        optimizers[-1].build(heads[-1].trainable_variables)
    batches = TrainingBatches(train, batch_size=settings.batch_size, seed=settings.seed)

    @tf.function
    def run_epoch(keep: tf.Tensor) -> None:
        for inputs, labels in batches.dataset:
            co_teaching_step(heads, optimizers, inputs, labels, keep)

    for epoch in range(settings.epochs):
        batches.callback.on_epoch_begin(epoch)
        keep = ramped_keep_fraction(epoch, 1 - noise_rate, CO_TEACHING_RAMP_EPOCHS)
        run_epoch(tf.cast(keep, tf.float32))
    probabilities = head_probabilities(heads[1], train)
    losses = keras.losses.sparse_categorical_crossentropy(train.labels, probabilities)
    chosen = np.zeros(len(train), bool)
    order = batches.order(settings.epochs - 1)[0].numpy()
    for start in range(0, len(order), settings.batch_size):
        batch = order[start : start + settings.batch_size]
        chosen[batch] = np.asarray(keep_smallest(tf.gather(losses, batch), keep))
    return heads[0], chosen


def co_teaching_step(
    heads: list[keras.Model],
    optimizers: list[keras.optimizers.Optimizer],
    inputs: tf.Tensor,
    labels: tf.Tensor,
    keep_fraction: tf.Tensor | float,
) -> None:
    """Updates each of two heads on the samples that the other one chooses."""
    with tf.GradientTape(persistent=True) as tape:
        outputs = [head(inputs, training=True) for head in heads]
        losses = [
            keras.losses.sparse_categorical_crossentropy(labels, one) for one in outputs
        ]
        chosen = [
            tf.cast(keep_smallest(tf.stop_gradient(loss), keep_fraction), loss.dtype)
            for loss in losses
        ]
        objectives = [
            tf.reduce_sum(loss * mask) / tf.maximum(tf.reduce_sum(mask), 1)
            for loss, mask in zip(losses, reversed(chosen), strict=True)
        ]
    for head, optimizer, objective in zip(heads, optimizers, objectives, strict=True):
        variables = head.trainable_variables
        optimizer.apply(tape.gradient(objective, variables), variables)


def out_of_fold_probabilities(
    features: SplitFeatures, settings: TrainConfig
) -> np.ndarray:
    """Returns plain heads' probabilities of training samples outside of their fold."""
    train = features.train
    folds = np.random.default_rng(settings.seed).permutation(len(train)) % FOLDS
    loss = "sparse_categorical_crossentropy"
    probabilities = np.zeros((len(train), len(features.class_names)), np.float32)
    for fold in np.unique(folds):
        held_out = folds == fold
        seen = train.take(np.flatnonzero(~held_out))
        head = train_stock(dataclasses.replace(features, train=seen), settings, loss)
        probabilities[held_out] = head_probabilities(head, train)[held_out]
    return probabilities


def estimated_noise_rate(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Estimates the noise rate, in [0, 0.9], from out-of-fold probabilities."""
    num_classes = probabilities.shape[1]
    thresholds = np.full(num_classes, np.inf)
    for label in np.unique(labels):
        thresholds[label] = probabilities[labels == label, label].mean()
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    counted = confident.max(axis=1) >= 0
    if not counted.any():
        return 0.0
    wrong = confident.argmax(axis=1)[counted] != labels[counted]
    return min(float(wrong.mean()), MAX_NOISE_RATE)


def _new_head(features: SplitFeatures) -> keras.Model:
    train = features.train
    return build_head(train.dim, len(features.class_names), moments=train.moments())


def train_stock(
    features: SplitFeatures, settings: TrainConfig, loss: str | keras.losses.Loss
) -> keras.Model:
    train = features.train
    head = _new_head(features)
    steps = _head.choose_steps_per_execution(-(-len(train) // settings.batch_size))
    head.compile(make_optimizer(settings), loss, steps_per_execution=steps)
    batches = TrainingBatches(train, batch_size=settings.batch_size, seed=settings.seed)
    head.fit(
        batches.dataset,
        epochs=settings.epochs,
        callbacks=[batches.callback],
        verbose=0,
        shuffle=False,
    )
    return head
