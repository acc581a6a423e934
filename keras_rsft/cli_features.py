"""The command `features`: runs the base and keeps what comes out, and no more.

For machines that compute features by shares, together or one after the other. Like
`cli.py`, imports nothing heavy until the command runs.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from keras_rsft.cli_options import (
    add_base_options,
    add_cache_dir,
    add_data_argument,
    add_data_options,
    add_output_options,
    base_options,
    load_corrected,
    parsed,
    positive_seconds,
    seed_number,
)
from keras_rsft.cluster import DEFAULT_PATIENCE, Cluster, cluster_of

if TYPE_CHECKING:
    from rich.console import Console

    from keras_rsft.finetuning import SplitFeatures


def add_features(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    features = commands.add_parser(
        "features", help="run the base only, also by shares on several machines"
    )
    add_data_argument(features)
    add_data_options(features.add_argument_group("data"))
    base = features.add_argument_group("base")
    add_base_options(base)
    base.add_argument(
        "--seed", type=seed_number, default=0, help="of the random views; default: 0"
    )
    shares = features.add_argument_group("shares")
    shares.add_argument(
        "--share",
        type=_share,
        metavar="I/N",
        help="compute the I-th of N shares, from 0 on, and wait for nobody; default: "
        "all, or by TF_CONFIG one, and wait for the others",
    )
    shares.add_argument(
        "--worker-timeout",
        type=positive_seconds,
        default=DEFAULT_PATIENCE,
        metavar="SECONDS",
        help="how long to wait for a worker that adds nothing; default: 600",
    )
    add_cache_dir(features)
    add_output_options(features)


def features_cluster(arguments: argparse.Namespace) -> Cluster:
    """Returns which share of how many this process computes.

    Raises:
        InvalidArgument: If there is no such share, or `TF_CONFIG` cannot be used.
    """
    if arguments.share is None:
        return cluster_of()
    index, count = arguments.share
    return Cluster(("",) * count, index)


def run_features(arguments: argparse.Namespace, cluster: Cluster) -> None:
    """Computes and keeps the features, or a share of them, and says where they are."""
    from keras_rsft.cli_documents import features_document
    from keras_rsft.cli_output import output_of, print_data
    from keras_rsft.features.extraction import default_cache_dir
    from keras_rsft.finetuning.features import keep_share, open_features

    folder = arguments.cache_dir or default_cache_dir()
    with output_of(arguments) as output:
        data = load_corrected(arguments)
        print_data(data, output.console)
        options = base_options(arguments) | {
            "seed": arguments.seed,
            "progress": output.progress,
            "cluster": cluster,
            "patience": arguments.worker_timeout,
        }
        if arguments.share is None:
            features = open_features(data, **options).features
            print_features(features, output.console, kind=data.kind)
        else:
            keep_share(data, **options)
            features = None
            output.console.print(
                f"Share {cluster.index} of {len(cluster)} is kept in {folder}. "
                "When all are, the next command that needs these features puts them "
                "together.",
                markup=False,
                soft_wrap=True,
            )
        output.finish(features_document(features, cluster, folder), folder)


def print_features(
    features: SplitFeatures, console: Console, *, kind: str = "images"
) -> None:
    """Prints what is kept of each split, and where."""
    for name in ("train", "validation", "test"):
        part = getattr(features, name)
        text = f"{name}: {len(part):,} {kind}, {part.dim:,} features each"
        if part.views > 1:
            text += f", {part.views} views"
        text += f", {part.num_bytes / 1e6:,.1f} MB in {part.path}"
        console.print(text, markup=False, soft_wrap=True)
    if features.unreadable:
        console.print(f"{len(features.unreadable):,} {kind} could not be read.")


def _share(text: str) -> tuple[int, int]:
    return parsed(
        text,
        lambda given: tuple(map(int, given.split("/"))),
        lambda pair: len(pair) == 2 and 0 <= pair[0] < pair[1],
        "I/N, with I from 0 to N - 1, such as 0/8",
    )
