"""`TF_CONFIG`: what it means, and that a mistake in it is told in a sentence."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_rsft._runtime import Cluster, cluster_of
from keras_rsft.errors import InvalidArgument

WORKERS = ["host-a:2222", "host-b:2222", "host-c:2222"]


def config(cluster, kind="worker", index=0):
    task = {"type": kind, "index": index}
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


@pytest.mark.parametrize("environment", [{}, {"TF_CONFIG": ""}, {"TF_CONFIG": "{}"}])
def test_without_a_cluster_a_process_is_alone(environment):
    found = cluster_of(environment)
    assert (len(found), found.index) == (1, 0)
    assert found.is_alone
    assert found.is_chief


@pytest.mark.parametrize("index", [2, "2"])
def test_workers_are_in_their_order(index):
    found = cluster_of(config({"worker": WORKERS}, index=index))
    assert found == Cluster(tuple(WORKERS), 2)
    assert not found.is_alone
    assert not found.is_chief
    assert found.named(1) == "worker 1 (host-b:2222)"
    assert Cluster(("", ""), 1).named(0) == "worker 0"


def test_a_chief_is_the_first_worker():
    cluster = {"chief": ["boss:1"], "worker": WORKERS}
    assert cluster_of(config(cluster, "chief")) == Cluster(("boss:1", *WORKERS), 0)
    assert cluster_of(config(cluster, "worker", 0)).index == 1
    assert cluster_of(config(cluster, "worker", 2)).index == 3


def test_what_kubeflow_adds_does_no_harm():
    environment = config({"worker": WORKERS}, index=1)
    told = json.loads(environment["TF_CONFIG"]) | {"environment": "cloud"}
    assert cluster_of({"TF_CONFIG": json.dumps(told)}).index == 1


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"TF_CONFIG": "{"}, "no JSON"),
        ({"TF_CONFIG": "[]"}, "must be an object"),
        (config({"worker": WORKERS, "ps": ["p:1"]}), "no parameter servers"),
        (config({"worker": []}), "list of"),
        (config({"worker": ["a:1", "a:1"]}), "the same address"),
        (config({"chief": ["a:1", "b:1"]}, "chief"), "one chief"),
        (config({"worker": WORKERS}, "evaluator"), "'evaluator'"),
        (config({"worker": WORKERS}, index=3), r"\[0, 3\)"),
        (config({"worker": WORKERS}, index=True), "it is True"),
        (config({"worker": WORKERS}, index=-1), "it is -1"),
        ({"TF_CONFIG": json.dumps({"cluster": {"worker": WORKERS}})}, '"task" must'),
    ],
)
def test_a_mistake_is_told(environment, said):
    with pytest.raises(InvalidArgument, match=said) as caught:
        cluster_of(environment)
    assert str(caught.value).startswith("TF_CONFIG cannot be used")
    assert environment["TF_CONFIG"] in str(caught.value)


plain = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
anything = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["cluster", "task", "worker", "chief", "type", "index"]),
            inner,
        )
    ),
)


@given(anything)
def test_whatever_it_is_there_is_a_cluster_or_a_sentence(value):
    try:
        found = cluster_of({"TF_CONFIG": json.dumps(value)})
    except InvalidArgument:
        return
    assert 0 <= found.index < len(found)


@pytest.mark.parametrize("index", [-1, 2])
def test_there_must_be_such_a_worker(index):
    with pytest.raises(InvalidArgument, match=r"\[0, 2\)"):
        Cluster(("", ""), index)
