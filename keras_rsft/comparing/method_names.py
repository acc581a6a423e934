"""The names of the methods: the part that needs no Keras."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from keras_rsft.errors import InvalidArgument
from keras_rsft.policy_choice import POLICY_NAMES, require_known

PLAIN = "plain"
CLEAN_SUBSET = "clean-subset"
EARLY_STOPPING = "early-stopping"
CLEANLAB = "cleanlab"
AUTO = "auto"

# Alone, and with rejection by `auto`.
WEIGHT_DECAY = "weight-decay"
AUTO_WEIGHT_DECAY = f"{AUTO}+{WEIGHT_DECAY}"

METHOD_NAMES = (
    PLAIN,
    EARLY_STOPPING,
    WEIGHT_DECAY,
    "article",
    "loss-threshold",
    "keep-fraction",
    *((AUTO,) if AUTO in POLICY_NAMES else ()),
    AUTO_WEIGHT_DECAY,
    "gce",
    "co-teaching",
    CLEANLAB,
    CLEAN_SUBSET,
)


def check_methods(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Returns the methods to run, `plain` first, each once.

    Args:
        names: Names out of `METHOD_NAMES`; None means all that can run.

    Raises:
        InvalidArgument: If a name is not known, or there is none.
        ImportError: If `cleanlab` is asked for by name and not installed.
    """
    if names is None:
        return None
    if isinstance(names, str) or not names:
        raise InvalidArgument(
            "`methods` must be a list of one or more names out of "
            f"{', '.join(METHOD_NAMES)}. Received: {names!r}."
        )
    for name in names:
        require_known("method", name, METHOD_NAMES)
    if CLEANLAB in names:
        require_cleanlab()
    return tuple(dict.fromkeys((PLAIN, *names)))


def has_cleanlab() -> bool:
    """Says whether the package `cleanlab` is installed, without importing it."""
    return importlib.util.find_spec("cleanlab") is not None


def require_cleanlab() -> None:
    """Raises ImportError, naming the extra, if `cleanlab` is not installed."""
    if not has_cleanlab():
        raise ImportError(
            "The method cleanlab needs the package of that name. "
            'Install it with: pip install "keras_rsft[compare]"'
        )
