"""Decodes image files into pixels of the size that a model takes."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
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

Size = tuple[tf.Tensor, tf.Tensor]  # width, height; int64 scalars


def head_bytes(encoded: tf.Tensor) -> tf.Tensor:
    """Returns the first 54 bytes as int64 numbers, zeros where there are fewer."""
    head = tf.io.decode_raw(encoded, tf.uint8, fixed_length=_HEAD_BYTES)
    return tf.cast(head, tf.int64)


def image_kind(head: tf.Tensor) -> tf.Tensor:
    """Returns the position in `KINDS` as int32, by signature only."""
    signatures = np.array([list(signature) for signature in _SIGNATURES], np.int64)
    start = head[..., None, : signatures.shape[1]]
    same = (start == signatures) | (signatures == ord("."))
    matches = tf.cast(tf.reduce_all(same, axis=-1), tf.int32)
    return tf.reduce_sum(matches * np.arange(1, len(KINDS), dtype=np.int32), axis=-1)


def jpeg_size(encoded: tf.Tensor) -> Size:
    """Returns the size of a JPEG file; raises InvalidArgumentError on a bad one."""
    shape = tf.io.extract_jpeg_shape(encoded, output_type=tf.int32)
    return tf.cast(shape[1], tf.int64), tf.cast(shape[0], tf.int64)


def png_size(head: tf.Tensor) -> Size:
    """Returns the size in a PNG file's IHDR chunk, which must come first."""
    return _big_endian(head, 16, 4), _big_endian(head, 20, 4)


def bmp_size(head: tf.Tensor) -> Size:
    """Returns the size of a BMP file; a negative height means top row first."""
    height = _little_endian(head, 22, 4)
    height = tf.where(height >= 2**31, 2**32 - height, height)
    return _little_endian(head, 18, 4), height


def webp_size(head: tf.Tensor) -> Size:
    """Returns the size of a WebP file: lossy, lossless or extended."""
    lossless_bits = _little_endian(head, 21, 4)
    cases = (
        (b"VP8 ", _low14(head, 26), _low14(head, 28)),
        (b"VP8L", lossless_bits % 2**14 + 1, lossless_bits // 2**14 % 2**14 + 1),
        (b"VP8X", _little_endian(head, 24, 3) + 1, _little_endian(head, 27, 3) + 1),
    )
    width = height = tf.zeros([], tf.int64)
    for chunk, case_width, case_height in cases:
        match = _has(head, 12, chunk)
        width = tf.where(match, case_width, width)
        height = tf.where(match, case_height, height)
    return width, height


def bytes_at(encoded: tf.Tensor, start: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Returns a part of the bytes, as far as they reach."""
    # Unlike `tf.strings.substr` it has no error for a start behind the end: that
    # error's message holds the bytes themselves, which Python fails to decode.
    length = tf.cast(tf.strings.length(encoded), tf.int64)
    start = tf.minimum(tf.cast(start, tf.int64), length)
    return tf.strings.substr(encoded, start, tf.cast(count, tf.int64))


def first_gif_frame(encoded: tf.Tensor) -> tuple[tf.Tensor, Size]:
    """Cuts a GIF file down to its first frame."""
    # TensorFlow's decoder unpacks every frame before it returns the first, so an
    # animation would cost the time and the memory of all of them.
    raw = tf.cast(tf.io.decode_raw(encoded, tf.uint8), tf.int32)
    # Zeros end every walk; no step below reaches further behind the end.
    raw = tf.pad(raw, [[0, 1024]])
    # For each byte, where 32 data blocks further would be if one began there.
    # A GIF's data lies in blocks of a length byte and up to 255 bytes; following them
    # one at a time in a graph loop would take longer than decoding.
    here = tf.range(tf.size(raw))
    last = tf.size(raw) - 1
    jump = tf.where(raw == 0, here, tf.minimum(here + raw + 1, last))
    for _ in range(5):
        jump = tf.gather(jump, jump)
    extension, palette_flag = 0x21, 0x80
    start = 13 + _palette_bytes(raw[10], palette_flag)
    (frame,) = tf.while_loop(
        lambda at: raw[at] == extension,
        lambda at: (_after_blocks(jump, at + 2),),
        (start,),
    )
    data = frame + 10 + _palette_bytes(raw[frame + 9], palette_flag) + 1
    end = _after_blocks(jump, data)
    parts = (
        bytes_at(encoded, 0, frame + 1),
        tf.constant(b"\0\0\0\0"),  # left and top
        bytes_at(encoded, frame + 5, end - frame - 5),
        tf.constant(b";"),
    )
    size = tf.cast(raw[frame + 5 : frame + 9], tf.int64)
    return tf.strings.join(parts), (
        _little_endian(size, 0, 2),
        _little_endian(size, 2, 2),
    )


def _after_blocks(jump: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """Returns the position behind the empty block that ends a run of blocks."""
    (end,) = tf.while_loop(lambda at: jump[at] != at, lambda at: (jump[at],), (start,))
    return end + 1


def _palette_bytes(flags: tf.Tensor, palette_flag: int) -> tf.Tensor:
    size = 3 * tf.bitwise.left_shift(2, flags % 8)
    return tf.where(flags >= palette_flag, size, 0)


def _has(head: tf.Tensor, at: int, signature: bytes) -> tf.Tensor:
    expected = tf.constant(list(signature), tf.int64)
    return tf.reduce_all(head[at : at + len(signature)] == expected)


def _little_endian(head: tf.Tensor, at: int, count: int) -> tf.Tensor:
    places = tf.constant([256**place for place in range(count)], tf.int64)
    return tf.reduce_sum(head[at : at + count] * places)


def _big_endian(head: tf.Tensor, at: int, count: int) -> tf.Tensor:
    places = tf.constant([256**place for place in reversed(range(count))], tf.int64)
    return tf.reduce_sum(head[..., at : at + count] * places, axis=-1)


def _low14(head: tf.Tensor, at: int) -> tf.Tensor:
    return _little_endian(head, at, 2) % 2**14


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


# Their graphs are large: they are traced once for all datasets of a size.
traced_image = tf.function(decode_image, autograph=False)
traced_views = tf.function(decode_views, autograph=False)


def decode_pixels(
    encoded: tf.Tensor, *, smallest: tuple[int, int] | None = None
) -> tf.Tensor:
    """Decodes one image at its own size, or not far above `smallest`."""
    head = head_bytes(encoded)
    branches = (
        lambda: _refuse_unknown(encoded),
        lambda: _decode_jpeg(encoded, smallest),
        lambda: _decode_png(encoded, head),
        lambda: _decode_gif(encoded),
        lambda: _decode_bmp(encoded, head),
        lambda: _decode_webp(encoded, head),
    )
    pixels = tf.switch_case(image_kind(head), branches)
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
    names = ", ".join(KINDS[1:])
    message = tf.where(
        tf.strings.length(encoded) == 0,
        "The file is empty.",
        f"Not an image of a known kind ({names}).",
    )
    with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
        return tf.zeros([1, 1, 3], tf.uint8)


def _decode_jpeg(encoded: tf.Tensor, smallest: tuple[int, int] | None) -> tf.Tensor:
    width, height = jpeg_size(encoded)
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
    encoded = _require_within_limit(encoded, *png_size(head))
    return tf.io.decode_png(encoded, channels=3)


def _decode_gif(encoded: tf.Tensor) -> tf.Tensor:
    frame, (width, height) = first_gif_frame(encoded)
    return tf.io.decode_gif(_require_within_limit(frame, width, height))[0]


def _decode_bmp(encoded: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    header_size, bits, compression = (
        _little_endian(head, 14, 4),
        _little_endian(head, 28, 2),
        _little_endian(head, 30, 4),
    )
    # TensorFlow would take compressed bytes for pixels. 3 means colour masks,
    # which 32-bit files with transparency have; they are in the usual order.
    plain = (compression == 0) | ((compression == 3) & (bits == 32))
    known = (header_size >= 40) & plain & tf.reduce_any(bits == [8, 24, 32])
    message = "A BMP file of another kind than uncompressed 8, 24 or 32 bits."
    encoded = _require(encoded, known, tf.constant(message))
    encoded = _require_within_limit(encoded, *bmp_size(head))
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
    table = bytes_at(encoded, 14 + header_size, 1024)
    table = tf.io.decode_raw(table, tf.uint8, fixed_length=1024)
    return tf.gather(tf.reshape(table, [256, 4])[:, 2::-1], tf.cast(numbers, tf.int32))


def _decode_webp(encoded: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    # An animated WebP has aborted the whole process in TensorFlow 2.21.
    still = ~(_has(head, 12, b"VP8X") & (head[20] // 2 % 2 == 1))
    message = tf.constant("An animated WebP, which TensorFlow cannot read.")
    encoded = _require(encoded, still, message)
    encoded = _require_within_limit(encoded, *webp_size(head))
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


# Pixels that may lie decoded at the same time. What is beyond goes the slower way,
# which holds no more of them than there are cores.
PIXEL_BUDGET = 64_000_000

_JPEG, _PNG = KINDS.index("JPEG"), KINDS.index("PNG")
_UNKNOWN = KINDS.index("unknown")


def decode_images(
    encoded: tf.Tensor, image_size: int | tuple[int, int]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes what can be decoded; the rest is black and not valid."""
    size = checked_size(image_size)
    heads = head_bytes(encoded)
    kinds = image_kind(heads)
    shapes = _caught(
        encoded,
        kinds == _JPEG,
        tf.io.extract_jpeg_shape,
        tf.zeros([tf.size(encoded), 3], tf.int32),
    )
    width, height = png_size(heads)
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
    # For those that a served graph runs anew on each request: looking for a better form
    # of the pipeline takes longer there than the pipeline.
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    index, results = data.with_options(options).get_single_element()
    kept = index >= 0
    return tf.boolean_mask(index, kept), tf.boolean_mask(results, kept)
