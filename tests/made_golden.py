"""Runs each command once on small photos, and sums up what came out.

    python tests/made_golden.py FILE.json

writes the summary that `test_golden.py` compares with. Write it anew only where a
change of behaviour is meant, and read the difference.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np
import tensorflow as tf
from eagerly import eagerly

import keras_rsft as rsft
from keras_rsft.cli import main

SIDE, DIM = 16, 6
CLASSES = ("blue", "green", "red")
TIMES = ("seconds", "bytes", "version", "started", "created", "device")
# The same numbers on every machine, up to the order in which they are added.
TOLERANCE = 2e-3


def public(*names: str):
    """The public object that has one of these names, the newest first."""
    return next(getattr(rsft, name) for name in names if name in rsft.__all__)


# --- Data -------------------------------------------------------------------------


def write_photos(root: Path) -> Path:
    """Twenty noisy 20 x 16 images of each of three colours."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(20):
            image = rng.integers(0, 200, size=(20, 16, 3))
            image[..., 2 - channel] += 25
            encoded = tf.io.encode_png(image.astype("uint8")).numpy()
            (root / name / f"{number:02}.png").write_bytes(encoded)
    return root


def write_backbone(path: Path) -> Path:
    """A network of 16 x 16 images to 6 features whose weights are written here."""
    rng = np.random.default_rng(1)
    images = keras.Input((SIDE, SIDE, 3))
    values = keras.layers.Rescaling(1 / 255)(images)
    convolution = keras.layers.Conv2D(DIM, 3, strides=2, activation="relu")
    values = convolution(values)
    values = keras.layers.GlobalAveragePooling2D()(values)
    kernel = rng.normal(0, 0.3, (3, 3, 3, DIM)).astype("float32")
    convolution.set_weights([kernel, np.full(DIM, 0.1, "float32")])
    keras.Model(images, values).save(path)
    return path


# --- Commands ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command left: exit status and both streams."""

    status: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def run_command(folder: Path, *arguments) -> Answer:
    """Runs a command in this process, in a folder."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own errors.
            status = stop.code
    return Answer(status, out.getvalue(), err.getvalue())


def prepare(root: Path) -> None:
    write_photos(root / "photos")
    write_backbone(root / "tiny.keras")
    lines = "id,given_label,decision,new_label\nred/01.png,red,keep,\n"
    (root / "corrections.csv").write_text(lines)


COMMON = (
    "--backbone", "{root}/tiny.keras", "--cache-dir", "{root}/cache", "--json",
    "--set", "dtype=float32",  # By default it depends on the processor.
)  # fmt: skip
NOISE = ("--noise", "symmetric:0.25")
FINISHED = {
    "fit": (
        "fit", "{root}/photos", *COMMON, *NOISE, "--epochs", 4, "--batch-size", 8,
        "--learning-rate", 0.05, "--corrections", "{root}/corrections.csv",
        "--output", "{root}/photos-1",
    ),
    "compare": (
        "compare", "{root}/photos", *COMMON, "--epochs", 2, "--seeds", 2,
        "--methods", "gce, article,clean-subset", "--noise", "instance:0.25",
        "--threshold", 0.000001, "--output", "{root}/compare",
    ),
    "search": (
        "search", "{root}/photos", *COMMON, *NOISE, "--epochs", 2, "--batch-size", 8,
        "--max-trials", 4, "--policies", "loss-threshold", "--optimizers", "adamw",
        "--range", "relative_threshold=1.2:3", "--range", "warmup_epochs=1:1",
        "--output", "{root}/search",
    ),
    "export": ("export", "{root}/photos-1", "--json"),
}  # fmt: skip
FOLDERS = {"fit": "photos-1", "compare": "compare", "search": "search"}


def in_folder(root: Path, *arguments) -> list[str]:
    return [str(argument).replace("{root}", str(root)) for argument in arguments]


def finish(root: Path, command: str) -> Answer:
    """Runs one of `FINISHED` in a prepared folder.

    Many small heads take longer to trace than to train; they are trained eagerly.
    """
    many = command in ("compare", "search")
    with eagerly() if many else contextlib.nullcontext():
        return run_command(root, *in_folder(root, *FINISHED[command]))


_FLOAT16 = ("--set", "cache_dtype=float16", "--set", "augmentations=2")
POLICIES = {
    "auto": (),
    "accept-all": ("--policy", "accept-all"),
    "loss-threshold": ("--threshold", 1.2),
    "batch": ("--threshold", 1.2, "--level", "batch"),
    "keep-fraction": ("--keep-fraction", 0.6, "--set", "class_floor=0.1"),
    "self-paced": ("--policy", "self-paced"),
    "running-threshold": ("--policy", "running-threshold"),
    "loss-mixture": ("--policy", "loss-mixture"),
    "adam": ("--threshold", 1.2, "--optimizer", "adamw", "--weight-decay", 0.01),
    "stopping": ("--threshold", 1.2, "--early-stopping", 1, "--epochs", 6),
    "float16": ("--threshold", 1.2, *_FLOAT16),
    "unfreeze": ("--threshold", 1.2, "--unfreeze", "all", "--set", "unfreeze_epochs=1"),
}


def fit_under(root: Path, policy: str) -> dict:
    """The summary of a run with one policy or option."""
    arguments = (
        "fit", "{root}/photos", *COMMON, *NOISE, "--epochs", 3, "--set",
        "with_plain=false",
        "--batch-size", 8, "--learning-rate", 0.05, "--output", f"of-{policy}",
        *POLICIES[policy],
    )  # fmt: skip
    answer = run_command(root, *in_folder(root, *arguments))
    if answer.status:
        return {"status": answer.status, "err": answer.err}
    folder = root / f"of-{policy}"
    return {
        "status": 0,
        "numbers": numbers(answer.json["results"]),
        "weights": weight_sums(folder / "model.keras"),
        "ledger": table(folder / "ledger.csv"),
    }


BAD = (
    "", "nothing", "fit", "fit no-such-folder", "fit photos --epochs 0",
    "fit photos --epochs x", "fit photos --batch-size 0", "fit photos --threshold 0",
    "fit photos --threshold -1", "fit photos --threshold nan",
    "fit photos --threshold inf", "fit photos --threshold much",
    "fit photos --keep-fraction 2", "fit photos --keep-fraction 0",
    "fit photos --policy keepfraction", "fit photos --level pixel",
    "fit photos --level batch --policy keep-fraction",
    "fit photos --threshold 1 --keep-fraction 0.5",
    "fit photos --threshold 1 --policy accept-all", "fit photos --learning-rate 0",
    "fit photos --optimizer adaam", "fit photos --backbone resnet5O",
    "fit photos --backbone missing.keras", "fit photos --noise symmetric",
    "fit photos --noise symmetric:2", "fit photos --noise nothing:0.1",
    "fit photos --validation-fraction 1", "fit photos --test-fraction -0.1",
    "fit photos --set dtype=float8", "fit photos --image-size -5",
    "fit photos --set augmentations=0", "fit photos --set class_floor=2",
    "fit photos --seed -1",
    "fit photos --warmup-epochs -1", "fit photos --thershold 1", "fit photos more",
    "fit photos -x", "fit photos --strategy tpu", "fit photos --weight-decay -1",
    "fit photos --early-stopping 0", "fit photos --corrections missing.csv",
    "fit photos --unfreeze none-such --backbone tiny.keras",
    "fit table.csv --backbone tiny.keras", "fit outside.csv --backbone tiny.keras",
    "fit one --backbone tiny.keras", "fit empty --backbone tiny.keras",
    "fit broken --backbone tiny.keras",
    "fit photos --backbone tiny.keras --output photos",
    "compare photos --methods co-teeching", "compare photos --seeds 0",
    "compare photos --policy accept-all", "compare photos --noise instance",
    "compare photos --backbone tiny.keras --methods clean-subset --seeds 1",
    "search photos --tuner bayes", "search photos --objective accuracy",
    "search photos --max-trials 0", "search photos --range learning_rate=0.1:0.01",
    "search photos --range keep_fraction=0.5:2", "search photos --policies auto,keep",
    "search photos --backbone tiny.keras --policies self-paced",
    "search photos --range warmup_epochs=0.5:1",
    "search photos --backbone tiny.keras --clean-validation",
    "export nowhere", "export photos", "export nowhere --name ../up",
    "export nowhere --format tar", "export nowhere --format onnx --weight-dtype int8",
    "export nowhere --format litert --top-k 2", "export nowhere --model-version 0",
    "predict nowhere x.png", "predict photos x.png", "rank photos",
    "rank photos --backbones nosuch", "review nowhere", "review photos",
    "features photos --backbone nosuch", "features photos --share 3/2",
)  # fmt: skip


def exit_statuses(root: Path) -> dict[str, int]:
    """The exit status of each command line in `BAD`."""
    image = (root / "photos" / "red" / "00.png").read_bytes()
    (root / "table.csv").write_text("file,label\na.png,x\n")
    (root / "secret.png").write_bytes(image)
    (root / "one" / "red").mkdir(parents=True)
    (root / "one" / "red" / "a.png").write_bytes(image)
    (root / "empty").mkdir()
    for name in CLASSES:
        (root / "broken" / name).mkdir(parents=True)
        (root / "broken" / name / "a.png").write_bytes(b"")
    (root / "inner").mkdir()
    (root / "outside.csv").write_text("path,label\n../secret.png,x\n")
    statuses = {}
    for line in BAD:
        answer = run_command(root, *line.split())
        if "Traceback" in answer.out + answer.err:
            raise AssertionError(f"a traceback of: {line}\n{answer.err}")
        statuses[line] = answer.status
    return statuses


# --- Python -----------------------------------------------------------------------


def trained_models() -> dict[str, dict]:
    """Weights and losses of `RSFTModel` under each policy, step by step."""
    policies = {
        "AcceptAll": rsft.AcceptAll(),
        "LossThreshold": rsft.LossThreshold(1.1, warmup_steps=2),
        "LossThreshold batch": rsft.LossThreshold(1.1, level="batch", warmup_steps=2),
        "KeepFraction": rsft.KeepFraction(0.6, ramp_steps=4),
        "KeepFraction floor": rsft.KeepFraction(0.4, class_floor=0.3),
        "SelfPaced": rsft.SelfPaced(0.9, growth=1.3, growth_steps=2),
        "RunningThreshold": rsft.RunningThreshold(0.5, warmup_steps=2),
        "LossMixture": rsft.LossMixture(0.5, warmup_steps=0),
        "AcceptListed": rsft.AcceptListed(np.arange(48) % 3 > 0),
    }
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 8)).astype("float32")
    y = np.argmax(x[:, :3] + rng.normal(size=(48, 3)), axis=1)
    first = [
        rng.normal(0, 0.4, shape).astype("float32")
        for shape in ((8, 6), (6,), (6, 3), (3,))
    ]
    found = {}
    for name, policy in policies.items():
        network = keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dense(6, activation="relu"),
                keras.layers.Dense(3, activation="softmax"),
            ]
        )
        network.set_weights(first)
        batches = tf.data.Dataset.from_tensor_slices(
            (x, y, np.ones(48, "float32"), np.arange(48, dtype="int32"))
        ).batch(16)
        model = rsft.RSFTModel(network, policy)
        model.compile(
            keras.optimizers.SGD(0.2), "sparse_categorical_crossentropy",
            run_eagerly=True,
        )  # fmt: skip
        ledger = rsft.RejectionLedger(np.arange(48).astype(str), y)
        history = model.fit(batches, epochs=3, verbose=0, callbacks=[ledger]).history
        found[name] = {
            "weights": [summed(values) for values in network.get_weights()],
            "history": {k: rounded(np.nansum(all_)) for k, all_ in history.items()},
            "ledger": summed(ledger.ledger.suspicion),
        }
    return found


def label_quality() -> dict:
    """What is found in features of three clusters, a fifth of their labels wrong."""
    rng = np.random.default_rng(3)
    clean = np.arange(150) % 3
    given = np.where(np.arange(150) < 30, (clean + 1) % 3, clean).astype("int32")
    values = 2.0 * np.eye(3, DIM)[clean] + rng.normal(size=(150, DIM))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.bin"
        values.astype("float32").tofile(path)
        features = rsft.FeatureSet(path, given, np.arange(150).astype(str), dim=DIM)
        audit = public("audit_labels", "audit_labels")
        found = audit(features, num_classes=3, progress=False)
    return {
        "noise_rate": rounded(found.noise_rate),
        "accepted": int(found.accept_mask().sum()),
        "accepted wrong": int(found.accept_mask()[:30].sum()),
        "noise": np.round(found.noise, 4).tolist(),
        "right_probability": summed(found.right_probability),
        "out_of_sample": summed(found.out_of_sample),
        "loss_limit": rounded(found.loss_limit),
    }


# --- Sums -------------------------------------------------------------------------


def rounded(value: float) -> float | str:
    return round(float(value), 4) if math.isfinite(value) else str(value)


def summed(values) -> list:
    """Shape, sum, and a sum that tells the places of the values apart."""
    values = np.asarray(values, np.float64)
    waves = np.cos(np.arange(values.size)).reshape(values.shape)
    return [list(values.shape), rounded(values.sum()), rounded((values * waves).sum())]


def weight_sums(path: Path) -> list:
    model = keras.models.load_model(path, compile=False)
    return [summed(values) for values in model.get_weights()]


def key_paths(value, before="") -> list[str]:
    """All keys of a JSON document, as `a.b`; items of a list are `a[].b`."""
    if isinstance(value, dict):
        found = [key_paths(one, f"{before}.{key}") for key, one in value.items()]
        return sorted({path for paths in found for path in paths}) or [before]
    if isinstance(value, list):
        paths = {path for one in value for path in key_paths(one, before + "[]")}
        return sorted(paths) or [before]
    return [before.removeprefix(".")]


def numbers(value, before="") -> dict[str, float | str]:
    """The numbers in a JSON document but for times and sizes."""
    if any(word in before for word in TIMES) or isinstance(value, (bool, str)):
        return {}
    if isinstance(value, dict):
        return {
            path: number
            for key, one in value.items()
            for path, number in numbers(one, f"{before}.{key}").items()
        }
    if isinstance(value, list):
        return numbers(dict(enumerate(value)), before)
    return {} if value is None else {before.removeprefix("."): rounded(value)}


def table(path: Path) -> dict:
    """A CSV file: its columns, its number of rows, the sum of each numeric column."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sums = {}
    for column in rows[0] if rows else ():
        if any(word in column for word in TIMES):
            continue
        with contextlib.suppress(ValueError):
            sums[column] = rounded(sum(float(row[column] or 0) for row in rows))
    return {"columns": list(rows[0] if rows else ()), "rows": len(rows), "sums": sums}


def files_of(folder: Path) -> list[str]:
    """The files below a folder; those of TensorBoard without time and process."""
    paths = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(re.sub(r"(\.tfevents).*", r"\1", path) for path in paths)


def documents(folder: Path) -> dict[str, list[str]]:
    return {
        path.name: key_paths(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.json"))
    }


def tables(folder: Path) -> dict[str, dict]:
    return {path.name: table(path) for path in sorted(folder.glob("*.csv"))}


def folder_summary(folder: Path, answer: Answer) -> dict:
    return {
        "status": answer.status,
        "keys": key_paths(answer.json),
        "files": files_of(folder),
        "documents": documents(folder),
    }


def summary_of(root: Path, command: str, answer: Answer) -> dict:
    """The summary of one of `FINISHED`."""
    if answer.status:
        return {"status": answer.status, "err": answer.err}
    if command == "export":
        folder = root / answer.json["path"]
        return folder_summary(folder, answer) | served(folder)
    folder = root / FOLDERS[command]
    found = folder_summary(folder, answer)
    if command == "compare":
        return found | {"numbers": numbers(answer.json)}
    found |= {"numbers": numbers(answer.json["results"])}
    found["tables"] = tables(folder)
    found["weights"] = weight_sums(folder / "model.keras")
    return found


def served(folder: Path) -> dict:
    """What the exported signature returns for one photo of each class."""
    loaded = tf.saved_model.load(str(folder)).signatures["serving_default"]
    photos = folder.parents[2] / "photos"
    images = [(photos / name / "00.png").read_bytes() for name in CLASSES]
    (name, _), *_ = loaded.structured_input_signature[1].items()
    outputs = loaded(**{name: tf.constant(images)})
    return {
        "input": name,
        "outputs": {
            key: value.numpy().astype(str).tolist()
            if value.dtype == tf.string
            else summed(value.numpy())
            for key, value in sorted(outputs.items())
        },
    }


def whole_summary(root: Path) -> dict:
    prepare(root)
    return {
        "finished": {
            name: summary_of(root, name, finish(root, name)) for name in FINISHED
        },
        "policies": {policy: fit_under(root, policy) for policy in POLICIES},
        "statuses": exit_statuses(root),
        "models": trained_models(),
        "label quality": label_quality(),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        text = json.dumps(whole_summary(Path(made)), indent=1, sort_keys=True)
    Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
