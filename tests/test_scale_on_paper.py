"""The arithmetic of `benchmarks/scale_on_paper.py`, by hand."""

from __future__ import annotations

import dataclasses

import pytest
from benchmarks.scale_on_paper import Assumed, Measured, sheet

# Round: 3.6 million images are an hour at 1,000 a second.
MEASURED = Measured(
    decoded=100.0, image_bytes=9_000.0, row_bytes=1_000.0, written=1e9, joined=1e6,
    trained=2_000.0, computed=50.0,
)  # fmt: skip
ASSUMED = Assumed(computed=1_000.0, price=2.0, cores=20.0, network=1e9, storage=1e9)
IMAGES = 3.6e6


def sheet_of(gpus, measured=MEASURED, epochs=2, **changes):
    assumed = dataclasses.replace(ASSUMED, **changes)
    return sheet(measured, assumed, images=IMAGES, gpus=gpus, epochs=epochs)


def test_one_gpu_that_is_kept_busy():
    one = sheet_of(1)
    assert one.limits == {
        "the base on the GPUs": 1_000.0,
        "decoding on the cores": 2_000.0,
        "each machine's network": 100_000.0,
        "the shared storage": 100_000.0,
    }
    assert one.bottleneck == "the base on the GPUs"
    assert (one.pass_hours, one.join_hours, one.head_hours) == (1.0, 0.0, 1.0)
    assert one.hours == 2.0
    assert one.cores_needed == 10.0
    assert one.network_needed == 1e7  # 1,000 images of 9 kB in, 1,000 rows of 1 kB out.
    assert one.cost == one.cost_held == 4.0


def test_eight_gpus_share_the_pass_and_nothing_else():
    eight = sheet_of(8)
    assert eight.pass_hours == 0.125
    assert eight.join_hours == 1.0  # 3.6 GB at 1 MB/s.
    assert eight.head_hours == 1.0
    assert eight.cores_needed == 80.0
    assert eight.network_needed == 1e7
    assert eight.cost == 2.0 * (8 * 0.125 + 2.0)
    assert eight.cost_held == 2.0 * 8 * 2.125


@pytest.mark.parametrize(
    "changes, bottleneck, hours",
    [
        ({"cores": 5.0}, "decoding on the cores", 2.0),
        ({"network": 5e6}, "each machine's network", 2.0),
        ({"storage": 2.5e6}, "the shared storage", 4.0),
    ],
)
def test_the_first_bottleneck(changes, bottleneck, hours):
    one = sheet_of(1, **changes)
    assert one.bottleneck == bottleneck
    assert one.pass_hours == hours


def test_what_takes_longest():
    assert sheet_of(1, epochs=1).longest == "the pass"
    assert sheet_of(8, epochs=8).longest == "the head"
    slow = dataclasses.replace(MEASURED, joined=1e5)
    assert sheet_of(8, slow).longest == "putting shares together"


def test_a_head_is_not_fed_faster_than_the_storage_reads():
    assert sheet_of(1, storage=1e6).head_hours == 2.0
