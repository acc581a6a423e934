"""What the policy `auto` does for any model: audits the labels by its features."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rsft.config import nearest_name_hint
from keras_rsft.errors import InvalidArgument
from keras_rsft.features._store import FeatureSet
from keras_rsft.label_quality._audit import LabelQuality, audit_labels
from keras_rsft.model._data import Samples

# Of labels that the features must be expected to predict. With fewer, right labels
# that the features cannot see are taken for wrong ones.
_LEAST_PREDICTED = 2 / 3


def audit_samples(
    model: keras.Model, samples: Samples, layer: str | None, *, progress: bool
) -> LabelQuality:
    """Audits the labels of training samples by a model's features of them."""
    if not model.built:
        for x, _, _ in samples.batches():
            model(x)
            break
    extractor = _FeaturesOf(model, layer)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "features.bin")
        with file.open("wb") as written:
            for x, _, index in samples.batches():
                values = np.asarray(extractor.predict_on_batch(x), np.float32)
                for row, value in zip(index.tolist(), values, strict=True):
                    written.seek(row * value.nbytes)  # They may come shuffled.
                    written.write(value.tobytes())
        labels = samples.labels  # Each sample once, or an error.
        ids = np.arange(len(labels)).astype(str)
        features = FeatureSet(file, labels, ids, values.shape[1])
        num_classes = max(int(labels.max()) + 1, 2)
        found = audit_labels(features, num_classes=num_classes, progress=progress)
    predicted = float(found.out_of_sample.max(axis=1).mean())
    if found.reason is not None or predicted >= _LEAST_PREDICTED:
        return found
    return dataclasses.replace(
        found,
        right_probability=np.ones_like(found.right_probability),
        noise_rate=0.0,
        can_judge=False,
        reason=(
            f"The model's features predict about {100 * predicted:.0f} % of the right "
            "labels, too few to say which given ones are wrong (those of a pretrained "
            "backbone predict more)"
        ),
    )


class _FeaturesOf(keras.Model):
    """A model up to the layer that its features are taken from."""

    def __init__(self, model: keras.Model, layer: str | None):
        super().__init__(name="features")
        self.inner, self._by_output = model, layer is not None
        inside = list(model._flatten_layers(include_self=False))
        names = [one.name for one in inside]
        if layer is not None and layer not in names:
            hint = nearest_name_hint(layer, names) or f" It has: {', '.join(names)}."
            raise InvalidArgument(
                "`features_from` must name a layer of the model. Received: "
                f"{layer!r}.{hint}"
            )
        self._watched = [
            one
            for one in inside
            if one.name == layer
            or (layer is None and isinstance(one, keras.layers.Dense))
        ]
        if not self._watched:
            raise InvalidArgument(
                "The policy auto judges labels by the input of the model's last Dense "
                "layer. Received: a model without one. Give RSFTModel "
                "`features_from`, the name of the layer whose output is the features."
            )

    def call(self, inputs: Any) -> Any:
        with _watching(self._watched, outputs=self._by_output) as seen:
            self.inner(inputs, training=False)
        values = ops.cast(seen[-1], "float32")
        axes = tuple(range(1, len(values.shape) - 1))
        return ops.mean(values, axis=axes) if axes else values


@contextlib.contextmanager
def _watching(layers: list[Any], *, outputs: bool) -> Iterator[list[Any]]:
    """Collects what goes into some layers, or what comes out, while a model runs."""
    seen: list[Any] = []

    def watched(layer: Any) -> Any:
        inner = layer.call

        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            found = inner(inputs, *args, **kwargs)
            seen.append(found if outputs else inputs)
            return found

        return call

    for layer in layers:
        layer.call = watched(layer)
    try:
        yield seen
    finally:
        for layer in layers:
            del layer.call
