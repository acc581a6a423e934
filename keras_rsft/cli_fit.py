"""The command `fit`: its options, and what it does.

Like `cli.py`, imports nothing heavy until the command runs.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from keras_rsft.cli_explain import add_explain_options, explain_if_asked
from keras_rsft.cli_options import (
    add_base_options,
    add_cache_dir,
    add_data_argument,
    add_data_options,
    add_output_options,
    add_policy_options,
    add_training_options,
    base_options,
    data_name,
    load_corrected,
    training_settings,
)
from keras_rsft.cli_regularisation import (
    add_regularisation_options,
    regularisation_settings,
)
from keras_rsft.cli_texts import chosen_backbone
from keras_rsft.cli_unfreeze import add_unfreeze_options, unfreeze_settings
from keras_rsft.errors import InvalidArgument
from keras_rsft.policy_choice import PolicyChoice
from keras_rsft.strategy_choice import STRATEGY_NAMES

if TYPE_CHECKING:
    from rich.console import Console

    from keras_rsft.data import ImageData
    from keras_rsft.finetuning import TrainingSettings
    from keras_rsft.finetuning.head_training import Callbacks


def add_fit(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    fit = commands.add_parser("fit", help="fine-tune on your own images or texts")
    add_data_argument(fit)
    add_data_options(fit.add_argument_group("data"))
    add_base_options(fit.add_argument_group("base"))
    add_policy_options(fit.add_argument_group("rejection"))
    add_training_options(fit.add_argument_group("training"))
    add_regularisation_options(fit)
    add_unfreeze_options(fit)
    fit.add_argument(
        "--output", metavar="FOLDER", help="run folder; default: runs/NAME-N"
    )
    fit.add_argument(
        "--tensorboard",
        metavar="FOLDER",
        help="write for TensorBoard, into a folder of the run's name below this one",
    )
    fit.add_argument(
        "--no-plain",
        dest="with_plain",
        action="store_false",
        help="train no plain head for the report to compare with",
    )
    fit.add_argument(
        "--strategy",
        choices=STRATEGY_NAMES,
        default="none",
        help="mirrored: all GPUs of this machine, or else its logical CPUs; "
        "multiworker: the workers in TF_CONFIG; default: one device",
    )
    add_explain_options(fit)
    add_cache_dir(fit)
    add_output_options(fit)


def run_fit(arguments: argparse.Namespace, choice: PolicyChoice) -> None:
    """Trains, writes run folder and report, and prints what came out.

    Args:
        arguments: The parsed command.
        choice: What `policy_choice` returned.
    """
    from keras_rsft._storage import check_new_folder
    from keras_rsft.cli_documents import run_document
    from keras_rsft.cli_output import output_of, print_data, print_run
    from keras_rsft.finetuning import NumberedFolder, finetune
    from keras_rsft.finetuning.devices import open_devices
    from keras_rsft.report import write_report

    _require_fit_for_workers(arguments)
    devices = open_devices(arguments.strategy)  # Before TensorFlow is used at all.
    settings = dataclasses.replace(
        training_settings(arguments, choice),
        **unfreeze_settings(arguments),
        **regularisation_settings(arguments),
    )
    if arguments.output is not None:
        check_new_folder(arguments.output)  # Before the work, not after it.
    with output_of(arguments) as output:
        if devices.strategy is not None:
            output.console.print(devices.describe())
        beginning = Beginning(output.console)
        callbacks_of = fit_callbacks(arguments, settings, beginning)
        data = load_corrected(arguments, noisy_splits=("train",))
        print_data(data, output.console, noise=arguments.noise)
        if not explain_if_asked(arguments, data, settings, output):
            return
        run = finetune(
            data,
            **base_options(arguments),
            settings=settings,
            strategy=devices,
            output=arguments.output or NumberedFolder(data_name(arguments)),
            callbacks=callbacks_of(data),
            with_plain=arguments.with_plain,
            progress=output.progress,
            command=arguments.command_line,
            on_begin=beginning,
            on_note=lambda text: output.console.print(
                text, markup=False, soft_wrap=True
            ),
        )
        if not devices.is_chief:
            output.console.print("Done; the chief, worker 0, has written the run.")
            return
        write_report(run)
        print_run(run, output.console)
        output.finish(run_document(run, data), run.folder)


def _require_fit_for_workers(arguments: argparse.Namespace) -> None:
    """Refuses what one process does for itself where several train together."""
    given = [
        name
        for name in ("explain", "dry_run", "tensorboard")
        if getattr(arguments, name)
    ]
    if arguments.strategy == "multiworker" and given:
        option = "--" + given[0].replace("_", "-")
        raise InvalidArgument(
            f"{option} cannot be used with --strategy multiworker. Leave it out, or "
            "use it with one process."
        )


class Beginning:
    """Hears where a run begins, and says so where it goes on with a killed one.

    Args:
        console: Where it is said.

    Attributes:
        folder: The run folder to be; None until the run begins.
    """

    def __init__(self, console: Console):
        self._console = console
        self.folder: Path | None = None

    def __call__(self, folder: Path, went_on: bool) -> None:
        self.folder = folder
        if went_on:
            text = f"Going on with {folder.name}, which was not finished."
            self._console.print(text, markup=False, soft_wrap=True)


def fit_callbacks(
    arguments: argparse.Namespace, settings: TrainingSettings, beginning: Beginning
) -> Callable[[ImageData], Callbacks]:
    """Returns what makes the callbacks of a run once its images are known.

    Args:
        arguments: The parsed command.
        settings: How to train.
        beginning: Will know the run's name when the training begins.

    Raises:
        ImportError: If TensorBoard is asked for and not installed.
    """
    if arguments.tensorboard is None:
        return lambda data: ()
    from keras_rsft.rejection_tensorboard import (
        RejectionTensorBoard,
        free_log_folder,
        hparams_of,
        require_tensorboard,
    )

    require_tensorboard()  # Before the work, not after it.
    names = ("data", "backbone", "weights", "precision", "views", "noise")
    chosen = {name: getattr(arguments, name) for name in names}
    chosen["backbone"] = chosen_backbone(arguments)
    hparams = hparams_of(chosen | dataclasses.asdict(settings))

    def callbacks_of(data: ImageData) -> Callbacks:
        return lambda ledger: [
            RejectionTensorBoard(
                free_log_folder(arguments.tensorboard, beginning.folder.name),
                ledger,
                images=data.train if data.kind == "images" else None,
                class_names=data.class_names,
                hparams=hparams,
            )
        ]

    return callbacks_of
