"""Decodes a batch of image files in one graph, and catches those that cannot be.

`decode.py` says what decoding is; here is how a server does it for many at once. The
one thing in TensorFlow that survives a failed op is a data set that leaves the element
out. Each run of such a data set prepares its function anew, which for the whole of
`decode_image` takes a hundred milliseconds and more. So kinds are told apart outside,
for all files together, and what runs inside for JPEG and PNG is one op.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from keras_rsft.data import headers
from keras_rsft.data.decode import (
    JPEG_RATIOS,
    centre_resize,
    checked_size,
    decode_image,
    jpeg_ratio_index,
    within_limit,
)
from keras_rsft.data.pipeline import without_tuning_or_rewriting

# Pixels that may lie decoded at the same time. What is beyond goes the slower way,
# which holds no more of them than there are cores.
PIXEL_BUDGET = 64_000_000

_JPEG, _PNG = headers.KINDS.index("JPEG"), headers.KINDS.index("PNG")
_UNKNOWN = headers.KINDS.index("unknown")


def decode_images(
    encoded: tf.Tensor, image_size: int | tuple[int, int]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes what can be decoded; the rest is black and not valid."""
    size = checked_size(image_size)
    heads = headers.head_bytes(encoded)
    kinds = headers.image_kind(heads)
    shapes = _caught(
        encoded,
        kinds == _JPEG,
        tf.io.extract_jpeg_shape,
        tf.zeros([tf.size(encoded), 3], tf.int32),
    )
    width, height = headers.png_size(heads)
    is_png = kinds == _PNG
    jpeg_height, jpeg_width = tf.unstack(tf.cast(shapes[:, :2], tf.int64), axis=1)
    width, height = (
        tf.where(is_png, width, jpeg_width),
        tf.where(is_png, height, jpeg_height),
    )
    ratio = jpeg_ratio_index(width, height, size)
    ratio = tf.where(kinds == _JPEG, ratio, 0)
    readable = (width > 0) & (height > 0) & within_limit(width, height)
    pixels = tf.where(readable, width * height // 4 ** tf.cast(ratio, tf.int64), 0)
    quick = readable & (tf.cumsum(pixels) <= PIXEL_BUDGET)
    slow = (readable & ~quick) | ((kinds != _JPEG) & (kinds != _PNG))
    serialised = _decode_quickly(encoded, quick, kinds, ratio)
    images = _resize_all(serialised, size)
    found = tf.strings.length(serialised) > 0
    chosen = slow & (kinds != _UNKNOWN)

    def decode_others() -> tuple[tf.Tensor, tf.Tensor]:
        index, decoded = _run(encoded, chosen, lambda one: decode_image(one, size))
        marks = tf.ones_like(index, tf.bool)
        place = index[:, None]
        return (
            tf.tensor_scatter_nd_update(images, place, decoded),
            tf.tensor_scatter_nd_update(found, place, marks),
        )

    return tf.cond(tf.reduce_any(chosen), decode_others, lambda: (images, found))


def _decode_quickly(
    encoded: tf.Tensor, chosen: tf.Tensor, kinds: tf.Tensor, ratio_index: tf.Tensor
) -> tf.Tensor:
    """Returns pixels as serialised tensors, empty where there are none."""
    serialised = tf.fill([tf.size(encoded)], "")
    for index, ratio in enumerate(JPEG_RATIOS):
        serialised = _caught(
            encoded,
            chosen & (kinds == _JPEG) & (ratio_index == index),
            lambda one, ratio=ratio: tf.io.serialize_tensor(
                tf.io.decode_jpeg(one, channels=3, ratio=ratio)
            ),
            serialised,
        )
    return _caught(
        encoded,
        chosen & (kinds == _PNG),
        lambda one: tf.io.serialize_tensor(tf.io.decode_png(one, channels=3)),
        serialised,
    )


def _resize_all(serialised: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    def resize(one: tf.Tensor) -> tf.Tensor:
        pixels = tf.io.parse_tensor(one, tf.uint8)
        return centre_resize(tf.ensure_shape(pixels, (None, None, 3)), size)

    black = tf.io.serialize_tensor(tf.zeros([1, 1, 3], tf.uint8))
    return tf.map_fn(
        resize,
        tf.where(tf.strings.length(serialised) > 0, serialised, black),
        fn_output_signature=tf.TensorSpec((*size, 3), tf.float32),
        parallel_iterations=32,
    )


def _caught(
    encoded: tf.Tensor,
    chosen: tf.Tensor,
    function: Callable[[tf.Tensor], tf.Tensor],
    values: tf.Tensor,
) -> tf.Tensor:
    """Puts a function's results for the chosen files in the place of `values`."""

    def put() -> tf.Tensor:
        index, results = _run(encoded, chosen, function)
        return tf.tensor_scatter_nd_update(values, index[:, None], results)

    return tf.cond(tf.reduce_any(chosen), put, lambda: values)


def _run(
    encoded: tf.Tensor,
    chosen: tf.Tensor,
    function: Callable[[tf.Tensor], tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Runs a function on the chosen files; leaves out those on which it fails."""
    index = tf.where(chosen)[:, 0]
    files = tf.gather(encoded, index)
    # One that always works: there must be a batch, even if all of them fail.
    index = tf.concat([index, [-1]], axis=0)
    works = tf.io.encode_jpeg(tf.zeros([1, 1, 3], tf.uint8))
    files = tf.concat([files, works[None]], axis=0)
    data = tf.data.Dataset.from_tensor_slices((index, files)).map(
        lambda at, one: (at, function(one)),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=False,
    )
    data = data.ignore_errors().batch(tf.size(index, tf.int64))
    index, results = without_tuning_or_rewriting(data).get_single_element()
    kept = index >= 0
    return tf.boolean_mask(index, kept), tf.boolean_mask(results, kept)
