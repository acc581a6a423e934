"""The files for clusters: as far as they can be tried without one."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from keras_rsft._runtime import Cluster, cluster_of
from keras_rsft.cli._commands import features_cluster
from keras_rsft.cli._main import build_parser

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*.sbatch")])
WORKER = EXAMPLES / "slurm_worker.sh"
# What `scontrol` does with the list of machines of this job.
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames gpu[07-08,11]" ] || { echo "no such nodes: $3" >&2; exit 1; }
printf 'gpu07\\ngpu08\\ngpu11\\n'
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_understands_it(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.fixture
def under_slurm(tmp_path):
    """Runs a command by the worker's script, as one task of three."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(SCONTROL)
    scontrol.chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}

    def run(*command, **variables):
        slurm = {
            "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "gpu[07-08,11]",
            "SLURM_JOB_ID": "4031234",
            "SLURM_PROCID": "2",
            "SLURM_NTASKS": "3",
        }
        return subprocess.run(
            [WORKER, *command], text=True, capture_output=True,
            env={k: v for k, v in (inherited | slurm | variables).items() if v},
        )  # fmt: skip

    return run


class TestSlurm:
    def test_each_task_is_told_who_it_is(self, under_slurm):
        done = under_slurm("printenv", "TF_CONFIG")
        assert done.returncode == 0, done.stderr
        hosts = ("gpu07:21234", "gpu08:21234", "gpu11:21234")
        assert cluster_of({"TF_CONFIG": done.stdout}) == Cluster(hosts, 2)
        assert json.loads(done.stdout)["task"] == {"type": "worker", "index": 2}

    @pytest.mark.parametrize("task, name", [("0", "chief"), ("2", "worker-2")])
    def test_a_search_has_a_chief_and_workers(self, under_slurm, task, name):
        variables = ("TUNER_ID", "ORACLE_IP", "ORACLE_PORT")
        names = [f"KERASTUNER_{variable}" for variable in variables]
        done = under_slurm("printenv", *names, SLURM_PROCID=task)
        assert done.stdout.split() == [name, "gpu07", "21234"]

    def test_the_step_and_the_port_may_be_others(self, under_slurm):
        step = {
            "SLURM_JOB_NODELIST": "all[1-9]",
            "SLURM_STEP_NODELIST": "gpu[07-08,11]",
        }
        done = under_slurm("printenv", "TF_CONFIG", KERAS_RSFT_PORT="5000", **step)
        assert cluster_of({"TF_CONFIG": done.stdout}).workers[0] == "gpu07:5000"

    def test_the_command_is_passed_on_as_it_is(self, under_slurm):
        done = under_slurm("printf", "%s|", "a b", "$c", "'d'")
        assert done.stdout == "a b|$c|'d'|"
        assert under_slurm("sh", "-c", "exit 7").returncode == 7

    @pytest.mark.parametrize(
        "variables, said",
        [
            ({"SLURM_NTASKS": "6"}, "6 tasks on 3 machines"),
            ({"SLURM_PROCID": ""}, "run this with srun"),
            ({"SLURM_JOB_NODELIST": "other[1-2]"}, "no such nodes"),
        ],
    )
    def test_what_cannot_work_is_told_before_the_command(
        self, under_slurm, variables, said
    ):
        done = under_slurm("echo", "began", **variables)
        assert done.returncode != 0
        assert said in done.stderr
        assert done.stdout == ""

    def test_a_task_of_an_array_is_a_share(self):
        command = _command_in(EXAMPLES / "slurm_features.sbatch")
        command = [
            word.replace("$SLURM_ARRAY_TASK_ID", "63").replace("$shares", "64")
            for word in command
        ]
        arguments = build_parser().parse_args(command)
        cluster = features_cluster(arguments)
        assert (cluster.index, len(cluster)) == (63, 64)
        assert (
            "#SBATCH --array=0-63" in (EXAMPLES / "slurm_features.sbatch").read_text()
        )


def _command_in(script):
    """Returns the words after `keras-rsft` in a script."""
    text = script.read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if " keras-rsft " in f" {line}")
    return shlex.split(line.partition("keras-rsft ")[2], comments=True)


def _documents(name):
    return list(yaml.safe_load_all((EXAMPLES / name).read_text(encoding="utf-8")))


def _spec_of(resource):
    """Returns the pod of a Job, or of a TFJob's workers."""
    spec = resource["spec"]
    if resource["kind"] == "TFJob":
        spec = spec["tfReplicaSpecs"]["Worker"]
    return spec["template"]["spec"]


class TestKubernetes:
    def test_kubeflows_operator_finds_what_it_looks_for(self):
        (job,) = [
            one for one in _documents("kubernetes_fit.yaml") if one["kind"] == "TFJob"
        ]
        assert job["apiVersion"] == "kubeflow.org/v1"
        assert set(job["spec"]) <= {
            "runPolicy", "successPolicy", "tfReplicaSpecs", "enableDynamicWorker",
        }  # fmt: skip
        assert set(job["spec"]["runPolicy"]) <= {
            "activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy",
            "schedulingPolicy", "suspend", "ttlSecondsAfterFinished",
        }  # fmt: skip
        assert job["spec"]["runPolicy"]["cleanPodPolicy"] in ("All", "None", "Running")
        (kind,) = job["spec"]["tfReplicaSpecs"]  # No chief, no parameter servers.
        assert kind == "Worker"
        workers = job["spec"]["tfReplicaSpecs"][kind]
        assert set(workers) == {"replicas", "restartPolicy", "template"}
        assert workers["replicas"] > 1
        policies = ("Always", "OnFailure", "Never", "ExitCode")
        assert workers["restartPolicy"] in policies
        (container,) = workers["template"]["spec"]["containers"]
        assert container["name"] == "tensorflow"
        (port,) = container["ports"]
        assert port == {"name": "tfjob-port", "containerPort": 2222}
        assert not any(e["name"] == "TF_CONFIG" for e in container.get("env", []))

    @pytest.mark.parametrize("name", ["kubernetes_fit.yaml", "kubernetes_search.yaml"])
    def test_every_pod_has_the_volume_and_shares_the_folders(self, name):
        resources = _documents(name)
        (claim,) = [one for one in resources if one["kind"] == "PersistentVolumeClaim"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        jobs = [one for one in resources if one["kind"] in ("Job", "TFJob")]
        for spec in map(_spec_of, jobs):
            (volume,) = spec["volumes"]
            mounted = volume["persistentVolumeClaim"]["claimName"]
            assert mounted == claim["metadata"]["name"]
            (container,) = spec["containers"]
            (mount,) = container["volumeMounts"]
            assert mount["name"] == volume["name"]
            for option in ("--output=", "--cache-dir="):
                (given,) = [w for w in container["command"] if w.startswith(option)]
                assert given.startswith(f"{option}{mount['mountPath']}/")

    def test_the_command_line_knows_the_options(self):
        for resource in _documents("kubernetes_search.yaml"):
            if resource["kind"] == "Job":
                _parse(_spec_of(resource)["containers"][0]["command"])
        (job,) = (r for r in _documents("kubernetes_fit.yaml") if r["kind"] == "TFJob")
        _parse(_spec_of(job)["containers"][0]["command"])
        _parse(["keras-rsft", *_command_in(EXAMPLES / "slurm_fit.sbatch")])


def _parse(command):
    program, *words = command
    assert program == "keras-rsft"
    build_parser().parse_args(words)
