"""What can be trained on several replicas, and what Keras cannot do there.

Owns the refusals: each says what to do instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from keras_rsft.errors import InvalidArgument

if TYPE_CHECKING:
    from keras_rsft.model.rsft_model import RSFTModel

_REPLICATED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
)


def is_replicated(strategy: Any) -> bool:
    """Says whether a strategy runs copies of the model side by side, one included."""
    return isinstance(strategy, _REPLICATED)


def ready_for_replicas(model: RSFTModel, data: Any) -> Any:
    """Checks that a model can be trained where it was made, before it is.

    Args:
        model: The compiled model.
        data: What `fit` was given, of any kind.

    Returns:
        The data, in the form that several replicas need.

    Raises:
        InvalidArgument: If its replicas cannot be trained.
    """
    strategy = model.distribute_strategy
    if not is_replicated(strategy):
        if strategy.num_replicas_in_sync > 1:
            raise InvalidArgument(
                "RSFTModel trains on several devices under MirroredStrategy and "
                f"MultiWorkerMirroredStrategy. Received: {type(strategy).__name__}."
            )
        return data
    reason = _what_keras_cannot_do(model)
    if reason is not None:
        raise InvalidArgument(
            f"{reason} Received: {strategy.num_replicas_in_sync} replicas of "
            f"{type(strategy).__name__}."
        )
    if model.built:
        _require_in_scope(model)
    return _without_none(data)


def _without_none(data: Any) -> Any:
    """Gives weights of one to batches that say they have none.

    TensorFlow cannot hand a None to replicas.
    """
    if not isinstance(data, tf.data.Dataset):
        return data
    spec = data.element_spec
    if not (isinstance(spec, tuple) and len(spec) == 4 and _is_none(spec[2])):
        return data
    return data.map(lambda x, y, none, index: (x, y, tf.ones(tf.shape(index)), index))


def _is_none(spec: Any) -> bool:
    return isinstance(spec, tf.TypeSpec) and not hasattr(spec, "shape")


def _what_keras_cannot_do(model: RSFTModel) -> str | None:
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if model.steps_per_execution > 1:
        return (
            "Keras runs one step in a call under a strategy of several replicas. "
            "Compile with `steps_per_execution=1`."
        )
    if model.jit_compile:
        return (
            "XLA cannot compile a step that goes from replica to replica. "
            "Compile with `jit_compile=False`."
        )
    if getattr(optimizer, "gradient_accumulation_steps", None):
        return (
            "Keras cannot accumulate gradients under a strategy of several replicas. "
            "Leave out `gradient_accumulation_steps`, or train on one device."
        )
    if getattr(optimizer, "ema_overwrite_frequency", None):
        return (
            "Keras cannot overwrite weights with their averages under a strategy of "
            "several replicas. Leave out `ema_overwrite_frequency`."
        )
    if model.policy.level == "element":
        return (
            "Elements within samples are judged on one device. "
            "Use `level='sample'`, or no strategy."
        )
    if model._softens:
        return (
            "Label smoothing and mix-up train on one device. Leave out `soft_targets`, "
            "or the strategy."
        )
    if model._selects_within_batch:
        return None
    reductions = {
        loss.reduction
        for loss in keras.tree.flatten(model.loss)
        if isinstance(loss, keras.losses.Loss)
    }
    other = reductions - {"sum_over_batch_size", "mean", "auto"}
    if other:
        return (
            "The loss of several replicas is the mean over their samples. Give it "
            f"`reduction='sum_over_batch_size'`, not {sorted(map(str, other))}."
        )
    return None


def _require_in_scope(model: RSFTModel) -> None:
    variables = [*model.variables, *model.optimizer.variables]
    outside = [v for v in variables if not _is_distributed(v)]
    if outside:
        raise InvalidArgument(
            "Model, policy and optimizer must be made, and compiled, in the scope of "
            "the strategy that trains them: `with strategy.scope(): ...`. Received: "
            f"{outside[0].path}, which was not."
        )


def _is_distributed(variable: Any) -> bool:
    return isinstance(variable.value, tf.distribute.DistributedValues)
