"""Turns an encoded image file into pixels of the size that a model takes.

TensorFlow ops only: the very same functions run in the input pipeline and in
the exported serving graph, so that training and serving cannot differ.
`headers.py` reads sizes; where the bytes come from is `readers.py`'s matter.
"""

from __future__ import annotations

import math
import operator
import re
from typing import Any

import tensorflow as tf

from keras_rsft.data import headers
from keras_rsft.errors import InvalidArgument

MAX_PIXELS = 100_000_000
"""An image with more pixels than this is refused before any is allocated."""

# Random views: how much of the image a crop keeps, and how much it may be
# stretched. Milder than what is usual for training from scratch, because the
# features come from a frozen base and no later layer can undo a lost object.
CROP_AREA = (0.5, 1.0)
CROP_STRETCH = (3 / 4, 4 / 3)

# libjpeg can decode to 1/2 or 1/4 of the size for less time and memory. Taken
# where what is left is still this many times the target, then the antialiased
# resize decides the result: less than 1 of 255 levels away on the mean.
_SCALED_DECODE_MARGIN = 3
JPEG_RATIOS = (1, 2, 4)


def decode_image(encoded: tf.Tensor, image_size: int | tuple[int, int]) -> tf.Tensor:
    """Decodes one image, crops its centre and resizes it."""
    # Reads JPEG (grey, colour, CMYK), PNG (any depth, palette), GIF (the first frame),
    # BMP (8, 24 and 32 bits) and WebP (not animated), told apart by their first bytes.
    # Transparency is dropped. The centre is cropped to the target's aspect ratio, then
    # resized with antialiased bilinear interpolation.
    size = checked_size(image_size)
    return centre_resize(decode_pixels(encoded, smallest=size), size)


def decode_views(
    encoded: tf.Tensor,
    image_size: int | tuple[int, int],
    *,
    views: int,
    seed: int,
    index: tf.Tensor,
) -> tf.Tensor:
    """Decodes one image into its plain view and random flips and crops of it."""
    size = checked_size(image_size)
    pixels = decode_pixels(encoded, smallest=size)
    random = [
        _random_resize(pixels, size, tf.stack([tf.constant(seed, tf.int64), key]))
        for key in (index * 2**16 + view for view in range(1, views))
    ]
    return tf.stack([centre_resize(pixels, size), *random])


def decode_pixels(
    encoded: tf.Tensor, *, smallest: tuple[int, int] | None = None
) -> tf.Tensor:
    """Decodes one image at its own size, or not far above `smallest`."""
    head = headers.head_bytes(encoded)
    branches = (
        lambda: _refuse_unknown(encoded),
        lambda: _decode_jpeg(encoded, smallest),
        lambda: _decode_png(encoded, head),
        lambda: _decode_gif(encoded),
        lambda: _decode_bmp(encoded, head),
        lambda: _decode_webp(encoded, head),
    )
    pixels = tf.switch_case(headers.image_kind(head), branches)
    return tf.ensure_shape(pixels, (None, None, 3))


def checked_size(image_size: Any) -> tuple[int, int]:
    """Returns height and width."""
    pair = image_size if isinstance(image_size, (tuple, list)) else (image_size,) * 2
    try:
        height, width = (operator.index(side) for side in pair)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise InvalidArgument(
            "`image_size` must be a positive integer or a pair (height, width). "
            f"Received: image_size={image_size!r}. Use 224, for example."
        )
    return height, width


def readable_reason(error: tf.errors.OpError) -> str:
    """Returns an op's error message without the names of TensorFlow's nodes."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*?\]| name:.*$", "", error.message)
    ours = re.search(r"Summarized data: b['\"](.*)['\"]", text, re.DOTALL)
    return " ".join((ours.group(1) if ours else text).split())


def _refuse_unknown(encoded: tf.Tensor) -> tf.Tensor:
    names = ", ".join(headers.KINDS[1:])
    message = tf.where(
        tf.strings.length(encoded) == 0,
        "The file is empty.",
        f"Not an image of a known kind ({names}).",
    )
    with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
        return tf.zeros([1, 1, 3], tf.uint8)


def _decode_jpeg(encoded: tf.Tensor, smallest: tuple[int, int] | None) -> tf.Tensor:
    width, height = headers.jpeg_size(encoded)
    encoded = _require_within_limit(encoded, width, height)
    if smallest is None:
        return tf.io.decode_jpeg(encoded, channels=3)
    branches = [
        lambda ratio=ratio: tf.io.decode_jpeg(encoded, channels=3, ratio=ratio)
        for ratio in JPEG_RATIOS
    ]
    return tf.switch_case(jpeg_ratio_index(width, height, smallest), branches)


def jpeg_ratio_index(
    width: tf.Tensor, height: tf.Tensor, smallest: tuple[int, int]
) -> tf.Tensor:
    """Returns by which of `JPEG_RATIOS` a JPEG of that size is decoded smaller."""
    scale = tf.minimum(height // smallest[0], width // smallest[1])
    return tf.add_n(
        [tf.cast(scale >= _SCALED_DECODE_MARGIN * r, tf.int32) for r in JPEG_RATIOS[1:]]
    )


def _decode_png(encoded: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    encoded = _require_within_limit(encoded, *headers.png_size(head))
    return tf.io.decode_png(encoded, channels=3)


def _decode_gif(encoded: tf.Tensor) -> tf.Tensor:
    frame, (width, height) = headers.first_gif_frame(encoded)
    return tf.io.decode_gif(_require_within_limit(frame, width, height))[0]


def _decode_bmp(encoded: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    header_size, bits, compression = headers.bmp_layout(head)
    # TensorFlow would take compressed bytes for pixels. 3 means colour masks,
    # which 32-bit files with transparency have; they are in the usual order.
    plain = (compression == 0) | ((compression == 3) & (bits == 32))
    known = (header_size >= 40) & plain & tf.reduce_any(bits == [8, 24, 32])
    message = "A BMP file of another kind than uncompressed 8, 24 or 32 bits."
    encoded = _require(encoded, known, tf.constant(message))
    encoded = _require_within_limit(encoded, *headers.bmp_size(head))
    pixels = tf.io.decode_bmp(encoded, channels=0)
    return tf.cond(
        bits == 8,
        lambda: _look_up_colours(encoded, header_size, pixels[..., 0]),
        lambda: pixels[..., :3],
    )


def _look_up_colours(
    encoded: tf.Tensor, header_size: tf.Tensor, numbers: tf.Tensor
) -> tf.Tensor:
    # TensorFlow returns an 8-bit BMP's colour numbers as if they were grey.
    table = headers.bytes_at(encoded, 14 + header_size, 1024)
    table = tf.io.decode_raw(table, tf.uint8, fixed_length=1024)
    return tf.gather(tf.reshape(table, [256, 4])[:, 2::-1], tf.cast(numbers, tf.int32))


def _decode_webp(encoded: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    # An animated WebP has aborted the whole process in TensorFlow 2.21.
    still = ~headers.webp_is_animated(head)
    message = tf.constant("An animated WebP, which TensorFlow cannot read.")
    encoded = _require(encoded, still, message)
    encoded = _require_within_limit(encoded, *headers.webp_size(head))
    return tf.io.decode_image(encoded, expand_animations=False)[..., :3]


def _require_within_limit(
    encoded: tf.Tensor, width: tf.Tensor, height: tf.Tensor
) -> tf.Tensor:
    template = f"An image of {{}} x {{}} pixels; the most is {MAX_PIXELS:,}."
    message = tf.strings.format(template, (width, height))
    return _require(encoded, within_limit(width, height), message)


def within_limit(width: tf.Tensor, height: tf.Tensor) -> tf.Tensor:
    """Says whether an image of that size, int64 of any shape, may be decoded."""
    # Dividing, for the product of two 32-bit numbers may not fit 64 bits.
    return width <= MAX_PIXELS // tf.maximum(height, 1)


def _require(encoded: tf.Tensor, condition: tf.Tensor, message: tf.Tensor) -> tf.Tensor:
    """Returns the bytes, so that what is made of them waits for the condition."""
    with tf.control_dependencies([tf.debugging.Assert(condition, [message])]):
        return tf.identity(encoded)


def centre_resize(pixels: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Crops the centre of uint8 pixels `(h, w, 3)`; float32 of the size given."""
    height, width = tf.shape(pixels)[0], tf.shape(pixels)[1]
    crop_height, crop_width = _largest_crop(height, width, size[1] / size[0])
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    crop = tf.slice(pixels, [top, left, 0], [crop_height, crop_width, 3])
    return _resize(crop, size)


def _random_resize(
    pixels: tf.Tensor, size: tuple[int, int], seed: tf.Tensor
) -> tf.Tensor:
    area, stretch, down, right, flip = tf.unstack(
        tf.random.stateless_uniform([5], seed, alg="philox")
    )
    height, width = tf.shape(pixels)[0], tf.shape(pixels)[1]
    aspect = size[1] / size[0] * tf.exp(_between(stretch, *map(math.log, CROP_STRETCH)))
    crop_height, crop_width = _largest_crop(height, width, aspect)
    share = tf.sqrt(_between(area, *CROP_AREA))
    crop_height, crop_width = _scaled(crop_height, share), _scaled(crop_width, share)
    top = _scaled(height - crop_height, down, least=0)
    left = _scaled(width - crop_width, right, least=0)
    crop = tf.slice(pixels, [top, left, 0], [crop_height, crop_width, 3])
    crop = tf.cond(flip < 0.5, lambda: tf.reverse(crop, axis=[1]), lambda: crop)
    return _resize(crop, size)


def _largest_crop(
    height: tf.Tensor, width: tf.Tensor, aspect: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the largest height and width of the given width-to-height ratio."""
    fitting_height = _scaled(width, 1 / aspect)
    fitting_width = _scaled(height, aspect)
    return tf.minimum(height, fitting_height), tf.minimum(width, fitting_width)


def _resize(crop: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    def resized() -> tf.Tensor:
        image = tf.image.resize(crop, size, method="bilinear", antialias=True)
        # Interpolation can leave the range by a rounding error.
        return tf.clip_by_value(image, 0.0, 255.0)

    # Of the right size already, the same numbers would come out, far later.
    fits = tf.reduce_all(tf.shape(crop)[:2] == size)
    image = tf.cond(fits, lambda: tf.cast(crop, tf.float32), resized)
    return tf.ensure_shape(image, (*size, 3))


def _scaled(length: tf.Tensor, factor: Any, *, least: int = 1) -> tf.Tensor:
    scaled = tf.round(tf.cast(length, tf.float32) * tf.cast(factor, tf.float32))
    return tf.maximum(tf.cast(scaled, tf.int32), least)


def _between(unit: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return low + unit * (high - low)
