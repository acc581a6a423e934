"""A worker's whole part: joins the chief's search, trains, and goes home."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from keras_rsft.errors import SearchFailed
from keras_rsft.searching.hypermodel import RSFTHyperModel
from keras_rsft.searching.names import SearchOptions
from keras_rsft.searching.oracle_client import WorkerOracle, mark_of_chief
from keras_rsft.searching.oracles import make_quiet_tuner
from keras_rsft.searching.roles import Role
from keras_rsft.searching.search_folder import join_search, read_results
from keras_rsft.searching.worker_processes import end_with_parent


def train_for_chief(
    hypermodel: RSFTHyperModel,
    options: SearchOptions,
    role: Role,
    output: str | os.PathLike,
    identity: dict[str, Any],
    *,
    patience: float,
) -> int:
    """Trains what the chief hands out until it has no more.

    Args:
        hypermodel: What a trial is, as the chief has it.
        options: As the chief has them.
        role: Where the chief is.
        output: The search's folder, which the chief and all workers share.
        identity: What `identity_of` gives.
        patience: Seconds to wait for the chief's answer.

    Returns:
        How many trials this worker trained.

    Raises:
        SearchFailed: If the chief does not answer or has failed, or its folder is
            not here.
        InvalidArgument: If the chief searches something else.
    """
    end_with_parent()
    try:
        mark = mark_of_chief(role, patience=patience)
    except SearchFailed:
        if read_results(Path(output)) is None:
            raise
        return 0  # This worker came when all was done and the chief had gone.
    folder = join_search(output, identity, mark)
    tuner = make_quiet_tuner(hypermodel, options, folder)
    tuner.oracle = WorkerOracle(tuner.oracle, role, patience=patience)
    with warnings.catch_warnings():
        # Told by a trial's acceptance rate, instead of by a warning in each epoch.
        warnings.filterwarnings("ignore", message=".*accepted no sample")
        tuner.search(verbose=0)
    return tuner.oracle.trials_ended
