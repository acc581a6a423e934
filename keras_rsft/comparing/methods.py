"""What each method is: how it gets from kept features to an outcome.

A method sees one seed's `Trial`; all of them train with the same settings, and all
of them are judged on the same test split.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Sequence

import keras
import numpy as np

from keras_rsft.comparing.baselines import (
    cleanlab_accepts,
    estimated_noise_rate,
    out_of_fold_probabilities,
    train_co_teaching,
    train_gce,
)
from keras_rsft.comparing.method_names import (
    AUTO,
    CLEAN_SUBSET,
    CLEANLAB,
    EARLY_STOPPING,
    PLAIN,
    WEIGHT_DECAY,
    WITH_AUTO,
)
from keras_rsft.comparing.summary import Outcome
from keras_rsft.errors import TrainingStalled
from keras_rsft.finetuning import SplitFeatures, TrainingSettings, train_head
from keras_rsft.finetuning.early_stopping import best_of_all_epochs
from keras_rsft.finetuning.head_training import head_probabilities

# In multiples of ln(classes).
ARTICLE_THRESHOLD = 1.5
# How strongly each regularises. A weight decay is multiplied by the learning rate: this
# one forgets in some 300 steps at the default rate. The share is Szegedy et al.'s,
# alpha is that of DivideMix.
STRENGTHS = {
    WEIGHT_DECAY: {"weight_decay": 3.0},
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One seed of a comparison: what every method is given.

    Attributes:
        features: The splits with the labels of this seed. The test labels are the
            right ones, where those are known.
        settings: How to train; `settings.policy` has the numbers of the policies.
    """

    features: SplitFeatures
    settings: TrainingSettings

    @functools.cached_property
    def out_of_fold(self) -> tuple[np.ndarray, float]:
        """Out-of-fold probabilities of plain heads, and the seconds they took."""
        started = time.perf_counter()
        probabilities = out_of_fold_probabilities(self.features, self.settings)
        return probabilities, time.perf_counter() - started


# What a method gives: which test samples it gets right, and which training samples it
# accepts in the end (None where it has no such notion), with the share accepted.
Trained = tuple[np.ndarray, np.ndarray | None, float | None]


def run_method(name: str, trial: Trial) -> Outcome:
    """Trains one method with one seed.

    A training that stalls is an outcome, not an error.

    Args:
        name: Out of `METHOD_NAMES`.
        trial: What to train on.
    """
    shared = name in (CLEANLAB, "co-teaching")
    # Computed once for the methods that share it, and counted for each of them.
    shared_seconds = trial.out_of_fold[1] if shared else 0.0
    started = time.perf_counter()
    stalled = None
    right = accepted = acceptance_rate = None
    try:
        with warnings.catch_warnings():
            # Said by the outcome, once, instead of by a warning in each epoch.
            warnings.filterwarnings("ignore", message=".*accepted no sample")
            right, accepted, acceptance_rate = _METHODS[name](trial)
    except TrainingStalled as error:
        stalled = str(error)
        acceptance_rate = 0.0
    return Outcome(
        method=name,
        seed=trial.settings.seed,
        seconds=shared_seconds + time.perf_counter() - started,
        test_right=right,
        acceptance_rate=acceptance_rate,
        stalled=stalled,
        **_rejected_shares(trial, accepted),
    )


def _policy(
    trial: Trial,
    name: str,
    *,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    **changes: str | float,
) -> Trained:
    """Trains with a policy by name, with the numbers of the trial's settings."""
    choice = dataclasses.replace(trial.settings.policy, name=name, **changes)
    settings = dataclasses.replace(trial.settings, policy=choice)
    trained = train_head(trial.features, settings, callbacks=callbacks, progress=False)
    return (
        _test_right(trained.model, trial),
        trained.accepted,
        trained.results["acceptance_rate"],
    )


def _plain(trial: Trial) -> Trained:
    return _policy(trial, "accept-all")


def _early_stopping(trial: Trial) -> Trained:
    """Plain, with the weights of the first epoch that is best on validation."""
    best_epoch = best_of_all_epochs("val_accuracy", "max", epochs=trial.settings.epochs)
    return _policy(trial, "accept-all", callbacks=[best_epoch])


def _regularised(name: str, policy: str) -> Callable[[Trial], Trained]:
    """Returns a policy with one more regularisation of the same head.

    Sources: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019;
    Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR
    2016, with their share, and under wrong labels Lukasik et al., "Does label smoothing
    mitigate label noise?", ICML 2020; Zhang et al., "mixup: beyond empirical risk
    minimization", ICLR 2018, on features, and of accepted samples alone as in Li,
    Socher and Hoi, "DivideMix", ICLR 2020.
    """

    def method(trial: Trial) -> Trained:
        settings = dataclasses.replace(trial.settings, **STRENGTHS[name])
        return _policy(dataclasses.replace(trial, settings=settings), policy)

    return method


def _article(trial: Trial) -> Trained:
    """The RSFT article's rule: a fixed threshold on the batch's mean loss.

    Without a warm-up, a threshold below the loss of a new head, somewhat above
    ln(classes), would reject every batch for ever.
    """
    above_a_new_head = {}
    if trial.settings.policy.threshold is None:
        above_a_new_head["relative_threshold"] = ARTICLE_THRESHOLD
    return _policy(
        trial, "loss-threshold", level="batch", warmup_epochs=0.0, **above_a_new_head
    )


def _loss_threshold(trial: Trial) -> Trained:
    return _policy(trial, "loss-threshold", level="sample")


def _gce(trial: Trial) -> Trained:
    head = train_gce(trial.features, trial.settings)
    return _test_right(head, trial), None, None


def _co_teaching(trial: Trial) -> Trained:
    """Co-teaching, given an estimate of the noise rate, never the true one."""
    train = trial.features.train
    rate = estimated_noise_rate(train.labels, trial.out_of_fold[0])
    head, chosen = train_co_teaching(trial.features, trial.settings, noise_rate=rate)
    return _test_right(head, trial), chosen, float(chosen.mean())


def _cleanlab(trial: Trial) -> Trained:
    """Filter once, then plain: on what cleanlab does not call a label issue."""
    train = trial.features.train
    accepted = cleanlab_accepts(train.labels, trial.out_of_fold[0])
    return _on_subset(trial, accepted)


def _clean_subset(trial: Trial) -> Trained:
    """Plain on the samples whose label is right: what no method can know."""
    train = trial.features.train
    return _on_subset(trial, train.labels == train.clean_labels)


def _on_subset(trial: Trial, accepted: np.ndarray) -> Trained:
    if not accepted.any():
        raise TrainingStalled("No sample was left to train on.")
    part = trial.features.train.take(np.flatnonzero(accepted))
    features = dataclasses.replace(trial.features, train=part)
    right, _, _ = _plain(dataclasses.replace(trial, features=features))
    return right, accepted, float(accepted.mean())


_METHODS: dict[str, Callable[[Trial], Trained]] = {
    PLAIN: _plain,
    EARLY_STOPPING: _early_stopping,
    **{name: _regularised(name, "accept-all") for name in STRENGTHS},
    "article": _article,
    "loss-threshold": _loss_threshold,
    "keep-fraction": lambda trial: _policy(trial, "keep-fraction"),
    AUTO: lambda trial: _policy(trial, AUTO),
    **{f"{WITH_AUTO}{name}": _regularised(name, AUTO) for name in STRENGTHS},
    "gce": _gce,
    "co-teaching": _co_teaching,
    CLEANLAB: _cleanlab,
    CLEAN_SUBSET: _clean_subset,
}


def _test_right(head: keras.Model, trial: Trial) -> np.ndarray:
    test = trial.features.test
    probabilities = head_probabilities(head, test)
    if not np.isfinite(probabilities).all():
        raise TrainingStalled("The weights became NaN or infinite.")
    return probabilities.argmax(axis=-1) == test.labels


def _rejected_shares(
    trial: Trial, accepted: np.ndarray | None
) -> dict[str, float | None]:
    train = trial.features.train
    if accepted is None or train.clean_labels is None:
        return {}
    wrong = train.labels != train.clean_labels
    shares = {"wrong_labels_rejected": wrong, "right_labels_rejected": ~wrong}
    return {
        name: float(np.mean(~accepted[part]))
        for name, part in shares.items()
        if part.any()
    }
