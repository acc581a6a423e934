"""Keeps the state of a search whole on disk, whenever the process is killed.

Keras Tuner writes its files in place, so that a kill can leave half of one, which it
then cannot read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_rsft.searching.search_folder import replaced


class DurableOracle:
    """Mixed into an oracle: its own file and its trials' are written whole."""

    def save(self) -> None:
        text = json.dumps(self.get_state())
        replaced(Path(self._get_oracle_fname()), lambda path: path.write_text(text))

    def set_state(self, state: Mapping[str, Any]) -> None:
        # A trial that was written just before a kill, of which the oracle's own file
        # does not know yet, would be neither ended nor tried again.
        self.trials = {name: self.trials[name] for name in state["start_order"]}
        super().set_state(state)

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
