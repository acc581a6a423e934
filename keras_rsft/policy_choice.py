"""A policy by name: the part of `policies.py` that needs no Keras.

Apart from it so that the command line can check a name and its numbers, and
suggest the nearest name, before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence

from keras_rsft.errors import InvalidArgument

POLICY_NAMES = (
    "auto",
    "accept-all",
    "loss-threshold",
    "keep-fraction",
    "self-paced",
    "running-threshold",
    "loss-mixture",
)
LEVELS = ("sample", "batch")
# Which policies look at what may be given.
_USED_BY = {
    "threshold": ("loss-threshold", "self-paced"),
    "keep_fraction": ("keep-fraction",),
    "level": ("loss-threshold",),
}
DEFAULT_KEEP_FRACTION = 0.7


@dataclasses.dataclass(frozen=True)
class PolicyChoice:
    """A policy by name, in units that do not depend on the data set's size.

    Attributes:
        name: One of `POLICY_NAMES`. Default: the policy whose number is given below
            (`loss-threshold` for `threshold` or batch level, `keep-fraction`), else
            `"auto"`, which none of them concerns.
        threshold: Loss below which `loss-threshold` accepts, and from which
            `self-paced` starts, positive. Default None: `relative_threshold` decides.
        relative_threshold: The same in multiples of ln(classes), the loss that
            a new head starts with; positive. Default 0.65.
        keep_fraction: Share that `keep-fraction` keeps, in (0, 1]. Default 0.7.
        level: `"sample"` or `"batch"`, for `loss-threshold`. Default `"sample"`.
        warmup_epochs: Epochs at the start in which everything is accepted;
            `keep-fraction` ramps down over them. At least 0. Default 2.
        class_floor: Least share of each class in a batch that a policy by loss
            accepts, in [0, 1]. Default 0.

    Raises:
        InvalidArgument: If a value is unknown or out of its range.

    Example:
        >>> PolicyChoice().name, PolicyChoice(threshold=1.5).name
        ('auto', 'loss-threshold')
        >>> PolicyChoice("keep-fractoin")
        Traceback (most recent call last):
        ...
        keras_rsft.errors.InvalidArgument: The policy must be one of auto, accept-all,
        loss-threshold, keep-fraction, self-paced, running-threshold, loss-mixture.
        Received: 'keep-fractoin'. Did you mean 'keep-fraction'?
    """

    name: str | None = None
    threshold: float | None = None
    relative_threshold: float = 0.65
    keep_fraction: float | None = None
    level: str = "sample"
    warmup_epochs: float = 2.0
    class_floor: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self._implied_name())
        if self.keep_fraction is None:
            object.__setattr__(self, "keep_fraction", DEFAULT_KEEP_FRACTION)
        require_known("policy", self.name, POLICY_NAMES)
        require_known("level", self.level, LEVELS)
        if self.threshold is not None:
            _require(
                "threshold",
                self.threshold,
                0 < self.threshold < math.inf,
                "a positive number",
            )
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
        _require(
            "class_floor", self.class_floor, 0 <= self.class_floor <= 1, "in [0, 1]"
        )

    def _implied_name(self) -> str:
        if self.threshold is not None or self.level == "batch":
            return "loss-threshold"
        return "auto" if self.keep_fraction is None else "keep-fraction"


def require_used(name: str, given: Mapping[str, object]) -> None:
    """Raises InvalidArgument if a policy would not look at something that was given.

    Args:
        name: One of `POLICY_NAMES`.
        given: What was given, by attribute of `PolicyChoice`; None where it was not;
            others are not looked at.
    """
    for attribute, users in _USED_BY.items():
        if given.get(attribute) not in (None, LEVELS[0]) and name not in users:
            option = "--" + attribute.replace("_", "-")
            raise InvalidArgument(
                f"`{option}` is for the policy {' or '.join(users)}. Received it for "
                f"{name}. Leave it out, or choose that policy."
            )


def nearest_name_hint(name: str, known: Sequence[str], cutoff: float = 0.4) -> str:
    """Returns `" Did you mean 'x'?"` for the nearest known name, or `""`.

    Args:
        name: What was written.
        known: The names that there are.
        cutoff: How alike they must be, in [0, 1]. Default 0.4.
    """
    close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=cutoff)
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
