"""Chief and workers on Keras Tuner's own protocol: who does what, and who gives up."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from keras_tuner.src.distribute import oracle_client
from made_features import split_features

from keras_rsft._runtime import ORACLE_HOST, ORACLE_PORT, TUNER_ID, part_in_search
from keras_rsft.config import SearchConfig, SearchSpace, TrainConfig
from keras_rsft.errors import InvalidArgument, WorkerLost
from keras_rsft.tuning import _workers as workers
from keras_rsft.tuning._folder import join_search, open_search
from keras_rsft.tuning._search import run_trials
from keras_rsft.tuning._space import values_of
from keras_rsft.tuning._tuner import RSFTHyperModel, make_tuner

SETTINGS = TrainConfig(epochs=1, batch_size=16)
SPACE = SearchSpace(policies=("accept-all", "keep-fraction"), optimizers=("sgd",))
OPTIONS = SearchConfig(max_trials=4, parallel_trials=1)


GIVEN = {ORACLE_HOST: "10.0.0.1", ORACLE_PORT: "8000", TUNER_ID: "w0"}


class TestPart:
    def test_alone_chief_and_worker(self):
        assert part_in_search({}) == part_in_search({TUNER_ID: "chief"}) == "alone"
        assert part_in_search(GIVEN | {TUNER_ID: "my-chief"}) == "chief"
        assert part_in_search(GIVEN) == "worker"

    @pytest.mark.parametrize("missing", [ORACLE_HOST, ORACLE_PORT, TUNER_ID])
    def test_a_variable_that_is_missing(self, missing):
        with pytest.raises(InvalidArgument, match=f"does not set {missing}"):
            part_in_search(GIVEN | {missing: ""})

    @pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "80.5"])
    def test_what_is_no_port(self, port):
        with pytest.raises(InvalidArgument, match="from 1 to 65535"):
            part_in_search(GIVEN | {ORACLE_PORT: port})


@pytest.fixture(scope="module")
def hypermodel(tmp_path_factory):
    features = split_features(tmp_path_factory.mktemp("features"))
    return RSFTHyperModel(features, settings=SETTINGS, space=SPACE, progress=False)


@pytest.fixture
def chief(hypermodel, tmp_path):
    return make_tuner(hypermodel, OPTIONS, tmp_path)


@pytest.fixture
def address(chief, monkeypatch):
    """Makes this process a worker from here on, of a chief at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {ORACLE_HOST: "127.0.0.1", ORACLE_PORT: port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(TUNER_ID, "worker")
    monkeypatch.setattr(workers, "_GOODBYE_SECONDS", 2.0)
    # Threads of one process end in any order, and so give these back in any order.
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(oracle_client, "TIMEOUT", oracle_client.TIMEOUT)


@pytest.fixture
def work(hypermodel, tmp_path, monkeypatch, address):
    """Starts a worker in a thread; what ends it is in the list it gives."""

    def work(name="worker", hypermodel=hypermodel, timeout=20):
        monkeypatch.setenv(TUNER_ID, name)
        tuner, ended = make_tuner(hypermodel, OPTIONS, tmp_path), []
        assert tuner.is_worker

        def follow():
            try:
                workers.follow(
                    lambda: tuner, tmp_path / "results.json", timeout=timeout
                )
            except WorkerLost as error:
                ended.append(error)

        thread = threading.Thread(target=follow)
        thread.start()
        return thread, ended

    return work


def led(chief, tmp_path, *, commands=(), timeout=20.0):
    return run_trials(
        chief, OPTIONS, progress=False,
        workers=lambda: workers.leading(chief, commands, tmp_path, timeout=timeout),
    )  # fmt: skip


def python(code):
    return (sys.executable, "-c", code)


class TestSearch:
    @pytest.mark.slow
    def test_two_workers_share_the_trials(self, chief, work, tmp_path):
        threads = [work(name) for name in ("a", "b")]
        outcomes = led(chief, tmp_path)
        assert [one.status for one in outcomes] == ["COMPLETED"] * 4
        assert len({str(one.values) for one in outcomes}) == 4
        for thread, ended in threads:
            thread.join(20)
            assert not thread.is_alive()
            assert not ended
        chief.get_best_models(4)  # The weights lie in the chief's folder.

    @pytest.mark.slow
    def test_why_a_trial_failed_is_told(self, chief, work, hypermodel, tmp_path):
        broken = RSFTHyperModel(hypermodel.features, settings=SETTINGS, progress=False)
        made = []

        def space(hp):
            if made:
                return {"keep_fraction": 7.0}
            return values_of(SPACE, hp)

        broken.space = space
        thread, _ = work(hypermodel=broken)
        made.append(True)
        outcomes = led(chief, tmp_path)
        thread.join(20)
        assert {one.status for one in outcomes} == {"FAILED"}
        assert "`keep_fraction` must be in" in outcomes[0].message

    @pytest.mark.slow
    def test_nothing_is_left_to_do(self, chief, tmp_path):
        chief.search()
        commands = [python("raise SystemExit('started for nothing')")]
        outcomes = led(chief, tmp_path, commands=commands)
        assert [one.status for one in outcomes] == ["COMPLETED"] * 4
        assert not (tmp_path / workers.LOGS_FOLDER).exists()

    def test_what_a_lost_worker_had_is_trained_by_the_next_search(
        self, chief, hypermodel, tmp_path
    ):
        handed = chief.oracle.create_trial("worker-1-0")
        again = make_tuner(hypermodel, OPTIONS, tmp_path)
        assert again.oracle.ongoing_trials == {}
        again.search()
        trials = again.oracle.trials
        assert [one.status for one in again.outcomes] == ["COMPLETED"] * 4
        np.testing.assert_equal(
            trials[handed.trial_id].hyperparameters.values,
            handed.hyperparameters.values,
        )


class TestChief:
    def test_a_worker_that_fails(self, chief, tmp_path):
        commands = [python("print('no such data'); raise SystemExit(3)")] * 2
        message = r"(?s)worker-\d has ended with status 3.*resumes.*no such data"
        with pytest.raises(WorkerLost, match=message):
            led(chief, tmp_path, commands=commands)

    def test_a_worker_that_is_killed(self, chief, tmp_path):
        commands = [python("import time; time.sleep(60)")] * 2
        with workers.leading(chief, commands, tmp_path, timeout=30) as trials_left:
            killed, other = psutil.Process().children()
            assert trials_left()
            killed.kill()
            while killed.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
            with pytest.raises(WorkerLost, match="worker-0 has ended with status -9"):
                trials_left()
            other.kill()
        assert not other.is_running()

    def test_none_is_left_behind(self, chief, tmp_path, monkeypatch):
        monkeypatch.setattr(workers, "_GOODBYE_SECONDS", 0.2)
        deaf = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            "print('deaf', flush=True); time.sleep(60)"
        )
        log = tmp_path / workers.LOGS_FOLDER / "worker-0.log"
        leading = workers.leading(chief, [python(deaf)], tmp_path, timeout=30)
        with contextlib.suppress(KeyboardInterrupt), leading as trials_left:
            (process,) = psutil.Process().children()
            while "deaf" not in log.read_text():
                trials_left()
            raise KeyboardInterrupt
        assert not process.is_running()

    def test_no_worker_comes(self, chief, address, tmp_path):
        with pytest.raises(WorkerLost, match=r"No worker has called for 0\.3 sec"):
            led(chief, tmp_path, timeout=0.3)

    def test_a_port_that_is_taken(self, chief, address, tmp_path):
        with (
            workers.leading(chief, (), tmp_path, timeout=1),
            pytest.raises(InvalidArgument, match="cannot listen"),
            workers.leading(chief, (), tmp_path, timeout=1),
        ):
            pass


class TestWorker:
    def test_the_chief_is_not_there(self, work):
        thread, ended = work(timeout=0.5)
        thread.join(20)
        assert "did not answer within 0.5 seconds" in str(ended[0])

    @pytest.mark.slow
    def test_the_chief_goes(self, chief, work, tmp_path):
        leading = workers.leading(chief, (), tmp_path, timeout=20)
        with contextlib.suppress(KeyboardInterrupt), leading as trials_left:
            thread, ended = work(timeout=5)
            while not chief.oracle.ongoing_trials:
                trials_left()
            raise KeyboardInterrupt
        thread.join(40)
        assert not thread.is_alive()
        assert "The chief at 127.0.0.1:" in str(ended[0])

    def test_all_was_done_before_it_came(self, work, tmp_path):
        (tmp_path / "results.json").write_text("{}")
        thread, ended = work(timeout=0.5)
        thread.join(20)
        assert not ended

    @pytest.mark.slow
    def test_the_chief_cannot_propose_trials(self, chief, work, monkeypatch, tmp_path):
        def fail(trial_id):
            raise ValueError("no next point")

        monkeypatch.setattr(chief.oracle, "populate_space", fail)
        thread, ended = work(timeout=5)
        with pytest.raises(WorkerLost, match="No worker has called"):
            led(chief, tmp_path, timeout=3)
        thread.join(20)
        assert "has failed: Exception calling application: no next" in str(ended[0])

    def test_the_folder_is_not_there(self, tmp_path):
        with pytest.raises(WorkerLost, match=r"No chief has begun.*`--output`"):
            join_search(tmp_path / "run", {}, timeout=0.1)

    def test_the_chief_searches_something_else(self, tmp_path):
        with open_search(tmp_path / "run", {"space": 1}) as folder:
            assert join_search(folder, {"space": 1}, timeout=0.1) == folder
            with pytest.raises(InvalidArgument, match="another search space"):
                join_search(folder, {"space": 2}, timeout=0.1)
