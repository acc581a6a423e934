"""Files of finished and unfinished runs, damaged: one sentence that names the file."""

from __future__ import annotations

import contextlib
import random
import shutil
import warnings
from pathlib import Path

import made_golden
import pytest
from eagerly import eagerly
from made_damage import damage

from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.report._record import read_run
from keras_rsft.report._server import ReviewServer
from keras_rsft.training import _resume

# The folders, and what is done with each.
USES = {
    "photos-1": ("review", "serve", "predict", "export"),
    "search": ("review", "predict", "export", "search"),
    "audit": ("review", "serve"),
    "half.unfinished": ("fit",),
    "cache": ("fit",),
}
# What a change of these alone is told by another name, since it is valid by itself.
ALSO = {
    "classes.json": "ledger.csv", "config.json": "results.json",
    "identity.json": "is a run that was not finished",
    "search.json": "search", "meta.json": "cached features",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run, search and audit, a run stopped half-way, and their cache."""
    root = tmp_path_factory.mktemp("finished")
    made_golden.prepare(root)
    for command in ("fit", "search"):
        answer = made_golden.finish(root, command)
        assert answer.status == 0, answer.err
    answer = made_golden.run_command(
        root, "audit", "photos", *made_golden.in_folder(root, *made_golden.COMMON),
        "--output", "audit",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    with pytest.MonkeyPatch.context() as patched:
        for name in ("SECONDS_BETWEEN", "TIMES_ITS_COST"):
            patched.setattr(_resume, name, 0.0)
        end_epoch = _resume.TrainingCheckpoint.on_epoch_end

        def stopping(self, epoch, logs=None):
            end_epoch(self, epoch, logs)
            raise KeyboardInterrupt

        patched.setattr(_resume.TrainingCheckpoint, "on_epoch_end", stopping)
        assert run(root, root, "fit", root / "half") == (130, "")
    assert (root / "half.unfinished" / "training.npz").exists()
    return root


def run(root: Path, place: Path, use: str, folder: Path) -> tuple[int, str]:
    """Uses a folder; returns the exit status and what was said of a failure."""
    if use == "serve":
        try:
            with ReviewServer(read_run(folder)) as server:
                server.order({"decided": {}})
                for name in server.record.ledger.ids[:3]:
                    server.record.thumbnail(name)
                    server.record.preview(name)
        except (DataError, InvalidArgument) as error:
            return 1, str(error)
        return 0, ""
    known = made_golden.FINISHED[use] if use in ("fit", "search") else ()
    arguments = made_golden.in_folder(root, *known)
    if known:
        output = arguments.index("--output") + 1
        arguments[output] = str(place / "half" if use == "fit" else folder)
    if folder.name == "cache":
        arguments[arguments.index(str(root / "cache"))] = str(folder)
    arguments = (
        arguments
        or {
            "review": ["review", folder, "--no-browser"],
            "predict": ["predict", folder, root / "photos" / "red" / "00.png"],
            "export": ["export", folder, "--name", "m", "--directory", place / "out"],
        }[use]
    )
    if use == "search":
        (folder / "results.json").unlink(missing_ok=True)
    with eagerly(), warnings.catch_warnings(action="ignore"):
        answer = made_golden.run_command(place, *arguments)
    assert "Traceback" not in answer.out + answer.err
    _, _, said = answer.err.rpartition("keras-rsft: ")
    return answer.status, said if answer.status in (1, 2) else ""


def files_of(folder: Path) -> list[Path]:
    every = (path for path in sorted(folder.rglob("*")) if path.is_file())
    left_out = (".lock", ".html", ".v2")
    return [path for path in every if not path.name.endswith(left_out)]


def damaged(root: Path, place: Path, seed: int) -> None:
    chance = random.Random(seed)
    name = chance.choice(list(USES))
    folder = place / name
    shutil.copytree(root / name, folder)
    file = chance.choice(files_of(folder))
    way = damage(file, chance)
    use = chance.choice(USES[name])
    status, said = run(root, place, use, folder)
    what = f"{seed}: {use} after {way} of {file.relative_to(place)}: {status} {said}"
    assert "should not happen" not in said, what
    assert len(said.strip().splitlines()) <= 1, what
    if status:
        assert file.name in said or ALSO.get(file.name, file.name) in said, what
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(place)


@pytest.mark.parametrize("seed", range(16))
def test_one_sentence_names_the_file(root, tmp_path, seed):
    damaged(root, tmp_path / "place", seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 160, 20))
def test_sixty_more(root, tmp_path, start):
    for seed in range(start, start + 20):
        damaged(root, tmp_path / str(seed), seed)
