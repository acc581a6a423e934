"""A tuner that runs its trials, and keeps their state whole whenever it is killed.

Keras Tuner writes its files in place, so that a kill can leave half of one, which it
then cannot read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras_tuner
from keras_tuner.engine.trial import Trial, TrialStatus

from keras_rsft._storage import replaced

STATE_FILE = "oracle.json"
# Keras Tuner's protocol drops why a trial failed, so a worker leaves it here.
_MESSAGE_FILE = "message.txt"
_WAIT_SECONDS = 1.0
OnEpoch = Callable[[int, float], None]


class DurableOracle:
    """Mixed into an oracle: its files are written whole, and no trial gets lost.

    What was being trained when a process ended is handed out again, before anything
    new and to whoever asks.
    """

    @property
    def folder(self) -> Path:
        return Path(self._get_oracle_fname()).parent

    def end_trial(self, trial: Trial) -> None:
        message = self.folder / f"trial_{trial.trial_id}" / _MESSAGE_FILE
        if trial.message is None and message.exists():
            trial.message = message.read_text(encoding="utf-8")
            message.unlink()
        super().end_trial(trial)

    def save(self) -> None:
        text = json.dumps(self.get_state())
        replaced(self.folder / STATE_FILE, lambda path: path.write_text(text))

    def set_state(self, state: Mapping[str, Any]) -> None:
        # A trial that was written just before a kill, of which the oracle's own file
        # does not know yet, would be neither ended nor tried again.
        self.trials = {name: self.trials[name] for name in state["start_order"]}
        # Nobody is training them any more: the queue's last one is the first out.
        ended = {*state["end_order"]}
        waiting = [name for name in reversed(self.trials) if name not in ended]
        super().set_state({**state, "ongoing_trials": {}, "retry_queue": waiting})

    def save_trial(self, trial: Trial) -> None:
        folder = self.folder / f"trial_{trial.trial_id}"
        folder.mkdir(exist_ok=True)
        replaced(folder / "trial.json", lambda beside: trial.save(str(beside)))

    _save_trial = save_trial  # Keras Tuner's name for it.


class DurableTuner(keras_tuner.Tuner):
    """Keeps all of its state in its oracle, which in a worker is the chief's."""

    def __init__(self, oracle: keras_tuner.Oracle, hypermodel: Any = None, **kwargs):
        super().__init__(oracle, hypermodel, **kwargs)
        if not self.is_worker and (Path(self.project_dir) / STATE_FILE).exists():
            self.reload()

    @property
    def is_worker(self) -> bool:
        return not isinstance(self.oracle, keras_tuner.Oracle)

    def save(self) -> None:
        if not self.is_worker:
            self.oracle.save()

    def reload(self) -> None:
        if not self.is_worker:
            self.oracle.reload()


class TrialsTuner(DurableTuner):
    """Takes trials from an oracle, trains them and reports them, until none is left."""

    parallel_trials = 1

    def search(self, *, verbose: int = 0, on_epoch: OnEpoch | None = None) -> None:
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

    def _train(self, trials: Sequence[Trial], on_epoch: OnEpoch | None) -> None:
        """Trains trials, and ends each by `_complete` or `_fail`."""
        raise NotImplementedError

    def _complete(
        self, trial: Trial, history: Mapping[str, Sequence[float]], best: int
    ) -> None:
        """Reports a trial by the metrics of its best epoch."""
        metrics = {name: float(values[best]) for name, values in history.items()}
        self.oracle.update_trial(trial.trial_id, metrics, step=best)
        trial.status = TrialStatus.COMPLETED
        self.on_trial_end(trial)

    def _fail(self, trial: Trial, message: str) -> None:
        trial.status, trial.message = TrialStatus.FAILED, message
        if self.is_worker:
            path = Path(self.get_trial_dir(trial.trial_id)) / _MESSAGE_FILE
            replaced(path, lambda beside: beside.write_text(message, encoding="utf-8"))
        self.on_trial_end(trial)

    def _take_trials(self) -> list[Trial]:
        """Asks the oracle for trials, each under a tuner's name of its own."""
        taken = []
        while len(taken) < self.parallel_trials:
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
