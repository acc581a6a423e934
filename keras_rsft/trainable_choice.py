"""Which part of a base learns, as somebody asks for it.

Apart from the rooms that know Keras, so that the command line can refuse a word that
means nothing before anything heavy is imported.
"""

from __future__ import annotations

from keras_rsft.errors import InvalidArgument

EVERYTHING = "all"

# A number of blocks, `EVERYTHING`, or names of layers.
TrainableFrom = int | str | tuple[str, ...]


def parse_trainable(text: str) -> TrainableFrom:
    """Returns what `N`, `all` or `LAYER[,LAYER...]` means.

    Raises:
        InvalidArgument: If it is empty, or a number below 1.

    Example:
        >>> parse_trainable("2"), parse_trainable("all"), parse_trainable("conv_1")
        (2, 'all', ('conv_1',))
    """
    text = text.strip()
    if text.lstrip("+-").isdigit():
        return checked_trainable(int(text))
    if text.lower() == EVERYTHING:
        return EVERYTHING
    return checked_trainable(tuple(name.strip() for name in text.split(",")))


def checked_trainable(value: TrainableFrom | list[str]) -> TrainableFrom:
    """Returns the same in its usual form: one name becomes a tuple of one.

    Raises:
        InvalidArgument: If it is none of what `TrainableFrom` can be.
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
        "What learns of the base must be a number of blocks, at least 1, all, or names "
        f"of layers. Received: {value!r}."
    )
