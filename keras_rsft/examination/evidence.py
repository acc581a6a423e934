"""What is known about labels beside the labels themselves: what a review found.

A person looks at the most suspicious labels first. What is left is no fair sample of
the noise: judged by it alone, wrong labels that are hard to see pass for hard images.
So the noise is estimated from the labels as they were before the review, with the
right ones known where somebody looked, and dropped images still counting.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from keras_rsft.features import FeatureSet


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What the noise is estimated from: `m` samples, among them the examined ones.

    Attributes:
        features: With the labels to learn from.
        given: int32 array `(m,)`, the labels as they were given.
        known: int32 array `(m,)`, the right labels, -1 where they are not known. None:
            none is.
        dropped: bool array `(m,)`: images that a person found of no use.
        places: int64 array `(n,)`: where the examined samples are.
    """

    features: FeatureSet
    given: np.ndarray
    known: np.ndarray | None
    dropped: np.ndarray
    places: np.ndarray

    def first_weights(self) -> np.ndarray:
        """Returns how much each sample counts at first, float32 `(m,)`."""
        return np.where(self.dropped, np.float32(0), np.float32(1))

    def with_what_is_known(self, right_probability: np.ndarray) -> np.ndarray:
        """Returns the probabilities, 1 for what was reviewed and 0 for the dropped."""
        sure = right_probability.copy()
        if self.known is not None:
            sure[self.known >= 0] = 1.0
        sure[self.dropped] = 0.0
        return sure


def evidence_of(features: FeatureSet) -> Evidence:
    """Returns what is known about the labels of a set of features."""
    labels = np.asarray(features.labels)
    before, count = features.before_review, len(features)
    if features.reviewed is None or before is None:
        known = None
        if features.reviewed is not None:
            known = np.where(features.reviewed, labels, -1)
        return Evidence(
            features, labels, known, np.zeros(count, bool), np.arange(count)
        )
    rows = features.file_rows(np.arange(count))
    places = np.searchsorted(before.file_rows(np.arange(len(before))), rows)
    learnt = np.array(before.labels)
    learnt[places] = labels
    known = np.full(len(before), -1)
    known[places[features.reviewed]] = labels[features.reviewed]
    dropped = np.ones(len(before), bool)
    dropped[places] = False
    return Evidence(
        before.with_labels(learnt), np.asarray(before.labels), known, dropped, places
    )
