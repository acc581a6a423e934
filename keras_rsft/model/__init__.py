"""`RSFTModel` and its parts: per-sample losses, selection metrics, training step.

`training_step.py` is the step, whatever Keras's backend; `tensorflow_step.py`,
`jax_step.py` and `torch_step.py` what each backend adds. `replicas.py` is the step on
several devices, `replica_rules.py` what is refused there.
"""

from keras_rsft.model.rsft_model import RSFTModel
from keras_rsft.model.second_pass import TwoPassRSFTModel
from keras_rsft.model.selection import AcceptanceGuard
from keras_rsft.model.soft_targets import SoftTargets

__all__ = ["AcceptanceGuard", "RSFTModel", "SoftTargets", "TwoPassRSFTModel"]
