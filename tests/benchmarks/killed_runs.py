"""`keras-rsft fit` killed at random moments and started again with the same command.

One run is left alone. Then, for each moment, a run begins in a folder and with a cache
of its own, is killed (`kill -9`) after a random share of the other's time, and started
again. Prints where each was when it was killed, what the next start did, and whether
the weights are those of the run that was left alone, to the last bit.

    python tests/benchmarks/killed_runs.py --moments 20

`--share 0.5:1` kills in the second half of the time only: much of a short run is the
loading of TensorFlow.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

import keras_rsft.model  # noqa: F401 (Keras then knows the class in head.keras.)

PROGRAM = """
import sys
from keras_rsft import cli
from keras_rsft.finetuning import checkpoint
checkpoint.TrainingCheckpoint.__init__.__kwdefaults__["seconds_between"] = 0.2
sys.exit(cli.main())
"""


def main() -> None:
    """Kills, starts again and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", default="0.3:1", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=200)
    arguments = parser.parse_args()
    low, high = map(float, arguments.share.split(":"))
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as root:
        left_alone = Path(root) / "left-alone"
        started = time.perf_counter()
        status, _ = finish(start(left_alone, arguments.epochs))
        seconds = time.perf_counter() - started
        print(f"left alone: {seconds:.1f} s, exit status {status}\n")
        print(f"{'killed after':>12}  {'when':34}  {'then':18}  weights")
        same = 0
        for number in range(arguments.moments):
            folder = Path(root) / str(number)
            after = seconds * rng.uniform(low, high)
            process = start(folder, arguments.epochs)
            time.sleep(after)
            process.kill()
            process.wait()
            when = stage(folder)
            then = "was finished"
            if not list(folder.glob("runs/*-1")):
                status, out = finish(start(folder, arguments.epochs))
                then = "went on" if "Going on with" in out else "began anew"
            equal = same_weights(folder, left_alone)
            same += equal
            verdict = "the same" if equal else "OTHER"
            print(f"{after:10.1f} s  {when:34}  {then:18}  {verdict}", flush=True)
    print(f"\n{same} of {arguments.moments} have the same weights to the last bit.")
    sys.exit(same != arguments.moments)


def start(folder: Path, epochs: int) -> subprocess.Popen:
    """Starts a fit of digits with wrong labels in a folder."""
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable, "-c", PROGRAM, "fit", "digits", "--noise", "symmetric:0.3",
        "--backbone", "efficientnet_lite0", "--image-size", "64",
        "--precision", "float32", "--policy", "running-threshold",
        "--epochs", str(epochs), "--cache-dir", "kept",
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Returns the exit status and what was printed."""
    out = process.communicate()[0]
    if process.returncode not in (0, -signal.SIGKILL):
        print(out)
    return process.returncode, out


def stage(folder: Path) -> str:
    """Says how far a killed run had come, by what it left."""
    if list(folder.glob("runs/*-1")):
        return "finished"
    unfinished = next(folder.glob("runs/*.unfinished"), None)
    if unfinished is None:
        return "starting"
    if (unfinished / "run").exists():
        return "writing the run"
    if (unfinished / "training.npz").exists():
        with np.load(unfinished / "training.npz") as kept:
            text = kept["description"].tobytes().decode()
        epochs = text.partition('"epochs_done": ')[2].partition(",")[0]
        return f"training, {epochs} epochs on disk"
    partial = [path.name for path in folder.glob("kept/*.partial")]
    whole = [p for p in folder.glob("kept/*") if p.is_dir() and p.name not in partial]
    if len(whole) < 3:
        return f"extraction, {len(whole)} of 3 splits whole"
    return "training, nothing on disk"


def same_weights(folder: Path, other: Path) -> bool:
    """Says whether two folders' runs have bit-identical models and heads."""
    for name in ("model.keras", "head.keras"):
        paths = [next(place.glob(f"runs/*-1/{name}")) for place in (folder, other)]
        one, two = (keras.saving.load_model(path).variables for path in paths)
        for mine, theirs in zip(one, two, strict=True):
            if not np.array_equal(mine.numpy(), theirs.numpy()):
                return False
    return True


if __name__ == "__main__":
    main()
