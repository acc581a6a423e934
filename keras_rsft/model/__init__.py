"""`RSFTModel` and its parts: per-sample losses, selection metrics, training step."""

from keras_rsft.model.metrics import AcceptanceGuard
from keras_rsft.model.rsft_model import RSFTModel

__all__ = ["AcceptanceGuard", "RSFTModel"]
