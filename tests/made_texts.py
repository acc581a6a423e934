"""Sentences about three things, and files of them."""

from __future__ import annotations

import csv
from pathlib import Path

_WORDS = {
    "animals": (
        ["The cat", "A young dog", "Our horse", "The old owl", "A grey wolf"],
        ["sleeps in the barn", "runs through the forest", "drinks some water",
         "is fed every morning"],
    ),
    "cooking": (
        ["The soup", "This cake", "Her bread", "The rice", "A good sauce"],
        ["needs more salt", "bakes for an hour", "tastes of garlic and butter",
         "is stirred with a spoon"],
    ),
    "money": (
        ["The bank", "Our tax office", "This company", "The stock market",
         "An insurance"],
        ["raises its interest rates", "publishes the quarterly profits",
         "asks for a higher payment", "lost a million dollars"],
    ),
}  # fmt: skip

HOSTILE_TEXTS = (
    "<script>document.title='text'</script> the cat sleeps",
    '=HYPERLINK("http://localhost/","the soup needs salt")',
    "</script><img src=x onerror=document.title='img'> the dog runs",
    "-1+1 the bank raises its rates",
    'two\nlines, a comma and "quotes"\tand a tab: the horse drinks',
    "a bell \x07, an escape \x1b[31m and a \u202eturn: the owl sleeps",
    "the stock market \U0001f4c8 عربي 日本語",
    "[SEP] [PAD] {{ 7 * 7 }} the rice tastes of butter",
)


def sentences() -> list[tuple[str, str]]:
    """Returns 60 pairs of a sentence and what it is about, mixed."""
    pairs = [
        (f"{subject} {verb}.", label)
        for label, (subjects, verbs) in _WORDS.items()
        for subject in subjects
        for verb in verbs
    ]
    return [pairs[7 * number % 60] for number in range(60)]


def write_table(
    path: Path, rows: list[tuple], header: tuple[str, ...] = ("text", "label")
) -> Path:
    """Writes a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path
