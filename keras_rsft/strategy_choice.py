"""On what to train, by name.

Needs no TensorFlow, so that the command line can check it before that is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from keras_rsft.cluster import CLUSTER_VARIABLE, Cluster, cluster_of
from keras_rsft.errors import InvalidArgument
from keras_rsft.policy_choice import require_known

STRATEGY_NAMES = ("none", "mirrored", "multiworker")


def check_strategy(name: str, environment: Mapping[str, str] = os.environ) -> Cluster:
    """Checks the name of a strategy and, for `multiworker`, the environment.

    Args:
        name: One of `STRATEGY_NAMES`.
        environment: Where `TF_CONFIG` is. Default: the process's environment.

    Returns:
        The processes that train together; this one alone but for `multiworker`.

    Raises:
        InvalidArgument: If the name is unknown, or `TF_CONFIG` is missing or wrong.
    """
    require_known("strategy", name, STRATEGY_NAMES)
    if name != "multiworker":
        return Cluster()
    if not environment.get(CLUSTER_VARIABLE, "").strip():
        raise InvalidArgument(
            f"The strategy multiworker needs the variable {CLUSTER_VARIABLE}, which "
            "names all workers and says which one this is. Received: none."
        )
    return cluster_of(environment)
