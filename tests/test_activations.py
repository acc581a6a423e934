"""Activations are kept where they fit and reading them is faster."""

from __future__ import annotations

import dataclasses
import re

import pytest

from keras_rsft.finetuning.activations import (
    ActivationChoice,
    ActivationCosts,
    choose_activations,
    settled_choice,
)

KEPT = ActivationChoice(True, "kept for the test")
ANEW = ActivationChoice(False, "computed for the test")


class TestChoice:
    costs = ActivationCosts(
        images=1000, image_bytes=10**6, free_bytes=10**10, front_seconds=0.02, epochs=5
    )

    def test_by_hand(self):
        # 1 GB: 20 s for the pass and six times 2 s, against five times 20 s.
        assert self.costs.seconds_kept == pytest.approx(32)
        assert self.costs.seconds_anew == pytest.approx(100)

    @pytest.mark.parametrize(
        ("changes", "keep", "reason"),
        [
            ({}, True, "1 GB .1e.03 kB an image., 10 GB are free; 5 epochs take about "
             "32 s with them, 100 s without"),
            ({"epochs": 1}, False, "computed anew in each epoch"),
            ({"front_seconds": 0.002}, False, "14 s with them, 10 s without"),
            ({"free_bytes": 2 * 10**9}, True, "kept"),
            ({"free_bytes": 2 * 10**9 - 1}, False, "more than half"),
            ({"front_is_preprocessing": True}, False, "images are decoded"),
        ],
    )  # fmt: skip
    def test_what_is_faster_and_fits(self, changes, keep, reason):
        choice = choose_activations(
            dataclasses.replace(self.costs, **changes), cut="conv"
        )
        assert choice.keep == keep
        assert "\n" not in choice.reason
        assert "conv" in choice.reason
        assert re.search(reason, choice.reason), choice.reason

    def test_is_made_once(self, tmp_path):
        path = tmp_path / "choice.json"
        assert settled_choice(path, lambda: KEPT) == KEPT
        assert settled_choice(path, lambda: ANEW) == KEPT
        path.write_text("{")
        assert settled_choice(path, lambda: ANEW) == ANEW
        assert settled_choice(None, lambda: KEPT) == KEPT
