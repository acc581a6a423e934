"""Pretrained bases by name, each with its preprocessing inside.

Owns turning a name and some weights into a frozen model from images in [0, 255] to
features, and joining it to a new head. Running it over a data set is left to
`features/`.

`load.py` is what the other rooms call, `assembly.py` what all bases have in common. A
module for each source of networks:
`applications.py`, `efficientnet_lite0.py`, `own_model.py`, `hub.py`, and, of
`foreign.py`'s kind, `saved_model.py` and `onnx_file.py`.

The names below are loaded when they are first used, so that the command line can
check the name of a base before anything heavy is imported.
"""

import importlib
from typing import Any

_HOMES = {
    "available_backbones": "load",
    "build_classifier": "classifier",
    "build_head": "classifier",
    "load_backbone": "load",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
