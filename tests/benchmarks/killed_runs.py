"""`fit` and `export` killed at random moments and started again with the same commands.

One run and its export are left alone. Then, for each moment, a run begins in a folder
and with a cache of its own, and is exported when it is finished. What runs is killed
(`kill -9`) at a random moment in each equal part of the others' time, and started
again. Prints where each was when it was killed, what the next start did, and
whether the weights are those of the run left alone, to the last bit, and the
exported files the same bytes.

    python tests/benchmarks/killed_runs.py --moments 20

`--share 0.5:1` kills in the second half of the time only: much of a short run is the
loading of TensorFlow. A larger `--image-size` makes the extraction longer.
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

import keras_rsft  # noqa: F401

EXPORT = ["export", "runs/digits-1", "--name", "photos"]
PROGRAM = """
import sys
from keras_rsft import cli
from keras_rsft.training import _resume as resume
resume.SECONDS_BETWEEN = 0.2
sys.exit(cli.main())
"""


def main() -> None:
    """Kills, starts again and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", default="0.3:1", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--image-size", type=int, default=128)
    arguments = parser.parse_args()
    low, high = map(float, arguments.share.split(":"))
    rng = random.Random(arguments.seed)
    fit = fit_command(arguments.epochs, arguments.image_size)
    with tempfile.TemporaryDirectory() as root:
        left_alone = Path(root) / "left-alone"
        seconds = [seconds_of(command, left_alone) for command in (fit, EXPORT)]
        print(f"left alone: {seconds[0]:.1f} s, export {seconds[1]:.1f} s\n")
        print(f"{'killed after':>12}  {'when':34}  {'then':18}  weights   export")
        same = 0
        for number in range(arguments.moments):
            folder = Path(root) / str(number)
            part = (number + rng.random()) / arguments.moments
            after = sum(seconds) * (low + part * (high - low))
            when, then = killed(folder, fit, after, seconds[0])
            if not list(folder.glob("saved_models/photos/1")):
                finish(start(folder, EXPORT))
            equal = same_weights(folder, left_alone), same_export(folder, left_alone)
            same += all(equal)
            verdicts = "  ".join("the same" if one else "OTHER   " for one in equal)
            print(f"{after:10.1f} s  {when:34}  {then:18}  {verdicts}", flush=True)
    print(f"\n{same} of {arguments.moments} have the same weights to the last bit,")
    print("and the same exported files.")
    sys.exit(same != arguments.moments)


def killed(
    folder: Path, command: list[str], after: float, fit_seconds: float
) -> tuple[str, str]:
    """Kills a fit, or its export where it would be finished, and starts it again.

    Args:
        folder: Where; it must not exist.
        command: The fit.
        after: Seconds from the beginning of the fit.
        fit_seconds: How long a fit takes.

    Returns:
        Where it was when it was killed, and what the next start did.
    """
    in_export = after > fit_seconds
    if in_export:
        finish(start(folder, command))
        command, after = EXPORT, after - fit_seconds
    process = start(folder, command)
    time.sleep(after)
    process.kill()
    process.wait()
    when = export_stage(folder) if in_export else stage(folder)
    if when == "finished":
        return when, "was finished"
    _, out = finish(start(folder, command))
    return when, "resumed" if "Resuming " in out else "began anew"


def seconds_of(command: list[str], folder: Path) -> float:
    """Runs a command that is left alone, and returns how long it takes."""
    started = time.perf_counter()
    status, _ = finish(start(folder, command))
    if status != 0:
        sys.exit(f"The command that was left alone ended with exit status {status}.")
    return time.perf_counter() - started


def fit_command(epochs: int, image_size: int) -> list[str]:
    """Returns a fit of digits with wrong labels."""
    return [
        "fit", "digits", "--noise", "symmetric:0.3",
        "--backbone", "efficientnet_lite0", "--image-size", str(image_size),
        "--set", "dtype=float32", "--policy", "running-threshold",
        "--epochs", str(epochs), "--cache-dir", "kept",
    ]  # fmt: skip


def start(folder: Path, command: list[str]) -> subprocess.Popen:
    """Starts a command in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


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


def export_stage(folder: Path) -> str:
    """Says how far a killed export had come, by what it left."""
    exports = folder / "saved_models" / "photos"
    if (exports / "1").exists():
        return "finished"
    partial = next(exports.glob(".1-*"), None)
    if partial is None:
        return "export, nothing on disk"
    number = sum(path.is_file() for path in partial.rglob("*"))
    return f"export, {number} files written"


def same_export(folder: Path, other: Path) -> bool:
    """Says whether two exports have the same files, but for a random number."""
    contents = []
    for place in (folder, other):
        version = place / "saved_models" / "photos" / "1"
        files = [path for path in version.rglob("*") if path.is_file()]
        contents.append({p.relative_to(version): p.read_bytes() for p in files})
        contents[-1].pop(Path("fingerprint.pb"))
    return contents[0] == contents[1]


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
