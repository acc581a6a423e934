"""Decodes image files into pixels of the size that a model takes."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import operator
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_rsft.errors import InvalidArgument


def without_autotuning(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the same data set with fixed buffers and a call for each core."""
    # `tf.data`'s tuner has nothing to find in pipelines as short as ours, and its
    # thread is asleep for up to five seconds when an iterator is dropped, which then
    # waits for it (seen with TensorFlow 2.21 at the end of passes of five seconds and
    # more).
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


KINDS = ("unknown", "JPEG", "PNG", "GIF", "BMP", "WebP")
# A dot stands for any byte.
_SIGNATURES = (
    b"\xff\xd8\xff.........",
    b"\x89PNG\r\n\x1a\n....",
    b"GIF8........",
    b"BM..........",
    b"RIFF....WEBP",
)
_HEAD_BYTES = 54  # The longest header read here: BMP with its colour count.


def bytes_at(encoded: tf.Tensor, start: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Returns a part of the bytes, as far as they reach."""
    # Unlike `tf.strings.substr` it has no error for a start behind the end: that
    # error's message holds the bytes themselves, which Python fails to decode.
    length = tf.cast(tf.strings.length(encoded), tf.int64)
    start = tf.minimum(tf.cast(start, tf.int64), length)
    return tf.strings.substr(encoded, start, tf.cast(count, tf.int64))


def first_gif_frame(encoded: tf.Tensor) -> tf.Tensor:
    """Cuts a GIF file down to its first frame."""
    # TensorFlow's decoder unpacks every frame before it returns the first, so an
    # animation of any number and size would be in memory at once.
    raw = tf.io.decode_raw(encoded, tf.uint8)
    raw = tf.pad(raw, [[0, 1024]])  # Zeros end every walk, which cannot leap over them.

    def byte(at: tf.Tensor) -> tf.Tensor:
        return tf.cast(raw[at], tf.int32)

    def after_palette(at: tf.Tensor, flags: tf.Tensor) -> tf.Tensor:
        size = 3 * tf.bitwise.left_shift(2, flags % 8)
        return at + tf.where(flags >= 0x80, size, 0)

    def after_blocks(at: tf.Tensor) -> tf.Tensor:
        """Follows blocks of a length byte and up to 255 bytes to the empty one."""
        step = (lambda at: byte(at) > 0), (lambda at: (at + byte(at) + 1,))
        return tf.while_loop(*step, (at,))[0] + 1

    (frame,) = tf.while_loop(
        lambda at: byte(at) == 0x21,  # An extension, such as a comment.
        lambda at: (after_blocks(at + 2),),
        (after_palette(13, byte(10)),),
    )
    end = after_blocks(after_palette(frame + 10, byte(frame + 9)) + 1)
    parts = (
        bytes_at(encoded, 0, frame + 1),
        tf.constant(b"\0\0\0\0"),  # left and top
        bytes_at(encoded, frame + 5, end - frame - 5),
        tf.constant(b";"),
    )
    size = tf.cast(raw[frame + 5 : frame + 9], tf.int64)
    cut = tf.strings.join(parts)
    return _require_within_limit(cut, _number(size, 0, 2), _number(size, 2, 2))


def _has(head: tf.Tensor, at: int, signature: bytes) -> tf.Tensor:
    return tf.reduce_all(head[at : at + len(signature)] == list(signature))


def _number(head: tf.Tensor, at: int, count: int, order: int = 1) -> tf.Tensor:
    """Reads an unsigned number, little-endian, or big-endian with an order of -1."""
    values = tf.constant([256**power for power in range(count)][::order], tf.int64)
    return tf.reduce_sum(head[..., at : at + count] * values, axis=-1)


MAX_PIXELS = 100_000_000
"""An image with more pixels than this is refused before any is allocated."""

# Random augmentations: how much of the image a crop has, and how much it may be
# stretched. Milder than what is usual for training from scratch, because the
# features come from a frozen backbone and no later layer can undo a lost object.
CROP_AREA = (0.5, 1.0)
CROP_STRETCH = (3 / 4, 4 / 3)

# libjpeg can decode to 1/2 or 1/4 of the size for less time and memory. Taken
# where what is left is still this many times the target, then the antialiased
# resize decides the result: less than 1 of 255 levels away on the mean.
_SCALED_DECODE_MARGIN = 3
_JPEG_RATIOS = (1, 2, 4)


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
    augmentations: int,
    seed: int,
    index: tf.Tensor,
) -> tf.Tensor:
    """Decodes one image into its plain image and random flips and crops of it."""
    size = checked_size(image_size)
    pixels = decode_pixels(encoded, smallest=size)
    random = [
        _random_resize(pixels, size, tf.stack([tf.constant(seed, tf.int64), key]))
        for key in (index * 2**16 + view for view in range(1, augmentations))
    ]
    return tf.stack([centre_resize(pixels, size), *random])


# Their graphs are large: they are traced once for all datasets of a size.
traced_image = tf.function(decode_image, autograph=False)
traced_views = tf.function(decode_views, autograph=False)


def decode_pixels(
    encoded: tf.Tensor, *, smallest: tuple[int, int] | None = None
) -> tf.Tensor:
    """Decodes one image at its own size, or not far above `smallest`."""
    encoded = tf.convert_to_tensor(encoded)
    if encoded.dtype != tf.string:  # The pixels of an array.
        return encoded
    # The first bytes, zeros where there are fewer.
    head = tf.io.decode_raw(encoded, tf.uint8, fixed_length=_HEAD_BYTES)
    head = tf.cast(head, tf.int64)
    signatures = np.array([list(signature) for signature in _SIGNATURES], np.int64)
    same = (head[: signatures.shape[1]] == signatures) | (signatures == ord("."))
    matches = tf.cast(tf.reduce_all(same, axis=-1), tf.int32)
    kind = tf.reduce_sum(matches * np.arange(1, len(KINDS), dtype=np.int32))
    branches = (
        lambda: _refuse_unknown(encoded),
        lambda: _decode_jpeg(encoded, smallest),
        lambda: _decode_png(encoded, head),
        lambda: tf.io.decode_gif(first_gif_frame(encoded))[0],
        lambda: _decode_bmp(encoded, head),
        lambda: _decode_webp(encoded, head),
    )
    return tf.ensure_shape(tf.switch_case(kind, branches), (None, None, 3))


def shrunk_jpeg(encoded: bytes, side: int, quality: int = 80) -> bytes:
    """Returns an image as JPEG, uncropped, its longer side at most `side` pixels."""
    return _shrunk_jpeg(tf.constant(encoded), tf.constant(side), quality).numpy()


@functools.partial(tf.function, autograph=False)
def _shrunk_jpeg(encoded: tf.Tensor, side: tf.Tensor, quality: int) -> tf.Tensor:
    pixels = decode_pixels(encoded)
    shape = tf.cast(tf.shape(pixels)[:2], tf.float32)
    share = tf.minimum(1.0, tf.cast(side, tf.float32) / tf.reduce_max(shape))
    size = tf.maximum(tf.cast(tf.round(share * shape), tf.int32), 1)
    shrunk = tf.cond(
        share < 1.0,
        lambda: tf.image.resize(pixels, size, method="area"),
        lambda: tf.cast(pixels, tf.float32),
    )
    shrunk = tf.cast(tf.clip_by_value(tf.round(shrunk), 0, 255), tf.uint8)
    return tf.io.encode_jpeg(shrunk, quality=quality, optimize_size=True)


def checked_size(image_size: Any) -> tuple[int, int]:
    pair = image_size if isinstance(image_size, (tuple, list)) else (image_size,) * 2
    try:
        height, width = (operator.index(side) for side in pair)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1 or any(isinstance(side, bool) for side in pair):
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
    message = tf.where(
        tf.strings.length(encoded) == 0,
        "The file is empty.",
        f"Not an image of a known kind ({', '.join(KINDS[1:])}).",
    )
    with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
        return tf.zeros([1, 1, 3], tf.uint8)


def _decode_jpeg(encoded: tf.Tensor, smallest: tuple[int, int] | None) -> tf.Tensor:
    shape = tf.io.extract_jpeg_shape(encoded, output_type=tf.int32)
    height, width = tf.cast(shape[0], tf.int64), tf.cast(shape[1], tf.int64)
    encoded = _require_within_limit(encoded, width, height)
    if smallest is None:
        return tf.io.decode_jpeg(encoded, channels=3)
    scale = tf.minimum(height // smallest[0], width // smallest[1])
    fits = scale >= _SCALED_DECODE_MARGIN * np.array(_JPEG_RATIOS[1:])
    ratio_index = tf.reduce_sum(tf.cast(fits, tf.int32))
    branches = [
        functools.partial(tf.io.decode_jpeg, encoded, channels=3, ratio=ratio)
        for ratio in _JPEG_RATIOS
    ]
    return tf.switch_case(ratio_index, branches)


def _decode_png(encoded: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    # The IHDR chunk, which must come first, has the size.
    width, height = _number(head, 16, 4, -1), _number(head, 20, 4, -1)
    return tf.io.decode_png(_require_within_limit(encoded, width, height), channels=3)


def _decode_bmp(encoded: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    header_size, width, height = (_number(head, at, 4) for at in (14, 18, 22))
    bits, compression = _number(head, 28, 2), _number(head, 30, 4)
    # TensorFlow would take compressed bytes for pixels. 3 means colour masks,
    # which 32-bit files with transparency have; they are in the usual order.
    plain = (compression == 0) | ((compression == 3) & (bits == 32))
    known = (header_size >= 40) & plain & tf.reduce_any(bits == [8, 24, 32])
    message = "A BMP file of another kind than uncompressed 8, 24 or 32 bits."
    encoded = _require(encoded, known, tf.constant(message))
    # A negative height means top row first.
    height = tf.where(height >= 2**31, 2**32 - height, height)
    encoded = _require_within_limit(encoded, width, height)
    pixels = tf.io.decode_bmp(encoded, channels=0)

    def look_up() -> tf.Tensor:
        # TensorFlow returns an 8-bit BMP's colour numbers as if they were grey.
        table = bytes_at(encoded, 14 + header_size, 1024)
        table = tf.io.decode_raw(table, tf.uint8, fixed_length=1024)
        colours = tf.reshape(table, [256, 4])[:, 2::-1]
        return tf.gather(colours, tf.cast(pixels[..., 0], tf.int32))

    return tf.cond(bits == 8, look_up, lambda: pixels[..., :3])


def _decode_webp(encoded: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    # An animated WebP has aborted the whole process in TensorFlow 2.21.
    still = ~(_has(head, 12, b"VP8X") & (head[20] // 2 % 2 == 1))
    message = tf.constant("An animated WebP, which TensorFlow cannot read.")
    encoded = _require(encoded, still, message)
    lossless_bits = _number(head, 21, 4)
    cases = (
        (b"VP8 ", _number(head, 26, 2) % 2**14, _number(head, 28, 2) % 2**14),
        (b"VP8L", lossless_bits % 2**14 + 1, lossless_bits // 2**14 % 2**14 + 1),
        (b"VP8X", _number(head, 24, 3) + 1, _number(head, 27, 3) + 1),
    )
    width = height = tf.zeros([], tf.int64)
    for chunk, case_width, case_height in cases:
        match = _has(head, 12, chunk)
        width = tf.where(match, case_width, width)
        height = tf.where(match, case_height, height)
    encoded = _require_within_limit(encoded, width, height)
    return tf.io.decode_image(encoded, expand_animations=False)[..., :3]


def _require_within_limit(
    encoded: tf.Tensor, width: tf.Tensor, height: tf.Tensor
) -> tf.Tensor:
    most = _fewer_pixels.get() or MAX_PIXELS
    template = f"An image of {{}} x {{}} pixels; the most is {most:,}."
    message = tf.strings.format(template, (width, height))
    # Dividing, for the product of two 32-bit numbers may not fit 64 bits.
    return _require(encoded, width <= most // tf.maximum(height, 1), message)


_fewer_pixels = contextvars.ContextVar[int | None]("fewer pixels", default=None)


@contextlib.contextmanager
def at_most_pixels(most: int | None) -> Iterator[None]:
    """Has graphs that are built meanwhile refuse larger images; None: MAX_PIXELS."""
    before = _fewer_pixels.set(most)
    try:
        yield
    finally:
        _fewer_pixels.reset(before)


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


def decode_images(
    encoded: tf.Tensor, image_size: int | tuple[int, int]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes all files that it can; the other images are black and not valid."""
    size, count = checked_size(image_size), tf.size(encoded)
    # One more that always works: there must be a batch, even if all files fail.
    works = tf.io.encode_jpeg(tf.zeros([1, 1, 3], tf.uint8))
    files = tf.concat([encoded, works[None]], axis=0)
    data = tf.data.Dataset.from_tensor_slices((tf.range(count + 1), files)).map(
        lambda index, one: (index, decode_image(one, size)),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=False,
    )
    data = data.ignore_errors().batch(tf.cast(count + 1, tf.int64))
    # A served graph runs the pipeline anew on each request: looking for a better form
    # of it takes longer there than the pipeline.
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    index, decoded = data.with_options(options).get_single_element()
    images = tf.scatter_nd(index[:, None], decoded, [count + 1, *size, 3])
    valid = tf.reduce_any(index == tf.range(count)[:, None], axis=1)
    return images[:count], valid
