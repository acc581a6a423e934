"""Leads a search that workers train: serves the oracle until all trials have ended.

A worker that dies, on this machine or another, loses nothing: its trials are handed
out again. A chief without workers does not wait for ever.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from pathlib import Path

import keras_tuner

from keras_rsft.errors import SearchFailed
from keras_rsft.progress import progress_bar
from keras_rsft.searching.choice import TrialOutcome
from keras_rsft.searching.names import SearchOptions
from keras_rsft.searching.oracle_server import OracleServer
from keras_rsft.searching.roles import Crew, Role
from keras_rsft.searching.search_folder import write_mark
from keras_rsft.searching.trials import best_so_far, outcomes_of
from keras_rsft.searching.worker_processes import WorkerProcesses

LOGS_FOLDER = "workers"
# Several heartbeats must be missed before a worker on another machine counts as dead.
SILENT_SECONDS = 60.0
MOST_RESTARTS = 3
_POLL_SECONDS = 0.2
# Workers that are waiting ask each second; what asks no more has been told.
_LAST_ANSWERS_SECONDS, _MOST_LAST_ANSWERS_SECONDS = 3.0, 30.0


def lead_trials(
    tuner: keras_tuner.Tuner,
    options: SearchOptions,
    role: Role,
    folder: Path,
    *,
    crew: Crew | None = None,
    patience: float,
    progress: bool = True,
) -> tuple[TrialOutcome, ...]:
    """Has workers train all trials that are left, and returns all.

    Args:
        tuner: With an oracle out of `oracles.py`.
        options: How the search goes on.
        role: Where to listen.
        folder: Of the search; the workers need it too.
        crew: Workers to start on this machine. Default None: they come by themselves.
        patience: Seconds without a word of any worker after which to give up.
        progress: Show a progress bar.

    Raises:
        SearchFailed: If all workers died, none came, or the oracle failed.
    """
    oracle = tuner.oracle
    oracle.verbose = 0
    mark = secrets.token_hex(16)
    write_mark(folder, mark)
    tuner.on_search_begin()
    server = OracleServer(oracle, role, mark)
    if server.is_over:
        return outcomes_of(tuner)
    with contextlib.ExitStack() as stack:
        stack.enter_context(server.running())
        advance = stack.enter_context(
            progress_bar(
                "Waiting for workers",
                total=options.max_trials,
                unit="trials",
                done=len(oracle.end_order),
                visible=progress,
            )
        )
        workers = None
        if crew is not None:
            logs = folder / LOGS_FOLDER
            workers = WorkerProcesses(crew, port=server.port, logs=logs)
            stack.enter_context(workers.running())
        done = len(oracle.end_order)
        while not server.is_over:
            time.sleep(_POLL_SECONDS)
            _look_after(server, workers, patience)
            ended = len(oracle.end_order)
            advance(ended - done, _state(tuner, options, workers))
            done = ended
        _say_goodbye(server, workers)
    return outcomes_of(tuner)


def _look_after(
    server: OracleServer, workers: WorkerProcesses | None, patience: float
) -> None:
    """Takes back the trials of the dead, and raises SearchFailed where none is left."""
    if server.failure is not None:
        raise SearchFailed(
            f"No more trials can be proposed: {server.failure}"
        ) from server.failure
    server.take_back(server.silent_tuners(SILENT_SECONDS))
    if workers is None:
        if server.silence > patience:
            raise SearchFailed(
                f"No worker has been heard of for {patience:g} seconds. Start workers "
                "with the address of this chief, and the same command to go on; "
                "trials that ended are kept."
            )
        return
    ended = workers.take_ended()
    for name in ended:
        held = server.tuners_of(name)
        server.take_back(held)
        # Without a trial in hand it could not even begin, and would not again.
        if held and workers.restarts[name] < MOST_RESTARTS:
            workers.restart(name)
    if ended and not workers.alive and not server.is_over:
        name, status = ended.popitem()
        how = f"status {status}" if status >= 0 else f"signal {-status}"
        raise SearchFailed(
            f"All workers have ended; the last one, {name}, with {how}. Trials that "
            f"ended are kept. Last lines of {workers.log_of(name)}:\n"
            f"{workers.last_words(name)}"
        )


def _say_goodbye(server: OracleServer, workers: WorkerProcesses | None) -> None:
    """Stays until the workers have heard that there is nothing left to do."""
    if workers is not None:
        workers.wait(_LAST_ANSWERS_SECONDS)
        return
    until = time.monotonic() + _MOST_LAST_ANSWERS_SECONDS
    while server.silence < _LAST_ANSWERS_SECONDS and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)


def _state(
    tuner: keras_tuner.Tuner, options: SearchOptions, workers: WorkerProcesses | None
) -> str:
    """Says who works, and the best so far; the bar itself counts the trials."""
    who = "Searching" if workers is None else f"{workers.alive} workers"
    return who + best_so_far(tuner.oracle, options)
