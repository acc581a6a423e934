"""On what to train, by name, and who is who among several processes.

Needs no TensorFlow, so that the command line can check both before it is imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping

from keras_rsft.errors import InvalidArgument
from keras_rsft.policy_choice import require_known

STRATEGY_NAMES = ("none", "mirrored", "multiworker")
_JOBS = ("chief", "worker")


@dataclasses.dataclass(frozen=True)
class WorkerPlace:
    """Which of how many workers this process is.

    Attributes:
        worker: Number of this process, at least 0; 0 is the chief.
        workers: How many there are, at least 1.
    """

    worker: int = 0
    workers: int = 1


def check_strategy(name: str) -> WorkerPlace:
    """Checks the name of a strategy and, for `multiworker`, the environment.

    Args:
        name: One of `STRATEGY_NAMES`.

    Raises:
        InvalidArgument: If the name is unknown, or `TF_CONFIG` is missing or wrong.
    """
    require_known("strategy", name, STRATEGY_NAMES)
    return worker_place() if name == "multiworker" else WorkerPlace()


def worker_place(environment: Mapping[str, str] = os.environ) -> WorkerPlace:
    """Reads `TF_CONFIG`, which says where all workers are and which one this is.

    Args:
        environment: Where the variable is. Default: the process's environment.

    Raises:
        InvalidArgument: If it is missing, or not as TensorFlow wants it.
    """
    text = environment.get("TF_CONFIG")
    example = (
        '{"cluster": {"worker": ["HOST:PORT", "HOST:PORT"]}, '
        '"task": {"type": "worker", "index": 0}}'
    )
    if not text:
        raise InvalidArgument(
            f"The strategy multiworker needs the variable TF_CONFIG, like {example}, "
            "with another index on each worker. Received: none."
        )
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        jobs = {job: len(cluster.get(job, ())) for job in _JOBS}
        kind, index = task["type"], int(task["index"])
        known = 0 <= index < jobs[kind] and jobs["chief"] <= 1
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known or set(cluster) - set(_JOBS):
        raise InvalidArgument(
            f"TF_CONFIG must be like {example}, with the jobs worker and, at most "
            "once, chief, and with a task that is one of them. "
            f"Received: {text}"
        )
    before = jobs["chief"] if kind == "worker" else 0
    return WorkerPlace(worker=before + index, workers=sum(jobs.values()))
