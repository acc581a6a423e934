"""Several processes that train together: over loopback, and between two networks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import keras
import numpy as np
import pytest

from keras_rsft.config import FeatureConfig, PolicyConfig, TrainConfig
from keras_rsft.training._run import finetune

pytestmark = pytest.mark.slow

SECONDS_UNTIL_LOST = 5
# Runs the command line, keeps every state, and writes a file in the third epoch, where
# it may wait; once, as long as the file is there.
DRIVER = textwrap.dedent(f"""
    import pathlib, sys, time
    from keras_rsft import cli
    from keras_rsft.training import _devices as devices, _resume as resume

    devices.SECONDS_UNTIL_LOST = {SECONDS_UNTIL_LOST}
    resume.TIMES_ITS_COST = 0.0
    resume.SECONDS_BETWEEN = 0.0
    end_epoch = resume.TrainingCheckpoint.on_epoch_end
    reached = pathlib.Path(sys.argv[1])

    def ended(self, epoch, logs=None):
        end_epoch(self, epoch, logs)
        if epoch + 1 == 3 and not reached.exists():
            reached.touch()
            time.sleep({{"wait": 600, "pause": 1, "go on": 0}}[sys.argv[2]])

    resume.TrainingCheckpoint.on_epoch_end = ended
    sys.exit(cli.main(sys.argv[3:]))
""")


@pytest.fixture
def start(photo_folder, tiny_base_file, tmp_path):
    """Starts a worker of two: its number, the addresses, and what it runs under."""
    started = []

    def start(worker, addresses, *under, then="go on"):
        command = [
            *under, sys.executable, "-c", DRIVER, tmp_path / f"reached-{worker}", then,
            "fit", photo_folder, "--backbone", tiny_base_file,
            "--set", "with_plain=false",
            "--strategy", "multiworker", "--cache-dir", tmp_path / "kept",
            "--policy", "keep-fraction", "--epochs", "6", "--batch-size", "8",
            "--learning-rate", "0.05",
        ]  # fmt: skip
        task = {"type": "worker", "index": worker}
        config = {"cluster": {"worker": addresses}, "task": task}
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"TF_CONFIG": json.dumps(config)},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def one_process(photo_folder, tiny_base_file, tmp_path):
    """The weights that one process trains."""
    settings = TrainConfig(
        policy=PolicyConfig("keep-fraction"), epochs=6, batch_size=8, learning_rate=0.05
    )
    run = finetune(
        str(photo_folder), settings=settings, progress=False,
        features=FeatureConfig(str(tiny_base_file), cache_dir=tmp_path / "kept"),
    )  # fmt: skip
    return run.model.get_weights()


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def assert_stopped(process, since):
    out, err = process.communicate(timeout=60)
    waited = time.monotonic() - since
    assert process.returncode == 1, out + err
    assert waited < 4 * SECONDS_UNTIL_LOST  # Its heartbeat, and its own end.
    (*_, said) = err.strip().splitlines()
    assert said.startswith("keras-rsft: Worker"), err
    assert "Start the same command on all workers again to resume." in said
    assert "Traceback" not in err


def assert_finished(processes, weights, folder):
    (_, out), (_, others) = (
        (process, process.communicate(timeout=120)) for process in processes
    )
    assert [process.returncode for process in processes] == [0, 0], (out, others)
    assert "Resuming photos" in out[0]
    assert "worker 0, has written the run" in others[0]
    (run,) = (folder / "runs").iterdir()
    assert f"{run.name}" in out[0]
    trained = keras.saving.load_model(run / "model.keras").get_weights()
    for mine, theirs in zip(trained, weights, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.fixture
def networks():
    """Names of two network namespaces that see each other, and of an interface."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    number = os.getpid() % 100_000
    names = [f"rsft-{number}-{side}" for side in "ab"]
    links = [f"rsft{number}{side}" for side in "ab"]
    steps = [("netns", "add", name) for name in names]
    steps.append(("link", "add", links[0], "type", "veth", "peer", "name", links[1]))
    for side, (name, link) in enumerate(zip(names, links, strict=True), start=1):
        inside = ("-n", name)
        steps += [
            ("link", "set", link, "netns", name),
            (*inside, "address", "add", f"10.213.7.{side}/24", "dev", link),
            (*inside, "link", "set", link, "up"),
            (*inside, "link", "set", "lo", "up"),
        ]
    try:
        for step in steps:
            done = subprocess.run(["ip", *step], capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"no network namespaces: {done.stderr.strip()}")
        yield names, links[0]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_a_worker_is_killed_and_both_go_on(start, one_process, tmp_path):
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    processes = [start(0, addresses), start(1, addresses, then="wait")]
    wait_for(tmp_path / "reached-1", processes[1])
    since = time.monotonic()
    processes[1].send_signal(signal.SIGKILL)
    assert_stopped(processes[0], since)
    again = [start(worker, addresses) for worker in range(2)]
    assert_finished(again, one_process, tmp_path)


def test_a_network_is_cut_and_both_go_on(start, one_process, tmp_path, networks):
    names, link = networks
    addresses = [f"10.213.7.{side}:2222" for side in (1, 2)]
    under = [("ip", "netns", "exec", name) for name in names]
    processes = [
        start(worker, addresses, *under[worker], then="pause") for worker in range(2)
    ]
    wait_for(tmp_path / "reached-0", processes[0])
    cut = ["ip", "-n", names[0], "link", "set", link]
    subprocess.run([*cut, "down"], check=True)
    since = time.monotonic()
    for process in processes:
        assert_stopped(process, since)
    subprocess.run([*cut, "up"], check=True)
    again = [start(worker, addresses, *under[worker]) for worker in range(2)]
    assert_finished(again, one_process, tmp_path)
