"""What a person sees of a run: on a terminal side by side with the differences marked, else in lines."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import typer


def answer(steered: str, baseline: str | None) -> None:
    """Print one answer; with a baseline, both."""
    if baseline is None:
        typer.echo(steered.strip())
    elif sys.stdout.isatty():
        _table(baseline.strip(), steered.strip())
    else:
        typer.echo(f"unsteered: {baseline.strip()}")
        typer.echo(f"steered:   {steered.strip()}")
        if baseline == steered:
            typer.echo("(the same text)")


def heading(side: str) -> None:
    """Name the side whose tokens come next."""
    typer.echo("unsteered:" if side == "baseline" else "steered:")


def note(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    typer.echo(f"steerlens: {text}", err=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of numbers under their names: a table on a terminal, else aligned lines."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        shown = Table()
        for name in columns:
            shown.add_column(name, justify="right")
        for row in rows:
            shown.add_row(*row)
        Console().print(shown)
        return
    lines = [columns, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    for line in lines:
        typer.echo("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def progress(total: int, done: int = 0, what: str = "prompts") -> AbstractContextManager[Callable[[int], None]]:
    """A function that moves a bar with rate and remaining time forward; a bar is drawn on a terminal only."""
    if not sys.stderr.isatty():
        return nullcontext(lambda advance: None)
    return _bar(total, done, what)


class _bar:
    def __init__(self, total: int, done: int, what: str) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Any) -> Text:
                return Text("" if task.speed is None else f"{task.speed:.3g}/s")

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(what, total=total, completed=done)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda advance: self._progress.advance(self._task, advance)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _table(baseline: str, steered: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    before, after = (re.findall(r"\s+|\S+", text) for text in (baseline, steered))
    sides = Text(), Text()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        same = kind == "equal"
        sides[0].append("".join(before[a:b]), style=None if same else "bold red")
        sides[1].append("".join(after[c:d]), style=None if same else "bold green")
    table = Table("unsteered", "steered" if baseline != steered else "steered (the same text)", expand=True)
    table.add_row(*sides)
    Console().print(table)
