"""What a search can be asked for: the part that needs no Keras."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from keras_rsft.errors import InvalidArgument
from keras_rsft.policy_choice import POLICY_NAMES, require_known

BATCHED = "batched"
HYPERBAND = "hyperband"
TUNER_NAMES = (BATCHED, "random", "bayesian", HYPERBAND, "grid")
ORACLE_NAMES = ("random", "bayesian", "grid")
# The rule of the RSFT article: whole batches, an absolute threshold, no warm-up.
ARTICLE = "article"
SEARCHED_POLICIES = (*POLICY_NAMES, ARTICLE)
# What is trained, from the cheapest on: the head alone, with the base's last block, or
# with all of the base.
FROZEN, LAST_BLOCK, ALL = "frozen", "last-block", "all"
TRAINABLE_NAMES = (FROZEN, LAST_BLOCK, ALL)
# Each with the direction in which it is better.
OBJECTIVES = {"val_accuracy": "max", "val_loss": "min"}
TUNER_ID = "KERASTUNER_TUNER_ID"
ORACLE_HOST = "KERASTUNER_ORACLE_IP"
ORACLE_PORT = "KERASTUNER_ORACLE_PORT"
# Tells a worker which process started it, and that it must not outlive it.
PARENT = "KERAS_RSFT_PARENT"
DEFAULT_TIMEOUT = 600.0


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """How a search goes on, whatever its data and its space are.

    Attributes:
        tuner: Out of `TUNER_NAMES`. Default `"batched"`, which trains many heads
            together; the others are Keras Tuner's and train one at a time.
        max_trials: Trials in all, at least 1. Default 64.
        objective: `"val_accuracy"` (default) or `"val_loss"`, at a trial's best epoch.
        oracle: What proposes the batched tuner's trials: `"random"` (default),
            `"bayesian"` or `"grid"`.
        parallel_trials: Heads that the batched tuner trains together, at least 1.
            Default 64.
        halvings: How often the batched tuner drops the worse half of its heads
            while they train, at least 0. Default 0.
        min_acceptance: Least acceptance rate of a setting that may be chosen, in
            [0, 1]. Default 0.1.
        trainable: Out of `TRAINABLE_NAMES`: what may learn. `"last-block"` and `"all"`
            of the base are trained on from the best heads; `"frozen"`, the heads, is
            always among them. Default `("frozen",)`.

    Raises:
        InvalidArgument: If a value is unknown or out of its range.
    """

    tuner: str = BATCHED
    max_trials: int = 64
    objective: str = "val_accuracy"
    oracle: str = "random"
    parallel_trials: int = 64
    halvings: int = 0
    min_acceptance: float = 0.1
    trainable: tuple[str, ...] = (FROZEN,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "trainable", checked_names(self.trainable))
        require_known("tuner", self.tuner, TUNER_NAMES)
        require_known("oracle", self.oracle, ORACLE_NAMES)
        require_known("objective", self.objective, tuple(OBJECTIVES))
        for name, least in {
            "max_trials": 1,
            "parallel_trials": 1,
            "halvings": 0,
        }.items():
            if getattr(self, name) < least:
                raise InvalidArgument(
                    f"`{name}` must be at least {least}. "
                    f"Received: {name}={getattr(self, name)}."
                )
        if not 0 <= self.min_acceptance <= 1:
            raise InvalidArgument(
                "`min_acceptance` must be in [0, 1]. "
                f"Received: min_acceptance={self.min_acceptance}."
            )
        if self.tuner == BATCHED:
            return
        for name in ("oracle", "halvings"):
            default = getattr(type(self), name)
            if getattr(self, name) != default:
                raise InvalidArgument(
                    f"`{name}` is an option of the batched tuner. Received: "
                    f"{name}={getattr(self, name)} with the tuner {self.tuner}."
                )

    @property
    def of_base(self) -> tuple[str, ...]:
        """Those of `trainable` in which the base learns, the cheapest first."""
        return self.trainable[1:]

    @property
    def direction(self) -> str:
        """`"max"` or `"min"`: where the objective is better."""
        return OBJECTIVES[self.objective]


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Returns what may learn: each name once, from the cheapest on, frozen first."""
    if isinstance(names, str):
        names = (names,)
    for name in names:
        require_known("trainable part", name, TRAINABLE_NAMES)
    return tuple(one for one in TRAINABLE_NAMES if one == FROZEN or one in names)


def part_in_search(given: Mapping[str, str] = os.environ) -> str:
    """Returns `"alone"`, `"chief"` or `"worker"`, as Keras Tuner's variables say."""
    if ORACLE_HOST not in given and ORACLE_PORT not in given:
        return "alone"
    names = (ORACLE_HOST, ORACLE_PORT, TUNER_ID)
    if missing := [name for name in names if not given.get(name)]:
        raise InvalidArgument(
            f"A search by chief and workers needs {', '.join(names)}, and the "
            f"environment does not set {' and '.join(missing)}. Set all or none."
        )
    port = given[ORACLE_PORT]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise InvalidArgument(
            f"{ORACLE_PORT} must be a port, from 1 to 65535. Received: {port!r}."
        )
    return "chief" if "chief" in given[TUNER_ID] else "worker"
