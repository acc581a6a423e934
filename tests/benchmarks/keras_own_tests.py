"""Keras's own tests, from the installed wheel, on stock models and on wrapped ones.

Whatever a test compiles is wrapped in an `RSFTModel` that accepts everything, and is
trained, evaluated, saved and exported by it. Prints how many tests passed as they do on
the stock model, how often the wrapper was used, and the tests that differ.

    python tests/benchmarks/keras_own_tests.py trainers/trainer_test.py callbacks
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

PARTS = (
    "trainers/trainer_test.py", "callbacks", "saving/saving_lib_test.py",
    "export/saved_model_test.py",
)  # fmt: skip
_USES = "KERAS_OWN_TESTS_USES"  # A file; set in the process of the wrapped tests.
_DELEGATED = (
    "fit", "evaluate", "predict", "train_on_batch", "test_on_batch",
    "predict_on_batch", "save", "export",
)  # fmt: skip


def main() -> None:
    """Runs the tests twice and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, help="below keras/src")
    parser.add_argument("-k", default="", help="as for pytest")
    arguments = parser.parse_args()
    source = Path(importlib.util.find_spec("keras").origin).parent / "src"
    paths = [str(source / part) for part in arguments.parts]
    with tempfile.TemporaryDirectory() as folder:
        uses = Path(folder, "uses.json")
        stock = _outcomes(paths, arguments.k, Path(folder, "stock.xml"), {})
        names = {_USES: str(uses)}
        wrapped = _outcomes(paths, arguments.k, Path(folder, "wrapped.xml"), names)
        counted = json.loads(uses.read_text())
    passed = [name for name, said in stock.items() if said is None]
    differ = {name: wrapped.get(name, "did not run") for name in passed}
    differ = {name: said for name, said in differ.items() if said is not None}
    print(f"stock:   {len(passed)} of {len(stock)} tests pass")
    print(f"wrapped: {len(passed) - len(differ)} of those {len(passed)} pass")
    print(", ".join(f"{count} {what}" for what, count in counted.items()))
    for name, said in differ.items():
        print(f"{name}: {said}")


def _outcomes(paths, expression, report, names) -> dict[str, str | None]:
    """Runs tests; returns by name what a failed one said, None of one that passed."""
    here = str(Path(__file__).parent)
    search = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "keras_own_tests", "-p",
        "no:cacheprovider", "-c", os.devnull, f"--junitxml={report}", "-n", "0",
        "-k", expression, *paths,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": search} | names
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True
        )
    if not report.exists():
        raise SystemExit(done.stdout + done.stderr)
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname').split('.')[-1]}.{case.get('name')}"
        wrong = [case.find(kind) for kind in ("failure", "error")]
        found = [one.get("message", "") for one in wrong if one is not None]
        if case.find("skipped") is None:
            outcomes[name] = found[0].splitlines()[0][:160] if found else None
    return outcomes


# As a plugin of pytest ----------------------------------------------------------------


def pytest_configure(config) -> None:
    for mark in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", mark)
    if _USES in os.environ:
        config.stash_of_uses = wrap_what_is_compiled()


def pytest_unconfigure(config) -> None:
    if uses := getattr(config, "stash_of_uses", None):
        Path(os.environ[_USES]).write_text(json.dumps(uses))


def wrap_what_is_compiled() -> dict[str, int]:
    """Has what is compiled be trained by a wrapper; returns the counts of its uses."""
    import keras
    from keras.src.trainers.trainer import Trainer

    import keras_rsft as rsft
    from keras_rsft.errors import InvalidArgument

    uses = {"models wrapped": 0, "models refused": 0, "calls delegated": 0}
    wrappers: dict[int, rsft.RSFTModel] = {}  # Not attributes: those are saved.
    compile_stock = Trainer.compile

    def compile_both(model, *args, **kwargs):
        compile_stock(model, *args, **kwargs)
        if isinstance(model, rsft.RSFTModel) or not isinstance(model, keras.Model):
            return
        wrappers.pop(id(model), None)
        try:
            wrapper = rsft.RSFTModel(model, rsft.AcceptAll())
        except InvalidArgument:
            uses["models refused"] += 1
            return
        names = ["optimizer", "loss", "loss_weights", "metrics"]
        given = dict(zip(names, args, strict=False)) | kwargs
        rsft.RSFTModel.compile(wrapper, **given | {"optimizer": model.optimizer})
        wrappers[id(model)] = wrapper
        uses["models wrapped"] += 1

    def delegated(name):
        stock = getattr(keras.Model, name)

        def method(model, *args, **kwargs):
            wrapper = wrappers.get(id(model))
            if wrapper is None:
                return stock(model, *args, **kwargs)
            uses["calls delegated"] += 1
            return getattr(wrapper, name)(*args, **kwargs)

        return method

    Trainer.compile = compile_both
    for name in _DELEGATED:
        setattr(keras.Model, name, delegated(name))
    return uses


if __name__ == "__main__":
    main()
