"""Reads a folder that holds one folder of images, or texts, for each class.

Either `DIR/<class>/...` or `DIR/{train,validation,test}/<class>/...`. Only names
are read here, with `os.scandir`: no file is opened.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from keras_rsft.data.partition import SPLIT_ALIASES, Listing, NamedSample, list_named
from keras_rsft.data.readers import FileReader
from keras_rsft.errors import DataError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp")
)


def list_folder(
    root: str,
    *,
    source: str,
    suffixes: frozenset[str] = IMAGE_SUFFIXES,
    kind: str = "images",
) -> Listing:
    """Lists the images, or texts, of a folder of class folders."""
    root = os.path.abspath(root)
    samples: list[NamedSample] = []
    layout, ignored = _split_folders(root)
    for prefix, split in layout:
        folders, others = _visible(os.path.join(root, prefix))
        ignored += others
        if not folders:
            raise DataError(
                f"Expected one folder for each class in {os.path.join(root, prefix)}. "
                f"Received: no folder. Sort the {kind} into <class>/<{kind[:-1]}> "
                "first."
            )
        for name in folders:
            below = os.path.join(prefix, name)
            ids, others = _files_below(root, below, suffixes)
            _refuse_empty(os.path.join(root, below), ids, others, suffixes, kind)
            samples += [NamedSample(id=id_, label=name, split=split) for id_ in ids]
            ignored += others
    for sample in samples:
        try:
            sample.id.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                "File names must be valid UTF-8. "
                f"Received: {sample.id!r}. Rename the file or its folder."
            ) from error
    reader_of = functools.partial(FileReader, root)
    return list_named(samples, reader_of, source=source, ignored_files=ignored)


def _split_folders(root: str) -> tuple[list[tuple[str, str]], int]:
    """Returns each split's folder, and how many other entries lie beside them."""
    folders, others = _visible(root)
    splits = [SPLIT_ALIASES.get(name.lower()) for name in folders]
    if "train" not in splits or None in splits:
        return [("", "train")], 0
    if len(set(splits)) < len(splits):
        raise DataError(
            f"Two folders in {root} are for the same split. Received: "
            f"{', '.join(folders)}. Put their images into one."
        )
    return list(zip(folders, splits, strict=True)), others


def _visible(folder: str) -> tuple[list[str], int]:
    """Returns the names of the folders that are not hidden, and counts the rest."""
    entries = _entries(folder)
    folders = [e.name for e in entries if _is_dir(e) and not e.name.startswith(".")]
    return folders, len(entries) - len(folders)


def _files_below(
    root: str, below: str, suffixes: frozenset[str]
) -> tuple[list[str], int]:
    """Returns the ids of all files to take in a folder, and counts the others."""
    ids: list[str] = []
    others = 0
    start = os.path.join(root, below)
    waiting = [(below, (os.path.realpath(start),))]
    while waiting:
        folder, chain = waiting.pop()
        for entry in _entries(os.path.join(root, folder)):
            name = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                others += 1
            elif _is_dir(entry):
                waiting += _descend(entry, name, chain)
            elif _is_taken(entry, suffixes):
                ids.append(name.replace(os.sep, "/"))
            else:
                others += 1
    return ids, others


def _descend(
    entry: os.DirEntry, name: str, chain: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the folder, unless it links back to one that it lies in."""
    if not entry.is_symlink():
        yield name, chain
        return
    real = os.path.realpath(entry.path)
    if not any(f"{place}{os.sep}".startswith(f"{real}{os.sep}") for place in chain):
        yield name, (*chain, real)


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_taken(entry: os.DirEntry, suffixes: frozenset[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    try:
        return suffix in suffixes and entry.is_file()
    except OSError:
        return False


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"Cannot read the folder {folder}: {error.strerror}."
        ) from error


def _refuse_empty(
    folder: str, ids: list[str], others: int, suffixes: frozenset[str], kind: str
) -> None:
    if not ids:
        raise DataError(
            f"Expected {kind} in the class folder {folder}. Received: none, and "
            f"{others} other files. {kind.capitalize()} end in "
            f"{', '.join(sorted(suffixes))}."
            " Add some or remove the folder."
        )
