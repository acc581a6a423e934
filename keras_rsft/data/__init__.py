"""Folder, CSV, TFDS or digits -> splits of samples with stable ids.

`sources.py` opens a data set by name and leaves each kind to a module of its
own (`folder.py`, `table.py`, `tfds.py`, `digits.py`); `partition.py` cuts the
splits; `samples.py` is what the other rooms see of it, `splits.py` that of
images, and `texts.py` opens texts; `readers.py` fetches
bytes and `decode.py`, with `headers.py`, makes pixels of them, `decode_many.py` for a
server's batches; `noise.py` makes labels wrong on purpose, `corrections.py` applies
what a person decided about them.
"""

from keras_rsft.data.corrections import Corrections, apply_corrections
from keras_rsft.data.decode import MAX_PIXELS, decode_image
from keras_rsft.data.noise import add_label_noise
from keras_rsft.data.samples import SampleData, SampleSplit
from keras_rsft.data.sources import load_images
from keras_rsft.data.splits import ImageData, ImageSplit
from keras_rsft.data.texts import TextData, TextSplit, load_texts

__all__ = [
    "MAX_PIXELS",
    "Corrections",
    "ImageData",
    "ImageSplit",
    "SampleData",
    "SampleSplit",
    "TextData",
    "TextSplit",
    "add_label_noise",
    "apply_corrections",
    "decode_image",
    "load_images",
    "load_texts",
]
