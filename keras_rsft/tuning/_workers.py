"""Workers of a search, on Keras Tuner's own chief and workers."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from keras_tuner.src.distribute import oracle_chief, oracle_client

from keras_rsft._runtime import ORACLE_HOST, ORACLE_PORT, PARENT, TUNER_ID
from keras_rsft.errors import InvalidArgument, WorkerLost

LOGS_FOLDER = "workers"
_POLL_SECONDS, _HEARTBEAT_SECONDS, _GOODBYE_SECONDS = 0.2, 1.0, 5.0


@contextlib.contextmanager
def leading(
    tuner: Any, commands: Sequence[Sequence[str]], folder: Path, *, timeout: float
) -> Iterator[Callable[[], bool]]:
    """Serves the oracle; the function it gives says whether trials are left."""

    class LastHeartbeat(grpc.ServerInterceptor):
        at = time.monotonic()

        def intercept_service(self, continuation: Callable, details: Any) -> Any:
            self.at = time.monotonic()
            return continuation(details)

    oracle, heartbeat = tuner.oracle, LastHeartbeat()
    threads = oracle_chief.futures.ThreadPoolExecutor(1)
    own_port = (("grpc.so_reuseport", 0),)  # Two chiefs must not share one.
    server = grpc.server(threads, interceptors=(heartbeat,), options=own_port)
    servicer = oracle_chief.OracleServicer(oracle)
    stubs = oracle_chief.protos.get_service_grpc()
    stubs.add_OracleServicer_to_server(servicer, server)
    address = "127.0.0.1:0" if commands else _address()
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        raise InvalidArgument(
            f"The chief cannot listen at {address}: the port is taken, or the address "
            f"is not one of this machine. Change {ORACLE_HOST} or {ORACLE_PORT}."
        ) from None

    def trials_left() -> bool:
        ended = len(oracle.end_order) >= oracle.max_trials
        left = bool(oracle.ongoing_trials) or not (ended or servicer.stop_triggered)
        resume = "Trials that ended are kept: the same command resumes the search."
        for log, one in workers.items():
            if left and one.poll():
                text = log.read_text(encoding="utf-8", errors="replace")
                raise WorkerLost(
                    f"{log.stem} has ended with status {one.returncode}. {resume} Last "
                    f"lines of {log}:\n" + "\n".join(text.splitlines()[-5:])
                )
        if left and time.monotonic() - heartbeat.at > timeout:
            raise WorkerLost(f"No worker has called for {timeout:g} seconds. {resume}")
        return left

    # Keras Tuner prints the values of conditions.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        stack.callback(lambda: server.stop(grace=1).wait())
        server.start()
        workers = stack.enter_context(_running(commands, port, folder / LOGS_FOLDER))
        yield trials_left
        until = time.monotonic() + _GOODBYE_SECONDS  # They must hear that it is over.
        while time.monotonic() < until and not (
            workers and all(one.poll() is not None for one in workers.values())
        ):
            time.sleep(_POLL_SECONDS)


def follow(make_tuner: Callable[[], Any], results: Path, *, timeout: float) -> None:
    """Trains what the chief hands out until it has no more, or `results` are there."""
    done, parent = threading.Event(), os.environ.get(PARENT)

    def beat() -> None:  # So that a long trial is not taken for a lost worker.
        while not done.wait(_HEARTBEAT_SECONDS):
            if parent and os.getppid() != int(parent):
                print("The chief that started this worker is gone.", file=sys.stderr)
                os._exit(1)
            with contextlib.suppress(grpc.RpcError):
                tuner.oracle.get_space()

    usual, oracle_client.TIMEOUT = oracle_client.TIMEOUT, timeout
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            tuner = make_tuner()
            threading.Thread(target=beat, daemon=True).start()
            tuner.search()
    except grpc.RpcError as error:
        gone = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
        if error.code() not in gone:
            why = f"has failed: {error.details()}"
        elif results.exists():
            return  # All was done before this worker came, and the chief had gone.
        else:
            why = f"did not answer within {timeout:g} seconds. Is it up and reachable?"
        raise WorkerLost(f"The chief at {_address()} {why}") from None
    finally:
        done.set()
        oracle_client.TIMEOUT = usual


def _address() -> str:
    return f"{os.environ[ORACLE_HOST]}:{os.environ[ORACLE_PORT]}"


@contextlib.contextmanager
def _running(
    commands: Sequence[Sequence[str]], port: int, logs: Path
) -> Iterator[dict[Path, subprocess.Popen]]:
    """Starts workers on this machine, each with a log, and leaves none behind."""
    threads = max(1, (os.cpu_count() or 1) // max(1, len(commands)))
    shared = {"TF_NUM_INTRAOP_THREADS": str(threads), "no_grpc_proxy": "127.0.0.1"}
    shared["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"  # Several share one device.
    own = {ORACLE_HOST: "127.0.0.1", ORACLE_PORT: str(port), PARENT: str(os.getpid())}
    workers: dict[Path, subprocess.Popen] = {}
    try:
        for number, command in enumerate(commands):
            log = logs / f"worker-{number}.log"
            logs.mkdir(exist_ok=True)
            with log.open("wb") as file:
                workers[log] = subprocess.Popen(  # noqa: S603
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**shared, **os.environ, **own, TUNER_ID: log.stem},
                    start_new_session=True,  # Ctrl-C reaches them through the chief.
                )
        yield workers
    finally:
        for one in workers.values():
            one.terminate()
        for one in workers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(_GOODBYE_SECONDS)
            one.kill()
            one.wait()
