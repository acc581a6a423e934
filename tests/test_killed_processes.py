"""Real processes: killed at chosen moments, asked to end, and two at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from made_images import png, write

pytestmark = pytest.mark.slow

# Runs the command line, and kills itself at the n-th call of a function.
DRIVER = textwrap.dedent("""
    import importlib, os, signal, sys
    from keras_rsft import cli
    from keras_rsft.training import _resume as resume

    resume.TIMES_ITS_COST = 0.0
    resume.SECONDS_BETWEEN = 0.0
    place, count = sys.argv[1], int(sys.argv[2])
    if place != "-":
        module, name = place.split(":")
        module = importlib.import_module(module)
        original = getattr(module, name)

        def killing(*args, **kwargs):
            global count
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, killing)
    sys.exit(cli.main(sys.argv[3:]))
""")
MOMENTS = {
    "between features and their index": ("keras_rsft.features._extract:_append", 4),
    "the second epoch": ("keras_rsft.training._resume:write_state", 2),
    "a state on its way to the disk": ("os:replace", 2),
    "writing the run": ("keras_rsft._storage:write_csv", 2),
}


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory):
    """150 images of three grey values with noise: three batches of training images."""
    root = tmp_path_factory.mktemp("many")
    for label, name in enumerate(("cat", "dog", "owl")):
        for number in range(50):
            write(root / name / f"{number:02}.png", png(70 * label + number % 60))
    return root


def start_command(folder, arguments, *, driver=("-", "1"), **variables):
    """Starts the command line in a folder, to be killed where the driver says."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith("TF_")}
    return subprocess.Popen(
        [str(part) for part in (sys.executable, "-c", DRIVER, *driver, *arguments)],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=kept | variables,
        # A shell lets its background jobs ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.fixture(scope="module")
def start(many_photos, tiny_base_file):
    def start(folder, *options, **how):
        arguments = [
            "fit", many_photos, "--backbone", tiny_base_file,
            "--cache-dir", folder / "kept", "--epochs", "6",
            "--policy", "running-threshold", "--noise", "symmetric:0.2",
            "--learning-rate", "0.01", "--set", "with_plain=false", *options,
        ]  # fmt: skip
        return start_command(folder, arguments, **how)

    return start


@pytest.fixture(scope="module")
def finish():
    def finish(process):
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
        return process.returncode, out, err

    return finish


@pytest.fixture(scope="module")
def whole(start, finish, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    status, _, err = finish(start(folder))
    assert status == 0, err
    return folder


def run_in(folder, number=1):
    return next((folder / "runs").glob(f"*-{number}"))


def assert_same(folder, other, number=1):
    runs = run_in(folder, number), run_in(other)
    for name in ("model.keras", "head.keras"):
        models = [keras.saving.load_model(run / name) for run in runs]
        weights = zip(models[0].variables, models[1].variables, strict=True)
        for mine, theirs in weights:
            np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
    for name in ("metrics.csv", "ledger.csv", "acceptance_by_class.csv"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()


def names_in(folder):
    return {path.name.rpartition("-")[2] for path in (folder / "runs").iterdir()}


def test_killed_at_every_stage_and_started_again(start, finish, whole, tmp_path):
    for moment, driver in MOMENTS.items():
        driver = tuple(map(str, driver))
        status, _, _ = finish(start(tmp_path, driver=driver))
        assert status == -signal.SIGKILL, moment
    status, out, err = finish(start(tmp_path))
    assert status == 0, err
    assert "which was not finished" in out
    assert_same(tmp_path, whole)
    assert names_in(tmp_path) == {"1"}


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_end(start, finish, tmp_path, sent, status):
    process = start(tmp_path, "--epochs", "20000")
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/*.unfinished/training.npz")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(sent)
    actual, _, err = finish(process)
    assert actual == status
    *_, said, command = err.strip().splitlines()
    assert said.startswith("keras-rsft: Interrupted.")
    assert "of 20000 epochs are kept" in said
    assert said.endswith("Run the same command again to resume:")
    assert command.strip().startswith("keras-rsft fit ")
    assert "Traceback" not in err
    (left,) = tmp_path.glob("runs/*")
    assert {path.name for path in left.iterdir()} == {
        "identity.json", "training.npz", ".lock"
    }  # fmt: skip


def test_two_at_once_over_one_cache_and_one_folder_of_runs(
    start, finish, whole, tmp_path
):
    processes = [start(tmp_path) for _ in range(2)]
    for status, _, err in map(finish, processes):
        assert status == 0, err
    assert names_in(tmp_path) == {"1", "2"}
    for number in (1, 2):
        assert_same(tmp_path, whole, number)
    kept = [path.name for path in (tmp_path / "kept").iterdir() if path.is_dir()]
    # A folder a split and one of thumbnails, none of them partial.
    assert len(kept) == 4
    assert not [name for name in kept if "partial" in name or name.startswith(".")]


def test_an_export_killed_and_then_two_of_one_name_at_once(whole, finish, tmp_path):
    folder = tmp_path / "photos"
    command = ["export", run_in(whole), "--name", "photos", "--directory", tmp_path]
    # Complete, and about to get its name.
    process = start_command(tmp_path, command, driver=("os:rename", "1"))
    status, _, err = finish(process)
    assert status == -signal.SIGKILL, err
    (left,) = folder.iterdir()
    assert left.name.startswith(".1-")
    assert (left / "saved_model.pb").is_file()
    processes = [start_command(tmp_path, command) for _ in range(2)]
    for status, _, err in map(finish, processes):
        assert status == 0, err
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"1", "2"}
    contents = [_files_in(folder / version) for version in ("1", "2")]
    assert contents[0] == contents[1]
    assert Path("saved_model.pb") in contents[0]


def _files_in(folder):
    """Returns the content of all files but the one with a random number in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    contents = {path.relative_to(folder): path.read_bytes() for path in files}
    del contents[Path("fingerprint.pb")]
    return contents
