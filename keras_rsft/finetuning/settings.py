"""What the user chooses about training, checked before any work begins."""

from __future__ import annotations

import dataclasses

import keras

from keras_rsft.errors import InvalidArgument
from keras_rsft.policy_choice import PolicyChoice
from keras_rsft.trainable_choice import SHARE_OF_LEARNING_RATE, UnfreezeConfig

# Parts of the names of variables that weight decay leaves alone: a bias, and the scale
# and offset of a normalisation, do not make a function any wilder.
NOT_DECAYED = ("bias", "gamma", "beta")


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How a head is trained, and after it perhaps a part of the backbone.

    Attributes:
        policy: What may update the weights. Default: `PolicyChoice()`.
        epochs: Passes over the training features, at least 1. Default 20.
        batch_size: Samples per step, at least 1. Default 32.
        learning_rate: Positive. Default 0.001.
        optimizer: Name of a Keras optimizer. Default `"sgd"`.
        momentum: Of `"sgd"`, in [0, 1]. Default 0.9.
        weight_decay: Of the kernels, at least 0, decoupled from the gradient
            (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR
            2019): an accepted step also takes `learning_rate` times this share of
            them away, a rejected one nothing. Default None: the optimizer's own.
        early_stopping: Epochs without a better validation accuracy, at least 1, after
            which the training of the head ends; the weights of the best epoch are
            kept. Default None: all epochs, and the weights of the last.
        seed: Seed of the initial weights and of the order. Default 0.
        unfreeze: Which layers of the backbone learn with the head once that has been
            trained for `epochs`, and how. Default None: none.

    Raises:
        InvalidArgument: If a value is out of its range or unknown.

    Example:
        >>> import keras_rsft as rsft
        >>> settings = rsft.TrainingSettings(epochs=5, optimizer="adamw")
        >>> type(settings.make_optimizer()).__name__
        'AdamW'
    """

    policy: PolicyChoice = dataclasses.field(default_factory=PolicyChoice)
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-3
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float | None = None
    early_stopping: int | None = None
    seed: int = 0
    unfreeze: UnfreezeConfig | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidArgument(
                    f"`{name}` must be at least 1. Received: {getattr(self, name)}."
                )
        if not 0 < self.learning_rate < float("inf"):
            raise InvalidArgument(
                "`learning_rate` must be a positive number. "
                f"Received: {self.learning_rate}."
            )
        if not 0 <= self.momentum <= 1:
            raise InvalidArgument(
                f"`momentum` must be in [0, 1]. Received: {self.momentum}."
            )
        if self.weight_decay is not None and not 0 <= self.weight_decay < float("inf"):
            raise InvalidArgument(
                f"`weight_decay` must be at least 0. Received: {self.weight_decay}."
            )
        if self.early_stopping is not None and self.early_stopping < 1:
            raise InvalidArgument(
                "`early_stopping` must be at least 1 epoch, or None. "
                f"Received: {self.early_stopping}."
            )
        self.make_optimizer()

    @property
    def unfreezes_under_policy(self) -> bool:
        """Whether unfrozen layers continue the head's training, under its policy."""
        return self.unfreeze is not None and not self.unfreeze.accepted_only

    @property
    def unfreezing(self) -> UnfreezeConfig:
        """How layers are unfrozen, by default where nothing was asked for."""
        return self.unfreeze or UnfreezeConfig()

    @property
    def all_epochs(self) -> int:
        """Epochs of the head, and of unfrozen layers after it."""
        return self.epochs + (0 if self.unfreeze is None else self.unfreeze.epochs)

    @property
    def unfreeze_rate(self) -> float:
        """The unfrozen layers' learning rate."""
        if self.unfreeze is None or self.unfreeze.learning_rate is None:
            return SHARE_OF_LEARNING_RATE * self.learning_rate
        return self.unfreeze.learning_rate

    def make_optimizer(
        self, *, largest_gradient: float | None = None
    ) -> keras.optimizers.Optimizer:
        """Returns a new optimizer.

        Args:
            largest_gradient: Norm that all gradients together are clipped to,
                positive. Default None: none.

        Raises:
            InvalidArgument: If Keras has no optimizer of this name.
        """
        config = {"learning_rate": self.learning_rate}
        if largest_gradient is not None:
            config["global_clipnorm"] = largest_gradient
        if self.optimizer.lower() == "sgd":
            config["momentum"] = float(self.momentum)
        if self.weight_decay is not None:
            config["weight_decay"] = self.weight_decay
        try:
            optimizer = keras.optimizers.get(
                {"class_name": self.optimizer.lower(), "config": config}
            )
        except (ValueError, TypeError) as error:
            raise InvalidArgument(
                "The optimizer must be the name of a Keras optimizer, such as sgd, "
                f"adam or adamw. Received: {self.optimizer!r}."
            ) from error
        optimizer.exclude_from_weight_decay(var_names=list(NOT_DECAYED))
        return optimizer
