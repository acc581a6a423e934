"""A Keras Tuner that trains many trials together instead of one after another."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras_tuner
import numpy as np
from keras_tuner.engine.trial import Trial, TrialStatus

from keras_rsft.errors import InvalidArgument
from keras_rsft.finetuning import TrainingSettings
from keras_rsft.model import RSFTModel
from keras_rsft.searching.batched_heads import BatchedHeads, OnEpoch, TrainedHeads
from keras_rsft.searching.durable import DurableTuner
from keras_rsft.searching.head_notes import METRICS
from keras_rsft.searching.head_trials import stack_trials, update_rule
from keras_rsft.searching.hypermodel import DIVERGED, RSFTHyperModel
from keras_rsft.searching.search_folder import replaced
from keras_rsft.searching.space import settings_of_values

HEAD_FILE = "head.npz"
_WAIT_SECONDS = 1.0


class BatchedTuner(DurableTuner, keras_tuner.Tuner):
    """Takes up to `parallel_trials` trials from an oracle and trains them together.

    Results go back to the oracle trial by trial, so that everything else is as with
    any of Keras Tuner's tuners: trial folders, `get_best_models`,
    `get_best_hyperparameters`, `results_summary`, and going on after a stop. A
    trial's value is that of its best epoch, whose weights are kept.

    Args:
        oracle: Any of Keras Tuner's oracles but Hyperband's. It is told not to stop
            after some failures in a row, which say little of trials trained together.
        hypermodel: What a trial is.
        parallel_trials: Most heads that are trained together, at least 1. Default 64.
        halvings: How often the worse half of the heads is dropped while they train,
            at least 0; the others go on. Default 0.
        **kwargs: `directory`, `project_name` and whatever `keras_tuner.Tuner` takes.

    Raises:
        InvalidArgument: If the oracle or something in the space cannot be batched;
            the message names a tuner that can take it.
    """

    def __init__(
        self,
        oracle: keras_tuner.Oracle,
        hypermodel: RSFTHyperModel,
        *,
        parallel_trials: int = 64,
        halvings: int = 0,
        **kwargs: Any,
    ):
        if not isinstance(hypermodel, RSFTHyperModel):
            raise InvalidArgument(
                "The batched tuner trains heads on kept features, so `hypermodel` must "
                f"be an `RSFTHyperModel`. Received: {type(hypermodel).__name__}."
            )
        if isinstance(oracle, keras_tuner.oracles.HyperbandOracle):
            raise InvalidArgument(
                "The batched tuner trains all its trials for the same epochs, so it "
                "cannot take Hyperband's: use the tuner hyperband, or `halvings`."
            )
        for name, value, least in (
            ("parallel_trials", parallel_trials, 1),
            ("halvings", halvings, 0),
        ):
            if value < least:
                raise InvalidArgument(
                    f"`{name}` must be at least {least}. Received: {name}={value}."
                )
        self._parallel_trials = parallel_trials
        self._halvings = halvings
        self._heads: BatchedHeads | None = None
        if oracle.objective.name not in METRICS:
            raise InvalidArgument(
                f"The objective must be one of {', '.join(METRICS)}. "
                f"Received: {oracle.objective.name!r}."
            )
        oracle.max_consecutive_failed_trials = None
        super().__init__(oracle, hypermodel, **kwargs)
        if not self._is_worker():  # A worker's space is the chief's.
            self._check_space()

    def search(
        self,
        *,
        verbose: int = 0,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        """Trains trials until the oracle has no more.

        Args:
            verbose: 1 prints what Keras Tuner prints for each trial. Default 0.
            on_epoch: Called with the number of heads that have trained one epoch, and
                the best value of the objective among those trained with them.
        """
        self.oracle.verbose = verbose
        self.on_search_begin()
        while trials := self._take_trials():
            for trial in trials:
                self.on_trial_begin(trial)
            self._train(trials, on_epoch)
        self.on_search_end()

    def load_model(self, trial: Trial) -> RSFTModel:
        """Returns a trial's model with the weights of its best epoch."""
        model = self.hypermodel.build(trial.hyperparameters)
        path = Path(self.get_trial_dir(trial.trial_id)) / HEAD_FILE
        with np.load(path, allow_pickle=False) as kept:
            weights = [kept["kernel"], kept["bias"]]
        model.model.get_layer("scores").set_weights(weights)
        settings = self.hypermodel.settings_of(trial.hyperparameters)
        steps = -(-len(self.hypermodel.features.train) // settings.batch_size)
        model.policy.note_steps_seen((trial.best_step + 1) * steps)
        return model

    def _take_trials(self) -> list[Trial]:
        """Asks the oracle for trials, each under a tuner's name of its own."""
        taken = []
        while len(taken) < self._parallel_trials:
            self.pre_create_trial()
            trial = self.oracle.create_trial(f"{self.tuner_id}-{len(taken)}")
            if trial.status == TrialStatus.STOPPED:
                break
            if trial.status != TrialStatus.IDLE:
                taken.append(trial)
            elif taken:
                break
            else:  # Another tuner's trials must end first.
                time.sleep(_WAIT_SECONDS)
        return taken

    def _train(self, trials: Sequence[Trial], on_epoch: OnEpoch | None) -> None:
        groups: dict[tuple[str, int], list[tuple[Trial, TrainingSettings]]] = {}
        for trial in trials:
            try:
                settings = self.hypermodel.settings_of(trial.hyperparameters)
                rule = (update_rule(settings), settings.epochs)
                group = groups.setdefault(rule, [])
            except Exception as error:  # Of a user's space: this trial's fault alone.
                self._fail(trial, f"{type(error).__name__}: {error}")
                continue
            group.append((trial, settings))
        for group in groups.values():
            trained = self._trained([settings for _, settings in group], on_epoch)
            for row, (trial, _) in enumerate(group):
                self._report(trial, trained, row)

    def _trained(
        self,
        settings: Sequence[TrainingSettings],
        on_epoch: OnEpoch | None,
    ) -> TrainedHeads:
        lists = any(one.policy.name == "auto" for one in settings)
        heads = self._heads_for(lists)
        return heads.train(
            stack_trials(
                settings,
                num_classes=len(self.hypermodel.features.class_names),
                steps_per_epoch=heads.steps_per_epoch,
                loss_limit=(
                    self.hypermodel.examination.loss_limit if lists else math.inf
                ),
            ),
            epochs=settings[0].epochs,
            objective=self.oracle.objective.name,
            direction=self.oracle.objective.direction,
            halvings=self._halvings,
            on_epoch=on_epoch,
        )

    def _heads_for(self, lists: bool) -> BatchedHeads:
        """Returns what trains heads; it knows the listed samples once they matter."""
        hypermodel = self.hypermodel
        if self._heads is None:
            self._heads = BatchedHeads(
                hypermodel.features.train,
                hypermodel.features.validation,
                num_classes=len(hypermodel.features.class_names),
                batch_size=hypermodel.settings.batch_size,
                seed=hypermodel.settings.seed,
            )
        if lists:
            self._heads.list_samples(hypermodel.examination.accept_mask())
        return self._heads

    def _report(self, trial: Trial, trained: TrainedHeads, row: int) -> None:
        best = int(trained.best_epochs[row])
        if trained.diverged[row]:
            self._fail(trial, DIVERGED)
            return
        self._keep_head(trial, trained.best_kernels[row], trained.best_biases[row])
        self.oracle.update_trial(
            trial.trial_id,
            {name: float(v[row, best]) for name, v in trained.history.items()},
            step=best,
        )
        trial.status = TrialStatus.COMPLETED
        self.on_trial_end(trial)

    def _fail(self, trial: Trial, message: str) -> None:
        trial.status, trial.message = TrialStatus.FAILED, message
        self.on_trial_end(trial)

    def _keep_head(self, trial: Trial, kernel: np.ndarray, bias: np.ndarray) -> None:
        path = Path(self.get_trial_dir(trial.trial_id)) / HEAD_FILE
        replaced(path, lambda beside: np.savez(beside, kernel=kernel, bias=bias))

    def _check_space(self) -> None:
        """Raises InvalidArgument where a policy or an optimizer cannot be batched."""
        update_rule(self.hypermodel.settings_of(self.oracle.get_space()))
        for searched in self.oracle.get_space().space:
            if searched.name in ("policy", "optimizer"):
                for value in searched.values:
                    update_rule(
                        settings_of_values(
                            {searched.name: value}, self.hypermodel.settings
                        )
                    )
