"""Unfreezes the backbone on from the best heads, each time as a trial."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np
import tensorflow as tf
from keras_tuner.engine.trial import Trial, TrialStatus

from keras_rsft._storage import MODEL_FILE, disk_full_said, replaced
from keras_rsft.config import (
    ALL,
    FROZEN,
    LAST_BLOCK,
    OBJECTIVES,
    SearchConfig,
    TrainConfig,
    Unfreeze,
)
from keras_rsft.training._curves import accuracy_error
from keras_rsft.training._features import FeatureSource, SplitFeatures
from keras_rsft.training._head import best_of_all_epochs
from keras_rsft.training._resume import TrainingCheckpoint, TrainingClock
from keras_rsft.training._unfreeze import (
    accuracy_on_images,
    begun_from,
    cache_activations,
    cut_backbone,
    train_unfrozen,
)
from keras_rsft.tuning._batched import METRICS
from keras_rsft.tuning._choice import (
    ACCURACY,
    COMPLETED,
    TRAINABLE,
    TrialOutcome,
    trainable_of,
)
from keras_rsft.tuning._trials import (
    TUNERS_OWN,
    ChosenTrial,
    head_accuracy,
    head_of_outcome,
    is_plain,
    outcomes_of,
    settings_of_outcome,
)
from keras_rsft.tuning._tuner import DIVERGED, DurableOracle, DurableTuner

BASE_RATE = "base_learning_rate"
SECONDS, WEIGHTS = "training_seconds", "trainable_weights"
UNFREEZE: dict[str, Unfreeze] = {LAST_BLOCK: 1, ALL: ALL}
_HEAD_TRIAL = f"{TUNERS_OWN}head_trial"
_NAMES = {LAST_BLOCK: "the last block", ALL: "all of the base"}
# The backbone's learning rate is a tenth of the head's, and at most this: the rate that
# is best for a new head may be one that ruins a backbone. Optimizers that divide by
# the gradient's size need a smaller one.
_HIGHEST_RATE = {"sgd": 1e-3}
_HIGHEST_ADAPTIVE_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class PlannedTrial:
    """A head's trial to train on from, and what is unfrozen: LAST_BLOCK or ALL."""

    trainable: str
    begins_from: TrialOutcome

    @property
    def trial_id(self) -> str:
        """Name of the trial."""
        return f"{self.trainable}-{self.begins_from.trial_id}"


def best_heads(
    outcomes: Sequence[TrialOutcome],
    is_plain: Callable[[TrialOutcome], bool],
    *,
    objective: str,
    min_acceptance: float,
) -> tuple[TrialOutcome, ...]:
    """Returns the best plain trial and the best that rejects, where there are any."""
    sign = 1.0 if OBJECTIVES[objective] == "max" else -1.0
    completed = [one for one in outcomes if one.status == COMPLETED]
    plain = [one for one in completed if is_plain(one)]
    # What accepted everything all the same would be the plain training once more.
    rejecting = [
        one
        for one in completed
        if not is_plain(one) and min_acceptance <= one.metrics["acceptance_rate"] < 1.0
    ]

    def goodness(one: TrialOutcome) -> tuple[float, float]:
        return sign * one.metrics[objective], one.metrics["acceptance_rate"]

    return tuple(max(group, key=goodness) for group in (plain, rejecting) if group)


def planned_trials(
    heads: Sequence[TrialOutcome], trainable: Sequence[str]
) -> tuple[PlannedTrial, ...]:
    """Returns the trials in which the backbone learns, the cheapest first."""
    return tuple(PlannedTrial(name, head) for name in trainable for head in heads)


def base_learning_rate(head_rate: float, optimizer: str) -> float:
    """Returns the backbone's learning rate where none is asked for."""
    highest = _HIGHEST_RATE.get(optimizer.lower(), _HIGHEST_ADAPTIVE_RATE)
    return min(0.1 * head_rate, highest)


def learnable(
    base: keras.Model, trainable: Sequence[str], settings: TrainConfig
) -> tuple[str, ...]:
    """Returns what may learn, without `"all"` where the last block is all there is."""
    how = settings.unfreezing
    layers = {
        name: [
            layer.name
            for layer in cut_backbone(
                base, dataclasses.replace(how, layers=UNFREEZE[name])
            ).layers
        ]
        for name in trainable
        if name != FROZEN
    }
    same = layers.get(LAST_BLOCK) == layers.get(ALL)
    return tuple(one for one in trainable if not (same and one == ALL and layers))


# --- Training -----------------------------------------------------------------------


class BackboneOracle(DurableOracle, keras_tuner.Oracle):
    """Keeps the trials in which the backbone learns, which it does not choose."""

    def begin(self, trial_id: str, hp: keras_tuner.HyperParameters) -> Trial:
        """Returns a trial to train, which is new or was stopped."""
        trial = self.trials.get(trial_id)
        if trial is None:
            trial = Trial(hp, trial_id=trial_id)
            self.trials[trial_id] = trial
            self.start_order.append(trial_id)
        trial.status = TrialStatus.RUNNING
        self.ongoing_trials[trial_id] = trial
        self.save_trial(trial)
        self.save()
        return trial


class BackboneTuner(DurableTuner, keras_tuner.Tuner):
    """Trains the last block of the backbone, or all of it, from searched heads."""

    def __init__(
        self,
        heads: keras_tuner.Tuner,
        options: SearchConfig,
        source: FeatureSource,
        folder: Path,
    ):
        oracle = BackboneOracle(
            objective=keras_tuner.Objective(options.objective, options.direction),
            # A failed trial is no reason to give up the others.
            max_consecutive_failed_trials=None,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # Of a resumed search.
            super().__init__(oracle, directory=str(folder), project_name="base_trials")
        self.oracle.verbose = 0
        self._heads, self._options, self._source = heads, options, source

    def search(self, planned: Sequence[PlannedTrial]) -> None:
        """Trains what has not ended yet, one after the other."""
        left = [one for one in planned if one.trial_id not in self.oracle.end_order]
        if not left:
            return
        self.on_search_begin()
        base = self._source.float32_backbone()
        kinds = ", ".join(
            f"{_NAMES[name]} from {count} head{'s' if count > 1 else ''}"
            for name, count in Counter(one.trainable for one in left).items()
        )
        epochs = len(left) * self.settings_of(left[0]).unfreezing.epochs
        self._source.on_note(f"The base learns: {kinds}, {epochs} epochs in all.")
        for number, one in enumerate(left, 1):
            settings = self.settings_of(one)
            self._source.on_note(
                f"Training {_NAMES[one.trainable]} on from trial "
                f"{one.begins_from.trial_id} ({settings.policy.name}), {number} of "
                f"{len(left)}."
            )
            self._run(one, settings, base)
        self.on_search_end()

    def run_trial(self, trial: Trial, *args: Any, **kwargs: Any) -> None:
        """Is not how these trials are run: see `search`."""
        raise NotImplementedError("Use `search` with the planned trials.")

    def load_model(self, trial: Trial) -> keras.Model:
        """Returns a completed trial's model, images to probabilities."""
        return keras.saving.load_model(self.model_file(trial.trial_id), compile=False)

    def model_file(self, trial_id: str) -> Path:
        """Returns where a completed trial's model is."""
        return Path(self.get_trial_dir(trial_id)) / MODEL_FILE

    def head_trial_of(self, outcome: TrialOutcome) -> str:
        """Returns the name of the head's trial that one began from."""
        return self.oracle.trials[outcome.trial_id].hyperparameters.values[_HEAD_TRIAL]

    def settings_of(self, planned: PlannedTrial) -> TrainConfig:
        """Returns how a trial is trained, its head's training first."""
        settings = settings_of_outcome(self._heads, planned.begins_from)
        how = settings.unfreezing
        rate = how.learning_rate or base_learning_rate(
            settings.learning_rate, settings.optimizer
        )
        layers = UNFREEZE[planned.trainable]
        how = dataclasses.replace(how, layers=layers, learning_rate=rate)
        return dataclasses.replace(settings, unfreeze=how)

    @property
    def _features(self) -> SplitFeatures:
        return self._heads.hypermodel.features

    def _hyperparameters(
        self, planned: PlannedTrial, settings: TrainConfig
    ) -> keras_tuner.HyperParameters:
        """Returns those of the head's trial, and of the backbone."""
        head = planned.begins_from
        hp = self._heads.oracle.trials[head.trial_id].hyperparameters.copy()
        hp.values = dict(head.values)
        hp.Choice(TRAINABLE, list(self._options.unfreeze))
        hp.Fixed(BASE_RATE, settings.unfreeze_rate)
        hp.Fixed(_HEAD_TRIAL, head.trial_id)
        hp.values |= {
            TRAINABLE: planned.trainable,
            BASE_RATE: settings.unfreeze_rate,
            _HEAD_TRIAL: head.trial_id,
        }
        return hp

    def _run(
        self, planned: PlannedTrial, settings: TrainConfig, base: keras.Model
    ) -> None:
        """Trains one trial, and reports it to the oracle."""
        hp = self._hyperparameters(planned, settings)
        trial = self.oracle.begin(planned.trial_id, hp)
        path = Path(self.get_trial_dir(trial.trial_id)) / "training.npz"
        checkpoint = TrainingCheckpoint(path)
        try:
            self._train(planned, settings, base, checkpoint)
            trial.status = TrialStatus.COMPLETED
        except _Diverged:
            trial.status, trial.message = TrialStatus.FAILED, DIVERGED
        except tf.errors.ResourceExhaustedError as error:
            trial.status = TrialStatus.FAILED
            trial.message = f"Memory is full: {str(error).splitlines()[0]}"
        except (KeyboardInterrupt, OSError) as error:
            with contextlib.suppress(OSError):  # The disk may be full.
                checkpoint.flush()
            said = disk_full_said(error, Path(self.project_dir))
            if said is error:
                raise
            raise said from error
        self.on_trial_end(trial)
        path.unlink(missing_ok=True)

    def _train(
        self,
        planned: PlannedTrial,
        settings: TrainConfig,
        base: keras.Model,
        checkpoint: TrainingCheckpoint,
    ) -> None:
        options, head_epochs = self._options, planned.begins_from.epochs
        clock = TrainingClock()
        best = best_of_all_epochs(
            options.objective, options.direction, epochs=settings.unfreezing.epochs
        )
        part = cut_backbone(base, settings.unfreezing)
        weights = sum(int(np.prod(v.shape)) for v in part.rest.trainable_variables)
        head = head_of_outcome(self._heads, planned.begins_from)
        begun = begun_from(
            head, self._features, epochs=head_epochs, callbacks=(best, clock)
        )
        # For all trials of a part the same.
        choice = Path(self.project_dir) / f"activations-{planned.trainable}.json"
        with warnings.catch_warnings():
            # Told by a trial's acceptance rate, instead of by a warning in each epoch.
            warnings.filterwarnings("ignore", message=".*accepted no sample")
            model, trained = train_unfrozen(
                part,
                begun,
                self._source,
                self._features,
                settings,
                cached=cache_activations(part, self._features, self._source, choice),
                checkpoint=checkpoint,
            )
        history = trained.history
        if not np.isfinite(history["val_loss"][head_epochs:]).all():
            raise _Diverged
        replaced(self.model_file(planned.trial_id), model.save)
        metrics = {name: float(history[name][best.best_epoch]) for name in METRICS}
        metrics |= {SECONDS: clock.seconds, WEIGHTS: weights + _weights_of(head)}
        self.oracle.update_trial(planned.trial_id, metrics, step=best.best_epoch)


class _Diverged(Exception):
    """The weights became NaN or infinite."""


def _weights_of(model: keras.Model) -> int:
    return sum(int(np.prod(one.shape)) for one in model.trainable_variables)


# --- Among the heads of a search ----------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class BackboneTrials:
    """The trials in which the backbone learnt, and the heads that they began from."""

    tuner: BackboneTuner
    outcomes: tuple[TrialOutcome, ...]
    best_heads: tuple[TrialOutcome, ...]
    source: FeatureSource

    def head_of(
        self, outcome: TrialOutcome, heads: Sequence[TrialOutcome]
    ) -> TrialOutcome:
        """Returns the head's trial that one began from; a head's own is itself."""
        if trainable_of(outcome) == FROZEN:
            return outcome
        name = self.tuner.head_trial_of(outcome)
        return next(one for one in heads if one.trial_id == name)


def with_frozen(outcomes: Sequence[TrialOutcome]) -> tuple[TrialOutcome, ...]:
    """Returns trials of heads, marked as those with a frozen backbone."""
    return tuple(
        dataclasses.replace(one, values={TRAINABLE: FROZEN, **one.values})
        for one in outcomes
    )


def train_backbones(
    heads: keras_tuner.Tuner,
    options: SearchConfig,
    outcomes: Sequence[TrialOutcome],
    source: FeatureSource,
    folder: Path,
) -> BackboneTrials:
    """Trains what is asked for of the backbone, on from the best heads."""
    tuner = BackboneTuner(heads, options, source, folder)
    best = best_heads(
        outcomes,
        lambda one: is_plain(heads, one),
        objective=options.objective,
        min_acceptance=options.min_acceptance,
    )
    tuner.search(planned_trials(best, options.of_base))
    return BackboneTrials(tuner, outcomes_of(tuner), best, source)


def chosen_trial(
    heads: keras_tuner.Tuner,
    outcomes: Sequence[TrialOutcome],
    chosen: TrialOutcome,
    bases: BackboneTrials | None,
) -> ChosenTrial:
    """Returns the chosen trial with its head and, if unfrozen, its whole model."""
    begun_from = chosen if bases is None else bases.head_of(chosen, outcomes)
    settings = settings_of_outcome(heads, begun_from)
    head = head_of_outcome(heads, begun_from)
    if bases is None or begun_from is chosen:
        measured = head_accuracy(head, heads.hypermodel.features.test)
        settings = dataclasses.replace(settings, unfreeze=None)
        return ChosenTrial(chosen, chosen, settings, head, measured)
    tuner = bases.tuner
    how = tuner.settings_of(PlannedTrial(trainable_of(chosen), begun_from)).unfreezing
    how = dataclasses.replace(
        how,
        epochs=chosen.epochs - begun_from.epochs,
        learning_rate=chosen.values[BASE_RATE],
    )

    def accuracy() -> float:
        model = tuner.load_model(tuner.oracle.trials[chosen.trial_id])
        return accuracy_on_images(model, bases.source.data.test)

    return ChosenTrial(
        chosen,
        begun_from,
        dataclasses.replace(settings, unfreeze=how),
        head,
        accuracy,
        tuner.model_file(chosen.trial_id),
    )


def keep_model(
    chosen: ChosenTrial,
    whole_model: Callable[[keras.Model], keras.Model] | None,
    folder: Path,
) -> None:
    """Keeps the chosen model from images in the search's folder."""
    if chosen.base_model is not None:
        trained = chosen.base_model
        replaced(folder / MODEL_FILE, lambda beside: shutil.copyfile(trained, beside))
    elif whole_model is not None:
        replaced(folder / MODEL_FILE, whole_model(chosen.head.model).save)


# --- Side by side -------------------------------------------------------------------


def strategy_rows(
    outcomes: Sequence[TrialOutcome],
    *,
    chosen: TrialOutcome,
    policy_of: Callable[[TrialOutcome], str | None],
    validation_size: int,
    head_seconds: float | None,
    head_weights: int,
) -> list[dict[str, Any]]:
    """Returns one row for each trial that stands for a strategy, and the choice."""
    ids = {one.trial_id for one in outcomes}
    rows = []
    for one in [*outcomes, *([] if chosen.trial_id in ids else [chosen])]:
        policy, of_head = policy_of(one), trainable_of(one) == FROZEN
        accuracy = one.metrics.get(ACCURACY)
        weights = head_weights if of_head else one.metrics.get(WEIGHTS)
        error = None if accuracy is None else accuracy_error(accuracy, validation_size)
        rows.append(
            {
                "trainable": trainable_of(one),
                "rejects": policy != "accept-all",
                "trial": one.trial_id,
                "policy": policy,
                "validation_accuracy": accuracy,
                "standard_error": error,
                "acceptance_rate": one.metrics.get("acceptance_rate"),
                "seconds": head_seconds if of_head else one.metrics.get(SECONDS),
                "trainable_weights": None if weights is None else int(weights),
                "chosen": one.trial_id == chosen.trial_id,
                "message": one.message,
            }
        )
    order = [FROZEN, LAST_BLOCK, ALL]
    return sorted(
        rows, key=lambda row: (order.index(str(row["trainable"])), row["rejects"])
    )


def table_of_strategies(
    heads: keras_tuner.Tuner,
    outcomes: Sequence[TrialOutcome],
    chosen: ChosenTrial,
    bases: BackboneTrials,
    head_seconds: float | None,
) -> list[dict[str, Any]]:
    """Returns the best heads and all trials of the backbone, for the record."""

    def policy_of(one: TrialOutcome) -> str | None:
        return settings_of_outcome(heads, bases.head_of(one, outcomes)).policy.name

    return strategy_rows(
        [*bases.best_heads, *bases.outcomes],
        chosen=chosen.outcome,
        policy_of=policy_of,
        validation_size=len(heads.hypermodel.features.validation),
        head_seconds=head_seconds,
        head_weights=_weights_of(chosen.head),
    )
