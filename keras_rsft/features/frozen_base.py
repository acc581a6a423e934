"""A base whose weights will not change: fingerprinted once, traced once.

Owns what several passes over different images share. Reading images and keeping
features are `extraction.py`'s business.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# Weights as constants are folded once (BatchNorm into convolutions, casts to
# bfloat16): a tenth faster for ResNet50, after four seconds of folding, which pays
# from some 1,500 images on. A graph can hold 2 GB, and is copied while it is folded.
MIN_IMAGES_FOR_CONSTANTS = 2000
MAX_BYTES_AS_CONSTANTS = 2**28


class FrozenBase:
    """A base as it is now; what is done to its weights later goes unnoticed.

    Args:
        backbone: Model from images `(batch, height, width, 3)`, float32 in
            [0, 255], or from texts `(batch,)`, to features `(batch, dim)`.
        num_images: How many images it will be run on, for the choice of the
            faster way. Default 0.
        device_names: Devices that `over` shares the batches among. Default:
            TensorFlow's own choice of one.

    Attributes:
        sample_shape: Shape of one input: `(height, width, 3)`, or `()` for a text.
        image_size: Height and width in pixels; `()` for a base that takes texts.
        dim: Number of features of an image.
    """

    def __init__(
        self,
        backbone: keras.Model,
        *,
        num_images: int = 0,
        device_names: Sequence[str] = (),
    ):
        self._backbone = backbone
        self._device_names = tuple(device_names)
        self._num_images = num_images
        self.sample_shape = tuple(backbone.input_shape[1:])
        self.image_size = self.sample_shape[:2]
        self.dim = int(backbone.output_shape[-1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: the architecture and every weight.

        The architecture includes preprocessing, image size and precision, but no
        layer's name.
        """
        digest = hashlib.blake2b(digest_size=16)
        config = json.dumps(_nameless_config(self._backbone), sort_keys=True)
        digest.update(config.encode())
        for weight in self._backbone.weights:
            digest.update(np.ascontiguousarray(weight.numpy()).data)
        return digest.hexdigest()

    @functools.cached_property
    def forward(self) -> tf.types.experimental.PolymorphicFunction:
        """Function from inputs to float32 features `(batch, dim)`, traced once."""
        return self._traced(())

    def over(
        self, batches: Iterable[tuple[Any, tf.Tensor]]
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Runs the base over batches, each on one device, all devices at once.

        Args:
            batches: Pairs of anything and inputs `(batch, *sample_shape)`.

        Yields:
            What came with the inputs, and their features `(batch, dim)`, in order.
        """
        if len(self._device_names) < 2:
            for number, images in batches:
                yield number, self.forward(images).numpy()
            return
        functions = [self._on_device(name) for name in self._device_names]
        waiting: collections.deque = collections.deque()
        with ThreadPoolExecutor(len(functions)) as threads:
            for at, (number, images) in enumerate(batches):
                run = functions[at % len(functions)]
                waiting.append((number, threads.submit(run, images)))
                if len(waiting) == len(functions):
                    number, features = waiting.popleft()
                    yield number, features.result()
            for number, features in waiting:
                yield number, features.result()

    def _on_device(self, name: str) -> Any:
        """Returns a function from images to an array, with the weights on a device."""
        with tf.device(name):
            copies = [(v, tf.identity(v.value)) for v in self._backbone.variables]
            run = self._traced(copies).get_concrete_function()

        def on_device(images: tf.Tensor) -> np.ndarray:
            with tf.device(name):
                return run(tf.identity(images)).numpy()

        return on_device

    def _traced(self, copies: Sequence[tuple[Any, tf.Tensor]]) -> Any:
        backbone, weights = self._backbone, []
        if self._num_images >= MIN_IMAGES_FOR_CONSTANTS:
            weights = [(variable, variable.numpy()) for variable in backbone.variables]
        if sum(value.nbytes for _, value in weights) > MAX_BYTES_AS_CONSTANTS:
            weights = []

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, *self.sample_shape), backbone.inputs[0].dtype)
            ]
        )
        def forward(images: tf.Tensor) -> tf.Tensor:
            constants = [(variable, tf.constant(value)) for variable, value in weights]
            constants = constants or copies
            with keras.StatelessScope(state_mapping=constants):
                return tf.cast(backbone(images, training=False), tf.float32)

        return forward


def _nameless_config(backbone: keras.Model) -> Any:
    """Returns the config without the layers' names."""
    # Keras numbers its automatic names through a process: the second load of a base
    # differs from the first in nothing else.
    config = json.loads(backbone.to_json())
    config.pop("build_config", None)
    return _nameless(config, {})


def _nameless(node: Any, places: Mapping[str, int]) -> Any:
    """Returns a part of a config, in which layers are called by their places."""
    if isinstance(node, list):
        return [_nameless(child, places) for child in node]
    if not isinstance(node, dict):
        return node
    if _is_model(node):
        layers = node["layers"]
        places = {_name_of(layer): at for at, layer in enumerate(layers)}
        ends = {
            key: _placed(node[key], places)
            for key in ("input_layers", "output_layers")
            if key in node
        }
        node = node | ends | {"layers": [_unnamed_layer(layer) for layer in layers]}
    if "keras_history" in node:
        history = _placed(node["keras_history"], places)
        node = node | {"keras_history": history}
    if "trainable" in node:  # Also of a layer within another one.
        node = _unnamed(node)
    return {key: _nameless(value, places) for key, value in node.items()}


def _is_model(config: dict[str, Any]) -> bool:
    layers = config.get("layers")
    return isinstance(layers, list) and all(
        isinstance(layer, dict) and isinstance(layer.get("config"), dict)
        for layer in layers
    )


def _name_of(layer: dict[str, Any]) -> str:
    return layer.get("name", layer["config"].get("name"))


def _unnamed_layer(layer: dict[str, Any]) -> dict[str, Any]:
    return _unnamed(layer) | {"config": _unnamed(layer["config"])}


def _unnamed(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "name"}


def _placed(references: Any, places: Mapping[str, int]) -> Any:
    """Returns references to layers, nested in any way, by place instead of name."""
    if isinstance(references, dict):
        return {key: _placed(value, places) for key, value in references.items()}
    if not isinstance(references, list):
        return references
    if references and isinstance(references[0], str):
        name, *rest = references
        return [places.get(name, name), *rest]
    return [_placed(one, places) for one in references]
