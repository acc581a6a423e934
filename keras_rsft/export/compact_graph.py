"""Makes a written SavedModel's graph smaller, without changing what it computes.

TensorFlow names each operation of a function after the layers around it and keeps the
shapes that it found: of a small network's graph that is more than half. Nobody asks
for these names; those of inputs, outputs and signatures stay.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from itertools import count, product
from pathlib import Path
from typing import Any

from keras_rsft.result_folder import replaced

GRAPH_FILE = "saved_model.pb"
_SHAPES = "_output_shapes"


def compact_saved_model(folder: Path) -> None:
    """Shortens the names inside the functions of a SavedModel that was just written."""
    from tensorflow.core.protobuf import saved_model_pb2
    from tensorflow.python.saved_model import fingerprinting_utils

    path = folder / GRAPH_FILE
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for graph in saved.meta_graphs:
        for function in graph.graph_def.library.function:
            shorten_names(function)
    compacted = saved.SerializeToString(deterministic=True)
    replaced(path, lambda beside: beside.write_bytes(compacted))
    # Which is of the graph as it was. Nothing in TensorFlow that is public makes one.
    fingerprinting_utils.write_fingerprint(str(folder))


def shorten_names(function: Any) -> None:
    """Renames the operations of a function, and forgets the shapes found in it."""
    free = _short_names({argument.name for argument in function.signature.input_arg})
    new_names = {node.name: next(free) for node in function.node_def}

    def renamed(reference: str) -> str:
        """Of `name`, `name:output:0` or, for an order of execution, `^name`."""
        first = reference[:1] if reference.startswith("^") else ""
        name, colon, output = reference[len(first) :].partition(":")
        return f"{first}{new_names.get(name, name)}{colon}{output}"

    for node in function.node_def:
        node.name = new_names[node.name]
        node.input[:] = map(renamed, node.input)
        node.attr.pop(_SHAPES, None)
        node.ClearField("experimental_debug_info")
    for references in (function.ret, function.control_ret):
        for result, reference in list(references.items()):
            references[result] = renamed(reference)


def _short_names(taken: set[str]) -> Iterator[str]:
    """Yields a, b, ... z, aa, ab, ... but for those that are taken."""
    for length in count(1):
        for letters in product(string.ascii_lowercase, repeat=length):
            name = "".join(letters)
            if name not in taken:
                yield name
