"""The model that lets only accepted samples change its weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import keras
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.export.export_utils import get_input_signature
from keras.src.trainers.compile_utils import CompileMetrics
from keras.src.trainers.data_adapters.array_slicing import train_validation_split
from keras.src.utils.tracking import DotNotTrackScope

from keras_rsft.config import PolicyConfig
from keras_rsft.errors import InvalidArgument
from keras_rsft.label_quality._audit import LabelQuality
from keras_rsft.model import _data
from keras_rsft.model._auto import audit_samples
from keras_rsft.model._losses import LossScorer
from keras_rsft.model._metrics import (
    AcceptanceGuard,
    LossMean,
    OutputLosses,
    SelectionMetric,
)
from keras_rsft.policies._listed import AutoPolicy, require_same_count
from keras_rsft.policies._policy import Policy
from keras_rsft.policies._threshold import build_policy

_BACKEND = keras.backend.backend()
if _BACKEND == "tensorflow":
    from keras_rsft.model._tensorflow import TensorFlowStep as BackendStep
elif _BACKEND == "jax":
    from keras_rsft.model._jax import JaxStep as BackendStep
elif _BACKEND == "torch":
    from keras_rsft.model._torch import TorchStep as BackendStep
else:
    raise ImportError(
        "keras_rsft trains under Keras's backends tensorflow, jax and torch. Received: "
        f"{_BACKEND}. Set KERAS_BACKEND=tensorflow, or leave it out."
    )

_NO_HDF5 = "The format HDF5 has no place for a policy. Save the model as `.keras`."
# What Keras asks of the model that it trains, and so of no model within another.
_ASKED_OF_THE_OUTER = (
    "train_step", "test_step", "predict_step", "compute_loss", "compute_metrics",
    "metrics", "get_metrics_result", "reset_metrics", "fit", "evaluate", "predict",
    "train_on_batch", "test_on_batch", "predict_on_batch",
)  # fmt: skip


def _refuse_overrides(
    kind: type, base: type, names: tuple[str, ...], hint: str
) -> None:
    """Refuses a class that overrides what would not be asked."""
    found = [name for name in names if getattr(kind, name) is not getattr(base, name)]
    if found:
        raise InvalidArgument(
            f"RSFTModel does not use what {kind.__name__} overrides: "
            f"{', '.join(found)}. {hint}"
        )


def _of_wrapped(name: str) -> property:
    def found(self: RSFTModel) -> Any:
        """Returns that of the wrapped model."""
        return getattr(self.model, name)

    return property(found)


@keras.saving.register_keras_serializable(package="keras_rsft")
class RSFTModel(BackendStep):
    """Wraps a Keras model so that only accepted samples change its weights.

    Compiled, fitted, evaluated, saved and loaded like any `keras.Model`. The
    logs of training have `acceptance_rate` (fraction of the samples that were
    accepted, in [0, 1]) and `accepted_loss` (mean loss of the accepted ones)
    beside `loss` (mean loss of all samples whose loss is finite).

    At sample level the gradient is that of the mean data loss over the accepted
    samples, whatever reduction the loss has; sample and class weights weigh the
    accepted samples and never decide acceptance. What layers add to the loss, of
    weights or of activations, is that of the whole batch. A step that accepts nothing
    changes no variable of the model or the optimizer and runs no backward pass.
    At level `"element"` the same holds for what the loss has a value for within a
    sample: pixels, boxes, time steps; of binary cross-entropy each label.

    It trains on each of Keras's backends that have gradients: TensorFlow, JAX and
    PyTorch, with the same weights up to rounding.

    Made and compiled in the scope of a `tf.distribute.MirroredStrategy` or
    `MultiWorkerMirroredStrategy`, with its policy, it trains as on one device: one
    decision on the batch of all replicas, normalised by the number that all accept.

    Policies and a `RejectionLedger` may ask which training sample each row is. `fit`
    numbers the rows of arrays and of a `PyDataset`. A `tf.data.Dataset` is numbered by
    `with_ids`: it yields `(x, y, sample_weight or None, sample_index)`, with int32
    indices `(batch,)` in [0, n).

    With the policy `"auto"`, the first `fit` audits the labels of the training samples
    before its first epoch, says in one line what it found, and makes an `AutoPolicy` of
    it, which is saved with the model. The features of the audit are what the model
    computes before it is trained, so that it needs a pretrained backbone: features that
    predict less than two thirds of the labels, as those of a model from scratch mostly
    do, are not trusted, and every sample is accepted.

    Args:
        model: Any `keras.Model`; it is used, not copied, and stays available
            as `.model`.
        policy: A `Policy`, e.g. `LossThreshold(1.5)`; a name out of
            `PolicyConfig`, e.g. `"auto"` or `"loss-threshold"`; or a `PolicyConfig`.
            The first `fit` makes a policy of the latter two, whose warm-up is counted
            in epochs and whose threshold in units of ln(classes).
        features_from: For the policy `"auto"`: the name of the layer whose output is
            the features, averaged over its inner axes. Default: what goes into the
            last Dense layer.

    Attributes:
        label_quality: The `LabelQuality` that the policy `"auto"` found; None before,
            for other policies, and after loading.

    Raises:
        TypeError: If `policy` is none of these, or `model` not a `keras.Model`.
        InvalidArgument: If `policy` is a name that is not known, or `features_from`
            is given for another policy.

    Example:
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> head = rsft.build_head(dim=2, num_classes=2)
        >>> model = rsft.RSFTModel(head, rsft.KeepFraction(0.5))
        >>> model.compile("sgd", "sparse_categorical_crossentropy")
        >>> log = model.fit(np.eye(4, 2), np.arange(4) % 2, verbose=0)
        >>> log.history["acceptance_rate"]
        [0.5]
    """

    def __init__(
        self,
        model: keras.Model,
        policy: Policy | PolicyConfig | str,
        *,
        features_from: str | None = None,
        **kwargs: Any,
    ):
        if not isinstance(model, keras.Model):
            raise TypeError(
                f"`model` must be a `keras.Model`. Received: {type(model).__name__}."
            )
        if isinstance(policy, str):
            policy = PolicyConfig(policy)
        if not isinstance(policy, (Policy, PolicyConfig)):
            raise TypeError(
                "`policy` must be a name such as 'auto', or a `keras_rsft` policy such "
                f"as `LossThreshold(1.5)`. Received: {type(policy).__name__}."
            )
        judged = isinstance(policy, AutoPolicy) or getattr(policy, "name", "") == "auto"
        if features_from is not None and not judged:
            raise InvalidArgument(
                "`features_from` names the features that the policy 'auto' judges "
                f"labels by. Received: features_from={features_from!r} for another "
                "policy. Leave it out."
            )
        hint = "Wrap the model that it is made of, or override that of RSFTModel."
        _refuse_overrides(type(model), keras.Model, _ASKED_OF_THE_OUTER, hint)
        hint = "It is one number: give `compile` a loss that judges each sample."
        _refuse_overrides(type(self), RSFTModel, ("compute_loss",), hint)
        kwargs.setdefault("dtype", model.dtype_policy)
        super().__init__(**kwargs)
        self.model = model
        self.policy: Any = policy
        self.features_from = features_from
        self.label_quality: LabelQuality | None = None
        self.selection = SelectionMetric()
        self._scorer = None
        self.built = model.built

    input_shape, output_shape = _of_wrapped("input_shape"), _of_wrapped("output_shape")
    inputs, outputs = _of_wrapped("inputs"), _of_wrapped("outputs")
    input, output = _of_wrapped("input"), _of_wrapped("output")

    def get_layer(self, name: str | None = None, index: int | None = None) -> Any:
        """Returns a layer of the wrapped model, or that model, or the policy."""
        if name in [layer.name for layer in self.layers]:
            return super().get_layer(name)
        return self.model.get_layer(name, index)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Keras's, and those that the wrapped model has as attributes."""
        return [*super().metrics, *self.model._metrics]

    @property
    def output_names(self) -> Any:
        """Names of the wrapped model's outputs: keys of `loss` and `metrics`."""
        return getattr(self.model, "output_names", None)

    def build(self, input_shape: Any) -> None:
        if not self.model.built:
            inputs = keras.tree.map_shape_structure(keras.KerasTensor, input_shape)
            self.model(inputs)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.model(inputs, training=training)

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Configures training; takes what `keras.Model.compile` takes."""
        if isinstance(metrics := kwargs.get("metrics"), list) and self.compiled:
            # Keras Tuner gives a model's `metrics`, to compile it once more.
            kept = [
                one._user_metrics for one in metrics if isinstance(one, CompileMetrics)
            ]
            own = {id(one) for one in self.metrics}
            others = [one for one in metrics if id(one) not in own]
            kwargs["metrics"] = kept[0] if kept and not others else others
        super().compile(optimizer, loss, loss_weights, *args, **kwargs)
        with DotNotTrackScope():  # As Keras keeps its own.
            self._loss_tracker = LossMean(name="loss")
            if loss is not None:
                self._compile_loss = OutputLosses(
                    loss, loss_weights, output_names=self.output_names
                )
        self._scored_by = loss, loss_weights
        self._scorer = LossScorer(self, loss, loss_weights)

    def export(
        self,
        filepath: Any,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Exports the wrapped model; takes what `keras.Model.export` takes."""
        if format != "tf_saved_model" or _BACKEND != "tensorflow":
            self.model.export(filepath, format, verbose, input_signature, **kwargs)
            return
        archive = keras.export.ExportArchive()
        signature = input_signature or get_input_signature(self.model)
        archive.track_and_add_endpoint("serve", self.model, signature, **kwargs)
        # Keras stores its variables, and what they hold, as if they were two.
        for name in ("variables", "trainable_variables", "non_trainable_variables"):
            stored = getattr(archive._tf_trackable, name)
            setattr(archive._tf_trackable, name, [one.value for one in stored])
        archive.write_out(filepath, verbose=True if verbose is None else verbose)

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Saves all of it, with the policy; takes what `keras.Model.save` takes."""
        if str(filepath).endswith((".h5", ".hdf5")):
            raise InvalidArgument(f"{_NO_HDF5} Received: filepath={str(filepath)!r}.")
        super().save(filepath, *args, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: Any = True,
        class_weight: dict[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains like `keras.Model.fit`, and warns if rejection goes wrong."""
        self._assert_compile_called("fit")
        given_list = isinstance(callbacks, keras.callbacks.CallbackList)
        given = callbacks.callbacks if given_list else keras.tree.flatten(callbacks)
        given = [one for one in given if one is not None]
        are_arrays = _data.are_arrays(x, y, sample_weight)
        if validation_split and validation_data is None and are_arrays:
            (x, y, sample_weight), validation_data = train_validation_split(
                (x, y, sample_weight), validation_split=validation_split
            )
        samples, found = None, _data.numbered(
            x, y, sample_weight, batch_size=batch_size, steps=steps_per_epoch,
            shuffle=shuffle, class_weight=class_weight, filled=self._is_replicated(),
            needed=isinstance(self.policy, PolicyConfig) or any(
                getattr(one, "needs_sample_index", False)
                for one in (self.policy, *given)
            ),
        )  # fmt: skip
        if found is not None:  # All but the order is in `x` now.
            x, samples = found
            y = sample_weight = class_weight = None
        self._decide_policy(samples, steps_per_epoch, x, verbose)
        for one in given:
            if hasattr(one, "learn_samples"):
                one.learn_samples(samples, self.label_quality)
                if given_list:
                    one.set_model(self)
        x = self.ready_for_training(x)
        guard = AcceptanceGuard()
        if given_list:
            guard.set_model(self)
            callbacks.callbacks.append(guard)
        else:
            callbacks = [*given, guard]
        try:
            return super().fit(
                x, y, batch_size, epochs, verbose, callbacks, validation_split,
                validation_data, shuffle, class_weight, sample_weight, initial_epoch,
                steps_per_epoch, *args, **kwargs,
            )  # fmt: skip
        except Exception:
            if samples is not None and samples.failure is not None:
                raise samples.failure from None
            raise
        finally:  # A ledger is of one fit, also where that fails.
            if self._recorder is not None:
                self.record_with(None)

    def _decide_policy(
        self, samples: _data.Samples | None, steps: int | None, data: Any, verbose: Any
    ) -> None:
        """Makes the policy that was chosen by name, at the first `fit`."""
        choice = self.policy
        if not isinstance(choice, PolicyConfig):
            require_same_count(choice, None if samples is None else samples.count)
            return
        found, num_classes, epoch = None, 0, 0
        if choice.name == "auto":
            found = self._audited(samples, choice.threshold, verbose)
        else:
            num_classes = self._class_count(samples)
            epoch = steps or _data.steps_of(samples, data)
        strategy = getattr(self, "distribute_strategy", None)
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            policy = (
                build_policy(choice, num_classes=num_classes, steps_per_epoch=epoch)
                if found is None
                # Without a limit of the loss: that of a new head is high at first,
                # and those it would reject are those it still has to learn.
                else AutoPolicy(
                    found.accept_mask(threshold=choice.threshold),
                    weights=found.weights,
                )
            )
        locked = self._tracker.locked
        self._tracker.unlock()
        self.policy = policy
        if locked:
            self._tracker.lock()
        self._scorer = LossScorer(self, *self._scored_by)

    def _audited(
        self, samples: _data.Samples | None, threshold: float | None, verbose: Any
    ) -> LabelQuality:
        """Audits the labels, and says what was found."""
        if samples is None:
            raise InvalidArgument(
                "The policy auto must know which samples there are. Received: data "
                f"without numbers. {_data.HOW_TO_NUMBER}"
            )
        found = self.label_quality = audit_samples(
            self.model, samples, self.features_from, progress=bool(verbose)
        )
        if verbose:
            left = int((~found.accept_mask(threshold=threshold)).sum())
            print(
                f"{found.finding} {left:,} are left out."
                if found.reason is None
                else found.describe()
            )
        return found

    def _class_count(self, samples: _data.Samples | None) -> int:
        shape = getattr(self.model, "output_shape", None)
        if isinstance(shape, tuple) and isinstance(shape[-1], int):
            return max(shape[-1], 2)
        if samples is not None:
            return int(samples.labels.max()) + 1
        raise InvalidArgument(
            "A policy by name needs the number of classes, and this model does not say "
            "its output's shape. Build it first, or give a policy such as "
            "LossThreshold(1.5)."
        )

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Predicts like `keras.Model.predict`, also of data with sample indices."""
        if _data.has_index(x):
            x = x.map(lambda inputs, *rest: (inputs, None))
        return super().predict(x, *args, **kwargs)

    def record_with(self, recorder: Callable[[Any, Any, Any], None] | None) -> None:
        """Has each training step report what it decided, as `RejectionLedger` does.

        Args:
            recorder: Called while a step is traced, with `sample_index` int32,
                `per_sample_loss` float32 and `accept_mask` bool, each `(batch,)`.
                None stops it, as does the end of `fit`. At level `"element"` a
                sample has its mean loss, and is accepted if half its elements are.
                What it writes to are Keras variables, which it lists as `variables`:
                JAX must know of them.
        """
        self._recorder = recorder
        self.train_function = None  # Traced anew, with or without it.

    def make_train_function(self, force: bool = False) -> None:
        if isinstance(self.policy, PolicyConfig):
            raise InvalidArgument(
                f"`fit` makes the policy {self.policy.name} of its data. Received: a "
                "training step before the first `fit`. Call `fit` first."
            )
        if self.policy.needs_ledger and self._recorder is None:
            raise InvalidArgument(
                f"{type(self.policy).__name__} learns from a ledger. Received: none. "
                "Give `fit` a `RejectionLedger` among its callbacks."
            )
        if self.loss is None:
            raise InvalidArgument(
                "A policy judges samples by the loss that `compile` is given. "
                "Received: none (`add_loss` is not of a sample). Give it a `loss`."
            )
        self._make_slots()
        return super().make_train_function(force)

    def selection_totals(self) -> dict[str, float]:
        """Returns the sums of the selection since the last reset of metrics.

        Returns:
            `accepted`, `samples` and `nonfinite` (numbers of samples, or elements),
            `loss_sum` of the finite and `accepted_loss_sum` of the accepted, and
            `lowest_loss_rejected`: the lowest loss that was compared with the threshold
            in steps that accepted nothing, infinity if there was none; and
            `steps_not_finite`: the number of steps that changed nothing, and accepted
            nothing, because their gradient was not finite.
        """
        totals = self.selection.totals.numpy().tolist()
        samples, accepted, accepted_loss_sum, finite, loss_sum = totals
        return {
            "accepted": accepted,
            "samples": samples,
            "accepted_loss_sum": accepted_loss_sum,
            "loss_sum": loss_sum,
            "nonfinite": samples - finite,
            "lowest_loss_rejected": float(self.selection.lowest.numpy()),
            "steps_not_finite": float(self.selection.steps_not_finite.numpy()),
        }

    def save_own_variables(self, store: Any) -> None:
        """Saves the states of random layers, which Keras itself does not."""
        for number, state in enumerate(self._random_states()):
            store[f"random_state_{number}"] = state.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Restores the states of random layers, so that training resumes alike."""
        for number, state in enumerate(self._random_states()):
            key = f"random_state_{number}"
            if key in store:
                state.assign(store[key][...])

    def get_config(self) -> dict[str, Any]:
        if get_global_attribute("use_legacy_config"):  # `keras.saving.save_model`.
            raise InvalidArgument(_NO_HDF5)
        return super().get_config() | {
            "model": keras.saving.serialize_keras_object(self.model),
            "policy": (
                dataclasses.asdict(self.policy)
                if isinstance(self.policy, PolicyConfig)
                else keras.saving.serialize_keras_object(self.policy)
            ),
            "features_from": self.features_from,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> RSFTModel:
        parts = {
            part: keras.saving.deserialize_keras_object(config[part], custom_objects)
            for part in ("model", "policy")
            if "class_name" in config[part]
        }
        if "policy" not in parts:  # Not decided yet.
            parts["policy"] = PolicyConfig(**config["policy"])
        return cls(**(config | parts))

    def _random_states(self) -> list[Any]:
        return [v for v in self.model.variables if v.name == "seed_generator_state"]
