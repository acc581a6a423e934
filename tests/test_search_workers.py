"""Chief and workers: what is handed out, what is handed out again, who gives up."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

import keras_tuner
import numpy as np
import psutil
import pytest
from made_features import split_features

from keras_rsft.errors import InvalidArgument, SearchFailed
from keras_rsft.finetuning import TrainingSettings
from keras_rsft.searching import RSFTHyperModel, SearchSpace, chief, durable
from keras_rsft.searching.chief import lead_trials
from keras_rsft.searching.names import SearchOptions
from keras_rsft.searching.oracle_client import WorkerOracle, mark_of_chief
from keras_rsft.searching.oracle_server import OracleServer
from keras_rsft.searching.oracles import RandomOracle, make_quiet_tuner
from keras_rsft.searching.roles import (
    ORACLE_HOST,
    ORACLE_PORT,
    TUNER_ID,
    Crew,
    Role,
    role_of,
)
from keras_rsft.searching.search_folder import join_search, open_search, write_mark
from keras_rsft.searching.worker_processes import WorkerProcesses

SETTINGS = TrainingSettings(epochs=1, batch_size=16)
SPACE = SearchSpace(policies=("accept-all", "keep-fraction"), optimizers=("sgd",))


class TestRoles:
    def test_alone_chief_and_worker(self):
        assert role_of({}) == role_of({TUNER_ID: "chief"}) == Role()
        environment = {ORACLE_HOST: "10.0.0.1", ORACLE_PORT: "8000"}
        leading = role_of(environment | {TUNER_ID: "my-chief"})
        assert leading.is_chief
        assert not leading.is_worker
        training = role_of(environment | {TUNER_ID: "w0"})
        assert training.is_worker
        assert training.address == "10.0.0.1:8000"

    @pytest.mark.parametrize("missing", [ORACLE_HOST, ORACLE_PORT, TUNER_ID])
    def test_a_variable_that_is_missing(self, missing):
        given = {ORACLE_HOST: "h", ORACLE_PORT: "1", TUNER_ID: "w"}
        if missing == TUNER_ID:
            del given[TUNER_ID]
        else:
            given[missing] = ""
        with pytest.raises(InvalidArgument, match=f"does not set {missing}"):
            role_of(given)

    @pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "80.5"])
    def test_what_is_no_port(self, port):
        with pytest.raises(InvalidArgument, match="from 1 to 65535"):
            role_of({ORACLE_HOST: "h", ORACLE_PORT: port, TUNER_ID: "w"})


@pytest.fixture
def oracle(tmp_path):
    space = keras_tuner.HyperParameters()
    space.Choice("policy", ["accept-all", "keep-fraction"])
    with space.conditional_scope("policy", ["keep-fraction"]):
        space.Float("keep_fraction", 0.1, 0.9)
    space.Float("learning_rate", 1e-4, 1e-1, sampling="log")
    made = RandomOracle(
        objective=keras_tuner.Objective("val_accuracy", "max"),
        max_trials=2,
        hyperparameters=space,
        seed=1,
        max_consecutive_failed_trials=None,
    )
    made._set_project_dir(str(tmp_path), "trials")
    made.verbose = 0
    return made


@pytest.fixture
def served(oracle, monkeypatch):
    """A server on loopback, and a function that connects a worker."""
    server = OracleServer(oracle, Role("chief"), "the mark")
    with server.running():
        monkeypatch.setenv(ORACLE_HOST, "127.0.0.1")
        monkeypatch.setenv(ORACLE_PORT, str(server.port))
        monkeypatch.setenv(TUNER_ID, "worker")
        role = Role("worker", port=server.port)
        yield server, lambda: WorkerOracle(oracle, role, patience=5)


def finish(worker, trial, value=0.5):
    worker.update_trial(trial.trial_id, {"val_accuracy": value}, step=3)
    trial.status = "COMPLETED"
    worker.end_trial(trial)


class TestOracleServer:
    def test_a_result_reaches_the_oracle(self, served, oracle, capfd):
        server, connect = served
        worker = connect()
        trial = worker.create_trial("a")
        given = oracle.trials[trial.trial_id]
        assert trial.hyperparameters.values == given.hyperparameters.values
        finish(worker, trial)
        assert (given.status, given.score, given.best_step) == ("COMPLETED", 0.5, 3)
        assert worker.trials_ended == 1
        assert not server.is_over
        assert capfd.readouterr().out == ""

    def test_it_is_over_after_the_last_result(self, served):
        server, connect = served
        worker = connect()
        for _ in range(2):
            finish(worker, worker.create_trial("a"))
        assert server.is_over
        assert worker.create_trial("a").status == "STOPPED"

    def test_nobody_goes_home_while_a_trial_may_come_back(
        self, served, oracle, monkeypatch
    ):
        server, connect = served
        monkeypatch.setattr("keras_rsft.searching.oracle_client._IDLE_SECONDS", 0.01)
        worker = connect()
        lost = worker.create_trial("a")
        finish(worker, worker.create_trial("b"))
        assert worker.create_trial("b").status == "IDLE"
        server.take_back(server.tuners_of("a"))
        again = worker.create_trial("b")
        assert again.trial_id == lost.trial_id
        assert again.hyperparameters.values == lost.hyperparameters.values
        finish(worker, again)
        assert server.is_over
        assert len(oracle.end_order) == 2

    def test_a_result_of_a_worker_taken_for_dead_counts_once(self, served, oracle):
        server, connect = served
        worker = connect()
        slow = worker.create_trial("a")
        server.take_back(["a"])
        finish(worker, slow, 0.5)
        finish(worker, slow, 0.9)
        assert oracle.end_order == [slow.trial_id]
        assert oracle.trials[slow.trial_id].score == 0.5
        assert worker.create_trial("b").trial_id != slow.trial_id

    def test_a_trial_that_kills_its_workers_fails(self, served, oracle):
        server, connect = served
        worker = connect()
        ids = set()
        for _ in range(durable.MOST_DEATHS):
            ids.add(worker.create_trial("a").trial_id)
            server.take_back(["a"])
        (trial_id,) = ids
        assert oracle.trials[trial_id].status == "FAILED"
        assert "died 3 times" in oracle.trials[trial_id].message
        assert worker.create_trial("a").trial_id != trial_id

    def test_why_a_trial_failed_is_not_forgotten(self, served, oracle):
        _, connect = served
        worker = connect()
        trial = worker.create_trial("a")
        trial.status, trial.message = "FAILED", "too high: ä" + "x" * 9000 + " the end"
        worker.end_trial(trial)
        assert oracle.trials[trial.trial_id].message.endswith("x the end")

    def test_heartbeats(self, served, monkeypatch):
        server, connect = served
        monkeypatch.setattr("keras_rsft.searching.oracle_client.HEARTBEAT_SECONDS", 0.1)
        worker = connect()
        worker.create_trial("a")
        time.sleep(0.6)
        assert server.silent_tuners(0.4) == []
        worker._held.clear()  # As if it were dead.
        time.sleep(0.6)
        assert server.silent_tuners(0.4) == ["a"]
        assert server.silence > 0.4

    def test_tuners_of_a_worker(self, served, oracle):
        server, connect = served
        oracle.max_trials = 9
        worker = connect()
        for name in ("worker-1", "worker-1-7", "worker-10-0", "worker-10"):
            worker.create_trial(name)
        assert server.tuners_of("worker-1") == ["worker-1", "worker-1-7"]

    def test_an_oracle_that_fails_is_told_to_both(self, served, oracle, monkeypatch):
        server, connect = served

        def fail(trial_id):
            raise ValueError("no next point")

        monkeypatch.setattr(oracle, "populate_space", fail)
        with pytest.raises(SearchFailed, match="no next point"):
            connect().create_trial("a")
        assert str(server.failure) == "no next point"

    def test_a_port_that_is_taken(self, served, oracle):
        server, _ = served
        other = OracleServer(oracle, Role("chief", port=server.port), "x")
        with pytest.raises(SearchFailed, match="cannot listen"), other.running():
            pass

    def test_the_mark_of_the_chief(self, served):
        server, _ = served
        role = Role("worker", port=server.port)
        assert mark_of_chief(role, patience=5) == "the mark"

    def test_no_chief(self):
        with pytest.raises(SearchFailed, match="did not answer within"):
            mark_of_chief(Role("worker", port=1), patience=0.2)


class TestSharedFolder:
    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch):
        monkeypatch.setattr("keras_rsft.searching.search_folder._SECONDS_TO_APPEAR", 0)

    def test_it_is_the_chiefs(self, tmp_path):
        with open_search(tmp_path / "run", {"space": 1}) as folder:
            write_mark(folder, "m")
            assert join_search(tmp_path / "run", {"space": 1}, "m") == folder

    def test_it_is_not_there(self, tmp_path):
        with pytest.raises(SearchFailed, match=r"does not exist here.*`--output`"):
            join_search(tmp_path / "run", {}, "m")

    def test_it_only_looks_like_it(self, tmp_path):
        with open_search(tmp_path / "run", {}) as folder:
            write_mark(folder, "another")
        with pytest.raises(SearchFailed, match="is not the chief's"):
            join_search(tmp_path / "run", {}, "m")

    def test_the_chief_searches_something_else(self, tmp_path):
        with open_search(tmp_path / "run", {"space": 1}) as folder:
            write_mark(folder, "m")
        with pytest.raises(InvalidArgument, match="another search space"):
            join_search(tmp_path / "run", {"space": 2}, "m")


def python(code):
    return (sys.executable, "-c", code)


class TestWorkerProcesses:
    def test_none_is_left_behind(self, tmp_path):
        crew = Crew(2, python("import time; time.sleep(60)"))
        workers = WorkerProcesses(crew, port=1, logs=tmp_path / "logs")
        with contextlib.suppress(KeyboardInterrupt), workers.running():
            assert workers.alive == 2
            processes = list(workers._processes.values())
            raise KeyboardInterrupt
        assert all(process.returncode is not None for process in processes)

    def test_one_that_does_not_listen_is_killed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "keras_rsft.searching.worker_processes._SECONDS_TO_END", 0.2
        )
        deaf = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            "print('deaf', flush=True); time.sleep(60)"
        )
        workers = WorkerProcesses(Crew(1, python(deaf)), port=1, logs=tmp_path / "logs")
        with workers.running():
            while "deaf" not in workers.last_words("worker-0"):
                time.sleep(0.05)
            (process,) = workers._processes.values()
        assert process.returncode == -9

    def test_a_worker_does_not_outlive_a_chief_that_was_killed(self, tmp_path):
        child = (
            "from keras_rsft.searching.worker_processes import end_with_parent\n"
            "import os, time; end_with_parent()\n"
            "print(os.getpid(), flush=True); time.sleep(60)"
        )
        parent = (
            "from pathlib import Path; import sys, time\n"
            "from keras_rsft.searching.roles import Crew\n"
            "from keras_rsft.searching.worker_processes import WorkerProcesses\n"
            f"crew = Crew(1, (sys.executable, '-c', {child!r}))\n"
            f"workers = WorkerProcesses(crew, port=1, logs=Path({str(tmp_path)!r}))\n"
            "with workers.running(): time.sleep(60)"
        )
        leading = subprocess.Popen(python(parent))
        log = tmp_path / "worker-0.log"
        until = time.monotonic() + 30
        while not (log.exists() and log.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        worker = psutil.Process(int(log.read_text()))
        leading.kill()
        leading.wait()
        while worker.is_running() and worker.status() != "zombie":
            assert time.monotonic() < until
            time.sleep(0.05)

    def test_last_words_and_a_restart(self, tmp_path):
        crew = Crew(
            1,
            python(
                "import os; [print(n) for n in range(9)];"
                f"print(os.environ['{TUNER_ID}'], os.environ['{ORACLE_PORT}']);"
                "raise SystemExit(3)"
            ),
        )
        workers = WorkerProcesses(crew, port=7, logs=tmp_path / "logs")
        with workers.running():
            workers.wait(20)
            assert workers.take_ended() == {"worker-0": 3}
            assert workers.last_words("worker-0").splitlines() == [
                "5", "6", "7", "8", "worker-0 7",
            ]  # fmt: skip
            workers.restart("worker-0")
            workers.wait(20)
            assert workers.take_ended() == {"worker-0": 3}
            assert workers.restarts == {"worker-0": 1}
        assert workers.log_of("worker-0").read_text().count("worker-0 7") == 2


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return split_features(tmp_path_factory.mktemp("features"))


@pytest.fixture
def tuner(features, tmp_path):
    hypermodel = RSFTHyperModel(
        features, settings=SETTINGS, space=SPACE, progress=False
    )
    return make_quiet_tuner(hypermodel, SearchOptions(max_trials=2), tmp_path)


class TestChief:
    def lead(self, tuner, tmp_path, **options):
        return lead_trials(
            tuner, SearchOptions(max_trials=2), options.pop("role", Role()), tmp_path,
            progress=False, **({"patience": 5} | options),
        )  # fmt: skip

    def test_workers_that_all_die_at_once(self, tuner, tmp_path):
        crew = Crew(2, python("print('no such data'); raise SystemExit(1)"))
        with pytest.raises(SearchFailed, match=r"(?s)All workers.*no such data"):
            self.lead(tuner, tmp_path, crew=crew)

    def test_no_worker_comes(self, tuner, tmp_path):
        with pytest.raises(SearchFailed, match="No worker has been heard of"):
            self.lead(tuner, tmp_path, patience=0.3, role=Role("chief"))

    def test_nothing_is_left_to_do(self, tuner, tmp_path):
        tuner.search()
        crew = Crew(1, python("raise SystemExit('started for nothing')"))
        outcomes = self.lead(tuner, tmp_path, crew=crew)
        assert [one.status for one in outcomes] == ["COMPLETED"] * 2
        assert not (tmp_path / chief.LOGS_FOLDER).exists()

    def test_what_a_dead_chiefs_workers_had_goes_on_alone(self, tuner, tmp_path):
        tuner.on_search_begin()
        handed = tuner.oracle.create_trial("worker-1-0")
        again = make_quiet_tuner(
            tuner.hypermodel, SearchOptions(max_trials=2), tmp_path
        )
        assert again.oracle.ongoing_trials == {}
        assert again.oracle._retry_queue == [handed.trial_id]
        again.search()
        trials = again.oracle.trials
        assert {trial.status for trial in trials.values()} == {"COMPLETED"}
        np.testing.assert_equal(
            trials[handed.trial_id].hyperparameters.values,
            handed.hyperparameters.values,
        )
