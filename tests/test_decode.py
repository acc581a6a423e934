"""Decoding: every format against Pillow, damaged files, crop and resize."""

from __future__ import annotations

import contextlib
import io
import struct
import time
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from keras_rsft.data import _images as decode
from keras_rsft.data._images import MAX_PIXELS, decode_image
from keras_rsft.errors import InvalidArgument

HEIGHT, WIDTH = 48, 64


def blocks(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Coloured 8 x 8 blocks: JPEG keeps them nearly as they are."""
    colours = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3))
    return np.kron(colours, np.ones((8, 8, 1))).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_files() -> dict[str, bytes]:
    colour = Image.fromarray(blocks())
    turned = colour.rotate(180)
    hidden = tuple(blocks()[0, 0].tolist())
    see_through = colour.convert("RGBA")
    see_through.putalpha(Image.fromarray(blocks()[..., 0]))
    return {
        "jpeg": encode(colour, "JPEG", quality=95, subsampling=0),
        "jpeg subsampled": encode(colour, "JPEG", quality=95),
        "jpeg progressive": encode(colour, "JPEG", quality=95, progressive=True),
        "jpeg grey": encode(colour.convert("L"), "JPEG", quality=95),
        "jpeg cmyk": encode(colour.convert("CMYK"), "JPEG", quality=95),
        "png": encode(colour, "PNG"),
        "png grey": encode(colour.convert("L"), "PNG"),
        "png grey alpha": encode(see_through.convert("LA"), "PNG"),
        "png alpha": encode(see_through, "PNG"),
        "png palette": encode(colour.convert("P"), "PNG"),
        "png palette alpha": encode(
            colour.convert("P"), "PNG", transparency=bytes(range(0, 250, 25))
        ),
        "png one colour hidden": encode(colour, "PNG", transparency=hidden),
        "png one grey hidden": encode(
            colour.convert("L"),
            "PNG",
            transparency=colour.convert("L").getpixel((0, 0)),
        ),
        "png 1 bit": encode(colour.convert("1"), "PNG"),
        "gif": encode(colour, "GIF"),
        "gif animated": encode(colour, "GIF", save_all=True, append_images=[turned]),
        "gif hidden": encode(colour.convert("P"), "GIF", transparency=3, comment=b"c"),
        "gif comment": encode(colour, "GIF", comment=b"c" * 700),
        "bmp": encode(colour, "BMP"),
        "bmp grey": encode(colour.convert("L"), "BMP"),
        "bmp palette": encode(colour.convert("P"), "BMP"),
        "bmp alpha": encode(see_through, "BMP"),
        "webp": encode(colour, "WEBP", quality=95),
        "webp lossless": encode(colour, "WEBP", lossless=True),
        "webp lossless alpha": encode(see_through, "WEBP", lossless=True, exact=True),
        "webp alpha": encode(see_through, "WEBP", quality=95, exact=True),
        "webp metadata": encode(
            colour, "WEBP", quality=95, exif=b"Exif\0\0" + b"x" * 9
        ),
    }


def oriented(orientation: int, order: str) -> bytes:
    """EXIF data with a few entries, in either order of bytes."""
    pack = "<" if order == "little" else ">"
    entries = struct.pack(f"{pack}HHII", 0x0100, 4, 1, 0x0112)
    entries += struct.pack(f"{pack}HHIHH", 0x0112, 3, 1, orientation, 0)
    mark = b"II" if order == "little" else b"MM"
    head = mark + struct.pack(f"{pack}HI", 42, 12) + b"next"
    return b"Exif\0\0" + head + struct.pack(f"{pack}H", 2) + entries + bytes(4)


def stored(orientation: int, pixels: np.ndarray | None = None) -> np.ndarray:
    """Pixels, the blocks by default, as a camera held in such a way stores them."""
    turns = [1, 2, 3, 4, 5, 8, 7, 6]  # Each undoes one of 1 to 8.
    exif = Image.Exif()
    exif[0x0112] = turns[orientation - 1]
    image = Image.fromarray(blocks() if pixels is None else pixels)
    image.info["exif"] = exif.tobytes()
    return np.asarray(ImageOps.exif_transpose(image))


FILES = make_files()
TURNED = Image.fromarray(stored(6))
FILES |= {
    "jpeg turned": encode(
        TURNED, "JPEG", quality=95, subsampling=0, exif=oriented(6, "big")
    ),
    "png turned": encode(TURNED, "PNG", exif=oriented(6, "little")),
    "webp turned": encode(TURNED, "WEBP", lossless=True, exif=oriented(6, "big")),
}
# A GIF is whole without its last byte, and an animation without its last frame.
TRUNCATABLE = [name for name in FILES if name != "gif animated"]


def pillow_pixels(encoded: bytes) -> np.ndarray:
    """What Pillow decodes, upright, on white."""
    image = Image.open(io.BytesIO(encoded))
    with contextlib.suppress(SyntaxError):  # Of EXIF data that are none.
        ImageOps.exif_transpose(image, in_place=True)
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@tf.function(input_signature=[tf.TensorSpec([], tf.string)])
def pixels_in_graph(encoded: tf.Tensor) -> tf.Tensor:
    return decode.decode_pixels(encoded)


def reason(encoded: bytes) -> str:
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        decode.decode_pixels(tf.constant(encoded))
    return decode.readable_reason(error.value)


@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_pillow(name):
    pixels = pixels_in_graph(tf.constant(FILES[name])).numpy()
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.dtype == np.uint8
    difference = np.abs(pixels.astype(int) - pillow_pixels(FILES[name]))
    # They differ in how they transform back and enlarge halved colour planes.
    halved = name in ("jpeg subsampled", "jpeg progressive")
    assert difference.max() <= (8 if halved else 1)
    assert difference.mean() < (1 if halved else 0.1)


@pytest.mark.parametrize("name", FILES)
def test_eager_equals_graph(name):
    encoded = tf.constant(FILES[name])
    np.testing.assert_array_equal(
        decode.decode_pixels(encoded), pixels_in_graph(encoded)
    )


def test_16_bit_png_is_scaled_to_8_bits():
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    encoded = encode(Image.fromarray(values), "PNG")
    pixels = decode.decode_pixels(tf.constant(encoded)).numpy()
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_photo_with_its_orientation_in_a_tag_is_upright(kind, orientation, order):
    image = Image.fromarray(stored(orientation))
    options = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "PNG": {},
        "WEBP": {"lossless": True, "quality": 0},
    }
    exif = oriented(orientation, order)
    pixels = decode.decode_pixels(
        tf.constant(encode(image, kind, exif=exif, **options[kind]))
    )
    assert np.abs(pixels.numpy().astype(int) - blocks()).max() <= 1
    see_through = image.convert("RGBA")
    see_through.putalpha(Image.fromarray(255 - stored(orientation)[..., 0]))
    if kind != "JPEG":
        file = encode(see_through, kind, exif=exif, **options[kind])
        pixels = decode.decode_pixels(tf.constant(file))
        assert np.abs(pixels.numpy().astype(int) - pillow_pixels(file)).max() <= 1


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_square_is_cut_from_the_same_pixels(orientation):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 14, 3), np.uint8)
    turned, exif = stored(orientation, pixels), oriented(orientation, "big")
    files = (
        encode(Image.fromarray(pixels), "PNG"),
        encode(Image.fromarray(turned), "PNG", exif=exif),
    )
    upright, turned = (decode_image(tf.constant(one), 5) for one in files)
    np.testing.assert_allclose(turned, upright, atol=1e-3)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (7, 30), (300, 200)])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_photo_equals_its_upright_twin(orientation, size):
    def twin(values, orientation):
        image = Image.fromarray(np.kron(values, np.ones((12, 12, 1), np.uint8)))
        exif = oriented(orientation, "big")
        return tf.constant(encode(image, "JPEG", quality=100, subsampling=0, exif=exif))

    upright, turned = twin(blocks(), 1), twin(stored(orientation), orientation)
    difference = np.abs(decode_image(turned, size) - decode_image(upright, size))
    assert difference.max() <= 1.5
    # The same scale was decoded: the longer side of a turned file is the height.
    shapes = [
        decode.decode_pixels(one, smallest=size).shape for one in (upright, turned)
    ]
    assert shapes[0] == shapes[1]


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


@pytest.mark.parametrize(
    "before",
    [
        b"",
        segment(0xE0, b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0"),
        segment(0xE0, b"JFIF\0\x01\x01\0\0\x01\0\x01\x01\x01" + bytes(3)),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(40_000)),
        segment(0xE2, b"ICC_PROFILE\0\x01\x01" + bytes(60_000)) * 3,
        segment(0xFE, b"a comment") + b"\xff\xff\xff",
        segment(0xED, b"Photoshop 3.0\0") + segment(0xEF, b"other" + bytes(5)),
    ],
)
def test_other_segments_may_stand_before_the_orientation(before):
    image = Image.fromarray(stored(6))
    plain = encode(image, "JPEG", quality=95, subsampling=0)
    rest = plain[2 + 18 :]  # Without Pillow's own JFIF segment.
    exif = segment(0xE1, oriented(6, "little"))
    file = plain[:2] + before + exif + rest
    pixels = pixels_in_graph(tf.constant(file)).numpy()
    assert np.abs(pixels.astype(int) - blocks()).max() <= 1


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II+\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(50),
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x00",
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_turn_nothing(kind, exif):
    image = Image.fromarray(blocks())
    file = encode(image, kind, exif=exif, quality=95)
    plain = encode(image, kind, quality=95)
    np.testing.assert_array_equal(
        pixels_in_graph(tf.constant(file)), decode.decode_pixels(tf.constant(plain))
    )


def test_many_segments_do_not_take_long():
    file = b"\xff\xd8" + segment(0xE5, b"") * 500_000 + FILES["jpeg"][20:]
    began = time.perf_counter()
    pixels_in_graph(tf.constant(file))
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("rows", [1, 5, 47, 48])
def test_large_images_are_put_on_white_in_bands(rows, monkeypatch):
    monkeypatch.setattr(decode, "_BAND_PIXELS", rows * WIDTH)
    for name in ("png alpha", "webp lossless alpha"):
        pixels = decode.decode_pixels(tf.constant(FILES[name])).numpy()
        assert np.abs(pixels.astype(int) - pillow_pixels(FILES[name])).max() <= 1


def test_16_bits_with_transparency():
    colours = np.array([[[0, 0, 0], [65535, 256, 255], [40000, 0, 0]]], np.uint16)
    opacity = np.array([[[0], [65535], [32768]]], np.uint16)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    rows = b"\0" + np.concatenate([colours, opacity], axis=-1).astype(">u2").tobytes()
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 16, 6, 0, 0, 0))
    body += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    pixels = decode.decode_pixels(tf.constant(b"\x89PNG\r\n\x1a\n" + body)).numpy()
    assert pixels[0].tolist() == [[255, 255, 255], [255, 1, 0], [205, 127, 127]]


@pytest.mark.parametrize(
    "mask, expected", [(0xFF000000, [255, 155, 100]), (0, [100] * 3)]
)
def test_a_bmp_with_a_mask_of_opacity_is_put_on_white(mask, expected):
    header = struct.pack("<IiiHHIIiiII", 108, 3, 1, 1, 32, 3, 12, 0, 0, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, mask) + bytes(108 - 56)
    rows = b"".join(bytes([100, 100, 100, opacity]) for opacity in (0, 165, 255))
    head = b"BM" + struct.pack("<IHHI", 14 + 108 + 12, 0, 0, 14 + 108)
    pixels = decode.decode_pixels(tf.constant(head + header + rows)).numpy()
    assert pixels[0, :, 0].tolist() == expected
    hidden = head + header + rows.replace(b"\xa5", b"\0").replace(b"\xff", b"\0")
    pixels = decode.decode_pixels(tf.constant(hidden)).numpy()
    assert pixels[0, :, 0].tolist() == [100] * 3  # Of opacity 0 everywhere: not used.


def test_gif_of_many_frames_decodes_the_first_only():
    frames = [Image.fromarray(np.full((40, 30), 9 * n, np.uint8)) for n in range(20)]
    encoded = encode(frames[3], "GIF", save_all=True, append_images=frames)
    one_frame = decode.first_gif_frame(tf.constant(encoded))
    assert Image.open(io.BytesIO(one_frame.numpy())).n_frames == 1
    assert np.all(decode.decode_pixels(tf.constant(encoded)).numpy() == 27)


@pytest.mark.parametrize("size", [254, 255, 256, 8191, 70000])
def test_gif_data_of_any_length_is_cut_at_its_end(size):
    noise = np.random.default_rng(size).integers(0, 256, (1, size), dtype=np.uint8)
    image = Image.fromarray(noise.reshape(-1, 1) if size < 65536 else noise[:, :65535])
    encoded = encode(image, "GIF", save_all=True, append_images=[image.rotate(180)])
    pixels = decode.decode_pixels(tf.constant(encoded)).numpy()
    np.testing.assert_array_equal(pixels[..., 0], np.asarray(image))


def test_bottom_up_and_top_down_bmp_are_the_same():
    upright = FILES["bmp"]
    (height,) = struct.unpack_from("<i", upright, 22)
    rows = np.frombuffer(upright[54:], np.uint8).reshape(HEIGHT, -1)[::-1]
    flipped = upright[:22] + struct.pack("<i", -height) + upright[26:54]
    np.testing.assert_array_equal(
        decode.decode_pixels(tf.constant(flipped + rows.tobytes())), blocks()
    )


@pytest.mark.parametrize("name", FILES)
def test_more_pixels_than_the_limit_are_refused(name, monkeypatch):
    encoded = tf.constant(FILES[name])
    monkeypatch.setattr(decode, "MAX_PIXELS", HEIGHT * WIDTH)
    decode.decode_pixels(encoded)  # exactly the limit
    monkeypatch.setattr(decode, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    sides = (HEIGHT, WIDTH) if name.endswith("turned") else (WIDTH, HEIGHT)
    expected = "An image of {} x {} pixels; the most is 3,071.".format(*sides)
    assert expected in reason(FILES[name])


@pytest.mark.parametrize(
    "width, height", [(30_000, 30_000), (MAX_PIXELS + 1, 1), (2**31 - 1, 2**31 - 1)]
)
def test_a_small_file_of_huge_size_is_refused_by_its_header(width, height):
    encoded = png_header(width, height)
    assert len(encoded) < 200
    expected = f"An image of {width} x {height} pixels; the most is 100,000,000."
    assert reason(encoded) == expected
    with pytest.raises(tf.errors.InvalidArgumentError, match="the most is"):
        pixels_in_graph(tf.constant(encoded))


@pytest.mark.parametrize("name", TRUNCATABLE)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(name, share):
    whole = FILES[name]
    cut = whole[: min(int(len(whole) * share), len(whole) - 2)]
    with pytest.raises(tf.errors.InvalidArgumentError):
        pixels_in_graph(tf.constant(cut))


@pytest.mark.parametrize("name", TRUNCATABLE)
def test_first_bytes_alone_are_refused(name):
    for length in (1, 2, 3, 6, 12, 13, 20, 29, 30, 54):
        assert reason(FILES[name][:length])


@pytest.mark.parametrize(
    "encoded, expected",
    [
        (b"", "The file is empty."),
        (b"\n", "Not an image of a known kind (JPEG, PNG, GIF, BMP, WebP)."),
        (b"Good morning", "Not an image of a known kind (JPEG, PNG, GIF, BMP, WebP)."),
        (b"RIFF\0\0\0\0WAVEfmt ", "Not an image of a known kind"),
        (encode(Image.fromarray(blocks()), "TIFF"), "Not an image of a known kind"),
        (b"BM" + bytes(60), "another kind than uncompressed 8, 24 or 32 bits"),
        (b"GIF89a" + bytes(60), "Invalid GIF data"),
        (FILES["jpeg"][:4] + b"text", "Invalid JPEG data"),
    ],
)
def test_other_content_is_refused_with_a_reason(encoded, expected):
    assert reason(encoded).startswith(expected) or expected in reason(encoded)


def test_a_reason_names_no_node():
    for encoded in (FILES["jpeg"][:99], FILES["png"][:99], FILES["gif"][:99]):
        assert not set("{}[]") & set(reason(encoded))


def test_animated_webp_is_refused():
    first = Image.fromarray(blocks())
    frames = encode(first, "WEBP", save_all=True, append_images=[first.rotate(180)])
    assert reason(frames) == "An animated WebP, which TensorFlow cannot read."


@pytest.mark.parametrize("field, value", [(28, 4), (28, 16), (30, 1), (14, 12)])
def test_unusual_bmp_is_refused(field, value):
    changed = bytearray(FILES["bmp palette"])
    changed[field] = value
    assert "another kind than uncompressed" in reason(bytes(changed))


@pytest.mark.parametrize("header_size", [1 << 20, 1 << 31, 2**32 - 1])
def test_a_bmp_palette_behind_the_end_does_not_leak_bytes(header_size):
    changed = bytearray(FILES["bmp palette"])
    struct.pack_into("<I", changed, 14, header_size)
    pixels = decode.decode_pixels(tf.constant(bytes(changed)))
    assert np.all(pixels.numpy() == 0)  # no colour is left to look up


@pytest.mark.parametrize("size", [(48, 64), (12, 16), (96, 128), (7, 200), (300, 5)])
def test_result_has_the_size_asked_for(size):
    image = decode_image(tf.constant(FILES["png"]), size)
    assert image.shape == (*size, 3)
    assert image.dtype == tf.float32
    assert float(tf.reduce_min(image)) >= 0.0
    assert float(tf.reduce_max(image)) <= 255.0


def test_native_size_changes_nothing():
    image = decode_image(tf.constant(FILES["png"]), (HEIGHT, WIDTH))
    np.testing.assert_array_equal(image, blocks().astype(np.float32))


def test_a_square_is_cut_from_the_centre():
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 200
    encoded = encode(Image.fromarray(stripes), "PNG")
    np.testing.assert_allclose(decode_image(tf.constant(encoded), 10), 200, atol=1e-3)
    upright = encode(Image.fromarray(stripes.transpose(1, 0, 2)), "PNG")
    np.testing.assert_allclose(decode_image(tf.constant(upright), 10), 200, atol=1e-3)


def test_shrinking_averages_instead_of_skipping():
    lines = np.zeros((60, 60, 3), np.uint8)
    lines[:, ::2] = 200
    encoded = encode(Image.fromarray(lines), "PNG")
    # Every fifth column would be 200, 0, 200, 0 and so on.
    np.testing.assert_allclose(decode_image(tf.constant(encoded), 12), 100, atol=10)


def test_enlarging_is_smooth():
    edge = np.zeros((2, 2), np.uint8)
    edge[:, 1] = 80
    encoded = encode(Image.fromarray(edge), "PNG")
    row = decode_image(tf.constant(encoded), 8).numpy()[3, :, 0]
    # Bilinear between pixel centres at 0.5 and 1.5 of 2, flat beyond them.
    np.testing.assert_allclose(row, [0, 0, 10, 30, 50, 70, 80, 80], atol=1e-4)


def test_a_one_pixel_image_fills_the_result():
    encoded = encode(Image.fromarray(np.full((1, 1, 3), 7, np.uint8)), "PNG")
    np.testing.assert_allclose(decode_image(tf.constant(encoded), (5, 3)), 7, atol=1e-3)


@pytest.mark.parametrize("target, expected", [(100, 600), (101, 1200), (50, 300)])
def test_large_jpeg_is_decoded_smaller(target, expected):
    """1200 is 6 x 200 and 12 x 100: halved from 6 times on, quartered from 12."""
    encoded = encode(Image.new("RGB", (1200, 1200), (10, 200, 90)), "JPEG")
    smallest = {100: (200, 200), 101: (201, 200), 50: (100, 100)}[target]
    pixels = decode.decode_pixels(tf.constant(encoded), smallest=smallest)
    assert pixels.shape[0] == expected


def test_scaled_decoding_hardly_changes_the_result():
    small = np.random.default_rng(1).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    photo = Image.fromarray(small).resize((1200, 1200), Image.Resampling.BICUBIC)
    encoded = tf.constant(encode(photo, "JPEG", quality=90))
    whole = tf.image.resize(decode.decode_pixels(encoded), (96, 96), antialias=True)
    difference = np.abs(decode_image(encoded, 96) - whole)
    assert 0 < difference.mean() < 1
    assert difference.max() < 8


def test_truncated_large_jpeg_is_refused_at_any_scale():
    noise = np.random.default_rng(2).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    encoded = encode(Image.fromarray(noise), "JPEG")
    for target in (8, 40, 400):
        decode_image(tf.constant(encoded), target)
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode_image(tf.constant(encoded[: len(encoded) * 9 // 10]), target)


@pytest.mark.parametrize("size", [0, -1, 2.5, "96", None, (3,), (3, 0), (1, 2, 3)])
def test_wrong_image_size_is_refused(size):
    with pytest.raises(InvalidArgument, match="image_size"):
        decode_image(tf.constant(FILES["png"]), size)


def test_views_begin_with_the_plain_one_and_differ():
    encoded = tf.constant(FILES["png"])
    index = tf.constant(5, tf.int64)
    views = decode.decode_views(encoded, (24, 24), augmentations=4, seed=1, index=index)
    assert views.shape == (4, 24, 24, 3)
    np.testing.assert_array_equal(views[0], decode_image(encoded, 24))
    for one in range(4):
        for two in range(one):
            assert np.abs(views[one] - views[two]).mean() > 1


def test_a_view_depends_on_seed_index_and_number_only():
    def views(count, seed=1, index=5):
        return decode.decode_views(
            tf.constant(FILES["png"]),
            24,
            augmentations=count,
            seed=seed,
            index=tf.constant(index, tf.int64),
        ).numpy()

    np.testing.assert_array_equal(views(4)[:3], views(3))
    assert np.abs(views(3) - views(3, seed=2))[1:].mean() > 1
    assert np.abs(views(3) - views(3, index=6))[1:].mean() > 1


def test_random_views_keep_most_of_the_image():
    """A grey ramp's mean tells where a crop lies, its range how much is kept."""
    ramp = np.broadcast_to(np.arange(0, 256, dtype=np.uint8), (256, 256))
    encoded = tf.constant(encode(Image.fromarray(ramp), "PNG"))
    views = decode.decode_views(
        encoded, 32, augmentations=60, seed=0, index=tf.constant(0, tf.int64)
    ).numpy()
    spans = np.ptp(views[1:, 16, :, 0], axis=1) / np.ptp(views[0, 16, :, 0])
    # A crop of half the area that is stretched to 3:4 is 0.53 of the width.
    assert spans.min() > 0.52
    assert spans.max() <= 1.0
    flipped = views[1:, 16, 0, 0] > views[1:, 16, -1, 0]
    assert 15 < flipped.sum() < 45


def test_saved_model_decodes_and_refuses(tmp_path):
    module = tf.Module()
    module.decode = tf.function(
        lambda encoded: decode_image(encoded, 32),
        input_signature=[tf.TensorSpec([], tf.string)],
    )
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for encoded in FILES.values():
        expected = decode_image(tf.constant(encoded), 32)
        np.testing.assert_allclose(loaded.decode(encoded), expected, atol=1e-3)
    for bad in (b"", b"text", png_header(30_000, 30_000), FILES["jpeg"][:300]):
        with pytest.raises(tf.errors.InvalidArgumentError):
            loaded.decode(bad)
