"""A policy by name: the part of `policies.py` that needs no Keras.

Apart from it so that the command line can check a name and its numbers, and
suggest the nearest name, before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence

from keras_rsft.errors import InvalidArgument

POLICY_NAMES = ("auto", "accept-all", "loss-threshold", "keep-fraction")
LEVELS = ("sample", "batch")


@dataclasses.dataclass(frozen=True)
class PolicyChoice:
    """A policy by name, in units that do not depend on the data set's size.

    Attributes:
        name: `"auto"`, `"accept-all"`, `"loss-threshold"` or `"keep-fraction"`.
            Default `"auto"`, which none of the numbers below concerns.
        threshold: Loss below which `loss-threshold` accepts, positive. Default
            None: `relative_threshold` decides.
        relative_threshold: The same in multiples of ln(classes), the loss that
            a new head starts with; positive. Default 0.65.
        keep_fraction: Share that `keep-fraction` keeps, in (0, 1]. Default 0.7.
        level: `"sample"` or `"batch"`, for `loss-threshold`. Default `"sample"`.
        warmup_epochs: Epochs in which `loss-threshold` accepts everything, and
            over which `keep-fraction` ramps down; at least 0. Default 2.

    Raises:
        InvalidArgument: If a value is unknown or out of its range.
    """

    name: str = "auto"
    threshold: float | None = None
    relative_threshold: float = 0.65
    keep_fraction: float = 0.7
    level: str = "sample"
    warmup_epochs: float = 2.0

    def __post_init__(self) -> None:
        require_known("policy", self.name, POLICY_NAMES)
        require_known("level", self.level, LEVELS)
        if self.threshold is not None:
            _require("threshold", self.threshold, self.threshold > 0, "positive")
        _require(
            "relative_threshold",
            self.relative_threshold,
            0 < self.relative_threshold < math.inf,
            "a positive multiple of ln(classes)",
        )
        _require(
            "keep_fraction",
            self.keep_fraction,
            0 < self.keep_fraction <= 1,
            "in (0, 1]",
        )
        _require(
            "warmup_epochs",
            self.warmup_epochs,
            0 <= self.warmup_epochs < math.inf,
            "at least 0",
        )


def nearest_name_hint(name: str, known: Sequence[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the nearest known name, or `""`."""
    close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.4)
    return f" Did you mean {close[0]!r}?" if close else ""


def require_known(kind: str, name: str, known: Sequence[str]) -> None:
    """Raises InvalidArgument with the nearest name if a name is not known."""
    if name not in known:
        raise InvalidArgument(
            f"The {kind} must be one of {', '.join(known)}. "
            f"Received: {name!r}.{nearest_name_hint(name, known)}"
        )


def _require(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:  # NaN fails every comparison.
        raise InvalidArgument(f"`{name}` must be {expected}. Received: {name}={value}.")
