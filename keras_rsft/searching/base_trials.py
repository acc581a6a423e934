"""Trains the base on from the best heads, each time as a trial of Keras Tuner.

They are a project of their own beside the heads' trials, so that what proposes heads
never sees them. A trial that was begun goes on after a stop; one that ended is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np
import tensorflow as tf
from keras_tuner.engine.trial import Trial, TrialStatus

from keras_rsft.backbones.trainable_part import TrainablePart, trainable_part
from keras_rsft.data import ImageData
from keras_rsft.finetuning import SplitFeatures, TrainingSettings
from keras_rsft.finetuning.activations import ActivationChoice, settled_choice
from keras_rsft.finetuning.base_time import BaseTime, measured_time
from keras_rsft.finetuning.base_training import measured_choice, train_base
from keras_rsft.finetuning.checkpoint import TrainingCheckpoint
from keras_rsft.finetuning.early_stopping import best_of_all_epochs
from keras_rsft.finetuning.head_training import TrainedHead
from keras_rsft.finetuning.training_clock import TrainingClock
from keras_rsft.ledger import RejectionLedger
from keras_rsft.progress import progress_bar
from keras_rsft.result_folder import disk_full_said
from keras_rsft.result_words import about
from keras_rsft.run_files import MODEL_FILE
from keras_rsft.searching.choice import TRAINABLE, TrialOutcome
from keras_rsft.searching.durable import DurableOracle, DurableTuner
from keras_rsft.searching.head_notes import METRICS
from keras_rsft.searching.hypermodel import DIVERGED
from keras_rsft.searching.names import LAST_BLOCK, SearchOptions
from keras_rsft.searching.search_folder import replaced
from keras_rsft.searching.strategies import (
    SECONDS,
    TRAINABLE_FROM,
    WEIGHTS,
    PlannedTrial,
    base_learning_rate,
)
from keras_rsft.searching.trials import (
    TUNERS_OWN,
    head_of_outcome,
    outcomes_of,
    settings_of_outcome,
)

BASE_TRIALS_FOLDER = "base_trials"
BASE_RATE = "base_learning_rate"
_HEAD_TRIAL = f"{TUNERS_OWN}head_trial"
_CHECKPOINT_FILE = "training.npz"
_NAMES = {LAST_BLOCK: "the last block"}


@dataclasses.dataclass(frozen=True, eq=False)
class BaseSource:
    """What the training of the base needs beside the search of the heads.

    Attributes:
        data: The images, with the labels that trials are judged by.
        base: Returns the base in float32.
        feature_precision: How activations are kept.
        cache_dir: Where they are kept.
        progress: Whether progress bars are shown.
        on_note: Told what is done next, in one line.
    """

    data: ImageData
    base: Callable[[], keras.Model]
    feature_precision: str
    cache_dir: str | os.PathLike | None
    progress: bool
    on_note: Callable[[str], None]


class BaseTrialsOracle(DurableOracle, keras_tuner.Oracle):
    """Keeps the trials in which the base learns; which they are is not its choice."""

    def begin(self, planned: PlannedTrial, hp: keras_tuner.HyperParameters) -> Trial:
        """Returns a trial to train, which is new or was stopped.

        Args:
            planned: The trial.
            hp: Its hyperparameters, with their values.
        """
        trial = self.trials.get(planned.trial_id)
        if trial is None:
            trial = Trial(hp, trial_id=planned.trial_id)
            self.trials[trial.trial_id] = trial
            self.start_order.append(trial.trial_id)
        self.take_off_queue(trial.trial_id)
        trial.status = TrialStatus.RUNNING
        self.ongoing_trials[trial.trial_id] = trial
        self._save_trial(trial)
        self.save()
        return trial


class BaseTrialsTuner(DurableTuner, keras_tuner.Tuner):
    """Trains the last block of the base, or all of it, on from heads of a search.

    A trial's value is that of its best epoch, whose model is kept: `load_model` and
    `get_best_models` give models from images to probabilities.

    Args:
        heads: The tuner of the heads, an `RSFTHyperModel` in it.
        options: How the search goes on.
        source: Images and base.
        folder: Of the search.
    """

    def __init__(
        self,
        heads: keras_tuner.Tuner,
        options: SearchOptions,
        source: BaseSource,
        folder: Path,
    ):
        oracle = BaseTrialsOracle(
            objective=keras_tuner.Objective(options.objective, options.direction),
            # A failed trial is no reason to give up the others.
            max_consecutive_failed_trials=None,
        )
        super().__init__(oracle, directory=str(folder), project_name=BASE_TRIALS_FOLDER)
        self.oracle.verbose = 0
        self._heads, self._options, self._source = heads, options, source

    def search(self, planned: Sequence[PlannedTrial]) -> None:
        """Trains what has not ended yet, one after the other.

        Args:
            planned: The trials.

        Raises:
            DataError: If an image cannot be read any more.
            OSError: If the disk is full; the same call goes on once there is room.
        """
        left = [one for one in planned if one.trial_id not in self.oracle.end_order]
        if not left:
            return
        self.on_search_begin()
        base = self._source.base()
        self._source.on_note(self._expected(base, left))
        for number, one in enumerate(left, 1):
            settings = self.settings_of(one)
            self._source.on_note(
                f"Training {_named(one.trainable)} on from trial "
                f"{one.begins_from.trial_id} ({settings.policy.name}), {number} of "
                f"{len(left)}."
            )
            trial = self.oracle.begin(one, self._hyperparameters(one, settings))
            self._run(trial, one, settings, base)
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

    def outcomes(self) -> tuple[TrialOutcome, ...]:
        """Returns what became of all trials, in the order in which they began."""
        return outcomes_of(self)

    def head_trial_of(self, outcome: TrialOutcome) -> str:
        """Returns the name of the head's trial that one began from."""
        return self.oracle.trials[outcome.trial_id].hyperparameters.values[_HEAD_TRIAL]

    def base_rate_of(self, outcome: TrialOutcome) -> float:
        """Returns the base's learning rate of a trial."""
        return outcome.values[BASE_RATE]

    def settings_of(self, planned: PlannedTrial) -> TrainingSettings:
        """Returns how a trial is trained, its head's training first."""
        settings = settings_of_outcome(self._heads, planned.begins_from)
        rate = settings.base_learning_rate
        if rate is None:
            rate = base_learning_rate(settings.learning_rate, settings.optimizer)
        return dataclasses.replace(
            settings,
            trainable_from=TRAINABLE_FROM[planned.trainable],
            base_learning_rate=rate,
        )

    def _hyperparameters(
        self, planned: PlannedTrial, settings: TrainingSettings
    ) -> keras_tuner.HyperParameters:
        """Returns those of the head's trial, and what is said of the base."""
        head = self._heads.oracle.trials[planned.begins_from.trial_id]
        hp = head.hyperparameters.copy()
        hp.values = dict(planned.begins_from.values)
        hp.Choice(TRAINABLE, list(self._options.unfreeze))
        hp.Fixed(BASE_RATE, settings.base_rate)
        hp.Fixed(_HEAD_TRIAL, planned.begins_from.trial_id)
        hp.values |= {
            TRAINABLE: planned.trainable,
            BASE_RATE: settings.base_rate,
            _HEAD_TRIAL: planned.begins_from.trial_id,
        }
        return hp

    def _cut(self, base: keras.Model, settings: TrainingSettings) -> TrainablePart:
        return trainable_part(
            base, settings.trainable_from, train_batch_norm=settings.train_batch_norm
        )

    def _activations(
        self, trainable: str, part: TrainablePart, settings: TrainingSettings
    ) -> ActivationChoice:
        """Returns whether activations are kept: for all trials of a part the same."""
        return settled_choice(
            Path(self.project_dir) / f"activations-{trainable}.json",
            lambda: measured_choice(
                part,
                self._source.data,
                self._features,
                settings,
                feature_precision=self._source.feature_precision,
                cache_dir=self._source.cache_dir,
            ),
        )

    @property
    def _features(self) -> SplitFeatures:
        return self._heads.hypermodel.features

    def _expected(self, base: keras.Model, left: Sequence[PlannedTrial]) -> str:
        """Says how long the trials will take, by a few steps of each kind."""
        counts: dict[str, int] = {}
        for one in left:
            counts[one.trainable] = counts.get(one.trainable, 0) + 1
        said, total = [], 0.0
        with progress_bar(
            "Measuring the training of the base",
            total=len(counts),
            unit="parts",
            visible=self._source.progress,
        ) as advance:
            for trainable, count in counts.items():
                one = next(one for one in left if one.trainable == trainable)
                seconds = self._measured(base, one).seconds(count)
                heads = f"{count} head{'s' if count > 1 else ''}"
                said.append(f"{_named(trainable)} from {heads}, {about(seconds)}")
                total += seconds
                advance(1)
        whole = f"; {about(total)} in all" if len(said) > 1 else ""
        return f"The base learns: {'; '.join(said)}{whole}."

    def _measured(self, base: keras.Model, planned: PlannedTrial) -> BaseTime:
        settings = self.settings_of(planned)
        part = self._cut(base, settings)  # A copy, which is lost.
        choice = self._activations(planned.trainable, part, settings)
        return measured_time(
            part,
            self._source.data,
            self._features,
            settings,
            keep_activations=choice.keep,
        )

    def _run(
        self,
        trial: Trial,
        planned: PlannedTrial,
        settings: TrainingSettings,
        base: keras.Model,
    ) -> None:
        """Trains one trial, and reports it to the oracle."""
        path = Path(self.get_trial_dir(trial.trial_id)) / _CHECKPOINT_FILE
        checkpoint = TrainingCheckpoint(path)
        try:
            self._train(trial, planned, settings, base, checkpoint)
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
        trial: Trial,
        planned: PlannedTrial,
        settings: TrainingSettings,
        base: keras.Model,
        checkpoint: TrainingCheckpoint,
    ) -> None:
        clock = TrainingClock()
        best = best_of_all_epochs(
            self._options.objective,
            self._options.direction,
            epochs=settings.base_epochs,
        )
        part = self._cut(base, settings)
        learning = part.rest.trainable_variables
        weights = sum(int(np.prod(one.shape)) for one in learning)
        head = head_of_outcome(self._heads, planned.begins_from)
        with warnings.catch_warnings():
            # Told by a trial's acceptance rate, instead of by a warning in each epoch.
            warnings.filterwarnings("ignore", message=".*accepted no sample")
            tuned = train_base(
                part,
                self._begun(head, planned, (best, clock)),
                self._source.data,
                self._features,
                settings,
                keep_activations=self._activations(
                    planned.trainable, part, settings
                ).keep,
                feature_precision=self._source.feature_precision,
                cache_dir=self._source.cache_dir,
                progress=self._source.progress,
                checkpoint=checkpoint,
            )
        history = tuned.trained.history
        if not np.isfinite(history["val_loss"][planned.begins_from.epochs :]).all():
            raise _Diverged
        replaced(self.model_file(trial.trial_id), tuned.classifier.save)
        metrics = {name: float(history[name][best.best_epoch]) for name in METRICS}
        metrics |= {SECONDS: clock.seconds, WEIGHTS: weights + weights_of(head)}
        self.oracle.update_trial(trial.trial_id, metrics, step=best.best_epoch)

    def _begun(
        self,
        head: keras.Model,
        planned: PlannedTrial,
        callbacks: Sequence[keras.callbacks.Callback],
    ) -> TrainedHead:
        """Returns a head's trial as a training that goes on."""
        train = self._features.train
        recorder = RejectionLedger(train.ids, train.labels, train.clean_labels)
        unknown = [float("nan")] * planned.begins_from.epochs
        return TrainedHead(
            model=head,
            history={"loss": unknown},
            results={},
            accepted=np.zeros(len(train), bool),
            ledger=recorder.ledger,
            acceptance_by_class=np.zeros((0, len(self._features.class_names))),
            recorder=recorder,
            callbacks=callbacks,
        )


class _Diverged(Exception):
    """The weights became NaN or infinite."""


def weights_of(model: keras.Model) -> int:
    """Returns how many numbers of a model learn."""
    return sum(int(np.prod(one.shape)) for one in model.trainable_variables)


def _named(trainable: str) -> str:
    return _NAMES.get(trainable, "all of the base")
