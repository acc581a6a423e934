"""Finds the last blocks of a base: the part that a cautious fine-tuning may change.

Owns where a block begins. Which of its layers learn, and how, is left to
`trainable_part.py` and the room `finetuning/`.
"""

from __future__ import annotations

import re

import keras
from keras import layers

# What the layers of one block have in common, in the names of keras.applications:
# conv5_block3_, block7a_, block_16_, stage_3_block_2_, block8_10_, expanded_conv_10_.
_BLOCK_NAME = re.compile(
    r"(block\d+_\d+|.*?block_?\d+[a-z]?|expanded_conv_\d+)(?=_|$)", re.IGNORECASE
)
# MobileNet numbers the two halves of a block: conv_dw_13, conv_pw_13.
_SEPARABLE_NAME = re.compile(r"conv_(?:pad|dw|pw)_(\d+)(?=_|$)")
_NOT_LEARNT = (layers.BatchNormalization, layers.Normalization)
_UPSAMPLING = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)


def last_block(body: keras.Model) -> list[keras.Layer]:
    """Returns the layers of the last block of a base, and all that come after it."""
    starts = block_starts(body)
    return leaf_layers(body)[starts[-1] :] if starts else []


def block_starts(body: keras.Model) -> list[int]:
    """Returns where the blocks of a base begin, as positions in `leaf_layers`."""
    # A block begins, by the first of these that gives one with a layer to train in it,
    # 1. where layers are named as in `keras.applications`, at the first of each name,
    # 2. behind each layer that halves height and width,
    # 3. at each layer to train.
    found = leaf_layers(body)
    for starts in (_named_starts(found), _halved_starts(found)):
        ends = [*starts, len(found)][1:]
        blocks = [
            start
            for start, end in zip(starts, ends, strict=True)
            if any(learns(layer) for layer in found[start:end])
        ]
        if blocks:
            return blocks
    return [at for at, layer in enumerate(found) if learns(layer)]


def leaf_layers(model: keras.Model) -> list[keras.Layer]:
    """Returns a model's layers in order, those of nested models in their place."""
    found: list[keras.Layer] = []
    for layer in model.layers:
        found += leaf_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return found


def learns(layer: keras.Layer) -> bool:
    """Says whether a layer has weights that are not those of a normalisation."""
    return bool(layer.weights) and not isinstance(layer, _NOT_LEARNT)


def is_batch_norm(layer: keras.Layer) -> bool:
    """Says whether a layer is a BatchNorm."""
    return isinstance(layer, layers.BatchNormalization)


def _named_starts(found: list[keras.Layer]) -> list[int]:
    blocks = [_block_of(layer.name) for layer in found]
    names = dict.fromkeys(block for block in blocks if block is not None)
    return sorted(blocks.index(name) for name in names)


def _halved_starts(found: list[keras.Layer]) -> list[int]:
    return [at + 1 for at, layer in enumerate(found) if _halves(layer)]


def _block_of(layer_name: str) -> str | None:
    match = _BLOCK_NAME.match(layer_name) or _SEPARABLE_NAME.match(layer_name)
    return match[1] if match else None


def _halves(layer: keras.Layer) -> bool:
    if isinstance(layer, _UPSAMPLING):
        return False
    strides = getattr(layer, "strides", 1)
    return max(strides if isinstance(strides, (tuple, list)) else (strides,)) > 1
