"""Keeps the state of a search whole on disk, whenever the process is killed.

Keras Tuner writes its files in place, so that a kill can leave half of one, which it
then cannot read.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_tuner.engine.trial import TrialStatus

from keras_rsft._storage import replaced

# A trial whose process died so often is likely to be what kills it.
MOST_DEATHS = 3
# A search alone and a chief go on with each other's trials, so they share a file.
_STATE_FILE = "tuner0.json"


class DurableOracle:
    """Mixed into an oracle: its files are written whole, and no trial gets lost.

    What was being trained when a process ended is handed out again, before anything
    new and to whoever asks.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._deaths = collections.Counter()

    def take_back(self, tuner_ids: Sequence[str]) -> None:
        """Takes trials back from tuners that are gone.

        A trial that was taken back `MOST_DEATHS` times has failed.
        """
        taken = [self.ongoing_trials[tuner_id] for tuner_id in tuner_ids]
        for tuner_id, trial in zip(tuner_ids, taken, strict=True):
            self._deaths[trial.trial_id] += 1
            if self._deaths[trial.trial_id] < MOST_DEATHS:
                del self.ongoing_trials[tuner_id]
                self._retry_queue.insert(0, trial.trial_id)
                continue
            trial.status = TrialStatus.FAILED
            trial.message = (
                f"The process that trained this trial died {MOST_DEATHS} times."
            )
            self.end_trial(trial)
        if taken:
            self.save()

    def take_off_queue(self, trial_id: str) -> None:
        """Does not hand a trial out again, because its result has come after all."""
        if trial_id in self._retry_queue:
            self._retry_queue.remove(trial_id)

    def save(self) -> None:
        text = json.dumps(self.get_state())
        replaced(Path(self._get_oracle_fname()), lambda path: path.write_text(text))

    def set_state(self, state: Mapping[str, Any]) -> None:
        # A trial that was written just before a kill, of which the oracle's own file
        # does not know yet, would be neither ended nor tried again.
        self.trials = {name: self.trials[name] for name in state["start_order"]}
        super().set_state(state)
        # Nobody is training them any more: the queue's last one is the first out.
        waiting = {trial.trial_id for trial in self.ongoing_trials.values()}
        waiting |= {*self._retry_queue}
        self._retry_queue = [t for t in reversed(self.start_order) if t in waiting]
        self.ongoing_trials = {}

    def _save_trial(self, trial: Any) -> None:
        path = Path(self._get_trial_dir(trial.trial_id)) / "trial.json"
        replaced(path, lambda beside: trial.save(str(beside)))


class DurableTuner:
    """Mixed into a tuner: its file, without which nothing is reloaded, as well."""

    def on_search_begin(self) -> None:
        super().on_search_begin()
        self.save()  # Keras Tuner waits for the end of the first trial.

    def save(self) -> None:
        if not self._is_worker():
            self.oracle.save()
        text = json.dumps(self.get_state())
        replaced(Path(self._get_tuner_fname()), lambda path: path.write_text(text))

    def _get_tuner_fname(self) -> str:
        if self._is_worker():
            return super()._get_tuner_fname()
        return str(Path(self.project_dir) / _STATE_FILE)
