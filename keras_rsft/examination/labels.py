"""Examines the labels of kept features: how many are wrong, and which."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from keras_rsft.examination.evidence import evidence_of
from keras_rsft.examination.left_out import LeftOutRegression
from keras_rsft.examination.noise_matrix import (
    fit_noise,
    right_probability,
    softmax,
)
from keras_rsft.features import FeatureSet
from keras_rsft.progress import progress_bar

ROUNDS = 4
# With fewer samples a class's labels are not judged.
MIN_CLASS_SIZE = 5
MIN_NOISE_RATE = 0.02
MIN_RIGHT_PROBABILITY = 0.6


@dataclasses.dataclass(frozen=True, eq=False)
class Examination:
    """What was found out about the labels of `n` samples in `k` classes.

    Attributes:
        out_of_sample: Float32 array `(n, k)`, each row adding up to 1: how likely
            each class is, from the other samples alone.
        right_probability: Float32 array `(n,)` in [0, 1]: how likely the given
            label is right.
        noise_rate: Estimated share of wrong labels, in [0, 1].
        noise: Float64 array `(k, k)`: `noise[c, g]` is the estimated probability
            that a sample of class `c` was labelled `g`. Rows add up to 1.
        labels: int32 array `(n,)`, the given labels.
        reason: Why nothing is rejected, or None if the labels could be judged.
        held_out_right: Float32 array `(m,)`: the same as `right_probability` of samples
            that were held out; None where there were none.
        held_out_labels: int32 array `(m,)`, their given labels, or None.
    """

    out_of_sample: np.ndarray
    right_probability: np.ndarray
    noise_rate: float
    noise: np.ndarray
    labels: np.ndarray
    reason: str | None = None
    held_out_right: np.ndarray | None = None
    held_out_labels: np.ndarray | None = None

    @property
    def judges_held_out(self) -> bool:
        """Whether samples were held out and can be judged."""
        return self.held_out_right is not None

    def held_out_mask(self) -> np.ndarray:
        """Returns which held-out samples would be accepted, boolean `(m,)`.

        By the same probability as the examined ones. Of a class that has too few of
        those to be judged, all are.
        """
        if self.reason is not None:
            return np.ones(len(self.held_out_labels), bool)
        counts = np.bincount(self.labels, minlength=len(self.noise))
        small = counts < MIN_CLASS_SIZE
        likely = self.held_out_right >= MIN_RIGHT_PROBABILITY
        return likely | small[self.held_out_labels]

    @property
    def suspicion(self) -> np.ndarray:
        """Float32 array `(n,)` in [0, 1]; the higher, the likelier a wrong label."""
        return 1.0 - self.out_of_sample[np.arange(len(self.labels)), self.labels]

    @property
    def loss_limit(self) -> float:
        """Loss from which on a trained head does no better than a guess: ln(k).

        Infinite where nothing is to be rejected. A sample above it is wrong, or so
        hard that a head learns it by heart.
        """
        return math.inf if self.reason is not None else math.log(len(self.noise))

    def accept_mask(self, *, class_floor: float = 0.1) -> np.ndarray:
        """Chooses the samples to learn from.

        Args:
            class_floor: Least share of each class's samples to accept, in [0, 1];
                at least one is. Default 0.1.

        Returns:
            Boolean array `(n,)`. All True where nothing is to be rejected.
        """
        if self.reason is not None:
            return np.ones(len(self.labels), bool)
        accepted = self.right_probability >= MIN_RIGHT_PROBABILITY
        counts = np.bincount(self.labels, minlength=len(self.noise))
        small = counts < MIN_CLASS_SIZE
        accepted |= small[self.labels]
        for label in np.flatnonzero(counts):
            members = np.flatnonzero(self.labels == label)
            least = max(1, int(np.ceil(class_floor * len(members))))
            if np.count_nonzero(accepted[members]) < least:
                best = np.argsort(-self.right_probability[members], kind="stable")
                accepted[members[best[:least]]] = True
        return accepted

    def describe(self) -> str:
        """Says in one line what was found and chosen."""
        if self.reason is not None:
            return f"{self.reason}: keeping every sample."
        kept = self.accept_mask().mean()
        return (
            f"About {100 * self.noise_rate:.0f} % of the labels look wrong; keeping "
            f"the {100 * kept:.0f} % whose label is right with a probability of "
            f"{MIN_RIGHT_PROBABILITY} or more, while they are learnt better than by "
            "guessing."
        )


def examine_labels(
    features: FeatureSet,
    num_classes: int,
    *,
    seed: int = 0,
    progress: bool = True,
    held_out: FeatureSet | None = None,
) -> Examination:
    """Estimates how many labels are wrong, and for each how likely it is right.

    Reviewed labels count as right, and the others are judged by them too.
    The noise is estimated from the labels as they were before a review.

    Sources: Allen, "The relationship between variable selection and data augmentation
    and a method for prediction", Technometrics 1974 (each sample judged as if it had
    been left out, in closed form); Dawid and Skene, "Maximum likelihood estimation of
    observer error-rates using the EM algorithm", 1979 (the matrix of label noise).

    Takes some seconds for 10,000 samples; the time grows with the number of samples
    and with the square of the number of features.

    Args:
        features: Kept features of the training samples with their given labels.
        num_classes: Number of classes, at least 2.
        seed: Chooses the samples by which the ridge is chosen, where there are
            more than 10,000. Default 0.
        progress: Show a progress bar. Default True.
        held_out: Features of other samples, which are judged by what the examined ones
            say and say nothing themselves. Default: none.

    Returns:
        What was found. Where there is too little to go by, `reason` says so.

    Raises:
        DataError: If a feature is NaN or infinite.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> right = np.arange(200) % 2
        >>> values = np.random.default_rng(0).normal(size=(200, 4)) + 3 * right[:, None]
        >>> file = Path(tempfile.mkdtemp(), "features.bin")
        >>> values.astype("float32").tofile(file)
        >>> given = np.where(np.arange(200) < 20, 1 - right, right)
        >>> features = rsft.FeatureSet(file, given, np.arange(200).astype(str), dim=4)
        >>> found = rsft.examine_labels(features, 2, progress=False)
        >>> round(found.noise_rate, 1), bool((found.suspicion[:20] > 0.5).all())
        (0.1, True)
    """
    labels = np.asarray(features.labels)
    counts = np.bincount(labels, minlength=num_classes)
    if np.count_nonzero(counts >= MIN_CLASS_SIZE) < 2:
        return _unjudged(
            labels,
            counts,
            f"Fewer than two classes have {MIN_CLASS_SIZE} samples, too few to judge "
            "labels by",
            held_out,
        )
    evidence = evidence_of(features)
    regression = LeftOutRegression(evidence.features, num_classes, seed)
    weights = evidence.first_weights()
    sharpness = noise = None
    with progress_bar(
        "Examining the labels", total=ROUNDS, unit="rounds", visible=progress
    ) as advance:
        for _ in range(ROUNDS):
            scores = regression.left_out_scores(weights)
            sharpness, noise = fit_noise(
                scores,
                evidence.given,
                known=evidence.known,
                near=sharpness,
                chosen=regression.sampled,
            )
            out_of_sample = softmax(sharpness * scores)
            weights = evidence.with_what_is_known(
                right_probability(out_of_sample, noise, evidence.given)
            )
            advance(1)
    probability = weights[evidence.places]
    examination = Examination(
        out_of_sample[evidence.places].astype(np.float32),
        probability,
        float(1.0 - probability.mean()),
        noise,
        labels,
    )
    if held_out is not None and len(held_out):
        scores = regression.scores_of(held_out)
        given = np.asarray(held_out.labels)
        examination = dataclasses.replace(
            examination,
            held_out_right=right_probability(softmax(sharpness * scores), noise, given),
            held_out_labels=given,
        )
    return dataclasses.replace(examination, reason=_reason_to_keep_all(examination))


def _unjudged(
    labels: np.ndarray,
    counts: np.ndarray,
    reason: str,
    held_out: FeatureSet | None = None,
) -> Examination:
    """Says nothing against any label: each class is as likely as it is frequent."""
    others = None if held_out is None else np.asarray(held_out.labels)
    shares = (counts / max(counts.sum(), 1)).astype(np.float32)
    return Examination(
        np.tile(shares, (len(labels), 1)),
        np.ones(len(labels), np.float32),
        0.0,
        np.eye(len(counts)),
        labels,
        reason,
        None if others is None else np.ones(len(others), np.float32),
        others,
    )


def _reason_to_keep_all(examination: Examination) -> str | None:
    labels, rate = examination.labels, examination.noise_rate
    shares = np.bincount(labels, minlength=len(examination.noise)) / len(labels)
    chance = float(shares.max())
    agreement = float(np.mean(examination.out_of_sample.argmax(axis=1) == labels))
    if agreement <= chance + 3 * np.sqrt(chance * (1 - chance) / len(labels)):
        return (
            "The labels do not fit the images better than chance (they agree with a "
            f"head that has not seen them in {100 * agreement:.0f} % of the cases, "
            f"against {100 * chance:.0f} % for the commonest class), so that right "
            "and wrong ones cannot be told apart"
        )
    if rate < MIN_NOISE_RATE:
        return f"No sign of wrong labels (about {100 * rate:.1f} %)"
    return None
