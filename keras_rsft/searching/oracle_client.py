"""A worker's side: asks the chief for trials, and gives up if it does not answer.

Keras Tuner's client waits an hour for each answer, asks again at once where it is to
wait, and drops the message of a trial that failed.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import grpc
import keras_tuner
from keras_tuner.engine.trial import Trial, TrialStatus
from keras_tuner.src import protos  # There is no public name for these two.
from keras_tuner.src.distribute.oracle_client import OracleClient

from keras_rsft.errors import SearchFailed
from keras_rsft.searching.oracle_server import MARK_KEY, MESSAGE_KEY, without_prints
from keras_rsft.searching.roles import Role

HEARTBEAT_SECONDS = 5.0
_IDLE_SECONDS = 1.0
_MESSAGE_BYTES = 4000  # Of 8,192 that all metadata of a call may have.
_OPTIONS = (("grpc.enable_http_proxy", 0),)


class WorkerOracle(OracleClient):
    """The chief's oracle as a worker sees it.

    Args:
        oracle: The worker's own, for what never changes.
        role: Where the chief is.
        patience: Seconds to wait for an answer.

    Raises:
        SearchFailed: From each call, if the chief does not answer or has failed.
    """

    def __init__(self, oracle: keras_tuner.Oracle, role: Role, *, patience: float):
        super().__init__(oracle)
        self.trials_ended = 0
        self.stub = _PatientStub(role, patience)
        self._held: set[str] = set()
        threading.Thread(target=self._beat, daemon=True).start()

    def create_trial(self, tuner_id: str) -> Trial:
        trial = super().create_trial(tuner_id)
        if trial.status == TrialStatus.RUNNING:
            self._held.add(trial.trial_id)
        elif trial.status == TrialStatus.IDLE:
            time.sleep(_IDLE_SECONDS)
        return trial

    def end_trial(self, trial: Trial) -> None:
        message = (trial.message or "").encode()[-_MESSAGE_BYTES:]
        with without_prints():
            sent = trial.to_proto()
        self.stub.EndTrial(
            protos.get_service().EndTrialRequest(trial=sent),
            wait_for_ready=True,
            metadata=((MESSAGE_KEY, message),),
        )
        self._held.discard(trial.trial_id)
        self.trials_ended += 1

    def _beat(self) -> None:
        """Tells the chief again and again that the trials in hand are being trained."""
        while True:
            time.sleep(HEARTBEAT_SECONDS)
            for trial_id in tuple(self._held):
                try:
                    self.get_trial(trial_id)
                except SearchFailed:
                    break  # The next call of the worker itself says so.


class _PatientStub:
    """Keras Tuner's stub, with another patience and errors that say what to do."""

    def __init__(self, role: Role, patience: float):
        self._role, self._patience = role, patience
        channel = grpc.insecure_channel(role.address, options=_OPTIONS)
        self._stub = protos.get_service_grpc().OracleStub(channel)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stub, name)

        def call(request: Any, **options: Any) -> Any:
            try:
                return method(request, **(options | {"timeout": self._patience}))
            except grpc.RpcError as error:
                raise SearchFailed(_reason(error, self._role, self._patience)) from None

        return call


def mark_of_chief(role: Role, *, patience: float) -> str:
    """Waits for the chief and returns what its search is known by.

    Args:
        role: Where the chief is.
        patience: Seconds to wait.

    Raises:
        SearchFailed: If it does not answer.
    """
    service = protos.get_service()
    with grpc.insecure_channel(role.address, options=_OPTIONS) as channel:
        stub = protos.get_service_grpc().OracleStub(channel)
        try:
            _, call = stub.GetSpace.with_call(
                service.GetSpaceRequest(), wait_for_ready=True, timeout=patience
            )
        except grpc.RpcError as error:
            raise SearchFailed(_reason(error, role, patience)) from None
        return dict(call.initial_metadata()).get(MARK_KEY, "")


def _reason(error: grpc.RpcError, role: Role, patience: float) -> str:
    if error.code() in (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
    ):
        return (
            f"The chief at {role.address} did not answer within {patience:g} seconds. "
            "Is it running, and can this machine reach it?"
        )
    return f"The chief at {role.address} has failed: {error.details()}"
