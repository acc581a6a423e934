"""One pass that several processes make together, on one machine or on many.

Each runs the base on its share of the images and keeps that in a folder which all of
them see. The chief then makes one set of the parts, the one that a single process would
have made, and all of them read it.
"""

from __future__ import annotations

from collections.abc import Sequence

from keras_rsft.cluster import DEFAULT_PATIENCE, Cluster
from keras_rsft.features.extraction import join_pass
from keras_rsft.features.feature_pass import FeaturePass, append_rows, require_rows
from keras_rsft.features.shares import (
    Part,
    parts_of,
    wait_for_parts,
    wait_for_set,
)


def run_together(
    passes: Sequence[FeaturePass],
    cluster: Cluster,
    *,
    patience: float = DEFAULT_PATIENCE,
) -> None:
    """Makes passes together with other processes that are called in the same way."""
    keep_shares(passes, cluster, patience=patience)
    # All of them before the first is put together: the chief may be the last.
    for work in passes:
        wait_for_parts(
            work.folder,
            _parts(work, cluster),
            cluster,
            name=work.split.name,
            patience=patience,
            progress=work.progress,
        )
    for work in passes:
        parts = _parts(work, cluster)
        rows = sum(part.rows for part in parts)  # First: they go when the set is there.
        if work.is_done:
            continue
        require_rows(rows, work.split)
        if cluster.is_chief:
            join_pass(work, parts, patience=patience)
        else:
            name = work.split.name
            wait_for_set(work.folder, cluster, name=name, patience=patience)


def keep_shares(
    passes: Sequence[FeaturePass],
    cluster: Cluster,
    *,
    patience: float = DEFAULT_PATIENCE,
) -> None:
    """Computes this process's share of each pass, and waits for nobody."""
    for work in passes:
        parts = _parts(work, cluster)
        if work.is_done or cluster.index >= len(parts):
            continue
        part = parts[cluster.index]
        with part.held(patience):
            if part.finished() is None and not work.is_done:
                part.finish(*append_rows(work, part.path, part.stretch))


def _parts(work: FeaturePass, cluster: Cluster) -> list[Part]:
    return parts_of(work.folder, len(work.split), work.batch_size, len(cluster))
