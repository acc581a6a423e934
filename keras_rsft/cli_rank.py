"""The command `rank`: its options, and how its table is printed.

Like `cli.py`, imports nothing heavy until the command runs.
"""

from __future__ import annotations

import argparse
import math
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

    from keras_rsft.ranking import BackboneRanking, RankedBackbone

_SCORE_NAMES = {"log_me": "LogME", "h_score": "H-score"}


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
    from keras_rsft.ranking import rank_backbones

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
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("Base", overflow="fold")
    for header in ("Accuracy", "Behind", "LogME", "H-score", "ms", "MB", "Features"):
        table.add_column(header, justify="right", no_wrap=True)
    for place, one in enumerate(ranking.ranked):
        table.add_row(*map(escape, _row(one, first=place == 0)))
    console.print(table)
    for line in _notes(ranking):
        console.print(line, soft_wrap=True)
    for name, reason in ranking.failed:
        short = reason.partition("\n")[0]
        console.print(f"[yellow]{escape(f'{name}: {short}')}[/]", soft_wrap=True)
    _print_command(console, ranking, data)


def _row(one: RankedBackbone, *, first: bool) -> list[str]:
    return [
        one.name,
        f"{100 * one.accuracy:.1f} ± {100 * one.accuracy_error:.1f}",
        "" if first else f"{100 * one.behind:.1f}",
        f"{one.log_me:.3f}",
        f"{one.h_score:.2f}",
        f"{1000 * one.seconds_per_image:.1f}",
        f"{one.weights_bytes / 1e6:.1f}",
        str(one.dim),
    ]


def _notes(ranking: BackboneRanking) -> list[str]:
    notes = [
        f"Accuracy in percent of a quick head on {ranking.num_images} training "
        "samples, each predicted from the others, ± half of its 95 % interval; ms of "
        "the pass for a sample."
    ]
    share = f"About {100 * ranking.noise_rate:.0f} % of the labels look wrong"
    if ranking.counts_right_labels:
        notes.append(
            f"{share}: each label counts by how likely it is right, by all bases "
            "together."
        )
    taus = {_SCORE_NAMES[key]: value for key, value in ranking.agreement.items()}
    if not any(math.isnan(value) for value in taus.values()):
        agreed = ", ".join(f"{name} {value:.2f}" for name, value in taus.items())
        notes.append(f"Same order as by accuracy (Kendall's tau, 1 is all): {agreed}.")
    equal = [one.name for one in ranking.ranked[1:] if one.behind <= one.behind_error]
    if equal:
        notes.append(
            f"Not shown to be worse than the first: {', '.join(equal)}; a larger "
            "--sample tells more."
        )
    return notes


def _print_command(console: Console, ranking: BackboneRanking, data: str) -> None:
    from rich.markup import escape

    best = ranking.ranked[0].name
    command = shlex.join(["keras-rsft", "fit", data, "--backbone", best])
    console.print("Train on the first, with your options for data:")
    console.print(f"  {escape(command)}", soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(map(backbone_name, name_list(text)))
