"""Finds out from kept features how many labels are wrong, and which.

A room between features and policies: it needs no trained head, no clean labels
and no noise rate, and decides nothing about training. NumPy only.

How: a ridge regression on the one-hot labels gives each sample's class scores as
if that sample had been left out, exactly and in closed form (Allen, 1974, PRESS).
A linear fit with a well-chosen ridge memorises no single label, so a sample's own
wrong label does not vouch for itself. From these scores and the given labels,
expectation maximisation estimates a matrix of label noise (Dawid and Skene, 1979;
for noisy labels Natarajan et al., 2013, and Patrini et al., 2017), and with it the
probability that each label is right. The regression is then repeated with these
probabilities as weights, so that wrong labels stop pulling at it.
"""

from keras_rsft.examination.labels import Examination, examine_labels
from keras_rsft.examination.noise_matrix import (
    fit_noise,
    softmax,
    true_label_posterior,
)

__all__ = [
    "Examination",
    "examine_labels",
    "fit_noise",
    "softmax",
    "true_label_posterior",
]
