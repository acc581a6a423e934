"""Several methods on one data set, side by side, on the same cached features.

`method_names.py` is what the command line may know, `methods.py` trains each method,
`verdict.py` turns outcomes into means and a verdict, `comparison.py` puts it together
and writes it. The names below are loaded when they are first used, so that the command
line can check the methods' names before anything heavy is imported.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Comparison": "comparison",
    "Outcome": "verdict",
    "compare": "comparison",
    "compare_features": "comparison",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
