"""Keras's own tests, from the installed wheel, on stock models and on wrapped ones.

Whatever a test trains, saves or exports is wrapped in an `RSFTModel` that accepts
everything and does it instead. Prints how many tests pass as they do on the stock
model, how many of them use a wrapper, and those that differ, by what they say.

    python tests/benchmarks/keras_own_tests.py trainers/trainer_test.py callbacks
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

PARTS = (
    "trainers/trainer_test.py", "callbacks", "saving/saving_lib_test.py",
    "export/saved_model_test.py",
)  # fmt: skip
# In the process of wrapped tests: "all", or "unlogged" without what they add to logs.
_WRAPPED = "KERAS_OWN_TESTS_WRAPPED"
_LOGGED = "passes without acceptance_rate and accepted_loss in the logs"
_OF_TRAINER = (
    "fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch",
)  # fmt: skip
_OF_SAVING = "save_model", "save_weights_only", "load_weights_only"
_COMPILED = "_loss_tracker", "_compile_metrics", "_compile_loss"
_SETTINGS = "run_eagerly", "jit_compile", "unrolled_steps_per_execution"


def main() -> None:
    """Runs the tests twice and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, help="below keras/src")
    parser.add_argument("-k", default="", help="as for pytest")
    arguments = parser.parse_args()
    source = Path(importlib.util.find_spec("keras").origin).parent / "src"
    paths = [str(source / part) for part in arguments.parts]
    stock, _ = _outcomes(paths, arguments.k)
    wrapped, users = _outcomes(paths, arguments.k, wrapped="all")
    passed = [name for name, said in stock.items() if said is None]
    differ = {name: wrapped.get(name, "did not run") for name in passed}
    differ = {name: said for name, said in differ.items() if said is not None}
    if differ:
        again = " or ".join(name.split(".")[1] for name in differ)
        unlogged, _ = _outcomes(paths, again, wrapped="unlogged")
        differ |= {n: _LOGGED for n in differ if unlogged.get(n, "did not run") is None}
    print(f"stock:   {len(passed)} of {len(stock)} tests pass")
    print(f"wrapped: {len(passed) - len(differ)} of those {len(passed)} pass")
    print(f"{len(users & {*passed})} of the {len(passed)} use a wrapper")
    for said in dict.fromkeys(differ.values()):
        names = [name for name in differ if differ[name] == said]
        print(f"{len(names)} x {said}", *names, sep="\n    ")


def _outcomes(paths, expression, wrapped=None):
    """Runs tests; returns by name what a failed one said, and who used a wrapper."""
    here = str(Path(__file__).parent)
    search = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "keras_own_tests", "-p",
        "no:cacheprovider", "-c", os.devnull, "--junitxml=report.xml", "-n", "0",
        "--continue-on-collection-errors", "-k", expression, *paths,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": search}
    if wrapped is not None:
        environment[_WRAPPED] = wrapped
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True
        )
        report = Path(folder, "report.xml")
        if not report.exists():
            raise SystemExit(done.stdout + done.stderr)
        cases = [*ET.parse(report).iter("testcase")]
    outcomes, users = {}, set()
    for case in cases:
        name = f"{case.get('classname').split('.')[-1]}.{case.get('name')}"
        wrong = [case.find(kind) for kind in ("failure", "error")]
        found = [one.get("message", "") for one in wrong if one is not None]
        if case.find("skipped") is None:
            said = "".join(found).partition("Received:")[0]
            outcomes[name] = " ".join(said.split())[:160] if found else None
        if any(one.get("value") != "0" for one in case.iter("property")):
            users.add(name)
    return outcomes, users


# As a plugin of pytest ----------------------------------------------------------------


def pytest_configure(config) -> None:
    for mark in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", mark)
    if _WRAPPED in os.environ:
        config.own_tests_wrappers = wrap_what_is_used()
        if os.environ[_WRAPPED] == "unlogged":
            from keras_rsft.model._metrics import SelectionMetric

            SelectionMetric.result = lambda self: {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Seeds a test, and notes how often wrappers stood in for its models."""
    from keras.utils import set_random_seed

    set_random_seed(0)  # What is shuffled is in the same order in all runs.
    wrappers = getattr(item.config, "own_tests_wrappers", Wrappers())
    try:
        return (yield)
    finally:
        item.user_properties.append(("uses", wrappers.uses))
        wrappers.clear()
        wrappers.uses = 0


class Wrappers(dict):
    """Wrappers by the `id` of their models, as an attribute would be saved."""

    uses = 0


def wrap_what_is_used() -> Wrappers:
    """Has wrappers train, save and export in place of the models of tests."""
    import keras
    from keras.src.export import saved_model
    from keras.src.saving import saving_lib
    from keras.src.trainers.trainer import Trainer
    from keras.src.utils.tracking import DotNotTrackScope

    import keras_rsft as rsft
    from keras_rsft.model import _rsft_model

    wrappers, busy = Wrappers(), set()
    backend_trainer = keras.Model.__mro__[1]
    compile_stock, load_stock = Trainer.compile, saving_lib.load_model

    class Held(keras.Model):
        """A layer that is a trainer but no model, as Keras's tests have them."""

        def __init__(self, layer):
            asked = _rsft_model._ASKED_OF_THE_OUTER
            _rsft_model._refuse_overrides(type(layer), backend_trainer, asked, "")
            super().__init__(dtype=layer.dtype_policy)
            self.layer = layer

        def call(self, inputs):
            return self.layer(inputs)

    def stand_in(model):
        """Returns the wrapper of a model; for anything else, that itself."""
        inner = isinstance(model, (rsft.RSFTModel, Held)) or id(model) in busy
        if inner or not isinstance(model, Trainer):
            return model
        if id(model) not in wrappers:
            whole = model if isinstance(model, keras.Model) else Held(model)
            wrappers[id(model)] = rsft.RSFTModel(whole, rsft.AcceptAll())
        return wrappers[id(model)]

    def share(model, wrapper):
        with DotNotTrackScope():
            for name in _COMPILED:
                setattr(model, name, getattr(wrapper, name))

    def delegated(stock, name=None):
        @functools.wraps(stock)
        def method(model, *args, **kwargs):
            wrapper = stand_in(model)
            if wrapper is model:
                return stock(model, *args, **kwargs)
            wrappers.uses += 1
            busy.add(id(model))
            wrapper.built = model.built
            for setting in _SETTINGS:
                if getattr(wrapper, setting) != getattr(model, setting):
                    setattr(wrapper, setting, getattr(model, setting))
            try:
                if name is None:
                    return stock(wrapper, *args, **kwargs)
                return getattr(wrapper, name)(*args, **kwargs)
            finally:
                busy.remove(id(model))

        return method

    @functools.wraps(compile_stock)
    def compile_both(model, *args, **kwargs):
        compile_stock(model, *args, **kwargs)
        wrappers.pop(id(model), None)
        wrapper = stand_in(model)
        if wrapper is not model:
            given = inspect.signature(compile_stock).bind(model, *args, **kwargs)
            given = {**given.arguments, "optimizer": model.optimizer}
            del given["self"]
            wrapper.compile(**given)
            share(model, wrapper)

    @functools.wraps(load_stock)
    def load(*args, **kwargs):
        """Returns what the test has saved, and keeps the wrapper around it."""
        wrapper = load_stock(*args, **kwargs)
        if not isinstance(wrapper, rsft.RSFTModel):
            return wrapper
        model = wrapper.model
        wrappers[id(model)] = wrapper
        if wrapper.compiled:
            given = {**wrapper._compile_config.config, "optimizer": wrapper.optimizer}
            compile_stock(model, **given)
            share(model, wrapper)
        return model

    # Only the test sees a model that is compiled; its wrapper saves one that is not.
    walk, compile_config = saving_lib._walk_saveable, Trainer.get_compile_config
    saving_lib._walk_saveable = lambda saveable: (
        (name, child)
        for name, child in walk(saveable)
        if not (id(saveable) in busy and name in ("optimizer", *_COMPILED))
    )
    Trainer.get_compile_config = lambda model: (
        None if id(model) in busy else compile_config(model)
    )
    Trainer.compile, saving_lib.load_model = compile_both, load
    for name in _OF_TRAINER:
        setattr(backend_trainer, name, delegated(getattr(backend_trainer, name), name))
    for name in ("save", "export"):
        setattr(keras.Model, name, delegated(getattr(keras.Model, name), name))
    for name in _OF_SAVING:
        setattr(saving_lib, name, delegated(getattr(saving_lib, name)))
    saved_model.export_saved_model = delegated(saved_model.export_saved_model, "export")
    return wrappers


if __name__ == "__main__":
    main()
