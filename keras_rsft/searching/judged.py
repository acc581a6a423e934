"""By which labels a search judges: the given ones, or those known to be right."""

from __future__ import annotations

import dataclasses

from keras_rsft.data import ImageData
from keras_rsft.errors import DataError
from keras_rsft.finetuning import SplitFeatures


def judged_features(
    features: SplitFeatures, *, clean_validation: bool
) -> SplitFeatures:
    """Returns the splits with the labels that trials and the choice are judged by.

    Args:
        features: The splits.
        clean_validation: Judge trials by the right labels of the validation split. The
            test split is judged by its own wherever they are known.

    Raises:
        DataError: If the right labels of the validation split are not known.
    """
    parts = {}
    if clean_validation:
        if features.validation.clean_labels is None:
            raise DataError(
                "The right labels of the validation split are not known. Name them "
                "with `--clean-label-column` or `--clean-label-key`, or leave out "
                "`--clean-validation`."
            )
        parts["validation"] = features.validation.with_right_labels()
    test = features.test.with_right_labels()
    return dataclasses.replace(features, test=test, **parts)


def judged_data(data: ImageData, *, clean_validation: bool) -> ImageData:
    """Returns the images with the same labels as `judged_features`."""
    parts = {}
    for name, wanted in (("validation", clean_validation), ("test", True)):
        split = getattr(data, name)
        if wanted and split.clean_labels is not None:
            parts[name] = dataclasses.replace(split, labels=split.clean_labels)
    return dataclasses.replace(data, **parts)
