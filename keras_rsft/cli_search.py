"""The options of `keras-rsft search`, and what is made of them.

Like `cli_options.py`, imports nothing heavy.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from keras_rsft.cli_options import (
    add_base_options,
    add_cache_dir,
    add_data_argument,
    add_data_options,
    add_loop_options,
    add_output_options,
    base_options,
    data_name,
    load_corrected,
    name_list,
    parsed,
    positive_int,
    positive_seconds,
)
from keras_rsft.cli_unfreeze import (
    add_base_training_options,
    base_training_settings,
)
from keras_rsft.errors import InvalidArgument
from keras_rsft.policy_choice import require_known
from keras_rsft.searching.names import (
    DEFAULT_TIMEOUT,
    OBJECTIVES,
    ORACLE_NAMES,
    PARENT,
    SEARCHED_POLICIES,
    TRAINABLE_NAMES,
    TUNER_ID,
    TUNER_NAMES,
    SearchOptions,
    part_in_search,
)
from keras_rsft.trainable_choice import UnfreezeConfig

if TYPE_CHECKING:
    from keras_rsft.searching import SearchSpace


def add_search_options(group: argparse._ArgumentGroup) -> None:
    """Adds what `SearchOptions` needs."""
    defaults = SearchOptions()
    group.add_argument(
        "--tuner",
        default=defaults.tuner,
        help=f"{', '.join(TUNER_NAMES)}; default: %(default)s, which trains many heads "
        "together",
    )
    group.add_argument(
        "--max-trials", type=positive_int, default=defaults.max_trials, metavar="N",
        help="default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--objective",
        default=defaults.objective,
        help=f"{', '.join(OBJECTIVES)}; default: %(default)s",
    )
    group.add_argument(
        "--oracle",
        default=defaults.oracle,
        help=f"what proposes the batched tuner's trials: {', '.join(ORACLE_NAMES)}; "
        "default: %(default)s",
    )
    group.add_argument(
        "--parallel-trials", type=positive_int, default=defaults.parallel_trials,
        metavar="N", help="heads trained together; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--halvings", type=int, default=defaults.halvings, metavar="N",
        help="how often the worse half of the heads is dropped; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--min-acceptance", type=float, default=defaults.min_acceptance,
        metavar="SHARE",
        help="a setting that accepts less is not chosen; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--clean-validation",
        action="store_true",
        help="judge trials by the validation split's right labels",
    )
    _add_worker_options(group)


def _add_worker_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workers", type=positive_int, metavar="N",
        help="processes on this machine that share the trials; default: this one alone",
    )  # fmt: skip
    group.add_argument(
        "--worker-timeout", type=positive_seconds, default=DEFAULT_TIMEOUT,
        metavar="SECONDS", help="how long a chief waits for workers, and a worker for "
        "the chief; default: 600",
    )  # fmt: skip


def add_trainable_options(group: argparse._ArgumentGroup) -> None:
    """Adds what of the base may learn, and how."""
    group.add_argument(
        "--trainable",
        type=name_list,
        default=SearchOptions().trainable,
        metavar="A,B,C",
        help=f"out of {', '.join(TRAINABLE_NAMES)}: train the base's last block, or "
        "all of it, on from the best plain head and the best one that rejects, and "
        "choose the cheapest that is as good as the best; frozen is always among them; "
        "default: frozen",
    )
    add_base_training_options(
        group,
        default_rate="a tenth of the head's, at most 0.001 with sgd and 0.0001 with "
        "other optimizers",
    )


def add_space_options(group: argparse._ArgumentGroup) -> None:
    """Adds the ranges of a `SearchSpace`; what is left out keeps its default."""
    ranges = {
        "learning_rate": "sampled by its logarithm; default: 0.0001:0.1",
        "relative_threshold": "in multiples of ln(classes); default: 0.2:1.5",
        "article_threshold": "of the policy article; default: 0.5:3",
        "keep_fraction": "default: 0.4:0.95",
        "warmup_epochs": "whole numbers; default: 0:5",
        "weight_decay": "of adamw; default: 0.00001:0.01",
    }
    for name, text in ranges.items():
        whole = name == "warmup_epochs"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=whole_range if whole else number_range,
            metavar="LOW:HIGH",
            help=text,
        )
    group.add_argument(
        "--policies",
        type=name_list,
        metavar="A,B,C",
        help=f"out of {', '.join(SEARCHED_POLICIES)}; default: accept-all, auto, "
        "loss-threshold, keep-fraction",
    )
    group.add_argument(
        "--optimizers", type=name_list, metavar="A,B", help="default: sgd,adamw"
    )


def search_options(arguments: argparse.Namespace) -> SearchOptions:
    """Returns how to search, as was asked for.

    Raises:
        InvalidArgument: If a name or number cannot be used.
    """
    for policy in arguments.policies or ():
        require_known("policy", policy, SEARCHED_POLICIES)
    names = [field.name for field in dataclasses.fields(SearchOptions)]
    return SearchOptions(**{name: getattr(arguments, name) for name in names})


def search_space(arguments: argparse.Namespace) -> SearchSpace:
    """Returns what to search, as was asked for.

    Raises:
        InvalidArgument: If a range or name cannot be used.
    """
    from keras_rsft.searching import SearchSpace

    names = [field.name for field in dataclasses.fields(SearchSpace)]
    given = {name: getattr(arguments, name) for name in names}
    return SearchSpace(**{k: v for k, v in given.items() if v is not None})


def check_part(arguments: argparse.Namespace) -> None:
    """Raises InvalidArgument if the environment and the options do not fit together."""
    if part_in_search() == "alone" or PARENT in os.environ:
        return
    if arguments.workers is not None:
        raise InvalidArgument(
            "`--workers` starts chief and workers by itself, but the environment says "
            "that this process is one of several "
            f"({TUNER_ID}={os.environ[TUNER_ID]}). Leave out one of the two."
        )
    if arguments.output is None:
        raise InvalidArgument(
            "Chief and workers share one folder: name it with `--output`."
        )


def worker_commands(
    arguments: argparse.Namespace, options: SearchOptions, output: Path
) -> list[list[str]]:
    """Returns the workers that `--workers` asks for: the same command once more."""
    count = arguments.workers
    if count is None or PARENT in os.environ:
        return []
    # So that the first to ask does not take all trials of the batched tuner.
    together = min(options.parallel_trials, -(-options.max_trials // count))
    command = [
        sys.executable,
        "-P",  # Nothing is imported from the folder in which the user is.
        "-m",
        "keras_rsft.cli",
        *arguments.argv,
        f"--output={output}",
        f"--parallel-trials={together}",
    ]
    return [command] * count


def number_range(text: str) -> tuple[float, float]:
    """Parses a lowest and a highest number."""
    return parsed(
        text,
        lambda given: tuple(float(part) for part in given.split(":")),
        lambda value: len(value) == 2 and value[0] <= value[1],
        "two numbers LOW:HIGH, the lower one first",
    )


def whole_range(text: str) -> tuple[int, int]:
    """Parses a lowest and a highest whole number."""
    return parsed(
        text,
        lambda given: tuple(int(part) for part in given.split(":")),
        lambda value: len(value) == 2 and value[0] <= value[1],
        "two whole numbers LOW:HIGH",
    )


def add_search(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    search = commands.add_parser(
        "search", help="find the policy, its threshold and the learning rate"
    )
    add_data_argument(search)
    add_search_options(search.add_argument_group("search"))
    add_space_options(search.add_argument_group("space"))
    add_trainable_options(search.add_argument_group("base that learns"))
    add_data_options(search.add_argument_group("data"))
    add_base_options(search.add_argument_group("base"))
    add_loop_options(search.add_argument_group("training"))
    search.add_argument(
        "--output",
        metavar="FOLDER",
        help="of a new search, or of a stopped one to go on with; default: "
        "runs/search-NAME-N",
    )
    add_cache_dir(search)
    add_output_options(search)


def run_search(arguments: argparse.Namespace, options: SearchOptions) -> None:
    """Searches, alone or as one of several processes, and prints what was found.

    Args:
        arguments: The parsed command.
        options: What `search_options` returned.
    """
    from keras_rsft.cli_documents import search_document
    from keras_rsft.cli_output import (
        output_of,
        print_data,
        print_search,
        repeat_command,
    )
    from keras_rsft.finetuning import TrainingSettings
    from keras_rsft.report import write_report
    from keras_rsft.searching import search
    from keras_rsft.searching.search_folder import next_search_folder

    space = search_space(arguments)
    how = base_training_settings(
        arguments, asked=bool(options.of_base), option="--trainable"
    )
    settings = TrainingSettings(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        unfreeze=UnfreezeConfig(**how) if options.of_base else None,
    )
    with output_of(arguments) as output:
        data = load_corrected(arguments, noisy_splits=("train", "validation"))
        print_data(data, output.console, noise=arguments.noise)
        folder = Path(arguments.output or next_search_folder(data_name(arguments)))
        found = search(
            data,
            output=folder,
            options=options,
            space=space,
            clean_validation=arguments.clean_validation,
            **base_options(arguments),
            settings=settings,
            progress=output.progress,
            command=arguments.command_line,
            worker_commands=worker_commands(arguments, options, folder),
            worker_timeout=arguments.worker_timeout,
            on_note=lambda text: output.console.print(
                text, markup=False, soft_wrap=True
            ),
        )
        if found is None:
            name = os.environ[TUNER_ID]
            text = f"{name} is done; the chief has the results."
            output.console.print(text, markup=False)
            output.finish({"worker": name}, text)
            return
        write_report(found)
        print_search(found, output.console, data=arguments.data)
        command = repeat_command(found, arguments.data)
        output.finish(search_document(found, command), found.folder)
