"""The training step under JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import keras
from jax.experimental import sparse

from keras_rsft.model._step import Change, Pass, SymbolicBuild, unpack, unselected

State = tuple[list[Any], ...]


class JaxStep(SymbolicBuild):
    @property
    def non_trainable_variables(self) -> list[Any]:
        """Those of the model and the policy, and what a recorder writes to."""
        own = super().non_trainable_variables
        return [*own, *getattr(self._recorder, "variables", ())]

    def _forward(self, x: Any) -> tuple[Any, None]:
        return self(x, training=True), None  # `recorded` holds back what it changes.

    def train_step(self, state: State, data: Any) -> tuple[dict[str, Any], State]:
        groups = self._state_variables()
        values = keras.tree.flatten(state)
        with _values_in_scope(keras.tree.flatten(groups), values) as scope:
            logs = self.train_on(data)
        return logs, tuple(
            [scope.get_current_value(variable) for variable in group]
            for group in groups
        )

    def test_step(self, state: State, data: Any) -> tuple[dict[str, Any], State]:
        logs, state = super().test_step(state, unpack(data)[:3])
        return unselected(logs), state

    def recorded(self, score: Callable[[], Pass]) -> Pass:
        trained = self.trainable_variables
        _, *other_groups = self._state_variables()
        others = keras.tree.flatten(other_groups)
        other_values = [variable.value for variable in others]
        changed: list[Any] = []

        def forward(values: list[Any]) -> tuple[Any, Any]:
            variables, given = [*trained, *others], [*values, *other_values]
            with _values_in_scope(variables, given, collect_losses=True) as scope:
                before = dict(scope.state_mapping)
                scored = score()
            now = scope.state_mapping
            changed[:] = [v for v in others if now[id(v)] is not before[id(v)]]
            left = [scope.get_current_value(variable) for variable in changed]
            return scored.targets(), (scored._replace(pending=None), left)

        _, backward, (scored, left) = jax.vjp(
            forward, [variable.value for variable in trained], has_aux=True
        )
        own = {id(variable) for variable in self.model.variables}
        pending = keras.StatelessScope()
        for variable, value in zip(changed, left, strict=True):
            if id(variable) in own:
                pending.add_update((variable, value))
            else:  # Metrics of single losses.
                variable.assign(value)
        return scored._replace(pending=pending, tape=backward)

    def taken(self, part: Any, rows: Any, usable: Any) -> Any:
        if isinstance(part, sparse.BCOO):  # Cannot be gathered from: it has zeros.
            kept = jax.numpy.where(usable[part.indices[:, 0]], part.data, 0)
            return sparse.BCOO((kept, part.indices), shape=part.shape)
        return super().taken(part, rows, usable)

    def gradients(self, recorded: Pass, seeds: list[Any]) -> list[Any]:
        (gradients,) = recorded.tape(seeds)
        return gradients

    def branch(
        self, condition: Any, accepted: Change, otherwise: Change, rare: bool = False
    ) -> Any:
        if not isinstance(condition, jax.core.Tracer):  # Eager: nothing to compile.
            return accepted() if condition else otherwise()
        variables = keras.tree.flatten(self._state_variables())
        changed = [  # What the two outcomes may leave different.
            *self.trainable_variables,
            *self.model.non_trainable_variables,
            *self.optimizer.variables,
            self.selection.lowest,
            self.selection.steps_not_finite,
        ]

        def stateless(run: Change) -> Callable[[], tuple[Any, list[Any]]]:
            def branch() -> tuple[Any, list[Any]]:
                given = [variable.value for variable in variables]
                with _values_in_scope(variables, given) as scope:
                    result = run()
                return result, [scope.get_current_value(one) for one in changed]

            return branch

        result, values = jax.lax.cond(
            condition, stateless(accepted), stateless(otherwise)
        )
        for variable, value in zip(changed, values, strict=True):
            variable.assign(value)
        return result

    def apply_gradients(self, gradients: list[Any]) -> None:
        variables = [self.trainable_variables, self.optimizer.variables]
        trained, slots = ([one.value for one in group] for group in variables)
        values = self.optimizer.stateless_apply(slots, gradients, trained)
        for variable, value in zip(
            keras.tree.flatten(variables), keras.tree.flatten(values), strict=True
        ):
            variable.assign(value)

    def _make_slots(self) -> None:
        super()._make_slots()
        # At the end of a `fit` with `use_ema` Keras gives weights and averages one
        # array; a step gives up what it was given, and cannot give one up twice.
        slots = getattr(self.optimizer, "variables", [])
        averages = {id(slot.value) for slot in slots}
        for variable in self.trainable_variables:
            if id(variable.value) in averages:
                variable.assign(jax.numpy.array(variable.value, copy=True))

    def _state_variables(self) -> tuple[list[Any], ...]:
        return (  # In Keras's order.
            self.trainable_variables,
            self.non_trainable_variables,
            self.optimizer.variables,
            self.metrics_variables,
        )


def _values_in_scope(
    variables: list[Any], values: list[Any], *, collect_losses: bool = False
) -> keras.StatelessScope:
    return keras.StatelessScope(
        state_mapping=list(zip(variables, values, strict=True)),
        collect_losses=collect_losses,
        # Within a trace they would be given a value that is gone after it.
        initialize_variables=False,
    )
