"""One pass of a frozen base over the images, kept on disk, fed to a head.

`extraction.py` runs the base, `shares.py` lets several processes do so,
`feature_set.py` is what is kept, `batches.py` feeds it to training, `thumbnails.py`
keeps small pictures and the beginnings of texts, `near_duplicate_pairs.py` compares.
"""

from keras_rsft.features.batches import TrainingBatches, batches_of
from keras_rsft.features.extraction import FrozenBase, extract_features
from keras_rsft.features.feature_set import FeatureSet
from keras_rsft.features.near_duplicate_pairs import NearDuplicate, near_duplicates
from keras_rsft.features.thumbnails import write_excerpts, write_thumbnails

__all__ = [
    "FeatureSet",
    "FrozenBase",
    "NearDuplicate",
    "TrainingBatches",
    "batches_of",
    "extract_features",
    "near_duplicates",
    "write_excerpts",
    "write_thumbnails",
]
