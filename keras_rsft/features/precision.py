"""Which arithmetic suits this machine for a forward pass.

bfloat16 halves the work where the hardware has it and is emulated, slowly,
where it has not.
"""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf

from keras_rsft.backbones import assembly
from keras_rsft.errors import InvalidArgument

PRECISIONS = ("auto", *assembly.PRECISIONS)
_CPU_FLAGS = {"avx512_bf16", "amx_bf16"}
_FIRST_GPU_WITH_BFLOAT16 = (8, 0)


def choose_precision(precision: str = "auto") -> str:
    """Returns `"float32"` or `"bfloat16"`."""
    if precision not in PRECISIONS:
        raise InvalidArgument(
            f"`precision` must be one of {', '.join(PRECISIONS)}. "
            f"Received: {precision!r}."
        )
    if precision != "auto":
        return precision
    return "bfloat16" if _has_bfloat16() else "float32"


def _has_bfloat16() -> bool:
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        capability = details.get("compute_capability", (0, 0))
        return tuple(capability) >= _FIRST_GPU_WITH_BFLOAT16
    try:
        description = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # Not Linux: nothing to ask, so nothing is assumed.
        return False
    return bool(_CPU_FLAGS & set(description.split()))
