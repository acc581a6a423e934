"""The command `rank`: its options, and how its table is printed.

Like `cli.py`, imports nothing heavy until the command runs.
"""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from keras_rsft.cli_options import (
    add_cache_dir,
    add_data_argument,
    add_data_options,
    add_output_options,
    add_pass_options,
    add_seed,
    backbone_name,
    load_corrected,
    name_list,
    positive_int,
)

if TYPE_CHECKING:
    from rich.console import Console

    from keras_rsft.rank import BackboneRanking


def add_rank(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    rank = commands.add_parser("rank", help="which base suits your own images or texts")
    add_data_argument(rank)
    bases = rank.add_argument_group("bases")
    bases.add_argument(
        "--backbones",
        type=_names,
        required=True,
        metavar="A,B,C",
        help="as --backbone of fit takes them",
    )
    bases.add_argument(
        "--sample",
        type=positive_int,
        default=1000,
        metavar="N",
        help="training samples to look at; default: %(default)s",
    )
    add_pass_options(bases, base="each base")
    add_seed(bases)
    add_data_options(rank.add_argument_group("data"))
    add_cache_dir(rank)
    add_output_options(rank)


def run_rank(arguments: argparse.Namespace) -> None:
    """Ranks the bases and prints the table."""
    from keras_rsft.backbones.load import check_backbone_name
    from keras_rsft.cli_documents import ranking_document
    from keras_rsft.cli_output import output_of, print_data
    from keras_rsft.rank import rank_backbones

    for name in arguments.backbones:
        check_backbone_name(name)
    with output_of(arguments) as output:
        data = load_corrected(arguments, noisy_splits=("train",))
        print_data(data, output.console, noise=arguments.noise)
        ranking = rank_backbones(
            data,
            arguments.backbones,
            sample=arguments.sample,
            image_size=arguments.image_size,
            precision=arguments.precision,
            seed=arguments.seed,
            cache_dir=arguments.cache_dir,
            progress=output.progress,
        )
        print_ranking(ranking, output.console, data=arguments.data)
        output.finish(ranking_document(ranking), ranking.ranked[0].name)


def print_ranking(ranking: BackboneRanking, console: Console, *, data: str) -> None:
    """Prints the table, what its numbers mean, and what to do next."""
    from rich import box
    from rich.markup import escape

    from keras_rsft.cli_output import print_summary
    from keras_rsft.report.summary import ranking_summary

    print_summary(ranking_summary(ranking), console, table_box=box.SIMPLE_HEAD)
    best = ranking.ranked[0].name
    command = shlex.join(["keras-rsft", "fit", data, "--backbone", best])
    console.print("Train on the first, with your options for data:")
    console.print(f"  {escape(command)}", soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(map(backbone_name, name_list(text)))
