"""The chief's side: serves an oracle to workers, and knows which of them are alive.

Speaks Keras Tuner's own protocol. Its server waits for ever for a worker that died,
forgets why a trial failed, and sends the others home while a trial might have to be
trained again; this one does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from keras_tuner.engine.trial import Trial, TrialStatus
from keras_tuner.src import protos  # There is no public name for these two.
from keras_tuner.src.distribute.oracle_chief import OracleServicer

from keras_rsft.errors import SearchFailed
from keras_rsft.searching.durable import DurableOracle
from keras_rsft.searching.roles import Role

MARK_KEY = "search-mark"
MESSAGE_KEY = "message-bin"
_OPTIONS = (("grpc.so_reuseport", 0),)  # Two chiefs must not share a port in silence.


@dataclasses.dataclass
class Heard:
    """What was heard of workers, by a clock that never goes back.

    Attributes:
        last: When any of them last said something.
        trials: When something was last heard of a trial that is being trained.
        stopped: Whether one was told that there are no more trials.
        failure: What went wrong in the oracle, or None.
    """

    last: float
    trials: dict[str, float] = dataclasses.field(default_factory=dict)
    stopped: bool = False
    failure: Exception | None = None


def without_prints() -> contextlib.AbstractContextManager:
    """Silences a forgotten print in Keras Tuner, where it sends a conditional space."""
    return contextlib.redirect_stdout(io.StringIO())


def _noted(method: Callable) -> Callable:
    """Lets one call at a time into the oracle, and keeps what goes wrong there."""

    @functools.wraps(method)
    def call(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        context.send_initial_metadata(((MARK_KEY, self.mark),))
        with self.lock:
            self.heard.last = time.monotonic()
            try:
                with without_prints():
                    return method(self, request, context)
            except Exception as error:
                self.heard.failure = error
                context.abort(grpc.StatusCode.INTERNAL, str(error))

    return call


class _Service(OracleServicer):
    """Keras Tuner's service, with an eye on who is alive."""

    def __init__(self, oracle: DurableOracle, mark: str):
        super().__init__(oracle)
        self.mark = mark
        self.lock = threading.Lock()
        self.heard = Heard(time.monotonic())

    GetSpace = _noted(OracleServicer.GetSpace)
    UpdateSpace = _noted(OracleServicer.UpdateSpace)
    GetBestTrials = _noted(OracleServicer.GetBestTrials)

    @_noted
    def CreateTrial(self, request: Any, context: Any) -> Any:  # noqa: N802
        trial = self.oracle.create_trial(request.tuner_id)
        if trial.status == TrialStatus.RUNNING:
            self.heard.trials[trial.trial_id] = time.monotonic()
        elif trial.status == TrialStatus.STOPPED:
            if self.oracle.ongoing_trials:
                # Whoever trains them may die, and somebody must be left to take over.
                trial = Trial(trial.hyperparameters, trial.trial_id, TrialStatus.IDLE)
            else:
                self.heard.stopped = True
        return protos.get_service().CreateTrialResponse(trial=trial.to_proto())

    @_noted
    def GetTrial(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.trial_id in self.heard.trials:
            self.heard.trials[request.trial_id] = time.monotonic()
        trial = self.oracle.get_trial(request.trial_id)
        return protos.get_service().GetTrialResponse(trial=trial.to_proto())

    @_noted
    def UpdateTrial(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.trial_id not in self.oracle.end_order:
            self.oracle.update_trial(
                request.trial_id, dict(request.metrics), step=request.step
            )
        trial = self.oracle.get_trial(request.trial_id)
        return protos.get_service().UpdateTrialResponse(trial=trial.to_proto())

    @_noted
    def EndTrial(self, request: Any, context: Any) -> Any:  # noqa: N802
        trial = Trial.from_proto(request.trial)
        sent = dict(context.invocation_metadata()).get(MESSAGE_KEY)
        trial.message = sent.decode(errors="replace") if sent else None
        # Of a worker that was taken for dead, and another was quicker.
        if trial.trial_id not in self.oracle.end_order:
            self.oracle.take_off_queue(trial.trial_id)
            self.oracle.end_trial(trial)
        self.heard.trials.pop(trial.trial_id, None)
        return protos.get_service().EndTrialResponse()


class OracleServer:
    """Serves an oracle while `running` is open.

    Args:
        oracle: Hands out the trials.
        role: Where to listen; port 0 takes any that is free.
        mark: What workers compare with the search's folder.
    """

    def __init__(self, oracle: DurableOracle, role: Role, mark: str):
        self._oracle = oracle
        self._role = role
        self._service = _Service(oracle, mark)
        self.port = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Listens until the context ends.

        Raises:
            SearchFailed: If the address cannot be listened at.
        """
        server = grpc.server(futures.ThreadPoolExecutor(2), options=_OPTIONS)
        protos.get_service_grpc().add_OracleServicer_to_server(self._service, server)
        try:
            self.port = server.add_insecure_port(self._role.address)
        except RuntimeError:  # Of older versions the port is then 0.
            self.port = 0
        if not self.port:
            raise SearchFailed(
                f"The chief cannot listen at {self._role.address}: the port is taken, "
                "or the address is not one of this machine."
            )
        server.start()
        try:
            yield
        finally:
            server.stop(grace=1).wait()

    @property
    def is_over(self) -> bool:
        """Whether every trial has ended and no more are to come."""
        with self._service.lock:
            ended = len(self._oracle.end_order)
            return self._service.heard.stopped or ended >= self._oracle.max_trials

    @property
    def silence(self) -> float:
        """Seconds since any worker said something."""
        return time.monotonic() - self._service.heard.last

    @property
    def failure(self) -> Exception | None:
        """What went wrong in the oracle, or None."""
        return self._service.heard.failure

    def silent_tuners(self, seconds: float) -> list[str]:
        """Returns who has a trial of which nothing was heard for so long."""
        now = time.monotonic()
        with self._service.lock:
            return [
                tuner_id
                for tuner_id, trial in self._oracle.ongoing_trials.items()
                if now - self._service.heard.trials.get(trial.trial_id, 0.0) > seconds
            ]

    def tuners_of(self, worker: str) -> list[str]:
        """Returns the names under which a worker has trials in hand."""
        with self._service.lock:
            return [
                name
                for name in self._oracle.ongoing_trials
                if name == worker or name.startswith(f"{worker}-")
            ]

    def take_back(self, tuner_ids: list[str]) -> None:
        """Takes the trials of dead workers back, to hand them out again."""
        with self._service.lock:
            self._oracle.take_back(tuner_ids)
