"""Decodes image files into pixels of the size that a model takes."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import io
import math
import operator
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from keras_rsft.errors import DataError, InvalidArgument


def without_autotuning(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the same data set with fixed buffers and a call for each core."""
    # `tf.data`'s tuner has nothing to find in pipelines as short as ours, and its
    # thread is asleep for up to five seconds when an iterator is dropped, which then
    # waits for it (seen with TensorFlow 2.21 at the end of passes of five seconds and
    # more).
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _apart(function: Callable) -> Callable:
    """Has a function traced apart, once and when it is needed, for all who call it."""
    attributes = {"_noinline": True}

    @functools.cache  # Traced once for all graphs.
    def traced(limit: int) -> Any:
        del limit
        return tf.function(
            function, autograph=False, experimental_attributes=attributes
        )

    @functools.wraps(function)
    def called(*arguments: Any) -> Any:
        return traced(_most_pixels())(*arguments)

    return called


SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp")
)
# Of kinds that TensorFlow cannot read, and Pillow can.
_TIFF, _HEIF = (".tif", ".tiff"), (".heic", ".heif")
MORE_SUFFIXES = frozenset((*_TIFF, *_HEIF, ".avif"))


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Returns the endings of images that can be read with what is installed."""
    if importlib.util.find_spec("PIL") is None:
        return SUFFIXES
    from PIL import features

    heif = _HEIF if importlib.util.find_spec("pillow_heif") else ()
    avif = (".avif",) if features.check("avif") else ()
    return SUFFIXES.union(_TIFF, heif, avif)


def needs_pillow(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in readable_suffixes() - SUFFIXES


def read_image(path: str) -> bytes:
    """Returns a file's bytes; those of a kind that only Pillow reads as PNG, upright.

    Raises DataError if Pillow cannot read it, OSError if it cannot be opened.
    """
    with open(path, "rb") as file:
        if not needs_pillow(path):
            return file.read()
        from PIL import Image, ImageOps

        if path.lower().endswith(_HEIF):
            importlib.import_module("pillow_heif").register_heif_opener()
        try:
            image: Any = Image.open(file)
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(_too_large(*image.size))
            image = ImageOps.exif_transpose(image)
            if image.mode not in ("1", "L", "LA", "I;16", "RGB", "RGBA"):
                mode = "RGBA" if image.has_transparency_data else "RGB"
                image = image.convert(mode)
            known = io.BytesIO()
            image.save(known, "PNG", compress_level=1)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as why:
            reason = str(why).partition(" <")[0].rstrip(".")
            raise DataError(f"Pillow cannot read the file: {reason}.") from why
    return known.getvalue()


KINDS = ("unknown", "JPEG", "PNG", "GIF", "BMP", "WebP")
# A dot stands for any byte.
_SIGNATURES = (
    b"\xff\xd8\xff.........",
    b"\x89PNG\r\n\x1a\n....",
    b"GIF8........",
    b"BM..........",
    b"RIFF....WEBP",
)
_HEAD_BYTES = 70  # The longest header read here: BMP with its colour masks.
_PART_BYTES = 10


def bytes_at(encoded: tf.Tensor, start: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Returns a part of the bytes, as far as they reach."""
    # Unlike `tf.strings.substr` it has no error for a start behind the end: that
    # error's message holds the bytes themselves, which Python fails to decode.
    length = tf.cast(tf.strings.length(encoded), tf.int64)
    start = tf.minimum(tf.cast(start, tf.int64), length)
    return tf.strings.substr(encoded, start, tf.cast(count, tf.int64))


def _values_at(encoded: tf.Tensor, start: Any, count: int) -> tf.Tensor:
    """Returns bytes as int64, zeros behind the end."""
    part = bytes_at(encoded, start, count)
    return tf.cast(tf.io.decode_raw(part, tf.uint8, fixed_length=count), tf.int64)


def _numbers(
    values: tf.Tensor, *places: tuple[int, int], order: str = "little"
) -> list[tf.Tensor]:
    """Reads unsigned numbers in bytes `(..., n)`, each at a place (first, count)."""
    # One product, for each node of a graph takes its time to build and to load.
    weights = np.zeros((len(places), values.shape[-1]), np.int64)
    step = 1 if order == "little" else -1
    for row, (at, count) in zip(weights, places, strict=True):
        row[at : at + count] = 256 ** np.arange(count)[::step]
    return tf.unstack(tf.linalg.matvec(weights, values), num=len(places), axis=-1)


def _code(signature: bytes, order: Literal["little", "big"] = "little") -> int:
    return int.from_bytes(signature, order)


@_apart
def first_gif_frame(encoded: tf.Tensor) -> tf.Tensor:
    """Cuts a GIF file down to its first frame."""
    # TensorFlow's decoder unpacks every frame before it returns the first, so an
    # animation of any number and size would be in memory at once.
    raw = tf.io.decode_raw(encoded, tf.uint8)
    raw = tf.pad(raw, [[0, 1024]])  # Zeros end every walk, which cannot leap over them.

    def byte(at: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.gather(raw, at), tf.int32)

    def after_palette(at: tf.Tensor, flags: tf.Tensor) -> tf.Tensor:
        size = 3 * tf.bitwise.left_shift(2, flags % 8)
        return at + tf.where(flags >= 0x80, size, 0)

    def after_blocks(at: tf.Tensor) -> tf.Tensor:
        """Follows blocks of a length byte and up to 255 bytes to the empty one."""
        step = (lambda at: byte(at) > 0), (lambda at: (at + byte(at) + 1,))
        return tf.while_loop(*step, (at,))[0] + 1

    def after_extension(at: tf.Tensor, hidden: tf.Tensor) -> tuple[tf.Tensor, ...]:
        # A graphic control extension may name the colour that stands for nothing.
        names = (byte(at + 1) == 0xF9) & (byte(at + 3) % 2 == 1)
        return after_blocks(at + 2), tf.where(names, byte(at + 6), hidden)

    begin = after_palette(13, byte(10))
    frame, hidden = tf.while_loop(
        lambda at, hidden: byte(at) == 0x21,  # An extension, such as a comment.
        after_extension,
        (begin, tf.constant(-1)),
    )
    end = after_blocks(after_palette(frame + 10, byte(frame + 9)) + 1)
    # Without the extensions that colour is one like others, and is made white.
    own = byte(frame + 9) >= 0x80
    palette = tf.where(own, frame + 10, 13)
    colours = after_palette(palette, byte(tf.where(own, frame + 9, 10)))
    white = palette + 3 * hidden
    rest = bytes_at(encoded, white + 3, tf.size(raw))
    whitened = [bytes_at(encoded, 0, white), tf.constant(b"\xff\xff\xff"), rest]
    encoded = tf.where(
        (hidden >= 0) & (white < colours), tf.strings.join(whitened), encoded
    )
    parts = (
        bytes_at(encoded, 0, begin),
        bytes_at(encoded, frame, 1),
        tf.constant(b"\0\0\0\0"),  # left and top
        bytes_at(encoded, frame + 5, end - frame - 5),
        tf.constant(b";"),
    )
    size = _numbers(_values_at(encoded, frame + 5, 4), (0, 2), (2, 2))
    return _require_within_limit(tf.strings.join(parts), *size)


_MOST_PARTS = 1000  # Of a file; more are not looked at.
_UPRIGHT = np.int64(1)
# Pixels `(h, w, 3)`, or 4 with opacity, and their orientation in [1, 8].
_Decoded = tuple[tf.Tensor, tf.Tensor]
# By orientation: whether rows and columns are mirrored.
_MIRRORED = np.array([[0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]], bool)
_BAND_PIXELS = 1_000_000


_JPEG, _PNG, _WEBP = (KINDS.index(kind) for kind in ("JPEG", "PNG", "WebP"))
# The parts that are looked for, how many bytes come before their content, and in what.
# The last is a colour that stands for nothing.
_WANTED = (b"\xff\xe1..Exif\0\0", b"....eXIf..", b"EXIF......", b"....tRNS..")
_WANTED_HEADS = np.array([4, 8, 8, 8], np.int64)
_WANTED_IN = np.array([_JPEG, _PNG, _WEBP, _PNG], np.int32)


@_apart
def _look_for_parts(encoded: tf.Tensor, kind: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns whether a colour is hidden, and the orientation, in [1, 8]."""
    size = tf.cast(tf.strings.length(encoded), tf.int64)
    wanted = np.array([list(signature) for signature in _WANTED])

    def length_of(head: tf.Tensor) -> tf.Tensor:
        """Returns a part's length, 0 of the last one."""
        marker, segment, chunk, name = _numbers(
            head, (1, 1), (2, 2), (0, 4), (4, 4), order="big"
        )
        # The segments of applications, comments and fillers come first.
        goes_on = (head[0] == 0xFF) & ((marker // 16 == 0xE) | (marker >= 0xFE))
        segment = tf.where(marker == 0xFF, np.int64(1), 2 + segment)
        (padded,) = _numbers(head, (4, 4))
        lengths: list[Any] = [np.int64(0)] * len(KINDS)
        lengths[_JPEG] = tf.where(goes_on, segment, np.int64(0))
        lengths[_PNG] = tf.where(name == _code(b"IDAT", "big"), np.int64(0), 12 + chunk)
        lengths[_WEBP] = 8 + padded + padded % 2
        return tf.gather(tf.stack(lengths), kind)

    def step(at: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        head = _values_at(encoded, at, _PART_BYTES)
        match = tf.reduce_all((head == wanted) | (wanted == ord(".")), axis=-1)
        found = tf.where(match & (kind == _WANTED_IN) & (found == 0), at, found)
        length = length_of(head)
        return tf.where(length > 0, at + length, size), found

    first = np.zeros(len(KINDS), np.int64)
    first[[_JPEG, _PNG, _WEBP]] = 2, 8, 12
    start = tf.gather(first, kind), tf.zeros([len(_WANTED)], tf.int64)
    found = tf.while_loop(
        lambda at, found: at < size, step, start, maximum_iterations=_MOST_PARTS
    )[1]
    exif = tf.reduce_max(tf.where(found > 0, found + _WANTED_HEADS, found)[:-1])
    orientation = tf.cond(
        exif > 0, lambda: _orientation(encoded, exif), lambda: tf.constant(_UPRIGHT)
    )
    return found[-1] > 0, orientation


def _mirrored(orientation: tf.Tensor) -> tf.Tensor:
    return tf.gather(_MIRRORED, (orientation - 1) % 4)


def _upright(pixels: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Turns and mirrors pixels as an EXIF orientation, in [1, 8], asks for."""

    def turned() -> tf.Tensor:
        swapped = (lambda: tf.transpose(pixels, [1, 0, 2])), (lambda: pixels)
        straight = tf.cond(orientation > 4, *swapped)
        return tf.raw_ops.Reverse(tensor=straight, dims=_mirrored(orientation))

    return tf.cond(orientation > 1, turned, lambda: pixels)


@_apart
def _orientation(encoded: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """Returns the orientation, in [1, 8], that EXIF data from there on name, else 1."""
    (mark,) = _numbers(_values_at(encoded, start, 6), (0, 6))
    start += tf.where(mark == _code(b"Exif\0\0"), np.int64(6), np.int64(0))
    head = _values_at(encoded, start, 8)
    is_big = head[0] == ord("M")

    def numbers(values: tf.Tensor, *places: tuple[int, int]) -> list[tf.Tensor]:
        orders = [
            tf.stack(_numbers(values, *places, order=order))
            for order in ("big", "little")
        ]
        return tf.unstack(tf.where(is_big, *orders), num=len(places))

    magic, directory = numbers(head, (2, 2), (4, 4))
    listed = _values_at(encoded, start + directory, 2 + 12 * _MOST_PARTS)
    (count,) = numbers(listed[:2], (0, 2))
    tag, value = numbers(tf.reshape(listed[2:], [_MOST_PARTS, 12]), (0, 2), (8, 2))
    is_asked = (tag == 0x0112) & (tf.range(_MOST_PARTS, dtype=tf.int64) < count)
    value = tf.reduce_max(tf.where(is_asked, value, _UPRIGHT))
    return tf.where((magic == 42) & (value >= 1) & (value <= 8), value, _UPRIGHT)


@_apart
def _on_white(pixels: tf.Tensor) -> tf.Tensor:
    """Puts uint8 pixels `(h, w, 4)`, the last of which is opacity, on white."""
    height, width = tf.shape(pixels)[0], tf.shape(pixels)[1]
    # As a whole, a large image would need its memory ten times.
    rows = tf.maximum(1, _BAND_PIXELS // tf.maximum(width, 1))

    def blended(start: tf.Tensor) -> tf.Tensor:
        part = tf.cast(pixels[start : start + rows], tf.uint16)
        share = part[..., 3:]  # Sums stay below 2**16.
        total = part[..., :3] * share + 255 * (255 - share) + 128
        rounded = tf.bitwise.right_shift(total, 8) + total  # Divided by 255.
        return tf.cast(tf.bitwise.right_shift(rounded, 8), tf.uint8)

    def in_bands() -> tf.Tensor:
        count = (height + rows - 1) // rows
        bands = tf.TensorArray(tf.uint8, count, infer_shape=False)
        return tf.while_loop(
            lambda at, bands: at < count,
            lambda at, bands: (at + 1, bands.write(at, blended(at * rows))),
            (0, bands),
            parallel_iterations=1,
        )[1].concat()

    opaque = tf.reduce_all(pixels[..., 3] == 255)
    return tf.cond(opaque, lambda: pixels[..., :3], in_bands)


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
    # What is transparent is put on white, the orientation in EXIF data is applied, and
    # values of 16 bits are divided by 256. The centre is cropped to the target's aspect
    # ratio, then resized with antialiased bilinear interpolation.
    height, width = size = checked_size(image_size)
    encoded = tf.convert_to_tensor(encoded)
    if encoded.dtype != tf.string or height != width:
        return centre_resize(decode_pixels(encoded, smallest=size), size)
    # A square is turned when it is small: that takes a tenth of the time.
    pixels, orientation = _decode_as_stored(encoded, size)
    return _upright(centre_resize(pixels, size, orientation), orientation)


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
    return _upright(*_decode_as_stored(encoded, smallest))


def _decode_as_stored(
    encoded: tf.Tensor, smallest: tuple[int, int] | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes one image, and returns its orientation, in [1, 8], too."""
    # The first bytes, zeros where there are fewer.
    head = _values_at(encoded, 0, _HEAD_BYTES)
    signatures = np.array([list(signature) for signature in _SIGNATURES], np.int64)
    same = (head[: signatures.shape[1]] == signatures) | (signatures == ord("."))
    matches = tf.cast(tf.reduce_all(same, axis=-1), tf.int32)
    kind = tf.reduce_sum(matches * np.arange(1, len(KINDS), dtype=np.int32))
    branches = (
        lambda: _refuse_unknown(encoded),
        lambda: _decode_jpeg(encoded, head, smallest),
        lambda: _decode_png(encoded, head),
        lambda: (tf.io.decode_gif(first_gif_frame(encoded))[0], _UPRIGHT),
        lambda: (_decode_bmp(encoded, head), _UPRIGHT),
        lambda: _decode_webp(encoded, head),
    )
    pixels, orientation = tf.switch_case(kind, branches)
    pixels = tf.cond(
        tf.shape(pixels)[-1] == 4, lambda: _on_white(pixels), lambda: pixels
    )
    return tf.ensure_shape(pixels, (None, None, 3)), orientation


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
    text = error.message.partition("\n\t [[")[0].rpartition("\n\n")[2]
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*?\]| name:.*$", "", text)
    ours = re.search(r"(?:data: b['\"]|failed: \[)(.*)['\"\]]", text, re.DOTALL)
    return " ".join((ours.group(1) if ours else text).split())


@_apart
def _refuse_unknown(encoded: tf.Tensor) -> _Decoded:
    message = tf.where(
        tf.strings.length(encoded) == 0,
        "The file is empty.",
        f"Not an image of a known kind ({', '.join(KINDS[1:])}).",
    )
    with tf.control_dependencies([tf.debugging.Assert(False, [message])]):
        return tf.zeros([1, 1, 3], tf.uint8), _UPRIGHT


def _parts_if(
    is_needed: tf.Tensor, encoded: tf.Tensor, kind: int
) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.cond(
        is_needed,
        lambda: _look_for_parts(encoded, tf.constant(kind)),
        lambda: (tf.constant(False), tf.constant(_UPRIGHT)),
    )


def _decode_jpeg(
    encoded: tf.Tensor, head: tf.Tensor, smallest: tuple[int, int] | None
) -> _Decoded:
    shape = tf.io.extract_jpeg_shape(encoded, output_type=tf.int32)
    height, width = tf.unstack(tf.cast(shape, tf.int64)[:2], num=2)
    encoded = _require_within_limit(encoded, width, height)

    # Most files have no more than a JFIF segment before their tables.
    first, second, after_first = _numbers(head, (2, 4), (3, 1), (21, 1))
    second = tf.where(first == _code(b"\xff\xe0\0\x10"), after_first, second)
    _, orientation = _parts_if(second != 0xDB, encoded, _JPEG)
    if smallest is None:
        return tf.io.decode_jpeg(encoded, channels=3), orientation
    sides = np.array(smallest, np.int64)
    sides = tf.where(orientation > 4, sides[::-1], sides)
    scale = tf.reduce_min(tf.stack([height, width]) // sides)
    fits = scale >= _SCALED_DECODE_MARGIN * np.array(_JPEG_RATIOS[1:])
    ratio_index = tf.reduce_sum(tf.cast(fits, tf.int32))
    branches = [
        functools.partial(tf.io.decode_jpeg, encoded, channels=3, ratio=ratio)
        for ratio in _JPEG_RATIOS
    ]
    return tf.switch_case(ratio_index, branches), orientation


@_apart
def _decode_png(encoded: tf.Tensor, head: tf.Tensor) -> _Decoded:
    # The IHDR chunk, which must come first, has the size.
    width, height, colours, chunk = _numbers(
        head, (16, 4), (20, 4), (25, 1), (37, 4), order="big"
    )
    encoded = _require_within_limit(encoded, width, height)

    # Many files have no chunk between their head and their pixels.
    hides, orientation = _parts_if(chunk != _code(b"IDAT", "big"), encoded, _PNG)
    pixels = tf.cond(
        (colours >= 4) | hides,
        lambda: tf.io.decode_png(encoded, channels=4),
        lambda: tf.io.decode_png(encoded, channels=3),
    )
    return pixels, orientation


@_apart
def _decode_bmp(encoded: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    header_size, width, height, bits, compression, opacity = _numbers(
        head, (14, 4), (18, 4), (22, 4), (28, 2), (30, 4), (66, 4)
    )
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

    # Only a header of this size has a mask of the opacity. All 0 means no opacity.
    masked = (bits == 32) & (compression == 3) & (header_size >= 56)
    is_alone = opacity == _code(b"\0\0\0\xff")

    def see_through() -> tf.Tensor:
        shown = tf.reduce_any(pixels[..., 3] > 0)
        return tf.cond(shown, lambda: pixels, lambda: pixels[..., :3])

    def opaque() -> tf.Tensor:
        return tf.cond(bits == 8, look_up, lambda: pixels[..., :3])

    return tf.cond(masked & is_alone, see_through, opaque)


@_apart
def _decode_webp(encoded: tf.Tensor, head: tf.Tensor) -> _Decoded:
    kind, flags, *sizes = _numbers(
        head, (12, 4), (20, 1), (26, 2), (28, 2), (21, 4), (24, 3), (27, 3)
    )
    is_extended = kind == _code(b"VP8X")
    # An animated WebP has aborted the whole process in TensorFlow 2.21.
    message = tf.constant("An animated WebP, which TensorFlow cannot read.")
    encoded = _require(encoded, ~(is_extended & (flags // 2 % 2 == 1)), message)
    low_width, low_height, lossless, width, height = sizes
    lossless_height = lossless // 2**14
    is_lossless = kind == _code(b"VP8L")
    width, low_width, lossless = width + 1, low_width % 2**14, lossless % 2**14 + 1
    height, low_height = height + 1, low_height % 2**14
    lossless_height = lossless_height % 2**14 + 1
    width = tf.where(is_extended, width, tf.where(is_lossless, lossless, low_width))
    height = tf.where(
        is_extended, height, tf.where(is_lossless, lossless_height, low_height)
    )
    encoded = _require_within_limit(encoded, width, height)
    pixels = tf.io.decode_image(encoded, expand_animations=False)
    _, orientation = _parts_if(is_extended & (flags // 8 % 2 == 1), encoded, _WEBP)
    return pixels, orientation


def _too_large(width: Any, height: Any) -> str:
    return f"An image of {width} x {height} pixels; the most is {_most_pixels():,}."


def _require_within_limit(
    encoded: tf.Tensor, width: tf.Tensor, height: tf.Tensor
) -> tf.Tensor:
    most = _most_pixels()
    message = tf.strings.format(_too_large("{}", "{}"), (width, height))
    # Dividing, for the product of two 32-bit numbers may not fit 64 bits.
    return _require(encoded, width <= most // tf.maximum(height, 1), message)


def _most_pixels() -> int:
    return _fewer_pixels.get() or MAX_PIXELS


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


def centre_resize(
    pixels: tf.Tensor, size: tuple[int, int], orientation: tf.Tensor | None = None
) -> tf.Tensor:
    """Crops the centre of uint8 pixels `(h, w, 3)`; float32 of the size given.

    An `orientation` says how the result will be turned: where the centre is between two
    pixels, its crop must be the one of the turned image.
    """
    height, width = tf.shape(pixels)[0], tf.shape(pixels)[1]
    crop_height, crop_width = _largest_crop(height, width, size[1] / size[0])
    down, right = height - crop_height, width - crop_width
    if orientation is not None:
        mirrored = tf.cast(_mirrored(orientation)[:2], tf.int32)
        mirrored = tf.where(orientation > 4, mirrored[::-1], mirrored)
        down, right = down + mirrored[0], right + mirrored[1]
    top, left = down // 2, right // 2
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
