"""A network that is not made of Keras layers, as one Keras layer.

The network is kept inside the layer: a `.keras` file holds it, and its digest is part
of the layer's config and with that of the key under which features are kept. What
runs it is left to the subclasses.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.errors import DataError, InvalidArgument


class KeptFile(keras.Layer):
    """A layer that keeps a file's bytes, which a `.keras` file carries along."""

    file_name = "content"
    # Whether it can be part of a SavedModel, and if not, what to say.
    is_tensorflow = True
    not_tensorflow = ""

    def __init__(self, *, digest: str, content: bytes | None = None, **options):
        super().__init__(trainable=False, dtype="float32", **options)
        self.supports_jit = False
        self.digest = digest
        self._content = content

    @property
    def content(self) -> bytes:
        if self._content is None:
            raise DataError(
                f"The layer {self.name!r} was made without its {self.file_name}, which "
                "only a `.keras` file brings. Load the whole model."
            )
        return self._content

    def get_config(self) -> dict:
        config = super().get_config()
        for fixed in ("trainable", "dtype"):
            config.pop(fixed, None)
        return config | {"digest": self.digest}

    def save_assets(self, directory: str) -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.file_name).write_bytes(self.content)

    def load_assets(self, directory: str) -> None:
        self._content = (Path(directory) / self.file_name).read_bytes()


class ForeignNetwork(KeptFile):
    """A frozen network from images to features, kept as bytes."""

    file_name = "network"

    def __init__(
        self, *, dim: int, digest: str, content: bytes | None = None, **options
    ):
        super().__init__(digest=digest, content=content, **options)
        self.dim = dim

    @property
    def num_bytes(self) -> int:
        return len(self.content)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return (input_shape[0], self.dim)

    def compute_output_spec(self, inputs, training=None) -> keras.KerasTensor:
        return keras.KerasTensor((inputs.shape[0], self.dim), dtype="float32")

    def get_config(self) -> dict:
        return super().get_config() | {"dim": self.dim}


def digest_of(*parts: bytes) -> str:
    """Returns 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def choose_output(shapes: dict[str, int | None]) -> str | None:
    """Chooses the features among a network's outputs."""
    if len(shapes) == 1:
        return next(iter(shapes))
    vectors = [name for name, rank in shapes.items() if rank == 2]
    return vectors[0] if len(vectors) == 1 else None


def pooled(values: tf.Tensor | np.ndarray, *, channels_first: bool = False):
    """Averages feature maps and tokens to one vector an image."""
    rank = len(values.shape)
    if rank == 4:
        axes = (2, 3) if channels_first else (1, 2)
    else:
        axes = tuple(range(1, rank - 1))
    if not axes:
        return values
    if isinstance(values, np.ndarray):
        return values.mean(axis=axes)
    return tf.reduce_mean(values, axis=axes)


def agreed_size(
    declared: tuple[int | None, int | None],
    wanted: tuple[int, int] | None,
    source: str | Path,
) -> tuple[int, int]:
    """Returns the image size that a file fixes, or else the one that was asked for."""
    if wanted is None and None in declared:
        raise InvalidArgument(
            f"{source} leaves the image size open: give `image_size` (--image-size)."
        )
    size = wanted or declared
    if any(d not in (None, s) for d, s in zip(declared, size, strict=True)):
        raise InvalidArgument(
            f"`image_size` must be {declared[0]}x{declared[1]} for {source}. "
            f"Received: {size[0]}x{size[1]}"
        )
    return size


def require_tensorflow(model: keras.Model) -> None:
    """Refuses a model that cannot be part of a SavedModel."""
    for layer in layers_of(model, KeptFile):
        if not layer.is_tensorflow:
            raise InvalidArgument(layer.not_tensorflow)


def foreign_layers(model: keras.Model) -> list[ForeignNetwork]:
    """Returns the layers of a model, at any depth, that hold such a network."""
    return layers_of(model, ForeignNetwork)


def layers_of(model: keras.Model, kind: type[keras.Layer]) -> list[keras.Layer]:
    """Returns the layers of a kind in a model, at any depth."""
    found: list[keras.Layer] = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found += layers_of(layer, kind)
        elif isinstance(layer, kind):
            found.append(layer)
    return found


def weights_bytes(model: keras.Model) -> int:
    """Returns the size of a model's weights, those of foreign networks with them."""
    own = sum(
        int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in model.variables
    )
    return own + sum(layer.num_bytes for layer in foreign_layers(model))
