"""One pass of a frozen base over the images, kept on disk, fed to a head.

`frozen_base.py` is the base, traced once, `feature_pass.py` runs it, `extraction.py`
keeps what comes out, `feature_set.py` is what is kept, `batches.py` feeds it to
training, `batch_share.py` deals the rows of a batch out to replicas. For several
processes there are `shared_pass.py`, `shares.py` and `share_joining.py`.
`thumbnails.py` keeps small pictures, `excerpts.py` the beginnings of texts;
`near_duplicate_pairs.py` compares.
"""

from keras_rsft.features.batches import TrainingBatches, batches_of
from keras_rsft.features.excerpts import write_excerpts
from keras_rsft.features.extraction import extract_features
from keras_rsft.features.feature_set import FeatureSet
from keras_rsft.features.frozen_base import FrozenBase
from keras_rsft.features.near_duplicate_pairs import NearDuplicate, near_duplicates
from keras_rsft.features.thumbnails import write_thumbnails

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
