"""One pass of a frozen base over the images, kept on disk, fed to a head.

`extraction.py` runs the pass and keeps it, `feature_set.py` is what is kept,
`batches.py` feeds it to training.
"""

from keras_rsft.features.batches import TrainingBatches, batches_of
from keras_rsft.features.extraction import extract_features
from keras_rsft.features.feature_set import FeatureSet

__all__ = ["FeatureSet", "TrainingBatches", "batches_of", "extract_features"]
