"""A trained model -> what TF Serving, LiteRT and ONNX Runtime load.

`serving_graph.py` owns the graph from encoded images to labels; `saved_model.py`
writes it, with what `tf_serving.py` lays beside it for the server. `litert_file.py` and
`onnx_file.py` write models that take decoded images; `runtimes.py` runs all three.
`places.py` knows which names are free,
`from_run.py` starts from a run folder, `model_card.py` describes it, `accuracy.py` and
`verification.py` compare with the run.

The names below are loaded when they are first used, so that the command line can
check the settings before anything heavy is imported.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Export": "from_run",
    "ExportSettings": "settings",
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
