"""What is searched: ranges of hyperparameters, and the settings that they mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras_tuner
from keras_tuner.engine.hyperparameters import Fixed

from keras_rsft.errors import InvalidArgument
from keras_rsft.finetuning import TrainingSettings
from keras_rsft.policy_choice import require_known
from keras_rsft.searching.names import ARTICLE, SEARCHED_POLICIES

BY_RELATIVE_THRESHOLD = ("loss-threshold", "self-paced")
WITHOUT_WARMUP = ("accept-all", "auto", ARTICLE)

_OF_SETTINGS = ("learning_rate", "optimizer", "momentum", "weight_decay")
_OF_POLICY = (
    "threshold",
    "relative_threshold",
    "keep_fraction",
    "level",
    "warmup_epochs",
    "class_floor",
)
_PARENTS = {"optimizer": "optimizers", "policy": "policies"}
VALUE_NAMES = ("policy", *_OF_SETTINGS, *_OF_POLICY)

# A function that declares hyperparameters and returns values out of `VALUE_NAMES`.
Space = Callable[[keras_tuner.HyperParameters], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """Ranges of the hyperparameters; a range of one value fixes it.

    Called with Keras Tuner's hyperparameters, it declares them and returns their
    values. Any function that does so can take its place:

    ```python
    def space(hp):
        rate = hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")
        return {"learning_rate": rate, "policy": "keep-fraction"}
    ```

    Attributes:
        learning_rate: Lowest and highest, sampled by their logarithm.
        policies: Names of policies, and `"article"`: the article's rule per batch.
        relative_threshold: Lowest and highest threshold of `loss-threshold` and
            `self-paced`, in multiples of ln(classes).
        article_threshold: Lowest and highest of `"article"`, in the loss's units.
        keep_fraction: Lowest and highest share of `keep-fraction`, in (0, 1].
        warmup_epochs: Fewest and most, whole numbers.
        optimizers: Names of Keras optimizers.
        weight_decay: Lowest and highest of `adamw`, sampled by their logarithm.

    Raises:
        InvalidArgument: If a range is empty, reversed or outside of what its number
            may be, or a name is not known.

    Example:
        >>> import keras_rsft as rsft
        >>> space = rsft.SearchSpace(policies=("keep-fraction",), optimizers=("sgd",))
        >>> values = space(keras_tuner.HyperParameters())
        >>> sorted(values)
        ['keep_fraction', 'learning_rate', 'optimizer', 'policy', 'warmup_epochs']
    """

    learning_rate: tuple[float, float] = (1e-4, 1e-1)
    policies: tuple[str, ...] = (
        "accept-all",
        "auto",
        "loss-threshold",
        "keep-fraction",
    )
    relative_threshold: tuple[float, float] = (0.2, 1.5)
    article_threshold: tuple[float, float] = (0.5, 3.0)
    keep_fraction: tuple[float, float] = (0.4, 0.95)
    warmup_epochs: tuple[int, int] = (0, 5)
    optimizers: tuple[str, ...] = ("sgd", "adamw")
    weight_decay: tuple[float, float] = (1e-5, 1e-2)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "relative_threshold", "article_threshold"):
            self._check_range(name, above=0.0)
        self._check_range("weight_decay", above=0.0)
        self._check_range("keep_fraction", above=0.0, most=1.0)
        self._check_range("warmup_epochs", least=0)
        for name in ("policies", "optimizers"):
            if isinstance(getattr(self, name), str) or not getattr(self, name):
                raise InvalidArgument(
                    f"`{name}` must be one or more names. "
                    f"Received: {name}={getattr(self, name)!r}."
                )
        for policy in self.policies:
            require_known("policy", policy, SEARCHED_POLICIES)
        for optimizer in self.optimizers:
            TrainingSettings(optimizer=optimizer)  # Raises where it is unknown.

    def __call__(self, hp: keras_tuner.HyperParameters) -> dict[str, Any]:
        """Declares the hyperparameters and returns those that are active."""
        values = {
            "optimizer": _choice(hp, "optimizer", self.optimizers),
            "policy": _choice(hp, "policy", self.policies),
            "learning_rate": _number(hp, "learning_rate", self.learning_rate, log=True),
        }

        def declare(
            parent: str, allowed: Sequence[str], name: str, given: str, **how: bool
        ) -> None:
            # A condition that can never hold would have Keras Tuner look for ever.
            possible = [v for v in getattr(self, _PARENTS[parent]) if v in allowed]
            if possible:
                with hp.conditional_scope(parent, possible):
                    value = _number(hp, name, getattr(self, given), **how)
                if values[parent] in possible:
                    values[name] = value

        warmed_up = [name for name in self.policies if name not in WITHOUT_WARMUP]
        relative = "relative_threshold"
        declare("optimizer", ("adamw",), "weight_decay", "weight_decay", log=True)
        declare("policy", BY_RELATIVE_THRESHOLD, relative, relative)
        declare("policy", (ARTICLE,), "threshold", "article_threshold")
        declare("policy", ("keep-fraction",), "keep_fraction", "keep_fraction")
        declare("policy", warmed_up, "warmup_epochs", "warmup_epochs", whole=True)
        return values

    def _check_range(
        self,
        name: str,
        *,
        above: float | None = None,
        least: float | None = None,
        most: float = float("inf"),
    ) -> None:
        given = getattr(self, name)
        holds = isinstance(given, (tuple, list)) and len(given) == 2
        if holds:
            low, high = given
            holds = low <= high < float("inf") and high <= most
            holds = holds and (above is None or low > above)
            holds = holds and (least is None or low >= least)
        if not holds:
            bound = f"above {above:g}" if above is not None else f"at least {least:g}"
            if most < float("inf"):
                bound += f" and at most {most:g}"
            raise InvalidArgument(
                f"`{name}` must be the lowest and the highest value, {bound}. "
                f"Received: {name}={given!r}."
            )


def settings_of_values(
    values: Mapping[str, Any], given: TrainingSettings
) -> TrainingSettings:
    """Returns how to train a trial: `values`, and the rest as `given`."""
    if not isinstance(values, Mapping):
        raise InvalidArgument(
            "A space must return a dict of values by name, such as "
            f"{{'learning_rate': 0.01}}. Received: {type(values).__name__}."
        )
    for name in values:
        require_known("hyperparameter", name, VALUE_NAMES)
    policy = {name: values[name] for name in _OF_POLICY if name in values}
    if "threshold" in policy and "relative_threshold" in policy:
        raise InvalidArgument(
            "A space must give `threshold` or `relative_threshold`, for one is the "
            "other divided by ln(classes). Received: both."
        )
    if "relative_threshold" in policy:
        policy["threshold"] = None
    name = values.get("policy", given.policy.name)
    if name == ARTICLE:
        policy = {"warmup_epochs": 0.0} | policy | {"level": "batch"}
        name = "loss-threshold"
    elif "policy" in values:  # Else its level is the given policy's.
        policy = {"level": "sample"} | policy
    return dataclasses.replace(
        given,
        policy=dataclasses.replace(given.policy, name=name, **policy),
        **{name: values[name] for name in _OF_SETTINGS if name in values},
    )


def check_space(space: Space, given: TrainingSettings) -> None:
    """Tries a space once, with default values, so that it fails before any trial."""
    if not callable(space):
        raise InvalidArgument(
            "`space` must be a `SearchSpace` or a function of Keras Tuner's "
            f"hyperparameters. Received: {type(space).__name__}."
        )
    hp = keras_tuner.HyperParameters()
    settings_of_values(space(hp), given)
    if all(isinstance(one, Fixed) for one in hp.space):
        raise InvalidArgument(
            "The search space is empty: every hyperparameter has one value. "
            "Widen a range or name a second policy."
        )


def _choice(hp: keras_tuner.HyperParameters, name: str, values: tuple[str, ...]) -> str:
    return (
        hp.Choice(name, list(values)) if len(values) > 1 else hp.Fixed(name, values[0])
    )


def _number(
    hp: keras_tuner.HyperParameters,
    name: str,
    bounds: tuple[float, float],
    *,
    log: bool = False,
    whole: bool = False,
) -> float:
    low, high = bounds if whole else map(float, bounds)
    if low == high:
        return hp.Fixed(name, low)
    if whole:
        return hp.Int(name, low, high)
    return hp.Float(name, low, high, sampling="log" if log else "linear")
