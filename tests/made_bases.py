"""Bases that the tests make themselves: the same network in several formats."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.backbones._blocks import block_starts, leaf_layers
from keras_rsft.backbones._build import build_classifier, build_head

SIDE, DIM = 16, 6


def network() -> keras.Model:
    """Images in [0, 1] to 6 features."""
    keras.utils.set_random_seed(1)
    images = keras.Input((SIDE, SIDE, 3), name="pixels")
    values = keras.layers.Conv2D(DIM, 3, strides=2, activation="relu", name="conv")(
        images
    )
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(values))


def spread_head(dim: int, classes: int, *, moments=None, seed: int = 0) -> keras.Model:
    """A head with weights such as training leaves: one of zeros hides mistakes."""
    head = build_head(dim, classes, moments=moments)
    weights = np.random.default_rng(seed).normal(size=(dim, classes)) / dim**0.5
    head.get_layer("scores").kernel.assign(weights)
    return head


def classifier_of(backbone: keras.Model, classes: int) -> keras.Model:
    head = spread_head(backbone.output_shape[-1], classes)
    return build_classifier(backbone, classes, head=head)


def save_three_blocks(path: Path) -> Path:
    """Three convolutions, each followed by a BatchNorm with statistics of its own."""
    keras.utils.set_random_seed(4)
    images = keras.Input((SIDE, SIDE, 3))
    x = keras.layers.Rescaling(1 / 255)(images)
    for number in (1, 2, 3):
        x = keras.layers.Conv2D(
            4 + number, 3, strides=2, padding="same", activation="relu",
            name=f"block{number}_conv",
        )(x)  # fmt: skip
        norm = keras.layers.BatchNormalization(name=f"block{number}_bn")
        x = norm(x)
        norm.moving_mean.assign(np.full(4 + number, 0.1))
        norm.moving_variance.assign(np.full(4 + number, 0.5))
    keras.Model(images, keras.layers.GlobalAveragePooling2D()(x)).save(path)
    return path


def changed_layers(before: keras.Model, after: keras.Model) -> set[str]:
    """Names of the layers whose weights differ between two copies of a model."""
    return {
        own.path.split("/")[-2]
        for own, other in zip(before.weights, after.weights, strict=True)
        if not np.array_equal(own.numpy(), other.numpy())
    }


def last_block(model: keras.Model) -> list[keras.Layer]:
    """The layers of the last block of a backbone, and all that come after."""
    starts = block_starts(model)
    return leaf_layers(model)[starts[-1] :] if starts else []


def save_signature(folder: Path, *, outputs=None, side: int | None = SIDE) -> Path:
    """A SavedModel as Keras writes it, with the signature `serving_default`."""
    model = network()
    module = tf.Module()
    module.variables_of_model = [variable.value for variable in model.variables]
    spec = tf.TensorSpec((None, side, side, 3), tf.float32, name="pixels")

    @tf.function(input_signature=[spec])
    def serve(pixels):
        images = tf.ensure_shape(pixels, (None, SIDE, SIDE, 3))
        features = model(images, training=False)
        return {"vector": features} if outputs is None else outputs(features)

    tf.saved_model.save(module, str(folder), signatures={"serving_default": serve})
    return folder


class Reusable(tf.Module):
    """What TensorFlow Hub calls a reusable SavedModel: an object to be called."""

    def __init__(self):
        super().__init__()
        kernel, bias = network().get_layer("conv").get_weights()
        self.kernel, self.bias = tf.Variable(kernel), tf.Variable(bias)

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, None, None, 3), tf.float32),
            tf.TensorSpec((), tf.bool),
        ]
    )
    def __call__(self, images, training):
        kept = tf.cond(training, lambda: 0.5, lambda: 1.0)
        values = tf.nn.conv2d(images * kept, self.kernel, 2, "VALID")
        return tf.nn.relu(values + self.bias)


def save_onnx(
    path: Path,
    *,
    channels_first: bool = True,
    batch: int | None = None,
    feature_map: bool = False,
    half: bool = False,
    beside: bool = False,
    opset: int = 17,
) -> Path:
    """The network as an ONNX file, as Torchvision's exports are or channels last."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kernel, bias = network().get_layer("conv").get_weights()
    real = np.float16 if half else np.float32
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    weights = [
        numpy_helper.from_array(kernel.transpose(3, 2, 0, 1).astype(real), "kernel"),
        numpy_helper.from_array(bias.astype(real), "bias"),
    ]
    shape = (3, SIDE, SIDE) if channels_first else (SIDE, SIDE, 3)
    rows = batch or "batch"
    last = "map" if feature_map else "vector"
    nodes = [helper.make_node("Transpose", ["pixels"], ["first"], perm=[0, 3, 1, 2])]
    source = "first"
    if channels_first:
        nodes, source = [], "pixels"
    nodes += [
        helper.make_node("Conv", [source, "kernel", "bias"], ["a"], strides=[2, 2]),
        helper.make_node("Relu", ["a"], ["map_first"]),
    ]
    if feature_map:
        order = [0, 1, 2, 3] if channels_first else [0, 2, 3, 1]
        nodes.append(helper.make_node("Transpose", ["map_first"], ["map"], perm=order))
    else:
        nodes += [
            helper.make_node("GlobalAveragePool", ["map_first"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["vector"]),
        ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("pixels", kind, (rows, *shape))],
        [helper.make_tensor_value_info(last, kind, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 9
    options = {"save_as_external_data": True, "location": f"{path.name}.data"}
    if beside:
        options["size_threshold"] = 0
    onnx.save(model, path, **(options if beside else {}))
    return path
