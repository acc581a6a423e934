"""Damages a file of a folder as a disk, a merge or a person would."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

WRONG = (
    None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", "x", "nan",
    "../../x", "\x00", [], [[]], {}, {"x": 1}, [None] * 3, "9" * 400,
)  # fmt: skip
CELLS = ("", "x", "nan", "inf", "-5", "1e999", "9" * 30, "0", "\x00", '"', "-0.5")
DEEP = "[" * 100_000


def damage(path: Path, chance: random.Random) -> str:
    """Changes a file, and returns in which way."""
    content = path.read_bytes()
    ways = ["cut", "flip", "empty", "noise", "zeros"]
    if path.suffix in (".json", ".jsonl"):
        ways += ["value", "value", "value", "key", "key", "deep", "whole"]
    if path.suffix == ".csv":
        ways += ["cell", "cell", "cell", "column", "row", "row twice", "more cells"]
    way = chance.choice(ways)
    path.unlink()  # It may be linked to a cache that all share.
    if way in ("value", "key", "deep", "whole"):
        path.write_text(_json(content.decode(), way, chance), encoding="utf-8")
    elif way in ("cell", "column", "row", "row twice", "more cells"):
        text = _csv(content.decode(), way, chance)
        path.write_text(text, encoding="utf-8", newline="")
    else:
        path.write_bytes(_bytes(content, way, chance))
    return way


def _bytes(content: bytes, way: str, chance: random.Random) -> bytes:
    if way == "cut":
        return content[: chance.randrange(len(content) + 1)]
    if way == "noise":
        return chance.randbytes(min(len(content), 5000))
    if way == "zeros":
        return bytes(len(content))
    if way == "empty":
        return b""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 3, 30))):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _json(text: str, way: str, chance: random.Random) -> str:
    if way == "deep":
        return DEEP
    if way == "whole":
        return json.dumps(chance.choice(WRONG))
    document = json.loads(text.splitlines()[0] if "\n{" in text else text)
    places = [(document, key) for key in _keys(document)]
    for parent, key in places:  # The list grows.
        places += [(parent[key], inner) for inner in _keys(parent[key])]
    if not places:
        return json.dumps(chance.choice(WRONG))
    parent, key = chance.choice(places)
    if way == "key":
        del parent[key]
    else:
        parent[key] = chance.choice(WRONG)
    return json.dumps(document)


def _keys(value):
    if isinstance(value, dict):
        return list(value)
    return range(len(value)) if isinstance(value, list) else ()


def _csv(text: str, way: str, chance: random.Random) -> str:
    rows = list(csv.reader(io.StringIO(text, newline="")))
    if not rows:
        return "x"
    row = chance.choice(rows)
    if way == "column":
        at = chance.randrange(len(rows[0]))
        rows = [one[:at] + one[at + 1 :] for one in rows]
    elif way == "row":
        rows.remove(row)
    elif way == "row twice":
        rows.append(row)
    elif way == "more cells":
        row.append("more")
    elif row:
        row[chance.randrange(len(row))] = chance.choice(CELLS)
    written = io.StringIO(newline="")
    csv.writer(written).writerows(rows)
    return written.getvalue()
