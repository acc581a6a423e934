"""Writes the serving graph as a SavedModel, the next version of a model's folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import keras
import tensorflow as tf

from keras_rsft.backend_in_use import require_tensorflow_backend
from keras_rsft.errors import InvalidArgument
from keras_rsft.export import tf_serving
from keras_rsft.export.places import (
    check_model_folder,
    check_name,
    free_version,
    turn_in,
)
from keras_rsft.export.serving_graph import ForwardPass, ServingGraph
from keras_rsft.result_folder import written_whole

WEIGHT_DTYPES = ("float32", "float16")


def export_saved_model(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    class_names: Sequence[str],
    version: int | None = None,
    top_k: int | None = None,
    weight_dtype: str = "float32",
    warmup: bool | None = None,
    model_card: str | None = None,
) -> Path:
    """Writes `DIRECTORY/VERSION` as a SavedModel with two signatures.

    `serving_default` takes `image_bytes`, a vector of encoded images, and gives
    `label` (string), `score` (float32), `probabilities` (float32,
    `(batch, classes)`) and `valid` (bool); with `top_k` also `top_labels` and
    `top_scores`, `(batch, top_k)`, the most probable first. An image that cannot be
    decoded is not valid, has empty labels and zero probabilities, and leaves the
    others alone. `serving_images` takes `images`, float32
    `(batch, height, width, 3)` in [0, 255], and gives all but `valid`. An empty batch
    gives empty results.

    The class names are in the graph and in `assets/labels.txt`. `models.config` and
    `batching.config` for TF Serving are written into `DIRECTORY` once.

    Args:
        model: Images in [0, 255] to probabilities, as `Run.model`.
        directory: Folder named after the model; made if it does not exist.
        class_names: Names in the order of the probabilities.
        version: Number of the version, at least 1. Default: one more than the
            highest that the folder holds, or 1.
        top_k: In [1, classes]. Default: no `top_labels`.
        weight_dtype: `"float32"`, or `"float16"` for half the size: kernels are
            stored in float16 and widened when the graph runs. Default float32.
        warmup: Write requests that the server runs before it answers, in
            `assets.extra/`. Default: where the extra `serving` is installed.
        model_card: Markdown, written as the version's `README.md`. Default: none.

    Returns:
        The folder that was written; it appears whole.

    Raises:
        InvalidArgument: If that version exists, the folder holds something else or
            cannot be written to, or another argument does not fit.
        ImportError: If `warmup` is True and the extra `serving` is not installed.
    """
    require_tensorflow_backend("`export_saved_model`")
    directory = check_model_folder(directory)
    check_name(directory.name)
    _check_fit(model, class_names, top_k, weight_dtype)
    free_version(directory, version)  # Refused before the work.
    if warmup is None:
        warmup = tf_serving.warmup_available()
    requests = tf_serving.warmup_requests(directory.name) if warmup else None
    forward = ForwardPass(model, float16=weight_dtype == "float16", pack=True)
    with turn_in(directory):
        target = directory / str(free_version(directory, version))
        # TF Serving looks for folders that are numbers: the hidden one it never sees.
        with written_whole(target) as partial, tempfile.TemporaryDirectory() as assets:
            labels = Path(assets) / "labels.txt"
            labels.write_text("\n".join(class_names) + "\n", encoding="utf-8")
            graph = ServingGraph(forward, class_names, labels, top_k=top_k)
            tf.saved_model.save(graph, str(partial), signatures=graph.signatures())
            if requests is not None:
                tf_serving.write_warmup(partial, requests)
            if model_card is not None:
                (partial / "README.md").write_text(model_card, encoding="utf-8")
        tf_serving.write_configs(directory)
    return target


def check_class_names(model: keras.Model, class_names: Sequence[str]) -> None:
    """Refuses names that do not fit the model."""
    if len(class_names) != model.output_shape[-1]:
        raise InvalidArgument(
            f"The model has {model.output_shape[-1]} classes. "
            f"Received: {len(class_names)} class names."
        )
    for name in class_names:
        if len(name.splitlines()) != 1:
            raise InvalidArgument(
                f"A class name must be one line of text. Received: {name!r}."
            )


def _check_fit(
    model: keras.Model,
    class_names: Sequence[str],
    top_k: int | None,
    weight_dtype: str,
) -> None:
    check_class_names(model, class_names)
    if top_k is not None and not 1 <= top_k <= len(class_names):
        raise InvalidArgument(
            f"`top_k` must be in [1, {len(class_names)}], the number of classes. "
            f"Received: {top_k}."
        )
    if weight_dtype not in WEIGHT_DTYPES:
        raise InvalidArgument(
            f"A SavedModel's `weight_dtype` must be one of {', '.join(WEIGHT_DTYPES)}. "
            f"Received: {weight_dtype!r}."
        )
