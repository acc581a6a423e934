"""Folder, CSV, TFDS or digits -> splits of images with stable sample ids.

`sources.py` opens a data set by name and leaves each kind to a module of its
own (`folder.py`, `table.py`, `tfds.py`, `digits.py`); `partition.py` cuts the
splits; `splits.py` is what the other rooms see of it; `readers.py` fetches
bytes and `decode.py`, with `headers.py`, makes pixels of them, `decode_many.py` for a
server's batches; `noise.py` makes labels wrong on purpose, `corrections.py` applies
what a person decided about them.
"""

from keras_rsft.data.corrections import Corrections, apply_corrections
from keras_rsft.data.decode import MAX_PIXELS, decode_image
from keras_rsft.data.noise import add_label_noise
from keras_rsft.data.sources import load_images
from keras_rsft.data.splits import ImageData, ImageSplit

__all__ = [
    "MAX_PIXELS",
    "Corrections",
    "ImageData",
    "ImageSplit",
    "add_label_noise",
    "apply_corrections",
    "decode_image",
    "load_images",
]
