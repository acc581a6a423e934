"""Activations before unfrozen layers are cached where the disk has room."""

from __future__ import annotations

import types

import keras
import numpy as np
import pytest
from made_bases import save_three_blocks

from keras_rsft.config import FeatureConfig, UnfreezeConfig
from keras_rsft.training import _unfreeze as unfreezing
from keras_rsft.training._features import FeatureSource
from keras_rsft.training._unfreeze import (
    cache_activations,
    cut_backbone,
)


class Samples:
    """As many as there are, with two augmentations each."""

    augmentations = 2

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """Chooses for 10 training and 5 validation images, with so many free bytes."""
    base = keras.models.load_model(save_three_blocks(tmp_path / "three.keras"))
    features = types.SimpleNamespace(train=Samples(10), validation=Samples(5))

    def call(free, *, layers=1, dtype="float32", choice_file=None):
        part = cut_backbone(base, UnfreezeConfig(layers))
        needed = 25 * part.front.output_shape[-1] * np.dtype(dtype).itemsize
        disk = types.SimpleNamespace(free=free(needed))
        monkeypatch.setattr(unfreezing.shutil, "disk_usage", lambda folder: disk)
        notes = []
        config = FeatureConfig(cache_dir=tmp_path, cache_dtype=dtype)
        source = FeatureSource(None, None, None, config, on_note=notes.append)
        return cache_activations(part, features, source, choice_file), notes

    return call


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_half_of_the_free_disk(choose, dtype):
    cached, (note,) = choose(lambda needed: 2 * needed, dtype=dtype)
    assert cached
    assert "are cached" in note
    cached, (note,) = choose(lambda needed: 2 * needed - 1, dtype=dtype)
    assert not cached
    assert "in each epoch" in note


def test_nothing_where_nothing_frozen_is_before(choose):
    cached, (note,) = choose(lambda needed: 10**12, layers="all")
    assert not cached
    assert "Nothing frozen" in note


def test_is_chosen_once(choose, tmp_path):
    path = tmp_path / "choice.json"
    assert choose(lambda needed: 2 * needed, choice_file=path)[0]
    assert choose(lambda needed: 0, choice_file=path) == (True, [])
    path.write_text("{")
    assert choose(lambda needed: 0, choice_file=path)[0] is False
    assert choose(lambda needed: 2 * needed, choice_file=path)[0] is False
