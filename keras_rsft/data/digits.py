"""The 1,797 handwritten digits that scikit-learn brings along (8 x 8, grey)."""

from __future__ import annotations

import numpy as np

from keras_rsft.data.partition import TRAIN, Listing
from keras_rsft.data.readers import ArrayReader

_BRIGHTEST = 16


def list_digits(*, source: str) -> Listing:
    """Lists the digits, as "digits/0000" to "digits/1796"."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'The source "digits" needs scikit-learn. '
            'Install it with: pip install "keras_rsft[demo]"'
        ) from error
    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / _BRIGHTEST)).astype(np.uint8)
    ids = np.array([f"digits/{number:04}" for number in range(len(pixels))])
    return Listing(
        ids=ids,
        labels=bunch.target.astype(np.int32),
        clean_labels=None,
        splits=np.full(len(ids), TRAIN, np.int8),
        class_names=tuple(str(name) for name in bunch.target_names),
        reader=ArrayReader(ids, pixels[..., np.newaxis]),
        source=source,
    )
