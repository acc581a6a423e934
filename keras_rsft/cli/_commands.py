"""The commands: each checks its options, calls the library, and shows the result.

What cannot be done is refused before anything heavy is imported. A command returns
whether it succeeded.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import shlex
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import keras_rsft as rsft
from keras_rsft._runtime import (
    PARENT,
    TUNER_ID,
    Cluster,
    check_strategy,
    cluster_of,
    part_in_search,
)
from keras_rsft._storage import REPORT_FILE, guarded_cell
from keras_rsft.cli._options import (
    DEFAULT_TEXT_COLUMN,
    config_of,
    data_name,
    feature_options,
    fit_command,
    kind_of,
    load_data,
    policy_of,
    unfreezing,
    words_of,
)
from keras_rsft.config import (
    ALL,
    IMAGES,
    TEXTS,
    ExportConfig,
    SearchConfig,
    SearchSpace,
    TrainConfig,
    check_methods,
    parse_base_name,
)
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.export._places import (
    check_exists,
    check_run_folder,
    free_version,
    model_folder,
)

if TYPE_CHECKING:
    from keras_rsft._predict import Prediction
    from keras_rsft.cli._render import Output
    from keras_rsft.data._samples import ImageSplit, SampleData
    from keras_rsft.export._export_run import Export, FinishedRun
    from keras_rsft.tuning._search import Search

OUTPUT_FORMATS = ("tsv", "csv", "jsonl")
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def _load(arguments: argparse.Namespace, output: Output, *noisy: str) -> SampleData:
    """Loads the data, with labels made wrong in some splits, and shows them."""
    from keras_rsft.cli._render import show_data

    data = load_data(arguments, noisy)
    show_data(output, data, arguments.noise if noisy else None)
    return data


def _program(*words: object) -> str:
    return shlex.join(["keras-rsft", *map(str, words)])


def _say_next(output: Output, folder: Path, arguments: argparse.Namespace) -> None:
    """Says where a run or search is, and what can be done with it."""
    output.say(f"Folder: {folder}")
    output.next_command("Look at it", _program("review", folder))
    source, column = Path(arguments.data), arguments.text_column
    if source.is_dir() or (kind_of(arguments) == TEXTS and source.is_file()):
        options = [f"--text-column={column}"] if column else []
        output.next_command("Use it", _program("predict", folder, source, *options))
    else:
        output.next_command("Serve it", _program("export", folder))


# === demo ===


def demo(arguments: argparse.Namespace) -> bool:
    """Fine-tunes on digits with noisy labels, three ways."""
    from keras_rsft.cli._demo import run_demo
    from keras_rsft.cli._render import output_of, show_demo

    with output_of(arguments) as output:
        output.say(
            "Real handwritten digits from scikit-learn. 30 % of the training labels "
            f"are now replaced by wrong ones (seed {arguments.seed})."
        )
        found = run_demo(
            TrainConfig(epochs=30, seed=arguments.seed),
            arguments.output,
            cache_dir=arguments.cache_dir,
            progress=output.progress,
            command=arguments.command_line,
        )
        folder = found.run.folder
        rsft.write_report(found.run)
        show_demo(output, found)
        output.next_command("Look at it", _program("review", folder))
        output.next_command("Use it", _program("predict", folder, found.sample_image))
        document = {
            "command": "demo",
            "folder": folder,
            "exported": found.exported,
            "sample_image": found.sample_image,
            "images": {"train": found.train_size, "test": found.test_size},
            "wrong_labels": found.wrong_labels,
            "finding": found.run.finding,
            "results": found.results,
        }
        output.finish(document, folder)
    return True


# === fit ===


def fit(arguments: argparse.Namespace) -> bool:
    """Fine-tunes, writes run folder and report."""
    check_strategy(arguments.strategy)
    for name in ("dry_run", "tensorboard"):
        if arguments.strategy == "multiworker" and getattr(arguments, name):
            raise InvalidArgument(
                f"--{name.replace('_', '-')} cannot be used with --strategy "
                "multiworker. Leave it out, or use it with one process."
            )
    how = unfreezing(arguments, arguments.unfreeze)
    policy = policy_of(arguments)
    settings = config_of(arguments, TrainConfig, policy=policy, unfreeze=how)
    options = feature_options(arguments)
    from keras_rsft._storage import check_new_folder
    from keras_rsft.cli._render import output_of
    from keras_rsft.report._summary import run_summary
    from keras_rsft.training._devices import open_devices
    from keras_rsft.training._run import results_of

    devices = open_devices(arguments.strategy)  # Before TensorFlow is used at all.
    if arguments.output is not None:
        check_new_folder(arguments.output)  # Before the work, not after it.
    with output_of(arguments) as output:
        if devices.strategy is not None:
            output.say(devices.describe())
        began: list[Path] = []

        def on_begin(folder: Path, resumed: bool) -> None:
            began.append(folder)
            if resumed:
                output.say(f"Resuming {folder.name}, which was not finished.")

        hparams = options | dataclasses.asdict(settings)
        callbacks_of = _tensorboard(arguments, hparams, began)
        data = _load(arguments, output, "train")
        shared = options | {"settings": settings, "progress": output.progress}
        shared["with_plain"] = arguments.with_plain
        if arguments.dry_run:
            _dry_run(arguments, data, shared, output)
            return True
        run = rsft.finetune(
            data,
            **shared,
            strategy=devices,
            output=arguments.output or rsft.NumberedFolder(data_name(arguments.data)),
            callbacks=callbacks_of(data),
            command=arguments.command_line,
            on_begin=on_begin,
            on_note=output.say,
        )
        if not devices.is_chief:
            output.say("Done; the chief, worker 0, has written the run.")
            return True
        rsft.write_report(run)
        output.show(run_summary(run))
        _say_next(output, run.folder, arguments)
        splits = (data.train, data.validation, data.test)
        sizes = {split.name: len(split) for split in splits}
        document = {
            "command": "fit",
            "folder": run.folder,
            "classes": run.class_names,
            "images": sizes | {"unreadable": len(run.features.unreadable)},
            "corrections": run.config.get("corrections"),
            "finding": run.finding,
            "results": results_of(run),
        }
        output.finish(document, run.folder)
    return True


def _dry_run(
    arguments: argparse.Namespace, data: SampleData, options: dict, output: Output
) -> None:
    """Says what a sample of the data tells about the run to come."""
    from keras_rsft.cli._render import json_value, show_pilot

    pilot = rsft.run_pilot(data, **options)
    show_pilot(output, pilot, options["settings"], data.kind)
    words = [word for word in arguments.argv if word != "--dry-run"]
    output.next_command("Nothing was trained. Train with", _program(*words))
    output.finish({"command": "fit --dry-run", **json_value(pilot)}, pilot.verdict)


def _tensorboard(
    arguments: argparse.Namespace, hparams: dict[str, Any], began: list[Path]
) -> Callable[[SampleData], Any]:
    """Returns what makes the callbacks of a run once its data are known."""
    if arguments.tensorboard is None:
        return lambda data: ()
    from keras_rsft.training._tensorboard import (
        free_log_folder,
        hparams_of,
        require_tensorboard,
    )

    require_tensorboard()  # Before the work, not after it.
    hparams |= {"data": arguments.data, "noise": arguments.noise}
    for name in ("cache_dir", "feature_precision", "image_size"):
        del hparams[name]
    return lambda data: (
        lambda ledger: [
            rsft.RejectionTensorBoard(
                free_log_folder(arguments.tensorboard, began[-1].name),
                ledger,
                images=data.train if data.kind == IMAGES else None,
                class_names=data.class_names,
                hparams=hparams_of(hparams),
            )
        ]
    )


# === compare ===


def compare(arguments: argparse.Namespace) -> bool:
    """Trains with several methods and several seeds."""
    methods = check_methods(arguments.methods)
    settings = config_of(arguments, TrainConfig, policy=policy_of(arguments))
    options = feature_options(arguments)
    from keras_rsft._storage import check_new_folder
    from keras_rsft.cli._render import output_of
    from keras_rsft.data._labels import parse_noise
    from keras_rsft.report._summary import comparison_summary

    if arguments.noise is not None:
        parse_noise(arguments.noise)
    if arguments.output is not None:
        check_new_folder(arguments.output)
    name = f"compare-{data_name(arguments.data)}"
    with output_of(arguments) as output:
        comparison = rsft.compare(
            _load(arguments, output),
            methods=methods,
            seeds=arguments.seeds,
            noise=arguments.noise,
            **options,
            settings=settings,
            output=arguments.output or rsft.NumberedFolder(name),
            progress=output.progress,
            command=arguments.command_line,
        )
        output.show(comparison_summary(comparison), plain=True)
        output.say(f"Folder: {comparison.folder}")
        document = {
            "command": "compare",
            "folder": comparison.folder,
            "seeds": arguments.seeds,
            "noise": arguments.noise,
            "methods": comparison.summaries,
            "verdict": comparison.verdict,
            "notes": comparison.notes,
        }
        output.finish(document, comparison.folder)
    return True


# === rank ===


def rank(arguments: argparse.Namespace) -> bool:
    """Ranks backbones by a quick head on a sample."""
    for name in arguments.backbones:
        parse_base_name(name)
    options = feature_options(arguments)
    from keras_rsft.backbones._load import check_backbone_name
    from keras_rsft.cli._render import json_value, output_of
    from keras_rsft.report._summary import ranking_summary

    for name in arguments.backbones:
        check_backbone_name(name)
    with output_of(arguments) as output:
        ranking = rsft.rank_backbones(
            _load(arguments, output, "train"),
            arguments.backbones,
            sample=arguments.sample,
            seed=arguments.seed,
            progress=output.progress,
            **{
                name: options[name] for name in ("image_size", "precision", "cache_dir")
            },
        )
        output.show(ranking_summary(ranking), plain=True)
        best = ranking.ranked[0].name
        command = fit_command(arguments, f"--seed={arguments.seed}", backbone=best)
        output.next_command("Train on the first", command)
        output.finish({"command": "rank", **json_value(ranking)}, best)
    return True


# === features ===


def features(arguments: argparse.Namespace) -> bool:
    """Extracts features and caches them, or a share of them."""
    cluster = features_cluster(arguments)
    options = feature_options(arguments)
    from keras_rsft.cli._render import output_of, show_features
    from keras_rsft.features._extract import default_cache_dir
    from keras_rsft.training._features import keep_share, open_features

    options |= {"cluster": cluster, "patience": arguments.worker_timeout}
    options["seed"] = arguments.seed
    folder = arguments.cache_dir or default_cache_dir()
    with output_of(arguments) as output:
        data = _load(arguments, output)
        splits, title = None, "Train on them"
        if arguments.share is None:
            found = open_features(data, progress=output.progress, **options).features
            splits = show_features(output, found, data.kind)
        else:
            keep_share(data, progress=output.progress, **options)
            output.say(
                f"Share {cluster.index} of {len(cluster)} is cached in {folder}."
            )
            title = "Once all shares are cached, put them together and train"
        command = fit_command(arguments, f"--seed={arguments.seed}")
        output.next_command(title, command)
        share = {"index": cluster.index, "count": len(cluster)}
        document = {"command": "features", "folder": folder, "share": share}
        output.finish(document | {"splits": splits}, folder)
    return True


def features_cluster(arguments: argparse.Namespace) -> Cluster:
    """Returns which share of how many this process computes."""
    if arguments.share is None:
        return cluster_of()
    index, count = arguments.share
    return Cluster(("",) * count, index)


# === search ===


def search(arguments: argparse.Namespace) -> bool:
    """Searches, alone or as one of several processes."""
    options, space = config_of(arguments, SearchConfig), search_space(arguments)
    # `options.unfreeze` says which layers.
    how = unfreezing(arguments, ALL if options.unfrozen else None)
    settings = config_of(arguments, TrainConfig, unfreeze=how)
    keywords = feature_options(arguments)
    _check_part(arguments)
    from keras_rsft.cli._render import output_of
    from keras_rsft.report._summary import search_summary
    from keras_rsft.tuning._folder import next_search_folder

    name = data_name(arguments.data)
    with output_of(arguments) as output:
        data = _load(arguments, output, "train", "validation")
        folder = Path(arguments.output or next_search_folder(name))
        found = rsft.search(
            data,
            output=folder,
            options=options,
            space=space,
            clean_validation=arguments.clean_validation,
            **keywords,
            settings=settings,
            progress=output.progress,
            command=arguments.command_line,
            worker_commands=_worker_commands(arguments, options, folder),
            worker_timeout=arguments.worker_timeout,
            on_note=output.say,
        )
        if found is None:
            name = os.environ[TUNER_ID]
            text = f"{name} is done; the chief has the results."
            output.say(text)
            output.finish({"worker": name}, text)
            return True
        rsft.write_report(found)
        output.show(search_summary(found))
        _say_next(output, found.folder, arguments)
        command = fit_command(arguments, *chosen_words(found))
        output.next_command("Train it again", command)
        document = {"command": "search", "folder": found.folder}
        document |= {"fit_command": command, "results": found.results}
        output.finish(document, found.folder)
    return True


def search_space(arguments: argparse.Namespace) -> SearchSpace:
    """Returns what to search, as was asked for."""
    return config_of(arguments, SearchSpace, **dict(arguments.range))


def chosen_words(found: Search) -> list[str]:
    """Returns the options of `fit` that train as a search has chosen."""
    settings, policy = found.settings, found.settings.policy
    threshold = policy.threshold
    if threshold is None:
        classes = found.head.model.output_shape[-1]
        threshold = policy.relative_threshold * math.log(classes)
    numbers = {
        "loss-threshold": {"level": policy.level, "threshold": threshold},
        "self-paced": {"threshold": threshold},
        "keep-fraction": {"keep-fraction": policy.keep_fraction},
    }
    given = {"policy": policy.name, **numbers.get(policy.name or "", {})}
    if policy.name not in ("auto", "accept-all"):
        given["warmup-epochs"] = policy.warmup_epochs
    # Also what is default: it is to be read, and to stay.
    given |= {
        "epochs": settings.epochs,
        "batch-size": settings.batch_size,
        "learning-rate": settings.learning_rate,
        "optimizer": settings.optimizer,
        "weight-decay": settings.weight_decay,
        "seed": settings.seed,
    }
    words = [f"--{name}={v}" for name, v in given.items() if v is not None]
    return words + ([] if settings.unfreeze is None else words_of(settings.unfreeze))


def _check_part(arguments: argparse.Namespace) -> None:
    """Refuses options that do not fit a process that is one of several."""
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


def _worker_commands(
    arguments: argparse.Namespace, options: SearchConfig, output: Path
) -> list[list[str]]:
    """Returns the workers that `--workers` asks for: the same command once more."""
    count = arguments.workers
    if count is None or PARENT in os.environ:
        return []
    # So that the first to ask does not take all trials of the batched tuner.
    together = min(options.parallel_trials, -(-options.max_trials // count))
    # -P: nothing is imported from the folder in which the user is.
    command = [sys.executable, "-P", "-m", "keras_rsft.cli", *arguments.argv]
    own = [f"--output={output}", f"--set=parallel_trials={together}"]
    return [command + own] * count


# === review ===


def review(arguments: argparse.Namespace) -> bool:
    """Opens the page of a run, or serves it."""
    if arguments.port is not None and not arguments.serve:
        raise InvalidArgument("`--port` goes with `--serve`. Add it, or leave it out.")
    folder = Path(arguments.run)
    if arguments.serve:
        return _serve(folder, arguments)
    page = folder / REPORT_FILE
    if arguments.rebuild or not page.is_file():
        page = rsft.write_report(folder)
    page = page.absolute()
    if arguments.json:
        _print_page(folder, page, page.as_uri())
    else:
        print(page)
    if not arguments.no_browser:
        webbrowser.open(page.as_uri())
    return True


def _print_page(folder: Path, page: Path | None, url: str) -> None:
    document = {"command": "review", "folder": str(folder.absolute())}
    document |= {"page": page and str(page), "url": url}
    print(json.dumps(document, ensure_ascii=False, indent=2), flush=True)


def _serve(folder: Path, arguments: argparse.Namespace) -> bool:
    from keras_rsft.report._record import read_run
    from keras_rsft.report._server import ReviewServer, own_port

    record = read_run(folder)
    if record.is_search:
        raise InvalidArgument(
            f"{folder} is a search, which has no samples to review. Leave out "
            "`--serve` to see its report."
        )
    for_person = not (arguments.quiet or arguments.json)
    with ReviewServer(record, port=arguments.port) as server:
        try:  # From the first word on, or an early Ctrl-C looks like a failure.
            if arguments.json:
                _print_page(folder, None, server.url)
            else:
                note = "  (Ctrl-C stops the server)" if for_person else ""
                print(f"{server.url}{note}", flush=True)
            own = own_port(record)
            if for_person and arguments.port is None and server.server_port != own:
                print(
                    f"Port {own} is taken, so what you decided there is not seen here.",
                    flush=True,
                )
            if not arguments.no_browser:
                webbrowser.open(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            if for_person:
                print("Stopped.")
    return True


# === export ===


def export(arguments: argparse.Namespace) -> bool:
    """Exports, and compares with the run if asked to, or where weights are narrower."""
    settings = config_of(arguments, ExportConfig)
    check_run_folder(Path(arguments.run))
    target = model_folder(arguments.run, arguments.name, arguments.directory)
    if settings.file_format == "saved-model":
        free_version(target, settings.version)
    from keras_rsft.cli._render import output_of, show_export
    from keras_rsft.export._export_run import read_run

    with output_of(arguments) as output:
        run, accuracy, verification = read_run(arguments.run), None, None
        export = rsft.export_run(
            run, name=arguments.name, directory=arguments.directory, settings=settings
        )
        command = show_export(output, export)
        narrowed = settings.weight_dtype != "float32"
        if narrowed or arguments.verify:
            images, missing = _validation_images(run)
        if narrowed:
            accuracy = _check_accuracy(run, export, images, missing, output)
        if arguments.verify:
            verification = _verify(run, export, images, missing, output)
        passed = verification is None or verification.passed
        document = {
            "command": "export",
            "path": export.path,
            "name": export.name,
            "format": settings.file_format,
            "weight_dtype": settings.weight_dtype,
            "num_bytes": export.num_bytes,
            "weight_bytes": export.weight_bytes,
            "serve_command": command,
            "accuracy": accuracy,
            "verification": verification
            and {"passed": passed, **dataclasses.asdict(verification)},
        }
        output.finish(document, export.path)
    return passed


def _validation_images(run: FinishedRun) -> tuple[ImageSplit | None, str]:
    """Returns what the run was validated on, or None and why that is gone."""
    from keras_rsft.export._verify import validation_split

    try:
        return validation_split(run, _data_of(run)), ""
    except (DataError, InvalidArgument, ImportError, OSError) as error:
        return None, str(error)


def _data_of(run: FinishedRun) -> SampleData:
    """Loads the images that the run was trained on, by the command it has kept."""
    command = shlex.split(run.config.get("command") or "")[1:]
    if command[:1] in (["fit"], ["search"]):
        from keras_rsft.cli._main import build_parser

        try:
            arguments = build_parser().parse_args(command)
        except SystemExit as stop:  # argparse, at a command of another version.
            raise DataError("the run's command cannot be read.") from stop
        arguments.corrections = []
        return load_data(arguments, ())
    if "data" not in run.config:
        raise DataError("the run does not say what data it was trained on.")
    return rsft.load_images(run.config["data"])


def _check_accuracy(
    run: FinishedRun, export: Export, images: Any, missing: str, output: Output
) -> Any:
    """Shows and returns the accuracy on the validation split, if it can be had."""
    from keras_rsft.cli._render import show_accuracy
    from keras_rsft.export._verify import check_accuracy

    try:
        if images is None:
            raise DataError(missing)
        check = check_accuracy(run, export, images, progress=output.progress)
    except (DataError, ImportError) as error:
        output.say(f"The accuracy on the validation split was not measured: {error}")
        return None
    show_accuracy(output, check)
    return check


def _verify(
    run: FinishedRun, export: Export, images: Any, missing: str, output: Output
) -> Any:
    """Verifies an export and shows what was found."""
    from keras_rsft.cli._render import show_verification
    from keras_rsft.export._verify import sample_of, verify_export

    encoded = None if images is None else sample_of(images)
    if not encoded:
        reason = missing or "their files are gone."
        output.say(
            f"The run's images cannot be read, so generated ones are used: {reason}"
        )
    found = verify_export(run, export, encoded or None, progress=output.progress)
    show_verification(output, found)
    return found


# === predict ===


def predict(arguments: argparse.Namespace) -> bool:
    """Prints an answer for each sample that can be read, and lists the others."""
    check_exists(arguments.model)
    from keras_rsft._predict import (
        find_images,
        find_texts,
        load_classifier,
        predict_samples,
        samples_in,
    )
    from keras_rsft._progress import progress_bar

    classifier = load_classifier(arguments.model)
    find = find_texts if classifier.takes == TEXTS else find_images
    column = arguments.text_column or DEFAULT_TEXT_COLUMN
    samples = samples_in(find(arguments.paths), classifier, text_column=column)
    write = answer_writer(arguments.output_format, sys.stdout)
    unreadable = []
    # Answers and a bar on the same terminal would write over each other.
    visible = not (arguments.quiet or sys.stdout.isatty())
    with progress_bar(
        "Predicting", total=len(samples), unit=classifier.takes, visible=visible
    ) as advance:
        for prediction in predict_samples(classifier, samples):
            if prediction.error is None:
                write(prediction)
            else:
                unreadable.append(prediction)
            advance(1)
    for prediction in unreadable:
        print(f"{prediction.path}: {prediction.error}", file=sys.stderr)
    sys.stdout.flush()  # A pipe that nobody reads any more fails here, not at exit.
    return not unreadable


def answer_writer(output_format: str, file: TextIO) -> Callable[[Prediction], None]:
    """Returns a function that writes one answer."""
    if output_format == "csv":
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "score"])
        return lambda one: writer.writerow(
            [guarded_cell(one.path), guarded_cell(one.label), f"{one.score:.6f}"]
        )
    if output_format == "jsonl":

        def write_json(one: Prediction) -> None:
            answer = {"path": one.path, "label": one.label, "score": one.score}
            print(json.dumps(answer, ensure_ascii=False), file=file)

        return write_json

    def write_line(one: Prediction) -> None:
        names = (name.translate(_ESCAPES) for name in (one.path, one.label))
        print(*names, f"{one.score:.4f}", sep="\t", file=file)

    return write_line
