"""Cuts a base in two: a front that stays as it is, and a rest in which layers learn.

Owns which layers are chosen and where the cut is. How the parts are trained is left
to the room `finetuning/`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

import keras

from keras_rsft.backbones.assembly import built_in_float32
from keras_rsft.backbones.last_block import (
    block_starts,
    is_batch_norm,
    leaf_layers,
    learns,
)
from keras_rsft.backbones.own_copy import copy_model, set_trainable
from keras_rsft.errors import InvalidArgument
from keras_rsft.trainable_choice import EVERYTHING, TrainableFrom, checked_trainable


@dataclasses.dataclass(frozen=True, eq=False)
class TrainablePart:
    """A copy of a base, and the same layers as two models one after the other."""

    base: keras.Model
    front: keras.Model
    rest: keras.Model
    layers: tuple[keras.Layer, ...]
    cut: str
    shape: tuple[int, ...]
    front_is_preprocessing: bool

    def freeze(self) -> None:
        """Makes the base frozen again, as a base is that nobody trains."""
        set_trainable(self.base, [])


@dataclasses.dataclass(frozen=True)
class _Call:
    """One layer at work: tensors are named by their identity."""

    operation: Any
    inputs: tuple[int, ...]
    outputs: tuple[keras.KerasTensor, ...]


def trainable_part(
    base: keras.Model,
    trainable_from: TrainableFrom,
    *,
    train_batch_norm: bool = False,
) -> TrainablePart:
    """Cuts a base at the latest place before the first layer that shall learn."""
    with built_in_float32():
        own = copy_model(base)
        chosen = _chosen(own, checked_trainable(trainable_from), train_batch_norm)
        set_trainable(own, chosen)
        images = keras.Input(own.input_shape[1:], name="images")
        calls: list[_Call] = []
        features = _replayed(own, images, calls)
        at, crossing = _latest_cut(calls, images, features, chosen)
        flatten = keras.layers.Flatten(dtype="float32", name="activations")
        front = keras.Model(images, flatten(crossing), name="front")
        shape = tuple(crossing.shape[1:])
        rest = _rest(crossing, features)
    return TrainablePart(
        base=own,
        front=front,
        rest=rest,
        layers=tuple(chosen),
        cut=calls[at].operation.name,
        shape=shape,
        front_is_preprocessing=not any(learns(layer) for layer in front.layers),
    )


def _rest(crossing: keras.KerasTensor, features: keras.KerasTensor) -> keras.Model:
    body = keras.Model(crossing, features, name="rest")
    shape = tuple(crossing.shape[1:])
    size = 1
    for side in shape:
        size *= side
    activations = keras.Input((size,), name="activations")
    whole = keras.layers.Reshape(shape, name="in_shape")(activations)
    return keras.Model(activations, body(whole), name="rest_of_activations")


def _chosen(
    base: keras.Model, trainable_from: TrainableFrom, train_batch_norm: bool
) -> list[keras.Layer]:
    found = leaf_layers(base)
    if not any(learns(layer) for layer in found):
        raise InvalidArgument(
            f"The base {base.name} has no Keras layer that could learn. Leave all of "
            "it frozen, or use another base."
        )
    if isinstance(trainable_from, tuple):
        return [_layer_named(name, found, train_batch_norm) for name in trainable_from]
    start = 0
    if trainable_from != EVERYTHING:
        starts = block_starts(base)
        if trainable_from > len(starts):
            raise InvalidArgument(
                f"The base {base.name} has {len(starts)} blocks. Received: "
                f"{trainable_from}. Use all to train the layers before them too."
            )
        start = starts[-trainable_from]
    return [
        layer
        for layer in found[start:]
        if learns(layer) or (train_batch_norm and _can_normalise(layer))
    ]


def _layer_named(
    name: str, found: list[keras.Layer], train_batch_norm: bool
) -> keras.Layer:
    by_name = {layer.name: layer for layer in found}
    layer = by_name.get(name)
    if layer is None:
        known = [one.name for one in found if learns(one)]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[-3:]
        raise InvalidArgument(
            f"The base has no layer {name!r}. Near it: {', '.join(near)}. A number "
            "means so many of the last blocks, all the whole base."
        )
    if learns(layer) or (train_batch_norm and _can_normalise(layer)):
        return layer
    if _can_normalise(layer):
        raise InvalidArgument(
            f"The layer {name!r} is a BatchNorm, which stays as it is unless "
            "`--train-batch-norm` is given."
        )
    raise InvalidArgument(f"The layer {name!r} has no weights that could learn.")


def _can_normalise(layer: keras.Layer) -> bool:
    return is_batch_norm(layer) and bool(layer.weights)


def _replayed(model: keras.Model, inputs: keras.KerasTensor, calls: list[_Call]) -> Any:
    """Calls a model's layers one by one, those of nested models too, and notes it."""

    def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_graph(operation):
            return _replayed(operation, args[0], calls)
        outputs = operation(*args, **kwargs)
        calls.append(
            _Call(
                operation,
                tuple(map(id, _tensors((args, kwargs)))),
                tuple(_tensors(outputs)),
            )
        )
        return outputs

    if isinstance(model, keras.Sequential):
        for layer in model.layers:
            inputs = call(layer, inputs)
        return inputs
    # As `keras.models.clone_model` does it, but in one graph with all that is nested.
    outputs = model._run_through_graph(inputs, call_fn=call)
    return outputs[0] if isinstance(outputs, list) and len(outputs) == 1 else outputs


def _is_graph(operation: Any) -> bool:
    if not isinstance(operation, keras.Model):
        return False
    sequential = isinstance(operation, keras.Sequential)
    return sequential or hasattr(operation, "_run_through_graph")


def _tensors(structure: Any) -> Iterator[keras.KerasTensor]:
    for value in keras.tree.flatten(structure):
        if isinstance(value, keras.KerasTensor):
            yield value


def _latest_cut(
    calls: list[_Call],
    images: keras.KerasTensor,
    features: keras.KerasTensor,
    chosen: list[keras.Layer],
) -> tuple[int, keras.KerasTensor]:
    """Returns before which call to cut, and the one tensor that crosses there."""
    # The calls are in an order in which each comes after what it needs, so a tensor
    # that all ways from images to features lead through is alone at its place.
    learning = {id(layer) for layer in chosen}
    last = next(at for at, call in enumerate(calls) if id(call.operation) in learning)
    last_use = {id(features): len(calls)}
    for at, call in enumerate(calls):
        for name in call.inputs:
            last_use[name] = max(at, last_use.get(name, -1))
    alive = {id(images): images}
    best = (0, images)
    for at, call in enumerate(calls[: last + 1]):
        alive = {name: one for name, one in alive.items() if last_use[name] >= at}
        if len(alive) == 1:
            (crossing,) = alive.values()
            if None not in crossing.shape[1:]:
                best = (at, crossing)
        for output in call.outputs:
            if id(output) in last_use:
                alive[id(output)] = output
    return best
