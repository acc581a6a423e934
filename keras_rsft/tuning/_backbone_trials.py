"""Unfreezes the backbone on from the best heads, each time as a trial."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np
import tensorflow as tf
from keras_tuner.engine.trial import Trial, TrialStatus
from keras_tuner.errors import FailedTrialError

from keras_rsft._storage import MODEL_FILE, disk_full_said, replaced
from keras_rsft.config import (
    ALL,
    FROZEN,
    LAST_BLOCK,
    SearchConfig,
    TrainConfig,
    Unfreeze,
)
from keras_rsft.training import _unfreeze
from keras_rsft.training._features import FeatureSource
from keras_rsft.training._head import ESTIMATED_ACCURACY, best_of_all_epochs
from keras_rsft.training._resume import TrainingCheckpoint, TrainingClock
from keras_rsft.training._unfreeze import cut_backbone, train_unfrozen
from keras_rsft.tuning import _tuner
from keras_rsft.tuning._batched import METRICS
from keras_rsft.tuning._choice import (
    GIVEN_ACCURACY,
    PLAIN,
    UNFREEZE,
    Choice,
    TrialOutcome,
)

RATE = "backbone_learning_rate"
WEIGHTS = "trainable_weights"
_LAYERS: dict[str, Unfreeze] = {LAST_BLOCK: 1, ALL: ALL}
_NAMES = {LAST_BLOCK: "the last block", ALL: "all of the backbone"}
# The backbone's learning rate is a tenth of the head's, and at most this: the rate that
# is best for a new head may be one that ruins a backbone. Optimizers that divide by
# the gradient's size need a smaller one.
_HIGHEST_RATE, _HIGHEST_ADAPTIVE_RATE = {"sgd": 1e-3}, 1e-4


def best_heads(
    outcomes: Sequence[TrialOutcome], options: SearchConfig
) -> tuple[TrialOutcome, ...]:
    """Returns the best plain trial and the best that rejects, where there are any."""
    plain = [one for one in outcomes if one.is_plain]
    rejecting = [
        one
        for one in outcomes
        if one.completed
        and not one.is_plain
        # One that accepted everything all the same would be the plain training again.
        and options.min_acceptance <= one.acceptance < 1.0
    ]
    return tuple(
        max(group, key=lambda one: (one.goodness(options), one.acceptance))
        for group in (plain, rejecting)
        if group
    )


def planned_trials(
    heads: Sequence[TrialOutcome], names: Sequence[str]
) -> dict[str, tuple[str, TrialOutcome]]:
    """Returns what each trial unfreezes and the head it begins from, cheapest first."""
    return {f"{name}-{one.trial_id}": (name, one) for name in names for one in heads}


def backbone_rate(head_rate: float, optimizer: str) -> float:
    """Returns the backbone's learning rate where none is asked for."""
    highest = _HIGHEST_RATE.get(optimizer.lower(), _HIGHEST_ADAPTIVE_RATE)
    return min(0.1 * head_rate, highest)


def learnable(
    backbone: keras.Model, names: Sequence[str], settings: TrainConfig
) -> tuple[str, ...]:
    """Returns what may learn, without `"all"` where the last block is all there is."""
    layers = {}
    for name in names:
        if name != FROZEN:
            how = dataclasses.replace(settings.unfreezing, layers=_LAYERS[name])
            layers[name] = [one.name for one in cut_backbone(backbone, how).layers]
    same = layers and layers.get(LAST_BLOCK) == layers.get(ALL)
    return tuple(one for one in names if not (same and one == ALL))


class BackboneTuner(_tuner.DurableTuner):
    """Trains the last block of the backbone, or all of it, from searched heads."""

    def __init__(
        self,
        tuner: _tuner.TrialsTuner,
        heads: Sequence[TrialOutcome],
        options: SearchConfig,
        source: FeatureSource,
        folder: Path,
    ):
        objective = keras_tuner.Objective(options.objective, options.direction)
        oracle = _tuner.DurableOracle(objective)
        with contextlib.redirect_stdout(io.StringIO()):  # Of a resumed search.
            super().__init__(
                oracle, directory=str(folder), project_name="backbone_trials"
            )
        self.oracle.verbose = 0
        self.heads: dict[str, TrialOutcome] = {}
        for one in heads:
            values = {UNFREEZE: FROZEN, **one.values}
            self.heads[one.trial_id] = dataclasses.replace(one, values=values)
        self.best_heads = best_heads(tuple(self.heads.values()), options)
        self._tuner, self._options, self._source = tuner, options, source
        self._epochs = tuner.hypermodel.settings.unfreezing.epochs or 1

    def head_of(self, outcome: TrialOutcome) -> TrialOutcome:
        """Returns the head's trial that one began from; a head's own is itself."""
        return self.heads[outcome.trial_id.removeprefix(f"{outcome.unfreeze}-")]

    def search(self) -> None:
        """Trains the planned trials that have not ended yet, one after the other."""
        planned = planned_trials(self.best_heads, self._options.unfrozen)
        left = {k: v for k, v in planned.items() if k not in self.oracle.end_order}
        if not left:
            return
        backbone = self._source.float32_backbone()
        kinds = ", ".join(
            f"{_NAMES[name]} from {count} head{'s' if count > 1 else ''}"
            for name, count in Counter(name for name, _ in left.values()).items()
        )
        epochs = len(left) * self._epochs
        self._source.on_note(f"The backbone learns: {kinds}, {epochs} epochs in all.")
        for number, (trial_id, (name, head)) in enumerate(left.items(), 1):
            self._source.on_note(
                f"Training {_NAMES[name]} on from trial {head.trial_id} "
                f"({head.settings.policy.name}), {number} of {len(left)}."
            )
            self._run(trial_id, name, head, backbone)

    def run_trial(self, trial: Trial, *args: Any, **kwargs: Any) -> None:
        """Exists because Keras Tuner asks for it where there is no hypermodel."""
        raise NotImplementedError("Use `search`, which plans the trials.")

    def load_model(self, trial: Trial) -> keras.Model:
        return keras.saving.load_model(self.model_file(trial.trial_id), compile=False)

    def model_file(self, trial_id: str) -> Path:
        return Path(self.get_trial_dir(trial_id)) / MODEL_FILE

    def test_predicted(self, outcome: TrialOutcome) -> np.ndarray:
        model = self.load_model(self.oracle.trials[outcome.trial_id])
        return _unfreeze.predicted_on_images(model, self._source.images.test)[1]

    def settings_of(self, trial: Trial, epochs: int) -> TrainConfig:
        name = trial.hyperparameters.values[UNFREEZE]
        head = self.heads[trial.trial_id.removeprefix(f"{name}-")]
        return self._settings(name, head, max(epochs - head.epochs, 1))

    def _settings(self, name: str, head: TrialOutcome, epochs: int) -> TrainConfig:
        """Returns how a trial is trained, its head's training first."""
        how, settings = self._tuner.hypermodel.settings.unfreezing, head.settings
        rate = how.learning_rate
        if rate is None:
            rate = backbone_rate(settings.learning_rate, settings.optimizer)
        how = dataclasses.replace(
            how, layers=_LAYERS[name], learning_rate=rate, epochs=epochs
        )
        return dataclasses.replace(settings, unfreeze=how)

    def _run(
        self, trial_id: str, name: str, head: TrialOutcome, backbone: keras.Model
    ) -> None:
        """Trains one trial, which is new or was stopped, and reports it."""
        settings, oracle = self._settings(name, head, self._epochs), self.oracle
        trial = oracle.trials.get(trial_id)
        if trial is None:
            hp = self._tuner.oracle.trials[head.trial_id].hyperparameters.copy()
            hp.values = dict(head.values)
            hp.Choice(UNFREEZE, list(self._options.unfreeze))
            hp.Fixed(RATE, settings.unfreeze_rate)
            hp.values |= {UNFREEZE: name, RATE: settings.unfreeze_rate}
            trial = oracle.trials[trial_id] = Trial(hp, trial_id=trial_id)
            oracle.start_order.append(trial_id)
        trial.status = TrialStatus.RUNNING
        oracle.ongoing_trials[trial_id] = trial
        oracle.save_trial(trial)
        oracle.save()
        path = Path(self.get_trial_dir(trial_id)) / "training.npz"
        checkpoint = TrainingCheckpoint(path)
        try:
            self._train(trial, head, settings, backbone, checkpoint)
        except FailedTrialError as error:
            self._fail(trial, str(error))
        except tf.errors.ResourceExhaustedError as error:
            self._fail(trial, f"Memory is full: {str(error).splitlines()[0]}")
        except (KeyboardInterrupt, OSError) as error:
            with contextlib.suppress(OSError):  # The disk may be full.
                checkpoint.flush()
            shown = disk_full_said(error, Path(self.project_dir))
            if shown is error:
                raise
            raise shown from error
        path.unlink(missing_ok=True)

    def _train(
        self,
        trial: Trial,
        head: TrialOutcome,
        settings: TrainConfig,
        backbone: keras.Model,
        checkpoint: TrainingCheckpoint,
    ) -> None:
        """Trains and keeps the model of the best epoch."""
        options, features = self._options, self._tuner.hypermodel.features
        clock = TrainingClock()
        best = best_of_all_epochs(
            options.objective, options.direction, epochs=self._epochs
        )
        part = cut_backbone(backbone, settings.unfreezing)
        model = self._tuner.model_of(head)
        weights = weights_of(part.rest) + weights_of(model)
        cut = settings.unfreezing.layers  # One choice for all trials of a part.
        choice = Path(self.project_dir) / f"activations-{cut}.json"
        cached = _unfreeze.cache_activations(part, features, self._source, choice)
        with warnings.catch_warnings():
            # A trial's acceptance rate says it, instead of a warning in each epoch.
            warnings.filterwarnings("ignore", message=".*accepted no sample")
            whole, trained = train_unfrozen(
                part,
                _unfreeze.begun_from(
                    model, features, epochs=head.epochs, callbacks=(best, clock)
                ),
                self._source,
                features,
                settings,
                cached=cached,
                checkpoint=checkpoint,
                credits=self._tuner.hypermodel.credits,
            )
        history = trained.history
        if not np.isfinite(history["val_loss"][head.epochs :]).all():
            raise FailedTrialError(_tuner.DIVERGED)
        replaced(self.model_file(trial.trial_id), whole.save)
        split = self._source.images.validation
        self._note_predicted(trial, _unfreeze.predicted_on_images(whole, split)[1])
        shown = {name: history[name] for name in METRICS}
        self._complete(
            trial, shown, best.best_epoch, clock.seconds, **{WEIGHTS: weights}
        )


def weights_of(model: keras.Model) -> int:
    return sum(int(np.prod(one.shape)) for one in model.trainable_variables)


def strategy_rows(
    outcomes: Sequence[TrialOutcome],
    choice: Choice,
    *,
    head_weights: int,
) -> list[dict[str, Any]]:
    """Returns one row for each trial that stands for a strategy, and the choice."""
    rows, chosen = [], choice.chosen
    unique = {one.trial_id: one for one in (*outcomes, chosen)}.values()
    for one in sorted(
        unique, key=lambda one: (one.cost, one.settings.policy.name != PLAIN)
    ):
        policy = one.settings.policy.name
        weights = one.metrics.get(WEIGHTS) if one.cost else head_weights
        rows.append(
            {
                "unfreeze": one.unfreeze,
                "rejects": policy != PLAIN,
                "trial": one.trial_id,
                "policy": policy,
                "validation_accuracy": one.metrics.get(GIVEN_ACCURACY),
                "validation_accuracy_estimated": one.metrics.get(ESTIMATED_ACCURACY),
                "standard_error": choice.errors.get(one.trial_id),
                "acceptance_rate": one.metrics.get("acceptance_rate"),
                "seconds": one.metrics.get(_tuner.SECONDS),
                "trainable_weights": None if weights is None else int(weights),
                "chosen": one.trial_id == chosen.trial_id,
                "message": one.message,
            }
        )
    return rows
