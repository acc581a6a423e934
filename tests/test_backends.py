"""JAX and PyTorch train as TensorFlow does; the rules of rejection hold on each.

The tests of the rules run again in a process of their own, as Keras takes its backend
when it is imported.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import run_under_backend

HERE = Path(__file__).parent
INSTALLED = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
        ),
    )
    for name in ("jax", "torch")
]


# Compiling small programs takes longest: each is compiled once, and quickly.
PROGRAMS = tempfile.TemporaryDirectory()
QUICK = {
    "JAX_COMPILATION_CACHE_DIR": PROGRAMS.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "PYTHONWARNINGS": "ignore",
}


def under(backend, *arguments, fails=False):
    """Runs Python under a backend; returns what it printed."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | QUICK | {"KERAS_BACKEND": backend},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def found_under(tmp_path_factory):
    """Returns what `run_under_backend.py` finds under a backend."""
    folder = tmp_path_factory.mktemp("backends")
    known = {}

    def find(backend):
        if backend not in known:
            path = folder / f"{backend}.npz"
            if backend == keras.backend.backend():
                run_under_backend.main(path)
            else:
                under(backend, HERE / "run_under_backend.py", path)
            with np.load(path, allow_pickle=False) as found:
                known[backend] = dict(found)
        assert known[backend]["backend"] == backend
        return known[backend]

    return find


@pytest.mark.slow
@pytest.mark.parametrize("backend", INSTALLED)
def test_weights_decisions_and_ledger_are_those_of_tensorflow(backend, found_under):
    expected, found = found_under("tensorflow"), found_under(backend)
    assert set(found) == set(expected)
    for name in set(expected) - {"backend"}:
        exact = expected[name].dtype.kind in "biu"
        np.testing.assert_allclose(
            found[name],
            expected[name],
            rtol=0 if exact else 1e-5,
            atol=0 if exact else 1e-6,
            err_msg=name,
        )
    rates = [found[f"{case}: log acceptance_rate"] for case in ("sample", "batch")]
    assert all(0 < rate.mean() < 1 for rate in rates), "both branches are taken"
    wrong = found["auto True: looks_wrong"]
    assert wrong[:6].all()
    np.testing.assert_array_equal(found["auto True: accepted"], 2 * (1 - wrong))


RULES = (
    "article_parity", "ledger", "model", "model_saving", "model_selection",
)  # fmt: skip


@pytest.mark.slow  # JAX compiles each model anew.
@pytest.mark.parametrize("backend", INSTALLED)
def test_the_rules_hold(backend):
    paths = [HERE / f"test_{name}.py" for name in RULES]
    # PyTorch, TensorFlow and JAX in one process do not get on.
    options = ["-n", "0", "-q", "-p", "no:cacheprovider"]
    options += ["-m", "not slow", "-k", "not in_pytorch"]
    output = under(backend, "-m", "pytest", *paths, *options)
    assert int(re.search(r"(\d+) passed", output)[1]) > 100, output


REFUSED = """
import sys

import keras
import keras_rsft as rsft

model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
for call in (
    lambda: rsft.finetune(None),
    lambda: rsft.compare(None),
    lambda: rsft.search(None, output="nowhere"),
    lambda: rsft.extract_features(None, None),
    lambda: rsft.export_saved_model(model, "nowhere", class_names=["a", "b"]),
):
    try:
        call()
    except ValueError as error:
        print(error)
from keras_rsft.cli import main
sys.exit(main(["demo"]))
"""


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.slow
def test_what_needs_tensorflow_says_so(backend):
    refused = under(backend, "-c", REFUSED, fails=True)
    said = f"needs Keras's TensorFlow backend. Received: {backend}."
    assert refused.count(said) == 5, refused
    assert f"Received: KERAS_BACKEND={backend}. Leave it out" in refused


@pytest.mark.slow
@pytest.mark.parametrize("backend", INSTALLED)
def test_the_example_of_custom_training_runs(backend):
    output = under(backend, HERE.parent / "examples" / "custom_training.py")
    names = [line.split()[0] for line in output.splitlines() if "%" in line]
    assert names == ["AcceptAll", "LossThreshold", "KeepFraction"]
