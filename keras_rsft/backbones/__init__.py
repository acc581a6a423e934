"""Pretrained bases by name, each with its preprocessing inside.

`load.py` is what the other rooms call, `base_name.py` what a name means,
`assembly.py` what all bases have in common, `trainable_part.py` what may learn. The
names below are loaded when they are first used, so that the command line can check the
name of a base before anything heavy is imported.
"""

import importlib
from typing import Any

_HOMES = {
    "available_backbones": "load",
    "build_classifier": "assembly",
    "build_head": "assembly",
    "load_backbone": "load",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
