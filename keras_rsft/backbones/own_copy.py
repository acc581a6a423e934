"""Copies a model, and says which layers of the copy learn."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from keras_rsft.backbones.last_block import is_batch_norm, leaf_layers


def copy_model(model: keras.Model) -> keras.Model:
    """Returns a model of the same layers and weights that shares nothing with it."""
    copy = keras.models.clone_model(model)
    _copy_weights(model, copy)
    return copy


def set_trainable(base: keras.Model, chosen: Sequence[keras.Layer]) -> None:
    """Lets some layers of a base learn and freezes all others."""
    # Layer by layer, as a model that has the value already does not pass it on. The
    # base itself stays frozen, which has no say in what a model around it trains. A
    # BatchNorm layer that is not trainable runs in inference mode; one inside of a
    # chosen layer is not trainable either.
    learning = {id(layer) for layer in chosen}
    for layer in leaf_layers(base):
        layer.trainable = id(layer) in learning
        for part in layer._flatten_layers(include_self=False):
            if is_batch_norm(part):
                part.trainable = False


def _copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Copies layer by layer: a clone may list parallel layers in another order."""
    for layer in source.layers:
        if not layer.weights:  # A clone may call its input otherwise.
            continue
        own = target.get_layer(layer.name)
        if isinstance(layer, keras.Model):
            _copy_weights(layer, own)
            continue
        own.set_weights(layer.get_weights())
        if isinstance(own, keras.layers.Normalization):
            own.finalize_state()  # It computes with what it derives from weights.
