"""Reads the kind and the size of an encoded image from its first bytes.

Everything here is made of TensorFlow ops, because it is part of the exported
serving graph; nothing here allocates pixels. `decode.py` refuses what is too
large by these sizes, before a decoder sees the bytes.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

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


def bmp_layout(head: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns a BMP file's header size, bits per pixel and compression number."""
    return (
        _little_endian(head, 14, 4),
        _little_endian(head, 28, 2),
        _little_endian(head, 30, 4),
    )


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


def webp_is_animated(head: tf.Tensor) -> tf.Tensor:
    """Says whether a WebP file's header announces an animation."""
    return _has(head, 12, b"VP8X") & (head[20] // 2 % 2 == 1)


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
