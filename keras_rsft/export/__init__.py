"""A trained model -> what TF Serving, LiteRT and ONNX Runtime load.

`saved_model.py` is for a server and takes encoded images, `litert_file.py` and
`onnx_file.py` take decoded ones; `runtimes.py` runs all three. `places.py` knows what
can be asked for and which names are free, `from_run.py` starts from a run folder,
`model_card.py` describes it, `verification.py` compares with the run. The names below
are loaded when they are first used, so that the command line imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Export": "from_run",
    "ExportConfig": "places",
    "export_litert": "litert_file",
    "export_onnx": "onnx_file",
    "export_run": "from_run",
    "export_saved_model": "saved_model",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
