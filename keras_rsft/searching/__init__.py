"""Searches the threshold and the learning rate with Keras Tuner.

`space.py` declares what is searched,
`hypermodel.py` makes and trains the model of one trial. `head_trials.py`,
`batched_step.py`, `head_notes.py` and `batched_heads.py` train many heads together,
`batched_tuner.py` does so for any oracle, `oracles.py` makes tuners by name,
`durable.py` keeps their files whole. `trials.py` runs a tuner's trials and compares
with plain training, `choice.py` chooses among them, `search_run.py` puts it together,
`search_folder.py` writes it, `pictures.py`, `parallel_coordinates.py` and `hparams.py`
show it. Where the base learns, `strategies.py` plans from which heads,
`base_trials.py` trains, `base_search.py` puts that half together; `judged.py` says by
which labels. With several processes, `roles.py` says which this one is, `chief.py`
leads through `oracle_server.py` and `worker_processes.py`, `worker.py` trains through
`oracle_client.py`. The folder is not called `search`: the function of that name is
public, and a module would hide it.

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
    "SearchOptions": "names",
    "SearchSpace": "space",
    "search": "search_run",
    "search_features": "search_run",
    "stack_trials": "head_trials",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
