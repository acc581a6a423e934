"""The commands: each checks its options, calls the library, and shows the result."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import errno
import io
import math
import os
import shlex
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import keras_rsft as rsft
from keras_rsft import config
from keras_rsft._runtime import (
    PARENT,
    TUNER_ID,
    Cluster,
    check_strategy,
    cluster_of,
    part_in_search,
)
from keras_rsft._storage import check_new_folder, guarded_cell, json_value, understood
from keras_rsft.cli._options import DEFAULT_TEXT_COLUMN, DataConfig, settings_of
from keras_rsft.cli._render import Output, json_text
from keras_rsft.config import IMAGES, TEXTS, FeatureConfig, TrainConfig
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.export import _places
from keras_rsft.report import _summary as summary

if TYPE_CHECKING:
    from keras_rsft._predict import Prediction
    from keras_rsft.data._samples import ImageData, SampleData
    from keras_rsft.export._export_run import Export, FinishedRun
    from keras_rsft.export._verify import AccuracyCheck, Verification
    from keras_rsft.tuning._search import Search

Config = TypeVar("Config")
OUTPUT_FORMATS = ("tsv", "csv", "jsonl")
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


# === From options to configurations, and back ===


def config_of(
    arguments: argparse.Namespace, kind: type[Config], **others: Any
) -> Config:
    """Returns a configuration of the options that a command has, and other fields."""
    values = {
        one.field.name: getattr(arguments, one.dest)
        for one in settings_of(kind)
        if hasattr(arguments, one.dest)
    }
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**values | others)


def policy_of(arguments: argparse.Namespace) -> config.PolicyConfig:
    """Returns the policy that was asked for, or the default one with the parameters."""
    policy = config_of(arguments, config.PolicyConfig)
    if hasattr(arguments, "policy"):  # Else several are tried, with all parameters.
        config.require_used(policy.name or "", vars(arguments))
    return policy


def unfreezing(
    arguments: argparse.Namespace, layers: config.Unfreeze | None
) -> config.UnfreezeConfig | None:
    """Returns how these layers are unfrozen; refuses a how without layers."""
    how = list(settings_of(config.UnfreezeConfig, "-unfreeze"))
    if layers is not None:
        values = {one.field.name: getattr(arguments, one.dest) for one in how}
        return config.UnfreezeConfig(layers, **values)
    for one in how:
        if getattr(arguments, one.dest) != one.default:
            is_fit = hasattr(arguments, "unfreeze")
            raise InvalidArgument(
                f"`{one.dest}` says how unfrozen layers are trained. Say which ones "
                f"with `{'--unfreeze' if is_fit else '--unfreeze-choices'}`."
            )
    return None


def features_of(arguments: argparse.Namespace) -> FeatureConfig:
    config_of(arguments, DataConfig)  # Refused before anything heavy is imported.
    features = config_of(arguments, FeatureConfig)
    return config.feature_config(features, kind_of(arguments))


def kind_of(arguments: argparse.Namespace) -> str:
    """Returns `"texts"` or `"images"`, by the data's column and the backbones."""
    names = getattr(arguments, "backbones", None) or (arguments.backbone,)
    kinds = {config.takes_texts(name) for name in names if name is not None}
    if len(kinds) > 1:
        raise InvalidArgument(
            "Backbones for images and for texts cannot be ranked on the same data. "
            f"Received: {', '.join(names)}."
        )
    return TEXTS if arguments.text_column is not None or True in kinds else IMAGES


def words_of(given: Any) -> list[str]:
    """Returns the options that give this configuration, without what is default."""
    words = []
    for one in settings_of(type(given)):
        value = getattr(given, one.field.name)
        if value is None or value == one.default:
            continue
        if one.repeats:
            words += [f"{one.flag}={part}" for part in value]
            continue
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        rare = ["--set", f"{one.dest}={text}"]
        words += rare if one.is_rare else [f"{one.flag}={text}"]
    return words


def fit_command(
    arguments: argparse.Namespace, *words: str, backbone: str | None = None
) -> str:
    """Returns a whole `fit`, quoted for a shell, on the data of another command."""
    features = config_of(arguments, FeatureConfig)
    if backbone is not None:
        features = dataclasses.replace(features, backbone=backbone)
    given = [*words_of(config_of(arguments, DataConfig)), *words_of(features)]
    return shlex.join(["keras-rsft", "fit", arguments.data, *given, *words])


# === Data and folders ===


def data_name(source: str) -> str:
    """Returns what a folder for the results is named after."""
    name = os.fsencode(Path(source.removeprefix("tfds:")).stem)
    # A file system takes 255 bytes; before and after the name of the data comes more.
    return name[:200].decode(errors="ignore") or "run"


def load_data(arguments: argparse.Namespace, noisy_splits: Sequence[str]) -> SampleData:
    """Returns the data, labels made wrong in some splits and then corrected."""
    from keras_rsft import add_label_noise, load_images, load_texts
    from keras_rsft.data._labels import (
        apply_corrections,
        read_corrections,
        trust_splits,
    )

    given = config_of(arguments, DataConfig)
    for file in given.corrections:
        read_corrections(file)  # Refused before the samples are listed.
    names = ["label_column", "split_column", "clean_label_column", "split_seed"]
    names += ["validation_fraction", "test_fraction"]
    shared = {name: getattr(given, name) for name in names}
    if kind_of(arguments) == TEXTS:
        shared["text_column"] = given.text_column or DEFAULT_TEXT_COLUMN
        data = load_texts(arguments.data, id_column=given.id_column, **shared)
    else:
        data = load_images(
            arguments.data,
            path_column=given.path_column,
            image_dir=given.image_dir,
            image_suffix=given.image_suffix,
            label_key=given.label_column,
            clean_label_key=given.clean_label_column,
            data_dir=given.data_dir,
            **shared,
        )
    if noisy_splits and given.noise is not None:
        seed = arguments.seed
        data = add_label_noise(data, given.noise, seed=seed, splits=noisy_splits)
    return trust_splits(apply_corrections(data, given.corrections), given.clean_splits)


def _load(arguments: argparse.Namespace, output: Output, *noisy: str) -> SampleData:
    data = load_data(arguments, noisy)
    splits = (data.train, data.validation, data.test)
    sizes = ", ".join(f"{len(split)} {split.name}" for split in splits)
    names = list(data.class_names[:5])
    if data.num_classes > len(names):
        names.append("...")
    text = f"{data.num_classes} classes ({', '.join(names)}); {data.kind}: {sizes}."
    if noisy and arguments.noise is not None:
        wrong = int((data.train.labels != data.train.clean_labels).sum())
        state = "made wrong" if data.corrections is None else "are still wrong"
        text += f" {wrong} training labels {state} ({arguments.noise})."
    output.say(text)
    for note in data.notes:
        output.say(note)
    if data.corrections is not None:
        output.say(data.corrections.describe())
    if clean := getattr(arguments, "clean_splits", ()):
        output.say(f"Taken as right: the labels of {' and '.join(clean)}.")
    return data


def _new_folder(
    arguments: argparse.Namespace, prefix: str = ""
) -> str | rsft.NumberedFolder:
    """Returns the folder for the results; refuses one that exists before the work."""
    if arguments.output is None:
        return rsft.NumberedFolder(prefix + data_name(arguments.data))
    check_new_folder(arguments.output)
    return arguments.output


def _program(*words: object) -> str:
    return shlex.join(["keras-rsft", *map(str, words)])


def _say_next(output: Output, folder: Path, arguments: argparse.Namespace) -> None:
    """Prints where a run or search is, and the commands that use it."""
    output.say(f"Folder: {folder}")
    output.next_command("Look at it", _program("review", folder))
    source, column = Path(arguments.data), arguments.text_column
    if source.is_dir() or (kind_of(arguments) == TEXTS and source.is_file()):
        options = [f"--text-column={column}"] if column else []
        output.next_command("Use it", _program("predict", folder, source, *options))
    else:
        output.next_command("Serve it", _program("export", folder))


# === Commands that train ===


def demo(arguments: argparse.Namespace, output: Output) -> None:
    from keras_rsft.training._head import train_head

    settings = TrainConfig(epochs=30, seed=arguments.seed)
    output.say(
        "Real handwritten digits from scikit-learn. 30 % of the training labels "
        f"are now replaced by wrong ones (seed {arguments.seed})."
    )
    data = rsft.load_images("digits")
    data = rsft.add_label_noise(data, "symmetric:0.3", seed=arguments.seed)
    features = FeatureConfig(
        "efficientnet_lite0",
        image_size=96,
        dtype="float32",
        cache_dir=arguments.cache_dir,
    )
    run = rsft.finetune(
        data,
        features=features,
        settings=settings,
        output=arguments.output or rsft.NumberedFolder("demo"),
        progress=output.progress,
        command=_as_fit(features, settings),
    )
    train = run.features.train
    wrong = int((train.labels != train.clean_labels).sum())
    on_clean = train_head(
        dataclasses.replace(run.features, train=train.with_labels(train.clean_labels)),
        dataclasses.replace(settings, policy=config.PolicyConfig("accept-all")),
        progress=output.progress,
    )
    results = {
        "plain": run.against_plain.results,
        "rsft": run.results,
        "right labels only": on_clean.results,
    }
    sample_image = run.folder / "sample.png"
    sample_image.write_bytes(data.test.encoded(0))
    exported = rsft.export_saved_model(
        run.model, Path("saved_models") / "digits", class_names=run.class_names
    )
    rsft.write_report(run)
    output.say(
        f"{wrong} of {len(data.train)} training labels were wrong; "
        f"the {len(data.test)} test labels are right."
    )
    columns = {
        "test_accuracy": "Accuracy",
        "acceptance_rate": "Accepted",
        "wrong_labels_rejected": "Wrong rejected",
        "right_labels_rejected": "Right rejected",
    }
    titles = {"plain": "plain fine-tuning", "rsft": "rejection (RSFT)"}
    rows = []
    for name, values in results.items():
        shares = [summary.share_text(values.get(column)) for column in columns]
        rows.append((titles.get(name, name), *shares))
    header = ("Head trained with", *columns.values())
    output.table(summary.Table(header, tuple(rows)))
    output.say(
        f"Found:          {run.finding}\nRun folder:     {run.folder}\n"
        f"Exported model: {exported}"
    )
    output.next_command("Look at it", _program("review", run.folder))
    output.next_command("Use it", _program("predict", run.folder, sample_image))
    output.finish(
        run.folder,
        folder=run.folder,
        exported=exported,
        sample_image=sample_image,
        images={"train": len(data.train), "test": len(data.test)},
        wrong_labels=wrong,
        finding=run.finding,
        results=results,
    )


def _as_fit(features: FeatureConfig, settings: TrainConfig) -> str:
    """Returns the command of the demo's run: a review goes on from there."""
    given = [*words_of(features), *words_of(settings), "--noise=symmetric:0.3"]
    return _program("fit", "digits", *given)


def fit(arguments: argparse.Namespace, output: Output) -> None:
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
    features = features_of(arguments)
    folder = _new_folder(arguments)
    from keras_rsft.training._devices import open_devices
    from keras_rsft.training._run import results_of

    devices = open_devices(arguments.strategy)  # Before TensorFlow is used at all.
    if devices.strategy is not None:
        output.say(devices.describe())
    if arguments.tensorboard is not None:
        from keras_rsft.training import _tensorboard as board

        board.require_tensorboard()
    data = _load(arguments, output, "train")
    shared = {"settings": settings, "progress": output.progress}
    shared |= {"with_plain": arguments.with_plain, "features": features}
    if arguments.dry_run:
        _dry_run(arguments, output, data, shared)
        return
    began: list[Path] = []

    def on_begin(folder: Path, resumed: bool) -> None:
        began.append(folder)
        if resumed:
            output.say(f"Resuming {folder.name}, which was not finished.")

    def tensorboard(ledger: rsft.RejectionLedger) -> list[rsft.RejectionTensorBoard]:
        hparams = {"data": arguments.data, "noise": arguments.noise}
        hparams |= dataclasses.asdict(features) | dataclasses.asdict(settings)
        for name in ("cache_dir", "cache_dtype", "image_size"):
            del hparams[name]
        return [
            rsft.RejectionTensorBoard(
                board.free_log_folder(arguments.tensorboard, began[-1].name),
                ledger,
                images=data.train if data.kind == IMAGES else None,
                class_names=data.class_names,
                hparams=board.hparams_of(hparams),
            )
        ]

    run = rsft.finetune(
        data,
        **shared,
        before=arguments.before,
        strategy=devices,
        output=folder,
        callbacks=() if arguments.tensorboard is None else tensorboard,
        command=arguments.command_line,
        on_begin=on_begin,
        on_note=output.say,
    )
    if not devices.is_chief:
        output.say("Done; the chief, worker 0, has written the run.")
        return
    rsft.write_report(run)
    output.show(summary.run_summary(run))
    _say_next(output, run.folder, arguments)
    splits = (data.train, data.validation, data.test)
    sizes = {split.name: len(split) for split in splits}
    output.finish(
        run.folder,
        folder=run.folder,
        classes=run.class_names,
        images=sizes | {"unreadable": len(run.features.unreadable)},
        unread_files=data.unread_files,
        corrections=run.config.get("corrections"),
        finding=run.finding,
        results=results_of(run),
    )


def _dry_run(
    arguments: argparse.Namespace, output: Output, data: SampleData, options: dict
) -> None:
    """Shows what a sample of the data tells about the run to come."""
    pilot, settings = rsft.run_pilot(data, **options), options["settings"]
    wrong = "-"
    if pilot.noise_rate is not None:
        share, low, high = (100 * value for value in pilot.noise_rate)
        wrong = f"{share:.0f} % ({low:.0f} to {high:.0f} %)"
    (largest, most), (smallest, fewest) = pilot.largest_class, pilot.smallest_class
    rows = [
        ("Largest class", f"{largest}: {most:,}"),
        ("Smallest class", f"{smallest}: {fewest:,}"),
        (summary.RESULT_NAMES["estimated_wrong_labels"], wrong),
    ]
    tried = (
        ("plain", pilot.plain_accuracy, pilot.plain_accuracy_right),
        (pilot.policy, pilot.policy_accuracy, pilot.policy_accuracy_right),
    )
    for name, given, right in tried:
        title = f"Held-out accuracy, {name}"
        if right is not None:
            interval = summary.range_text(right.low, right.high)
            rows.append((title, f"{summary.share_text(right.value)} ({interval} %)"))
        if given is not None:
            by_given = f"{title}, given labels" if right is None else summary.BY_GIVEN
            rows.append((by_given, summary.share_text(given)))
    extraction = "cached from before"
    if pilot.images_left:
        time = summary.about(pilot.pass_seconds)
        extraction = f"{pilot.images_left:,} {data.kind}, {time}"
    rows.append(("Feature extraction", extraction))
    training = f"{settings.epochs} epochs, {summary.about(pilot.training_seconds)}"
    if settings.unfreeze is not None:
        training += ", without the backbone"
    rows.append(("Training", training))
    output.rows(f"From {pilot.num_images} training {data.kind}", rows)
    output.say(pilot.verdict)
    words = [word for word in arguments.argv if word != "--dry-run"]
    output.next_command("No run was written. Train with", _program(*words))
    document = {"command": "fit --dry-run", **json_value(pilot)}
    output.finish(pilot.verdict, **document)


def audit(arguments: argparse.Namespace, output: Output) -> None:
    features = features_of(arguments)
    folder = _new_folder(arguments, "audit-")
    found = rsft.audit(
        _load(arguments, output, "train"),
        features=features,
        seed=arguments.seed,
        output=folder,
        progress=output.progress,
        command=arguments.command_line,
    )
    rsft.write_report(found)
    output.show(summary.audit_summary(found), plain=True)
    output.say(f"Folder: {found.folder}")
    output.next_command("Review the labels", _program("review", found.folder))
    command = fit_command(arguments, f"--seed={arguments.seed}")
    output.next_command("Train on them", command)
    output.finish(
        found.folder,
        folder=found.folder,
        classes=found.class_names,
        corrections=found.config.get("corrections"),
        **found.results,
    )


def compare(arguments: argparse.Namespace, output: Output) -> None:
    methods = config.check_methods(arguments.methods)
    settings = config_of(arguments, TrainConfig, policy=policy_of(arguments))
    features = features_of(arguments)
    folder = _new_folder(arguments, "compare-")
    from keras_rsft.data._labels import parse_noise

    if arguments.noise is not None:
        parse_noise(arguments.noise)
        noisy = [name for name in arguments.clean_splits if name != "test"]
        if noisy:
            raise InvalidArgument(
                "`--noise` makes training and validation labels wrong. Received: "
                f"--clean-splits {','.join(noisy)}. Leave out one of the two."
            )
    comparison = rsft.compare(
        _load(arguments, output),
        methods=methods,
        seeds=arguments.seeds,
        noise=arguments.noise,
        features=features,
        settings=settings,
        output=folder,
        progress=output.progress,
        command=arguments.command_line,
    )
    output.show(summary.comparison_summary(comparison), plain=True)
    output.say(f"Folder: {comparison.folder}")
    output.finish(
        comparison.folder,
        folder=comparison.folder,
        seeds=arguments.seeds,
        noise=arguments.noise,
        methods=comparison.summaries,
        verdict=comparison.verdict,
        judged_by=comparison.judged_by,
        notes=comparison.notes,
    )


def rank(arguments: argparse.Namespace, output: Output) -> None:
    for name in arguments.backbones:
        FeatureConfig(name)  # Refused before anything heavy is imported.
    features = dataclasses.replace(features_of(arguments), backbone=None)
    from keras_rsft.backbones._load import check_backbone_name

    for name in arguments.backbones:
        check_backbone_name(name)
    ranking = rsft.rank_backbones(
        _load(arguments, output, "train"),
        arguments.backbones,
        sample=arguments.sample,
        seed=arguments.seed,
        progress=output.progress,
        features=features,
    )
    output.show(summary.ranking_summary(ranking), plain=True)
    best = ranking.ranked[0].name
    command = fit_command(arguments, f"--seed={arguments.seed}", backbone=best)
    output.next_command("Train on the first", command)
    output.finish(best, **json_value(ranking))


def features(arguments: argparse.Namespace, output: Output) -> None:
    cluster = features_cluster(arguments)
    config = features_of(arguments)
    from keras_rsft.features._extract import default_cache_dir, keep_shares
    from keras_rsft.training import _features
    from keras_rsft.training._devices import Devices

    options = {"seed": arguments.seed, "progress": output.progress}
    timeout = arguments.worker_timeout
    folder = arguments.cache_dir or default_cache_dir()
    data = _load(arguments, output)
    if arguments.share is None:
        source = _features.open_features(
            data, config, devices=Devices(cluster=cluster), timeout=timeout, **options
        )
        found, splits = source.features, {}
        for name in ("train", "validation", "test"):
            part = getattr(found, name)
            text = f"{name}: {len(part):,} {data.kind}, {part.dim:,} features each"
            if part.augmentations > 1:
                text += f", {part.augmentations} augmentations"
            output.say(f"{text}, {part.num_bytes / 1e6:,.1f} MB in {part.path}")
            splits[name] = {
                "images": len(part),
                "unreadable": len(part.unreadable),
                "dim": part.dim,
                "augmentations": part.augmentations,
                "dtype": part.dtype,
                "bytes": part.num_bytes,
                "path": part.path,
            }
        for note in found.one_colour_notes:
            output.say(note)
        if found.unreadable:
            output.say(f"{len(found.unreadable):,} {data.kind} could not be read.")
        title = "Train on them"
    else:
        splits = None
        backbone = _features.load_configured(config)
        passes = _features.feature_passes(backbone, data, config, **options)
        keep_shares(passes, cluster, timeout=timeout)
        output.say(f"Shard {cluster.index} of {len(cluster)} is cached in {folder}.")
        title = "Once all shards are cached, join them and train"
    output.next_command(title, fit_command(arguments, f"--seed={arguments.seed}"))
    share = {"index": cluster.index, "count": len(cluster)}
    output.finish(folder, folder=folder, share=share, splits=splits)


def features_cluster(arguments: argparse.Namespace) -> Cluster:
    """Returns which shard of how many this process computes."""
    if arguments.share is None:
        return cluster_of()
    index, count = arguments.share
    return Cluster(("",) * count, index)


def search(arguments: argparse.Namespace, output: Output) -> None:
    options = config_of(arguments, config.SearchConfig)
    space = config_of(arguments, config.SearchSpace, **dict(arguments.range))
    how = unfreezing(arguments, config.ALL if options.unfrozen else None)
    settings = config_of(arguments, TrainConfig, unfreeze=how)
    features = features_of(arguments)
    _check_part(arguments)
    from keras_rsft.tuning._folder import next_search_folder

    data = _load(arguments, output, "train", "validation")
    folder = Path(arguments.output or next_search_folder(data_name(arguments.data)))
    found = rsft.search(
        data,
        output=folder,
        options=options,
        space=space,
        clean_validation=arguments.clean_validation,
        features=features,
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
        output.finish(text, worker=name)
        return
    rsft.write_report(found)
    output.show(summary.search_summary(found))
    _say_next(output, found.folder, arguments)
    command = fit_command(arguments, *chosen_words(found))
    output.next_command("Train it again", command)
    output.finish(
        found.folder, folder=found.folder, fit_command=command, results=found.results
    )


def chosen_words(found: Search) -> list[str]:
    """Returns the options of `fit` that train as a search has chosen."""
    settings, policy = found.settings, found.settings.policy
    given: dict[str, object] = {"policy": policy.name}
    for one in settings_of(config.PolicyConfig):
        if policy.name in config.USED_BY.get(one.dest, ()) and not one.is_rare:
            given[one.dest] = getattr(policy, one.dest)
    if "threshold" in given and policy.threshold is None and policy.name != "auto":
        classes = found.head.model.output_shape[-1]
        given["threshold"] = policy.relative_threshold * math.log(classes)
    if policy.name != "accept-all":
        given["warmup_epochs"] = policy.warmup_epochs
    # Defaults too: a default may change, the command must not.
    for name in ("epochs", "batch_size", "learning_rate", "optimizer", "weight_decay"):
        given[name] = getattr(settings, name)
    given["seed"] = settings.seed
    shown = {name.replace("_", "-"): v for name, v in given.items() if v is not None}
    words = [f"--{name}={value}" for name, value in shown.items()]
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
    arguments: argparse.Namespace, options: config.SearchConfig, output: Path
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


# === Commands that use a run ===


def review(arguments: argparse.Namespace, output: Output) -> None:
    if arguments.port is not None and not arguments.serve:
        raise InvalidArgument("`--port` goes with `--serve`. Add it, or leave it out.")
    folder = Path(arguments.run)
    if arguments.serve:
        _serve(folder, arguments, output)
        return
    # Anew each time: a page that is there may be a stranger's, with scripts of theirs.
    try:
        page = rsft.write_report(folder).absolute()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS):
            raise
        raise InvalidArgument(
            f"The page is written anew into {folder}, which cannot be written to. Use "
            "`--serve`, which shows it without writing."
        ) from error
    output.say(str(page))
    output.finish(page, folder=folder.absolute(), page=page, url=page.as_uri())
    if not arguments.no_browser:
        webbrowser.open(page.as_uri())


def _serve(folder: Path, arguments: argparse.Namespace, output: Output) -> None:
    from keras_rsft.report._record import read_run
    from keras_rsft.report._server import ReviewServer, own_port

    record = read_run(folder)
    if record.is_search:
        raise InvalidArgument(
            f"{folder} is a search, which has no samples to review. Leave out "
            "`--serve` to see its report."
        )
    with ReviewServer(record, port=arguments.port) as server:
        try:  # From the first word on, or an early Ctrl-C looks like a failure.
            if not arguments.json:
                output.say(f"{server.url}  (Ctrl-C stops the server)")
                for text in server.missing:
                    output.say(text)
            output.finish(
                server.url, folder=folder.absolute(), page=None, url=server.url
            )
            own = own_port(record)
            if arguments.port is None and server.server_port != own:
                output.say(
                    f"Port {own} is taken, so decisions made there are not seen here."
                )
            if not arguments.no_browser:
                webbrowser.open(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            if not arguments.json:
                output.say("Stopped.")


def export(arguments: argparse.Namespace, output: Output) -> bool:
    settings = config_of(arguments, config.ExportConfig)
    _places.check_run_folder(Path(arguments.run))
    target = _places.model_folder(arguments.run, arguments.name, arguments.directory)
    if settings.file_format == "saved-model":
        _places.free_version(target, settings.version)
    from keras_rsft.export._export_run import read_run

    run = read_run(arguments.run)
    export = rsft.export_run(
        run, name=arguments.name, directory=arguments.directory, settings=settings
    )
    share = export.num_bytes / export.weight_bytes
    output.say(
        f"Exported model: {export.path}\nSize:           {export.num_bytes / 1e6:.1f} "
        f"MB, {share:.2f} times the weights in float32"
    )
    command = None
    if settings.file_format == "saved-model":
        model, inside = export.path.parent, f"/models/{export.name}"
        command = (
            "docker run --rm -p 127.0.0.1:8500:8500 -p 127.0.0.1:8501:8501 "
            f"-v {shlex.quote(f'{model}:{inside}:ro')} tensorflow/serving "
            f"--model_config_file={inside}/models.config --enable_batching "
            f"--batching_parameters_file={inside}/batching.config"
        )
        output.next_command("Serve it", command)
    accuracy, verification = _check(run, export, arguments, output)
    passed = verification is None or verification.passed
    output.finish(
        export.path,
        path=export.path,
        name=export.name,
        format=settings.file_format,
        weight_dtype=settings.weight_dtype,
        num_bytes=export.num_bytes,
        weight_bytes=export.weight_bytes,
        serve_command=command,
        accuracy=accuracy,
        verification=verification and {"passed": passed, **json_value(verification)},
    )
    return passed


def _data_of(
    run: FinishedRun, parser: argparse.ArgumentParser, output: Output
) -> ImageData:
    """Loads the images that the run was trained on, by the command that trained it."""
    from keras_rsft.data._samples import ImageData

    # The run may be a stranger's: the user must see what is read.
    told = "The run's folder says that its images are in"
    with understood(run.folder):
        command = shlex.split(str(run.config.get("command") or ""))[1:]
    if command[:1] in (["fit"], ["search"]):
        nothing = io.StringIO()
        try:
            with (
                contextlib.redirect_stdout(nothing),
                contextlib.redirect_stderr(nothing),
            ):
                arguments = parser.parse_args(command)
        except SystemExit as stop:  # argparse, at a command of another version.
            raise DataError("the run's command cannot be read.") from stop
        arguments.corrections = []
        output.say(f"{told} {arguments.data}.")
        data = load_data(arguments, ())
        if not isinstance(data, ImageData):
            raise DataError("the run was trained on texts.")
        return data
    if "data" not in run.config:
        raise DataError("the run does not say what data it was trained on.")
    if "fingerprint" in run.config:
        raise DataError(f"the run was trained on {run.config['data']}.")
    output.say(f"{told} {run.config['data']}.")
    return rsft.load_images(run.config["data"])


def _check(
    run: FinishedRun, export: Export, arguments: argparse.Namespace, output: Output
) -> tuple[AccuracyCheck | None, Verification | None]:
    """Shows what narrower weights cost, and with `--verify` how a fresh one answers."""
    from keras_rsft.export import _verify as checks

    accuracy = verification = images = None
    progress = output.progress
    missing, narrowed = "", export.settings.weight_dtype != "float32"
    if narrowed or arguments.verify:
        try:
            images = checks.validation_split(
                run, _data_of(run, arguments.parser, output)
            )
        except (DataError, InvalidArgument, ImportError, OSError) as error:
            missing = str(error)
    if narrowed:
        try:
            if images is None:
                raise DataError(missing)
            accuracy = checks.check_accuracy(run, export, images, progress=progress)
            output.say(
                f"Accuracy on the validation split ({accuracy.images} images): "
                f"{100 * accuracy.exported:.1f} %; in float32 "
                f"{100 * accuracy.run:.1f} %. Largest difference of a probability: "
                f"{accuracy.largest_difference:.4f}"
            )
        except (DataError, ImportError) as error:
            output.say(
                f"The accuracy on the validation split was not measured: {error}"
            )
    if arguments.verify:
        encoded = None if images is None else checks.sample_of(images) or None
        if encoded is None:
            reason = missing or "their files are gone."
            output.say(
                f"The run's images cannot be read, so generated ones are used: {reason}"
            )
        verification = checks.verify_export(run, export, encoded, progress=progress)
        _show_verification(verification, output)
    return accuracy, verification


def _show_verification(found: Verification, output: Output) -> None:
    limit = found.allowed_difference
    allowed = "" if limit is None else f" (allowed: {limit:.0e})"
    kind = "generated" if found.generated else f"{found.images} of the validation split"
    rows = [
        ("Images", kind),
        ("Largest difference", f"{found.largest_difference:.1e}{allowed}"),
        ("Same label", f"{found.same_labels} of {found.images} images"),
    ]
    if found.broken_refused is not None:
        rows.append(
            ("Broken image", "refused" if found.broken_refused else "NOT refused")
        )
    rows.append(("Loaded in", f"{found.load_seconds:.1f} s"))
    rows.append(
        ("Verdict", "same as the run" if found.passed else "DIFFERS from the run")
    )
    output.rows("In a fresh process", rows)


def predict(arguments: argparse.Namespace, output: Output) -> bool:
    """Prints an answer for each sample that can be read, and lists the others."""
    _places.check_exists(arguments.model)
    from keras_rsft import _predict as library
    from keras_rsft._progress import progress_bar
    from keras_rsft.data._sources import unread_sentence

    classifier = library.load_classifier(
        arguments.model,
        engine=arguments.engine or "auto",
        on_note=lambda text: print(summary.shown(text), file=sys.stderr),
    )
    column = arguments.text_column or DEFAULT_TEXT_COLUMN
    files, skipped = library.find_files(arguments.paths, classifier.takes)
    samples = library.samples_in(files, classifier, text_column=column)
    unreadable = []
    if arguments.output_format == "csv":
        print("path,label,score", file=output.answer)
    # Answers and a bar on the same terminal would write over each other.
    visible = output.progress and not output.answer.isatty()
    with progress_bar(
        "Predicting", total=len(samples), unit=classifier.takes, visible=visible
    ) as advance:
        for one in library.predict_samples(classifier, samples):
            if one.error is None:
                write_answer(one, arguments.output_format, output.answer)
            else:
                unreadable.append(one)
            advance(1)
    for one in unreadable:
        print(summary.shown(f"{one.path}: {one.error}"), file=sys.stderr)
    if skipped:
        print(summary.shown(unread_sentence(skipped)), file=sys.stderr)
    output.answer.flush()  # A pipe that nobody reads any more fails here, not at exit.
    return not unreadable and not skipped


def write_answer(one: Prediction, output_format: str, file: TextIO) -> None:
    """Writes one answer in a format out of `OUTPUT_FORMATS`."""
    label, score = str(one.label), one.score
    if output_format == "csv":
        cells = [guarded_cell(one.path), guarded_cell(label), f"{score:.6f}"]
        csv.writer(file, lineterminator="\n").writerow(cells)
    elif output_format == "jsonl":
        answer = {"path": one.path, "label": label, "score": score}
        print(json_text(answer, file), file=file)
    else:
        names = (summary.shown(n.translate(_ESCAPES)) for n in (one.path, label))
        print(*names, f"{score:.4f}", sep="\t", file=file)
