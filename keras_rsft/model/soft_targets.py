"""Softer targets to learn from: label smoothing and mix-up.

They change what is minimised and nothing else: a sample is judged by its plain loss,
which is also what the logs and the validation show. So a threshold keeps its meaning,
and runs with and without them can be compared.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_rsft.errors import InvalidArgument


class Mix(NamedTuple):
    """How the samples of one batch are mixed.

    `share` is a float32 scalar in [0, 1], what each keeps of itself; `partner` an int32
    tensor `(batch,)`, with which sample it is mixed.
    """

    share: Any
    partner: Any

    def of(self, values: Any) -> Any:
        """Returns floats `(batch, ...)`, in any structure, mixed with their partners'.

        Raises:
            InvalidArgument: If they are whole numbers, such as tokens.
        """

        def mixed(part: Any) -> Any:
            if not keras.backend.is_float_dtype(part.dtype):
                raise InvalidArgument(
                    "Mix-up needs inputs that are floats. Received: inputs of type "
                    f"{keras.backend.standardize_dtype(part.dtype)}. Mix what a base "
                    "makes of them, its features."
                )
            share = ops.cast(self.share, part.dtype)
            return share * part + (1 - share) * ops.take(part, self.partner, axis=0)

        return keras.tree.map_structure(mixed, values)

    def partners_of(self, values: Any) -> Any:
        """Returns tensors `(batch, ...)` or None, in any structure, of the partners."""
        return keras.tree.map_structure(
            lambda part: None if part is None else ops.take(part, self.partner, axis=0),
            values,
        )


@keras.saving.register_keras_serializable(package="keras_rsft")
class SoftTargets(keras.layers.Layer):
    """Label smoothing and mix-up for the accepted samples of an `RSFTModel`.

    ```python
    soft = rsft.SoftTargets(mix_up=0.4, seed=1)
    model = rsft.RSFTModel(head, rsft.LossThreshold(1.5), soft_targets=soft)
    ```

    Which samples are accepted is decided before, by the plain loss of the unmixed
    samples. Label smoothing (Szegedy et al., "Rethinking the Inception architecture for
    computer vision", CVPR 2016) takes `label_smoothing` of the probability from the
    given class and spreads it evenly over all. Mix-up (Zhang et al., "mixup: beyond
    empirical risk minimization", ICLR 2018) minimises `l loss(y_i) + (1 - l) loss(y_j)`
    on `l x_i + (1 - l) x_j`, with one `l` a batch from Beta(alpha, alpha), as its
    authors' code does. Accepted samples are mixed with accepted ones of the batch and
    no others, as DivideMix does after it has divided them (Li, Socher and Hoi, ICLR
    2020). It costs a second forward pass.

    Both at levels `"sample"` and `"batch"`, and on one device; with TensorFlow
    mix-up not under XLA, which Keras then says and leaves out.

    Args:
        label_smoothing: Share of the probability to spread, in [0, 1); for the loss
            `sparse_categorical_crossentropy` of one output. Default 0: none.
        mix_up: alpha of the Beta distribution, at least 0. Default 0: nothing is mixed.
        seed: Seed of what is mixed with what. The generator's state is saved with the
            model, and a rejected step leaves it as it was. Default 0.

    Raises:
        InvalidArgument: If an argument is out of its range.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        mix_up: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ):
        kwargs.setdefault("dtype", "float32")
        super().__init__(trainable=False, **kwargs)
        check_soft_targets(label_smoothing, mix_up)
        self.label_smoothing = float(label_smoothing)
        self.mix_up = float(mix_up)
        self.seed = int(seed)
        self.seed_generator = keras.random.SeedGenerator(self.seed)
        # TensorFlow's XLA has no gamma distribution, of which a Beta one is made.
        self.supports_jit = not self.mix_up or keras.backend.backend() != "tensorflow"
        self.built = True

    def draw(self, accept_mask: Any) -> Mix:
        """Draws how a batch is mixed: accepted samples with accepted ones.

        Args:
            accept_mask: Boolean tensor `(batch,)`.
        """
        alpha, seed = self.mix_up, self.seed_generator
        share = keras.random.beta((), alpha, alpha, dtype="float32", seed=seed)
        draws = keras.random.uniform(ops.shape(accept_mask), dtype="float32", seed=seed)
        return Mix(share, partners(accept_mask, draws))

    def save_own_variables(self, store: Any) -> None:
        """Saves the generator's state, which Keras itself does not."""
        store["seed_generator_state"] = self.seed_generator.state.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Restores the generator's state, so that training goes on alike."""
        self.seed_generator.state.assign(store["seed_generator_state"][...])

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.pop("trainable", None)
        return config | {
            "label_smoothing": self.label_smoothing,
            "mix_up": self.mix_up,
            "seed": self.seed,
        }


def check_soft_targets(label_smoothing: float, mix_up: float) -> None:
    """Raises InvalidArgument if a number is out of its range."""
    if not 0 <= label_smoothing < 1:
        raise InvalidArgument(
            "`label_smoothing` must be in [0, 1). "
            f"Received: {label_smoothing}. Use 0 for none."
        )
    if not 0 <= mix_up < math.inf:
        raise InvalidArgument(
            f"`mix_up` must be at least 0. Received: {mix_up}. Use 0 to mix nothing."
        )


def partners(accept_mask: Any, draws: Any) -> Any:
    """Returns a random partner for each sample: accepted ones for accepted ones.

    Args:
        accept_mask: Boolean tensor `(batch,)`.
        draws: Float tensor `(batch,)` in [0, 1), all different.

    Returns:
        int32 tensor `(batch,)`: a permutation within the accepted samples, and one
        within the others.
    """
    accepted = ops.cast(accept_mask, "int32")
    rejected = 1 - accepted
    # By their draws, the accepted samples first.
    shuffled = ops.argsort(draws + ops.cast(rejected, draws.dtype))
    place = ops.where(
        accept_mask,
        ops.cumsum(accepted) - 1,
        ops.sum(accepted) + ops.cumsum(rejected) - 1,
    )
    return ops.cast(ops.take(shuffled, place, axis=0), "int32")


class LearnsSoftTargets:
    """Has an `RSFTModel` learn from softer targets; goes before `keras.Model`.

    Without `soft_targets` nothing is changed.
    """

    def __init__(
        self, *args: Any, soft_targets: SoftTargets | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        if soft_targets is not None and not isinstance(soft_targets, SoftTargets):
            raise TypeError(
                "`soft_targets` must be a `keras_rsft.SoftTargets` or None. "
                f"Received: {type(soft_targets).__name__}."
            )
        self.soft_targets = soft_targets

    def make_train_function(self, force: bool = False) -> Any:
        if self._softens:
            _require_learnable(self)
        return super().make_train_function(force)

    def get_config(self) -> dict[str, Any]:
        soft = self.soft_targets
        return super().get_config() | {
            "soft_targets": soft and keras.saving.serialize_keras_object(soft)
        }

    @property
    def _softens(self) -> bool:
        soft = self.soft_targets
        return soft is not None and (soft.label_smoothing > 0 or soft.mix_up > 0)

    @property
    def _mixes(self) -> bool:
        return self.soft_targets is not None and self.soft_targets.mix_up > 0

    def _draw_mix(self, accept_mask: Any) -> Mix | None:
        return self.soft_targets.draw(accept_mask) if self._mixes else None

    def _learnt_loss(
        self, y: Any, y_pred: Any, sample_weight: Any = None, mix: Mix | None = None
    ) -> Any:
        """Returns what is minimised of each sample, float32 `(batch,)`."""
        own = self._smoothed_loss(y, y_pred, sample_weight)
        if mix is None:
            return own
        other_y, other_weight = mix.partners_of((y, sample_weight))
        other = self._smoothed_loss(other_y, y_pred, other_weight)
        return mix.share * own + (1 - mix.share) * other

    def _smoothed_loss(self, y: Any, y_pred: Any, sample_weight: Any) -> Any:
        hard = self._scorer(y, y_pred, sample_weight)
        smoothing = (
            0.0 if self.soft_targets is None else self.soft_targets.label_smoothing
        )
        if smoothing == 0:
            return hard
        if len(getattr(y_pred, "shape", ())) != 2:
            raise InvalidArgument(
                "Label smoothing needs one output of class scores (batch, classes). "
                f"Received: {y_pred}."
            )
        scores = ops.cast(y_pred, "float32")
        even = keras.losses.categorical_crossentropy(
            ops.ones_like(scores) / scores.shape[-1],
            scores,
            from_logits=_takes_logits(self.loss),
        )
        if sample_weight is not None:
            even = even * ops.reshape(ops.cast(sample_weight, "float32"), (-1,))
        return (1 - smoothing) * hard + smoothing * even


def _require_learnable(model: Any) -> None:
    """Refuses what a model with soft targets cannot train."""
    soft = model.soft_targets
    if model.policy.level == "element":
        raise InvalidArgument(
            "Label smoothing and mix-up judge whole samples. Received: a policy at "
            "level 'element'. Leave out `soft_targets`, or use level 'sample'."
        )
    if soft.label_smoothing > 0 and _takes_logits(model.loss) is None:
        raise InvalidArgument(
            "Label smoothing needs the loss sparse_categorical_crossentropy. Received: "
            f"{model.loss!r}. For one-hot targets compile with "
            "`keras.losses.CategoricalCrossentropy(label_smoothing=...)`, by which "
            "samples are then judged too."
        )


def _takes_logits(loss: Any) -> bool | None:
    """Says whether a sparse cross-entropy takes logits; None for any other loss."""
    if isinstance(loss, (dict, list, tuple)):
        return None
    loss = keras.losses.get(loss)
    if loss is keras.losses.sparse_categorical_crossentropy:
        return False
    if not isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        return None
    config = loss.get_config()
    return None if config["ignore_class"] is not None else config["from_logits"]
