"""Chief and workers as processes of their own: killed, stopped, started by hand."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from keras_rsft._runtime import ORACLE_HOST, ORACLE_PORT, TUNER_ID

pytestmark = pytest.mark.slow
SECONDS = 240


@pytest.fixture
def start(tmp_path, photo_folder, tiny_base_file):
    """Starts a search in a process of its own; none outlives the test."""
    started = []

    def run(*arguments, **environment):
        command = [
            sys.executable, "-m", "keras_rsft.cli", "search", photo_folder,
            "--backbone", tiny_base_file, "--tuner", "random", "--max-trials", "4",
            "--policies", "accept-all,keep-fraction", "--optimizers", "sgd",
            "--epochs", "20", "--batch-size", "4", "--cache-dir", tmp_path / "kept",
            "--output", tmp_path / "run", *arguments,
        ]  # fmt: skip
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
            # A shell's background jobs ignore it, and hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(psutil.Process(process.pid))
        return process

    yield run
    for one in started:
        if one.is_running():
            for child in one.children(recursive=True):
                child.kill()
            one.kill()


def wait_for(condition, search=None):
    until = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < until, "It never came."
        if search is not None:
            assert search.poll() is None, search.communicate()
        time.sleep(0.02)
    return found


def held_by(folder, worker):
    """Returns the trial that a worker has in hand, or None."""
    try:
        state = json.loads((folder / "trials" / "oracle.json").read_text())
    except FileNotFoundError:
        return None
    return state["ongoing_trials"].get(f"{worker}-0")


def worker_process(search, name):
    for child in psutil.Process(search.pid).children(recursive=True):
        if child.environ().get(TUNER_ID) == name:
            return child
    raise AssertionError(f"There is no {name}.")


def statuses(folder):
    with (folder / "trials.csv").open(encoding="utf-8") as file:
        return {row["trial"]: row["status"] for row in csv.DictReader(file)}


COMPLETED = dict.fromkeys("0123", "COMPLETED")


def test_a_killed_worker_ends_the_search_and_the_same_command_resumes_it(
    start, tmp_path
):
    search = start("--workers", 2)
    wait_for(lambda: held_by(tmp_path / "run", "worker-0"), search)
    worker_process(search, "worker-0").send_signal(signal.SIGKILL)
    out, _ = search.communicate(timeout=SECONDS)
    assert search.returncode == 1, out
    assert "worker-0 has ended with status -9" in out
    search = start("--workers", 2)
    out, _ = search.communicate(timeout=SECONDS)
    assert search.returncode == 0, out
    assert "plain fine-tuning" in out
    assert statuses(tmp_path / "run") == COMPLETED


def test_workers_do_not_outlive_a_chief_that_is_killed(start, tmp_path):
    search = start("--workers", 1)
    wait_for(lambda: held_by(tmp_path / "run", "worker-0"), search)
    worker = worker_process(search, "worker-0")
    search.kill()
    wait_for(lambda: not worker.is_running() or worker.status() == "zombie")
    log = (tmp_path / "run" / "workers" / "worker-0.log").read_text()
    assert "The chief that started this worker is gone." in log


def test_asked_to_end_it_ends_all(start, tmp_path):
    search = start("--workers", 1)
    wait_for(lambda: held_by(tmp_path / "run", "worker-0"), search)
    children = psutil.Process(search.pid).children(recursive=True)
    search.send_signal(signal.SIGTERM)
    out, _ = search.communicate(timeout=SECONDS)
    assert search.returncode == 143
    assert "Run the same command again to resume" in out
    assert not any(child.is_running() for child in children)
    log = (tmp_path / "run" / "workers" / "worker-0.log").read_text()
    assert "Interrupted." in log
    assert "Traceback" not in out + log


def test_ctrl_c_ends_all_and_workers_by_hand_go_on(start, tmp_path):
    search = start("--workers", 1)
    wait_for(lambda: held_by(tmp_path / "run", "worker-0"), search)
    children = psutil.Process(search.pid).children(recursive=True)
    search.send_signal(signal.SIGINT)
    out, _ = search.communicate(timeout=SECONDS)
    assert search.returncode == 130
    assert "Run the same command again to resume" in out
    assert not any(child.is_running() for child in children)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {ORACLE_HOST: "127.0.0.1", ORACLE_PORT: port}
    chief = start(**address, **{TUNER_ID: "chief"})
    worker = start(**address, **{TUNER_ID: "w"})
    out, _ = worker.communicate(timeout=SECONDS)
    assert worker.returncode == 0, out
    assert "w is done" in out
    out, _ = chief.communicate(timeout=SECONDS)
    assert chief.returncode == 0, out
    assert statuses(tmp_path / "run") == COMPLETED
