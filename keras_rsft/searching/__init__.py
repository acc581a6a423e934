"""Searches the threshold and the learning rate with Keras Tuner.

`names.py` is what the command line may know, `space.py` what is searched,
`hypermodel.py` makes the model of one trial. `durable.py` runs trials and keeps their
files whole, `oracles.py` makes tuners by name; `batched_tuner.py`, `batched_heads.py`,
`batched_step.py` and `head_trials.py` train many heads together; `workers.py` shares
trials among processes. `trials.py` reads what became of trials, `choice.py` chooses,
`search_run.py` puts it together, `search_folder.py` writes it, `pictures.py` and
`parallel_coordinates.py` draw it. Where the base learns, `strategies.py` plans,
`base_trials.py` trains and `base_search.py` puts that half together. The folder is not
called `search`: the function of that name is public, and a module would hide it.

The names below are loaded when they are first used, so that the command line can
check names before anything heavy is imported.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "BatchedHeads": "batched_heads",
    "BatchedTuner": "batched_tuner",
    "HeadTrials": "head_trials",
    "RSFTHyperModel": "hypermodel",
    "Search": "search_run",
    "search": "search_run",
    "search_features": "search_run",
    "stack_trials": "head_trials",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
