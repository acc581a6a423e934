"""Which layers of a backbone are unfrozen, and how they are trained; needs no Keras."""

from __future__ import annotations

import dataclasses

from keras_rsft.errors import InvalidArgument

EVERYTHING = "all"

# A number of blocks, `EVERYTHING`, or names of layers.
Unfreeze = int | str | tuple[str, ...]

# As a share of the head's: what a pretrained backbone knows is soon unlearnt.
SHARE_OF_LEARNING_RATE = 0.1


@dataclasses.dataclass(frozen=True)
class UnfreezeConfig:
    """Which layers of the backbone learn with the head once that is trained, and how.

    Attributes:
        layers: How many of the last blocks, at least 1; `"all"`; or names of layers.
            Default 1.
        epochs: Passes over the training images, at least 1. Default 5.
        learning_rate: The unfrozen layers' own, positive. Default None: a tenth of the
            head's.
        batch_size: Samples per step, at least 1. Default None: the head's.
        batch_norm: Have unfrozen BatchNorm layers learn and normalise by the batch.
            Default False: they are in inference mode.
        accepted_only: Train on the samples that the finished head accepts, without a
            policy, with SGD and this learning rate for the head too (Ahn et al.,
            2024, TURN). Default False: on all samples, under the head's policy.

    Raises:
        InvalidArgument: If a value is out of its range.

    Example:
        >>> import keras_rsft as rsft
        >>> rsft.UnfreezeConfig("conv_1").layers
        ('conv_1',)
    """

    layers: Unfreeze = 1
    epochs: int = 5
    learning_rate: float | None = None
    batch_size: int | None = None
    batch_norm: bool = False
    accepted_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", checked_unfreeze(self.layers))
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(
                    f"`{name}` of unfrozen layers must be at least 1. "
                    f"Received: {value}."
                )
        rate = self.learning_rate
        if rate is not None and not 0 < rate < float("inf"):
            raise InvalidArgument(
                "The learning rate of unfrozen layers must be a positive number. "
                f"Received: {rate}."
            )


def parse_unfreeze(text: str) -> Unfreeze:
    """Returns what `N`, `all` or `LAYER[,LAYER...]` means.

    Raises:
        InvalidArgument: If it is empty, or a number below 1.

    Example:
        >>> parse_unfreeze("2"), parse_unfreeze("all"), parse_unfreeze("conv_1")
        (2, 'all', ('conv_1',))
    """
    text = text.strip()
    if text.lstrip("+-").isdigit():
        return checked_unfreeze(int(text))
    if text.lower() == EVERYTHING:
        return EVERYTHING
    return checked_unfreeze(tuple(name.strip() for name in text.split(",")))


def checked_unfreeze(value: Unfreeze | list[str]) -> Unfreeze:
    """Returns the same in its usual form: one name becomes a tuple of one.

    Raises:
        InvalidArgument: If it is none of what `Unfreeze` can be.
    """
    if value == EVERYTHING:
        return EVERYTHING
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    names = (value,) if isinstance(value, str) else value
    if (
        isinstance(names, (tuple, list))
        and names
        and all(isinstance(name, str) and name for name in names)
    ):
        return tuple(names)
    raise InvalidArgument(
        "What is unfrozen must be a number of blocks, at least 1, all, or names of "
        f"layers. Received: {value!r}."
    )


# What `--stage2` is short for.
STAGE2 = UnfreezeConfig(1, epochs=3, learning_rate=1e-4, accepted_only=True)
