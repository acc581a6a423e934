"""Worker processes on the chief's own machine: starts, restarts and ends them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from keras_rsft.searching.roles import (
    ORACLE_HOST,
    ORACLE_PORT,
    PARENT_VARIABLE,
    TUNER_ID,
    Crew,
)

_LAST_LINES = 5
_SECONDS_TO_END = 5.0


class WorkerProcesses:
    """The workers of one chief; all of them end with the context `running`.

    Args:
        crew: How many, and how to start one.
        port: The chief's, on 127.0.0.1.
        logs: Folder for what they print, one file each; it is made.
    """

    def __init__(self, crew: Crew, *, port: int, logs: Path):
        self._crew, self._port, self._logs = crew, port, logs
        self._processes: dict[str, subprocess.Popen] = {}
        self.restarts: dict[str, int] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Starts all workers, and leaves none behind."""
        self._logs.mkdir(exist_ok=True)
        try:
            for number in range(self._crew.count):
                name = f"worker-{number}"
                self.log_of(name).write_bytes(b"")
                self.restarts[name] = 0
                self._start(name)
            yield
        finally:
            self._end_all()

    @property
    def alive(self) -> int:
        """How many are running."""
        return sum(one.poll() is None for one in self._processes.values())

    def take_ended(self) -> dict[str, int]:
        """Returns who has ended since the last call, with the exit status."""
        ended = {
            name: process.returncode
            for name, process in self._processes.items()
            if process.poll() is not None
        }
        for name in ended:
            del self._processes[name]
        return ended

    def restart(self, name: str) -> None:
        """Starts a worker that has ended again."""
        self.restarts[name] += 1
        self._start(name)

    def wait(self, seconds: float) -> None:
        """Waits until all have ended by themselves, but not longer than that."""
        until = time.monotonic() + seconds
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))

    def log_of(self, name: str) -> Path:
        """Returns the file with what a worker printed."""
        return self._logs / f"{name}.log"

    def last_words(self, name: str) -> str:
        """Returns the last lines that a worker printed."""
        text = self.log_of(name).read_text(encoding="utf-8", errors="replace")
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        return "\n".join(lines[-_LAST_LINES:]) or "(nothing)"

    def _start(self, name: str) -> None:
        with self.log_of(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(  # noqa: S603
                self._crew.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(name),
                start_new_session=True,  # Ctrl-C reaches them through the chief.
            )

    def _environment(self, name: str) -> dict[str, str]:
        threads = max(1, _cores() // self._crew.count)
        shared = {
            "TF_NUM_INTRAOP_THREADS": str(threads),
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # Several share one device.
        }
        return (
            shared
            | os.environ
            | {
                TUNER_ID: name,
                ORACLE_HOST: "127.0.0.1",
                ORACLE_PORT: str(self._port),
                PARENT_VARIABLE: str(os.getpid()),
            }
        )

    def _end_all(self) -> None:
        for process in self._processes.values():
            process.terminate()
        self.wait(_SECONDS_TO_END)
        for process in self._processes.values():
            process.kill()
            process.wait()


def end_with_parent(environment: Mapping[str, str] = os.environ) -> None:
    """Has this process end when the chief that started it is gone, however it went."""
    parent = environment.get(PARENT_VARIABLE)
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Not on macOS.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
