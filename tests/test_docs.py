"""README.md and docs/: links lead somewhere, commands parse, Python runs.

The Python blocks of a page run one after the other, as a reader would paste them, in a
folder that has what they name: `photos/`, and a backbone `own.keras`. `your_model`,
`train`, `validation`, `x_train` and `y_train` are there too. `<!-- not run: WHY -->` in
front of a block, and WHY in the page's words, leaves one out.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from keras_rsft._runtime import check_strategy
from keras_rsft.cli._commands import config_of, features_cluster, policy_of, unfreezing
from keras_rsft.cli._main import build_parser
from keras_rsft.cli._options import FIRST
from keras_rsft.config import (
    FeatureConfig,
    SearchConfig,
    SearchSpace,
    TrainConfig,
    check_methods,
)
from keras_rsft.data._labels import parse_noise

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
every_page = pytest.mark.parametrize("page", PAGES)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+? -->\s*\Z", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Options of other programs that the pages name.
FOREIGN_OPTIONS = {"--grpc", "--logdir", "--no-deps", "--torch-python"}
FRONT_PAGE_LINES = 100
SLOW_PAGES = {"docs/python.md"}  # A fit and a search.
TWO_WORKERS = json.dumps(
    {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}
)


def blocks(text: str, language: str) -> list[str]:
    """Returns the fenced blocks of a language, without those that are not run."""
    return [
        found[2]
        for found in FENCE.finditer(text)
        if found[1] == language and not NOT_RUN.search(text[: found.start()])
    ]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+?) *$", prose(text), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {text.replace(" ", "-") for text in words}


def whole_lines(block: str) -> Iterator[list[str]]:
    """Splits a block for the shell into words, line by line."""
    waiting = ""
    for line in block.replace("\\\n", " ").splitlines():
        waiting += line
        lexer = shlex.shlex(waiting, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # A quotation that goes on in the next line.
            waiting += "\n"
            continue
        waiting = ""
        yield words
    assert not waiting, f"A quotation is not closed: {waiting}"


def commands(text: str) -> Iterator[list[str]]:
    """Returns the words of each program that a page's blocks start."""
    for block in blocks(text, "bash"):
        for words in whole_lines(block):
            command: list[str] = []
            for word in [*words, ";"]:
                if not set(word) <= set("&|;<>"):
                    # Variables of the environment stand before the program's name.
                    command += [word] if command or "=" not in word else []
                elif command:
                    yield command
                    command = []


OURS = [
    (page, command[1:])
    for page, text in PAGES.items()
    for command in commands(text)
    if command[0] == "keras-rsft"
]


@every_page
def test_links_lead_somewhere(page):
    links = LINK.findall(prose(PAGES[page]))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_front_page_leads_to_every_other():
    linked = set(LINK.findall(PAGES["README.md"]))
    assert set(PAGES) - {"README.md"} <= linked


def test_the_source_distribution_has_all_that_is_linked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for page, text in PAGES.items():
        for link in LINK.findall(prose(text)):
            if not link.startswith(("#", "http://", "https://")):
                target = ((ROOT / page).parent / link.partition("#")[0]).resolve()
                assert target.relative_to(ROOT.resolve()).parts[0] in included, link


def test_the_front_page_is_one_page():
    assert len(PAGES["README.md"].splitlines()) <= FRONT_PAGE_LINES


def test_the_table_of_rooms_names_modules_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `?([\w ]+?)/?`? \| ((?:`_\w+` ?)+)\|", text, re.MULTILINE)
    assert len(rows) == 13
    for where, modules in rows:
        folder = ROOT / "keras_rsft" / ("" if where == "top level" else where)
        for name in re.findall(r"`(\w+)`", modules):
            assert (folder / f"{name}.py").is_file(), (where, name)


def test_the_walk_of_one_photo_names_code_that_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walk = re.findall(r"^\d+\. `([\w/]+\.py)`, `(\w+)`", text, re.MULTILINE)
    assert 8 <= len(walk) <= 10
    for file, name in walk:
        code = (ROOT / "keras_rsft" / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {name}\b", code, re.MULTILINE), file


def test_the_lines_that_are_run_as_written():
    text = PAGES["README.md"]
    assert text.count('pip install ".[test]"') == 1
    assert '\npip install ".[test]" && pytest\n' in text
    assert '\npip install ".[demo]" && keras-rsft demo\n' in text


@pytest.mark.parametrize(
    "page, words", OURS, ids=[f"{page}: {shlex.join(words)}" for page, words in OURS]
)
def test_a_command_is_understood(page, words, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if "multiworker" in words:
        monkeypatch.setenv("TF_CONFIG", TWO_WORKERS)
    arguments = build_parser().parse_args(words)  # Exits where it is not understood.
    checks = {
        "compare": [policy_of, lambda a: check_methods(a.methods)],
        "features": [features_cluster],
        "fit": [
            policy_of,
            lambda a: unfreezing(a, a.unfreeze),
            lambda a: check_strategy(a.strategy),
        ],
        "search": [
            lambda a: config_of(a, SearchSpace, **dict(a.range)),
            lambda a: config_of(a, SearchConfig),
        ],
    }
    for check in checks.get(arguments.command, []):
        check(arguments)
    for config in (FeatureConfig, TrainConfig):
        config_of(arguments, config)
    if getattr(arguments, "noise", None) is not None:
        parse_noise(arguments.noise)


def test_commands_are_found_in_all_shapes():
    text = """
```bash
keras-rsft fit a \\
  --epochs 3   # why
A='{"b":
 1}'
B=1 keras-rsft search 'x y' > out.txt && keras-rsft demo
```
"""
    assert list(commands(text)) == [
        ["keras-rsft", "fit", "a", "--epochs", "3"],
        ["keras-rsft", "search", "x y"],
        ["out.txt"],
        ["keras-rsft", "demo"],
    ]


def test_an_option_is_the_same_in_every_command():
    parsers = build_parser()._subparsers._group_actions[0].choices
    known: dict[str, tuple] = {}
    for parser in parsers.values():
        for action in parser._actions:
            for flag in action.option_strings:
                what = (type(action), action.type, action.default, action.metavar)
                what += (action.nargs, action.const, action.choices, action.help)
                assert known.setdefault(flag, what) == what, (parser.prog, flag)
    fields: dict[str, tuple] = {}
    for parser in parsers.values():
        for name, one in parser._settable.items():
            what = (one.field.type, one.default, one.is_rare, one.help)
            assert fields.setdefault(name, what) == what, (parser.prog, name)


def test_fit_has_few_options_and_five_that_matter_first():
    parser = build_parser()._subparsers._group_actions[0].choices["fit"]
    assert sum(bool(action.option_strings) for action in parser._actions) <= 37
    first = next(g for g in parser._action_groups if g.title == FIRST)
    flags = [action.option_strings[0] for action in first._group_actions]
    assert flags == ["--backbone", "--policy", "--unfreeze", "--epochs", "--output"]


@every_page
def test_scripts_that_are_started_exist(page):
    for command in commands(PAGES[page]):
        if command[0] == "python":
            assert (ROOT / command[1]).is_file(), command[1]


@every_page
def test_options_in_the_text_exist(page):
    subparsers = build_parser()._subparsers._group_actions[0].choices.values()
    known = {
        option
        for parser in subparsers
        for action in parser._actions
        for option in action.option_strings
    }
    spans = re.findall(r"`([^`]+)`", prose(PAGES[page]))
    named = {name for span in spans for name in re.findall(r"(?<!\S)--[\w-]+", span)}
    assert named <= known | FOREIGN_OPTIONS


@pytest.fixture
def readers_folder(tmp_path, photo_folder, tiny_base_file, monkeypatch):
    """An empty folder but for `photos/` and `own.keras`; features are kept in it."""
    shutil.copytree(photo_folder, tmp_path / "photos")
    shutil.copy(tiny_base_file, tmp_path / "own.keras")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page in SLOW_PAGES else page
        for page, text in PAGES.items()
        if blocks(text, "python")
    ],
)
def test_python_runs(page, readers_folder, small_data, make_model):
    import tensorflow as tf

    batches = tf.data.Dataset.from_tensor_slices(small_data).batch(16)
    names = {"your_model": make_model(), "train": batches, "validation": batches}
    names |= dict(zip(("x_train", "y_train"), small_data, strict=True))
    for block in blocks(PAGES[page], "python"):
        exec(compile(block, page, "exec"), names)
