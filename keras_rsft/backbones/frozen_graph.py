"""Turns a traced function into a graph without variables, and says whether it is pure.

Owns what a graph of somebody else may contain: a SavedModel is a program, and may
read and write files. A pure graph only computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# Stateful by TensorFlow's account only because of what they might contain, which is
# looked at too.
_HARMLESS = {
    "Assert",
    "Case",
    "If",
    "PartitionedCall",
    "Placeholder",
    "StatefulPartitionedCall",
    "While",
    "XlaCallModule",
}
# Neither stateful nor given a text, yet they reach out of the graph.
_REACH_OUT = {"ImmutableConst", "PyFuncStateless"}
# To read a file, an operation must be told its name; to read records, have a source.
_NOT_NUMBERS = {tf.string.as_datatype_enum, tf.variant.as_datatype_enum}


def freeze(traced: Any) -> tuple[tf.compat.v1.GraphDef, list[str]]:
    """Returns a concrete function's graph with its variables as constants."""
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    frozen = convert_variables_to_constants_v2(traced, lower_control_flow=False)
    graph = frozen.graph.as_graph_def()
    # A layer's constants of 128 numbers and more (the means of the standardisation)
    # are further inputs of a traced function, which freezing leaves as they are.
    constants = {
        inner.op.name: tf.make_tensor_proto(outer.numpy())
        for outer, inner in traced.graph.captures
        if inner.dtype != tf.resource
    }
    for node in graph.node:
        if node.name in constants:
            value = constants[node.name]
            node.ClearField("attr")
            node.op = "Const"
            node.attr["dtype"].type = value.dtype
            node.attr["value"].tensor.CopyFrom(value)
    return graph, [output.name for output in frozen.outputs]


def impure_operations(graph: tf.compat.v1.GraphDef) -> list[str]:
    """Returns the operations of a graph that do more than compute, sorted."""
    # Those with a state (`WriteFile`, `PyFunc`, lookup tables, random numbers), those
    # on text (`ReadFile`), and those that this TensorFlow does not know.
    return sorted({node.op for node in _nodes(graph) if not _is_pure(node.op)})


def _nodes(graph: tf.compat.v1.GraphDef) -> Iterator[Any]:
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def


def _is_pure(operation: str) -> bool:
    from tensorflow.python.framework import op_def_registry

    known = op_def_registry.get(operation)
    if known is None or operation in _REACH_OUT:
        return False
    if operation in _HARMLESS:
        return True
    types = {one.type for one in (*known.input_arg, *known.output_arg)}
    return not (known.is_stateful or types & _NOT_NUMBERS)
