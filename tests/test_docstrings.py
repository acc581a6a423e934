"""Docstrings: every public name says what it takes, and what it says is run.

What a docstring must have is checked where it can be: a text, an entry for each
parameter or field and for no other, one for each error that the function itself raises.
A method that replaces one of Keras, or of a class of ours, is described there.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import keras_rsft as rsft

PACKAGE = Path(rsft.__file__).parent
WITH_EXAMPLES = {
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
}
# What readers meet first: each has an example that is run.
MAIN_NAMES = (
    *("AcceptAll", "AcceptListed", "AutoPolicy", "KeepFraction", "LossMixture"),
    *("LossThreshold", "Policy", "RunningThreshold", "SelfPaced", "RSFTModel"),
    *("FeatureSet", "RejectionLedger", "SearchSpace", "TrainingBatches"),
    *("TrainConfig", "PolicyConfig", "add_label_noise", "build_head"),
    *("audit_labels", "load_data", "load_images", "with_ids"),
)
# Methods of others: each names the paper.
PUBLISHED = (
    *("KeepFraction", "LossMixture", "RunningThreshold", "SelfPaced"),
    *("audit_labels", "finetune", "rank_backbones"),
)
PUBLIC = {name: getattr(rsft, name) for name in rsft.__all__ if name[0] != "_"}
CLASSES = {name: one for name, one in PUBLIC.items() if inspect.isclass(one)}


def own_members(owner: type) -> dict:
    """Returns the public methods and properties that a class of ours defines."""
    found = {}
    for name, raw in vars(owner).items():
        function = getattr(raw, "__func__", raw)
        function = getattr(function, "fget", None) or getattr(
            function, "func", function
        )
        if not name.startswith("_") and inspect.isfunction(function):
            found[name] = function
    return found


def is_described_elsewhere(owner: type, name: str) -> bool:
    return any(hasattr(parent, name) for parent in owner.__mro__[1:])


CALLABLES = {name: one for name, one in PUBLIC.items() if inspect.isfunction(one)} | {
    f"{name}.{member}": function
    for name, owner in CLASSES.items()
    for member, function in own_members(owner).items()
    if not is_described_elsewhere(owner, member)
}
WITH_FIELDS = {
    name: owner for name, owner in CLASSES.items() if dataclasses.is_dataclass(owner)
}
TAKE_ARGUMENTS = CALLABLES | {
    name: owner
    for name, owner in CLASSES.items()
    if name not in WITH_FIELDS and "__init__" in vars(owner)
}


def entries(doc: str, *titles: str) -> set[str]:
    """Returns the names described in sections of a docstring.

    `one, other: Both.` describes two.
    """
    found = set()
    for title in titles:
        section = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)*)", doc, re.MULTILINE)
        if section is None:
            continue
        for line in textwrap.dedent(section[1]).splitlines():
            if named := re.match(r"([*\w.]+(?:, [*\w.]+)*): ", line):
                found |= {name.strip("*") for name in named[1].split(", ")}
    return found


def parameters(called) -> set[str]:
    """Returns the parameters that must be described: all but what is handed on."""
    function = called.__init__ if inspect.isclass(called) else called
    handed_on = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    given = inspect.signature(function).parameters.values()
    return {one.name for one in given if one.kind not in handed_on} - {"self", "cls"}


def raised(called) -> set[str]:
    """Returns the errors in the raise statements of a function's own body."""
    function = called
    if inspect.isclass(called):
        name = "__post_init__" if dataclasses.is_dataclass(called) else "__init__"
        function = vars(called).get(name)
    if function is None:
        return set()
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    found, waiting = set(), [*definition.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            found.add(ast.unparse(error))
        waiting += ast.iter_child_nodes(node)
    # `raise error` hands on what was caught; `raise _unusable(...)` makes one of ours.
    return {name for name in found if name[0].isupper()}


@pytest.mark.parametrize("name", [*CLASSES, *CALLABLES])
def test_every_public_name_has_a_docstring(name):
    doc = inspect.getdoc(PUBLIC.get(name) or CALLABLES[name])
    assert doc
    assert re.search(r"[.:]$", doc.splitlines()[0]), doc.splitlines()[0]


@pytest.mark.parametrize("name", TAKE_ARGUMENTS)
def test_every_parameter_is_described_and_no_other(name):
    called = TAKE_ARGUMENTS[name]
    function = called.__init__ if inspect.isclass(called) else called
    # What is taken as `**kwargs` need not be described, but may be.
    handed_on = {*inspect.signature(function).parameters}
    # What is handed on to a class of ours may be described at both.
    if inspect.isclass(called):
        for parent in called.__mro__[1:]:
            if parent.__module__.startswith("keras_rsft"):
                handed_on |= parameters(parent)
    described = entries(inspect.getdoc(called), "Args")
    assert described - handed_on - parameters(called) == set()
    assert parameters(called) - described == set()


@pytest.mark.parametrize("name", WITH_FIELDS)
def test_every_field_is_described(name):
    bases = filter(dataclasses.is_dataclass, WITH_FIELDS[name].__mro__)
    described = set().union(
        *(entries(inspect.getdoc(base), "Attributes", "Args") for base in bases)
    )
    fields = {field.name for field in dataclasses.fields(WITH_FIELDS[name])}
    assert fields - described == set()


@pytest.mark.parametrize("name", [*TAKE_ARGUMENTS, *WITH_FIELDS])
def test_every_error_is_described(name):
    called = TAKE_ARGUMENTS.get(name) or WITH_FIELDS[name]
    assert raised(called) <= entries(inspect.getdoc(called), "Raises")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_method_names_its_source(name):
    doc = inspect.getdoc(PUBLIC[name])
    assert re.search(r"\b(19|20)\d\d\b", doc)


@pytest.mark.parametrize("name", MAIN_NAMES)
def test_a_main_name_has_an_example(name):
    assert ">>> " in inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize("path", sorted(WITH_EXAMPLES))
def test_examples_do_what_they_say(path):
    name = f"keras_rsft.{path.removesuffix('.py').replace('/', '.')}"
    module = importlib.import_module(name.removesuffix(".__init__"))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(module, optionflags=flags)
    assert result.attempted > 0
    assert result.failed == 0
