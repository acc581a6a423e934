"""Folder, CSV, TFDS or digits -> splits of samples with stable ids.

`sources.py` and `tfds.py` list a data set, `partition.py` cuts the splits, `samples.py`
is what the other rooms see of it, `decode.py` makes pixels, `noise.py` makes labels
wrong on purpose, `corrections.py` applies what a person decided about them.
"""

from keras_rsft.data.corrections import Corrections, apply_corrections
from keras_rsft.data.decode import MAX_PIXELS, decode_image
from keras_rsft.data.noise import add_label_noise
from keras_rsft.data.samples import ImageData, ImageSplit, SampleData, SampleSplit
from keras_rsft.data.sources import TextData, TextSplit, load_images, load_texts

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
