"""`RSFTModel` and its parts: per-sample losses, selection metrics, training step."""

from keras_rsft.model.rsft_model import RSFTModel
from keras_rsft.model.second_pass import TwoPassRSFTModel
from keras_rsft.model.selection import AcceptanceGuard

__all__ = ["AcceptanceGuard", "RSFTModel", "TwoPassRSFTModel"]
