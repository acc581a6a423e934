"""Cuts a backbone into frozen and unfrozen layers."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from keras_rsft.backbones._build import built_in_float32, leaf_layers
from keras_rsft.config import ALL, Unfreeze, checked_unfreeze
from keras_rsft.errors import InvalidArgument

# What the layers of one block have in common, in the names of keras.applications:
# conv5_block3_, block7a_, block_16_, stage_3_block_2_, block8_10_, expanded_conv_10_.
_BLOCK_NAME = re.compile(
    r"(block\d+_\d+|.*?block_?\d+[a-z]?|expanded_conv_\d+)(?=_|$)", re.IGNORECASE
)
# MobileNet numbers the two halves of a block: conv_dw_13, conv_pw_13.
_SEPARABLE_NAME = re.compile(r"conv_(?:pad|dw|pw)_(\d+)(?=_|$)")
_NOT_LEARNT = (layers.BatchNormalization, layers.Normalization)
_UPSAMPLING = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)


def block_starts(body: keras.Model) -> list[int]:
    """Returns where the blocks of a backbone begin, as indices in `leaf_layers`."""
    # A block begins, by the first of these that gives one with a layer to train in it,
    # 1. where layers are named as in `keras.applications`, at the first of each name,
    # 2. behind each layer that halves height and width,
    # 3. at each layer to train.
    found = leaf_layers(body)
    named: dict[str, int] = {}
    for index, layer in enumerate(found):
        match = _BLOCK_NAME.match(layer.name) or _SEPARABLE_NAME.match(layer.name)
        if match:
            named.setdefault(match[1], index)
    halved = [index + 1 for index, layer in enumerate(found) if _halves(layer)]
    for starts in (list(named.values()), halved):
        blocks = [
            start
            for start, end in zip(starts, [*starts, len(found)][1:], strict=True)
            if any(learns(layer) for layer in found[start:end])
        ]
        if blocks:
            return blocks
    return [index for index, layer in enumerate(found) if learns(layer)]


def learns(layer: keras.Layer) -> bool:
    """Says whether a layer has weights that are not those of a normalisation."""
    return bool(layer.weights) and not isinstance(layer, _NOT_LEARNT)


def _halves(layer: keras.Layer) -> bool:
    stride = np.max(getattr(layer, "strides", 1))
    return not isinstance(layer, _UPSAMPLING) and bool(stride > 1)


def copy_model(model: keras.Model) -> keras.Model:
    """Returns a model of the same layers and weights that shares nothing with it."""
    copy = keras.models.clone_model(model)
    _copy_weights(model, copy)
    return copy


def _copy_weights(source: keras.Model, target: keras.Model) -> None:
    # Layer by layer: a clone may list parallel layers in another order.
    for layer in source.layers:
        if not layer.weights:  # A clone may call its input otherwise.
            continue
        own = target.get_layer(layer.name)
        if isinstance(layer, keras.Model):
            _copy_weights(layer, own)
            continue
        own.set_weights(layer.get_weights())
        if isinstance(own, layers.Normalization):
            own.finalize_state()  # It computes with what it derives from weights.


def set_trainable(backbone: keras.Model, chosen: Sequence[keras.Layer]) -> None:
    """Lets some layers of a backbone learn and freezes all others."""
    # Layer by layer, as a model that has the value already does not pass it on. The
    # backbone itself stays frozen, which has no say in what a model around it trains. A
    # BatchNorm layer that is not trainable runs in inference mode; one inside of a
    # chosen layer is not trainable either.
    for layer in leaf_layers(backbone):
        layer.trainable = layer in chosen
        for part in layer._flatten_layers(include_self=False):
            if isinstance(part, layers.BatchNormalization):
                part.trainable = False


@dataclasses.dataclass(frozen=True, eq=False)
class TrainablePart:
    """A copy of a backbone, and the same layers as two models one after the other."""

    backbone: keras.Model
    front: keras.Model
    rest: keras.Model
    layers: tuple[keras.Layer, ...]
    cut: str
    front_is_preprocessing: bool

    def freeze(self) -> None:
        set_trainable(self.backbone, [])


class _Call(NamedTuple):
    """One layer at work: tensors are named by their identity."""

    operation: Any
    inputs: tuple[int, ...]
    outputs: tuple[keras.KerasTensor, ...]


def trainable_part(
    backbone: keras.Model, unfreeze: Unfreeze, *, train_batch_norm: bool = False
) -> TrainablePart:
    """Cuts a backbone as late as it can be before the first layer that shall learn."""
    with built_in_float32():
        own = copy_model(backbone)
        chosen = _chosen(own, checked_unfreeze(unfreeze), train_batch_norm)
        set_trainable(own, chosen)
        images = keras.Input(own.input_shape[1:], name="images")
        calls: list[_Call] = []
        features = _replayed(own, images, calls)
        # The calls are in an order in which each comes after what it needs, so a tensor
        # that all ways from images to features lead through is alone at its index.
        last = next(i for i, call in enumerate(calls) if call.operation in chosen)
        last_use = {id(features): len(calls)}
        for index, call in enumerate(calls):
            last_use |= dict.fromkeys(set(call.inputs) - {id(features)}, index)
        alive = {id(images): images}
        crossing, cut = images, calls[0].operation.name
        for index, call in enumerate(calls[: last + 1]):
            alive = {key: one for key, one in alive.items() if last_use[key] >= index}
            if len(alive) == 1:
                (only,) = alive.values()
                if None not in only.shape[1:]:
                    crossing, cut = only, call.operation.name
            for output in call.outputs:
                if id(output) in last_use:
                    alive[id(output)] = output
        flatten = layers.Flatten(dtype="float32", name="activations")
        front = keras.Model(images, flatten(crossing), name="front")
        shape = tuple(crossing.shape[1:])
        body = keras.Model(crossing, features, name="rest")
        activations = keras.Input((math.prod(shape),), name="activations")
        whole = layers.Reshape(shape, name="in_shape")(activations)
        rest = keras.Model(activations, body(whole), name="rest_of_activations")
    return TrainablePart(
        backbone=own,
        front=front,
        rest=rest,
        layers=tuple(chosen),
        cut=cut,
        front_is_preprocessing=not any(learns(layer) for layer in front.layers),
    )


def _chosen(
    backbone: keras.Model, unfreeze: Unfreeze, train_batch_norm: bool
) -> list[keras.Layer]:
    found = leaf_layers(backbone)
    known = [layer.name for layer in found if learns(layer)]
    if not known:
        raise InvalidArgument(
            f"The backbone {backbone.name} has no Keras layer that could learn. Leave "
            "all of it frozen, or use another one."
        )
    able = [
        layer
        for layer in found
        if learns(layer) or (train_batch_norm and _can_normalise(layer))
    ]
    if isinstance(unfreeze, int):
        starts = block_starts(backbone)
        if unfreeze > len(starts):
            raise InvalidArgument(
                f"The backbone {backbone.name} has {len(starts)} blocks. Received: "
                f"{unfreeze}. Use {ALL} to train the layers before them too."
            )
        return [layer for layer in found[starts[-unfreeze] :] if layer in able]
    if unfreeze == ALL:
        return able
    chosen = []
    for name in unfreeze:
        layer = {layer.name: layer for layer in found}.get(name)
        if layer is None:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[-3:]
            raise InvalidArgument(
                f"The backbone has no layer {name!r}. Near it: {', '.join(near)}. Name "
                f"layers, give the number of blocks to train, or {ALL}."
            )
        if layer not in able:
            reason = "has no weights that could learn"
            if _can_normalise(layer):
                reason = (
                    "is a BatchNorm, which stays as it is unless "
                    "`--set train_batch_norm=true` is given"
                )
            raise InvalidArgument(f"The layer {name!r} {reason}.")
        chosen.append(layer)
    return chosen


def _can_normalise(layer: keras.Layer) -> bool:
    return isinstance(layer, layers.BatchNormalization) and bool(layer.weights)


def _replayed(model: keras.Model, inputs: keras.KerasTensor, calls: list[_Call]) -> Any:
    """Calls a model's layers one by one, those of nested models too, and notes it."""

    def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(operation, keras.Sequential) or (
            isinstance(operation, keras.Model)
            and hasattr(operation, "_run_through_graph")
        ):
            return _replayed(operation, args[0], calls)
        outputs = operation(*args, **kwargs)
        taken = tuple(map(id, _tensors((args, kwargs))))
        calls.append(_Call(operation, taken, tuple(_tensors(outputs))))
        return outputs

    if isinstance(model, keras.Sequential):
        for layer in model.layers:
            inputs = call(layer, inputs)
        return inputs
    # As `keras.models.clone_model` does it, but in one graph with all that is nested.
    outputs = model._run_through_graph(inputs, call_fn=call)
    return outputs[0] if isinstance(outputs, list) and len(outputs) == 1 else outputs


def _tensors(structure: Any) -> list[keras.KerasTensor]:
    values = keras.tree.flatten(structure)
    return [value for value in values if isinstance(value, keras.KerasTensor)]
