"""A progress bar for anything that takes more than two seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_BAR_WIDTH = 40
# Long enough to tell the time left where one unit takes minutes.
_SECONDS_OF_RATE = 600.0


@contextmanager
def progress_bar(
    description: str, *, total: int, unit: str, done: int = 0, visible: bool = True
) -> Iterator[Callable[..., None]]:
    """Shows a bar on standard error while the context is open."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task) -> Text:
            speed = task.speed
            if speed is None and task.finished and task.elapsed:
                speed = (task.completed - done) / task.elapsed  # All in one go.
            return Text("" if speed is None else f"{rate_text(speed)} {unit}/s")

    console = Console(stderr=True)
    if not (visible and console.is_terminal):
        yield lambda finished, description=None: None
        return
    # On a narrow terminal the bar gives way, and no line breaks.
    unbroken = Column(no_wrap=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None, table_column=Column(max_width=_BAR_WIDTH)),
        MofNCompleteColumn(table_column=unbroken),
        RateColumn(table_column=unbroken),
        TimeRemainingColumn(compact=True, table_column=unbroken),
        console=console,
        speed_estimate_period=_SECONDS_OF_RATE,
    ) as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda finished, description=None: progress.update(
            task, advance=finished, description=description
        )


def rate_text(speed: float) -> str:
    """Returns a rate, two digits where it is below ten."""
    return f"{speed:,.0f}" if speed >= 9.95 else f"{speed:.2g}"
