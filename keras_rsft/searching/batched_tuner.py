"""A Keras Tuner that trains many trials together instead of one after another."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras_tuner
import numpy as np
from keras_tuner.engine.trial import Trial

from keras_rsft._storage import replaced
from keras_rsft.config import TrainConfig
from keras_rsft.errors import InvalidArgument
from keras_rsft.model import RSFTModel
from keras_rsft.searching.batched_heads import METRICS, BatchedHeads
from keras_rsft.searching.durable import OnEpoch, TrialsTuner
from keras_rsft.searching.head_trials import stack_trials, update_rule
from keras_rsft.searching.hypermodel import DIVERGED, RSFTHyperModel
from keras_rsft.searching.space import settings_of_values

HEAD_FILE = "head.npz"


class BatchedTuner(TrialsTuner):
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
        if oracle.objective.name not in METRICS:
            raise InvalidArgument(
                f"The objective must be one of {', '.join(METRICS)}. "
                f"Received: {oracle.objective.name!r}."
            )
        self.parallel_trials, self._halvings = parallel_trials, halvings
        oracle.max_consecutive_failed_trials = None
        super().__init__(oracle, hypermodel, **kwargs)
        if not self.is_worker:  # A worker's space is the chief's.
            self._check_space()

    def load_model(self, trial: Trial) -> RSFTModel:
        """Returns a trial's model with the weights of its best epoch."""
        model = self.hypermodel.build(trial.hyperparameters)
        path = Path(self.get_trial_dir(trial.trial_id)) / HEAD_FILE
        with np.load(path, allow_pickle=False) as kept:
            weights = [kept["kernel"], kept["bias"]]
        model.model.get_layer("scores").set_weights(weights)
        batch_size = self.hypermodel.settings.batch_size
        steps = -(-len(self.hypermodel.features.train) // batch_size)
        model.policy.note_steps_seen((trial.best_step + 1) * steps)
        return model

    def _train(self, trials: Sequence[Trial], on_epoch: OnEpoch | None) -> None:
        """Trains trials together, those of each update rule and length at once."""
        groups: dict[tuple, list[tuple[Trial, TrainConfig]]] = {}
        for trial in trials:
            try:
                settings = self.hypermodel.settings_of(trial.hyperparameters)
                rule = (update_rule(settings), settings.epochs)
                group = groups.setdefault(rule, [])
            except Exception as error:  # Of a user's space: this trial's fault alone.
                self._fail(trial, f"{type(error).__name__}: {error}")
            else:
                group.append((trial, settings))
        for group in groups.values():
            self._train_group(group, on_epoch)

    def _train_group(
        self,
        group: Sequence[tuple[Trial, TrainConfig]],
        on_epoch: OnEpoch | None,
    ) -> None:
        settings = [one for _, one in group]
        hypermodel, heads, loss_limit = self.hypermodel, self._heads, math.inf
        if any(one.policy.name == "auto" for one in settings):
            heads.list_samples(hypermodel.examination.accept_mask())
            loss_limit = hypermodel.examination.loss_limit
        trained = heads.train(
            stack_trials(
                settings,
                num_classes=len(hypermodel.features.class_names),
                steps_per_epoch=heads.steps_per_epoch,
                loss_limit=loss_limit,
            ),
            epochs=settings[0].epochs,
            objective=self.oracle.objective.name,
            direction=self.oracle.objective.direction,
            halvings=self._halvings,
            on_epoch=on_epoch,
        )
        for row, (trial, _) in enumerate(group):
            if trained.diverged[row]:
                self._fail(trial, DIVERGED)
                continue
            kernel, bias = trained.best_kernels[row], trained.best_biases[row]
            path = Path(self.get_trial_dir(trial.trial_id)) / HEAD_FILE
            replaced(path, functools.partial(np.savez, kernel=kernel, bias=bias))
            history = {name: values[row] for name, values in trained.history.items()}
            self._complete(trial, history, int(trained.best_epochs[row]))

    @functools.cached_property
    def _heads(self) -> BatchedHeads:
        features, settings = self.hypermodel.features, self.hypermodel.settings
        return BatchedHeads(
            features.train,
            features.validation,
            num_classes=len(features.class_names),
            batch_size=settings.batch_size,
            seed=settings.seed,
        )

    def _check_space(self) -> None:
        """Raises InvalidArgument where a policy or an optimizer cannot be batched."""
        space, given = self.oracle.get_space(), self.hypermodel.settings
        update_rule(self.hypermodel.settings_of(space))
        for searched in space.space:
            if searched.name in ("policy", "optimizer"):
                for value in searched.values:
                    update_rule(settings_of_values({searched.name: value}, given))
