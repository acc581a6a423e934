"""What the user chooses about training, checked before any work begins."""

from __future__ import annotations

import dataclasses

import keras

from keras_rsft.errors import InvalidArgument
from keras_rsft.policy_choice import PolicyChoice
from keras_rsft.trainable_choice import TrainableFrom, checked_trainable

# Of the head's learning rate: what a pretrained base knows is soon unlearnt.
BASE_SHARE_OF_LEARNING_RATE = 0.1
# Parts of the names of variables that weight decay leaves alone: a bias, and the scale
# and offset of a normalisation, do not make a function any wilder.
NOT_DECAYED = ("bias", "gamma", "beta")


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How a head is trained, and after it perhaps the base's last block.

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
        stage2_epochs: Passes over the accepted images in which the last block of
            the base is fine-tuned with the head, at least 0. Default 0: none.
        trainable_from: Which part of the base learns with the head once that has been
            trained for `epochs`: how many of the last blocks, `"all"`, or names of
            layers. Default None: none.
        base_epochs: Passes over the training images in which it does, at least 1.
            Default 5.
        base_learning_rate: The base's own, positive. Default None: a tenth of
            `learning_rate`.
        train_batch_norm: Have the BatchNorm layers of that part learn and normalise
            by the batch. Default False: they are in inference mode.

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
    stage2_epochs: int = 0
    trainable_from: TrainableFrom | None = None
    base_epochs: int = 5
    base_learning_rate: float | None = None
    train_batch_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "base_epochs"):
            if getattr(self, name) < 1:
                raise InvalidArgument(
                    f"`{name}` must be at least 1. Received: {getattr(self, name)}."
                )
        if self.stage2_epochs < 0:
            raise InvalidArgument(
                "`stage2_epochs` must be at least 0; 0 leaves the base as it is. "
                f"Received: {self.stage2_epochs}."
            )
        if not 0 < self.learning_rate < float("inf"):
            raise InvalidArgument(
                "`learning_rate` must be a positive number. "
                f"Received: {self.learning_rate}."
            )
        self._check_base()
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
    def all_epochs(self) -> int:
        """Epochs of the head, and of the base after it if that learns."""
        return self.epochs + (0 if self.trainable_from is None else self.base_epochs)

    @property
    def base_rate(self) -> float:
        """The base's learning rate."""
        if self.base_learning_rate is None:
            return BASE_SHARE_OF_LEARNING_RATE * self.learning_rate
        return self.base_learning_rate

    def _check_base(self) -> None:
        if not 0 < self.base_rate < float("inf"):
            raise InvalidArgument(
                "`base_learning_rate` must be a positive number. "
                f"Received: {self.base_learning_rate}."
            )
        if self.trainable_from is None:
            return
        checked = checked_trainable(self.trainable_from)
        object.__setattr__(self, "trainable_from", checked)
        if self.stage2_epochs:
            raise InvalidArgument(
                "`--stage2` and `--unfreeze` both train the base after the head. Give "
                "one of them."
            )

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
