"""Keeps a tuned base or the frozen one, by what validation says."""

from __future__ import annotations

import keras

from keras_rsft.data import ImageData
from keras_rsft.finetuning.head_training import SplitFeatures
from keras_rsft.finetuning.stage_two import accuracy_on_images


def better_model(
    head_only: keras.Model,
    tuned: keras.Model,
    data: ImageData,
    features: SplitFeatures,
    results: dict[str, float],
    *,
    name: str,
    unjudged: bool = False,
) -> keras.Model:
    """Returns the better of two models by validation, and notes both in the results.

    Args:
        head_only: Images to probabilities, on the frozen base.
        tuned: The same on the tuned base.
        data: The images.
        features: The features of the frozen base.
        results: Gets `NAME_validation_accuracy`, `NAME_test_accuracy` and `NAME_kept`.
            Where the tuned model is kept, the plain accuracies become its own, and
            those of before `head_validation_accuracy` and `head_test_accuracy`.
        name: What the tuning is called there.
        unjudged: Whether the tuned model is kept where there is no validation split.
            Default False.
    """
    kept = unjudged
    if len(features.test):
        results[f"{name}_test_accuracy"] = accuracy_on_images(tuned, data.test)
    if len(features.validation):
        accuracy = accuracy_on_images(tuned, data.validation)
        results[f"{name}_validation_accuracy"] = accuracy
        # Anew, as the features may have been computed in another precision.
        kept = accuracy >= accuracy_on_images(head_only, data.validation)
    results[f"{name}_kept"] = float(kept)
    if not kept:
        return head_only
    for split in ("validation_accuracy", "test_accuracy"):
        if f"{name}_{split}" in results:
            results[f"head_{split}"] = results[split]
            results[split] = results[f"{name}_{split}"]
    return tuned
