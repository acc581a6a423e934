"""Decoding a batch for a server: what training sees, and no file harms another."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_decode import FILES, encode, png_header

from keras_rsft.data import _images as decode
from keras_rsft.data._images import decode_image, decode_images

SIZE = (24, 32)
LARGE = {
    f"{kind} of {width}": encode(
        Image.new("RGB", (width, 3 * width // 4), "teal"), kind
    )
    for kind in ("JPEG", "PNG")
    for width in (192, 400, 700)
}
GOOD = FILES | LARGE
BAD = {
    "empty": b"",
    "text": b"no image at all",
    "cut JPEG": FILES["jpeg"][:-200],
    "head of a JPEG": FILES["jpeg"][:12],
    "cut PNG": FILES["png"][:-200],
    "head of a PNG": FILES["png"][:16],
    "cut GIF": FILES["gif"][:60],
    "cut WebP": FILES["webp"][:-80],
    "bomb": png_header(30_000, 30_000),
    "no pixels": png_header(0, 5),
    "animated WebP": encode(
        Image.new("RGB", (9, 9)),
        "WEBP",
        save_all=True,
        append_images=[Image.new("RGB", (9, 9), "red")],
    ),
}


@pytest.fixture(scope="module")
def decode_batch():
    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string)])
    def graph(encoded):
        return decode_images(encoded, SIZE)

    return lambda files: [
        result.numpy() for result in graph(tf.constant(files, tf.string))
    ]


def one_by_one(files):
    return np.stack([decode_image(tf.constant(one), SIZE) for one in files])


def test_every_kind_equals_decoding_one_by_one(decode_batch):
    files = list(GOOD.values())
    images, valid = decode_batch(files)
    assert valid.all()
    np.testing.assert_array_equal(images, one_by_one(files))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_leaves_its_neighbours_alone(decode_batch, name):
    good = [FILES["jpeg"], FILES["png"], FILES["gif"]]
    images, valid = decode_batch([good[0], BAD[name], *good[1:]])
    assert valid.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(images[[0, 2, 3]], one_by_one(good))
    assert not images[1].any()


@pytest.mark.parametrize("files", [[], list(BAD.values())])
def test_nothing_good(decode_batch, files):
    images, valid = decode_batch(files)
    assert images.shape == (len(files), *SIZE, 3)
    assert valid.shape == (len(files),)
    assert not valid.any()
    assert not images.any()


def test_more_pixels_than_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 400 * 300)
    images, valid = decode_images(tf.constant(list(LARGE.values())), SIZE)
    fits = [not name.endswith("700") for name in LARGE]
    assert valid.numpy().tolist() == fits
    assert not images.numpy()[~valid.numpy()].any()


@given(data=st.data())
def test_any_change_of_bytes_gives_an_answer_for_each(decode_batch, data):
    names = data.draw(st.lists(st.sampled_from(list(FILES)), min_size=1, max_size=4))
    files = []
    for name in names:
        content = bytearray(FILES[name])
        for _ in range(data.draw(st.integers(0, 4))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
        files.append(bytes(content[: data.draw(st.integers(0, len(content)))]))
    images, valid = decode_batch(files)
    for file, image, is_valid in zip(files, images, valid, strict=True):
        try:
            expected = decode_image(tf.constant(file), SIZE)
        except tf.errors.InvalidArgumentError:
            assert not is_valid
        else:
            assert is_valid
            np.testing.assert_array_equal(image, expected)
