"""Several methods on one data set, side by side, on the same kept features.

`methods.py` is what each method is, `baselines.py` trains those that are no policy,
`summary.py` turns outcomes into
means and a verdict, `comparison.py` puts it together, `comparison_folder.py` writes it.
The folder is not called `compare`: the function of that name is public, and a module
would hide it.

The names below are loaded when they are first used, so that the command line can
check the methods' names before anything heavy is imported.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Comparison": "comparison",
    "Outcome": "summary",
    "compare": "comparison",
    "compare_features": "comparison",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
