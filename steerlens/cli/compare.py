"""`steerlens compare`: do two result folders differ by more than noise?"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerlens import files
from steerlens.cli import show
from steerlens.cli.guard import UsageError

if TYPE_CHECKING:
    from steerlens.evals.compare import Comparison, Run

COLUMNS = ("task", "metric", "n", "A", "B", "B−A [95 %]", "p", "p (Holm)", "detectable", "verdict")


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Result folder of `steerlens eval` or lm-eval.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one; the difference is B minus A.")],
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="M", help='Only this one, as "acc" or "exact_match,flexible"; repeatable.'),
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", metavar="T", help="Only this one; repeatable.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the resampling.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", metavar="F.md", help="Write the table here too.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Compare two result folders, paired by document; lm-eval's own work too, if run with --log_samples.

    Exact McNemar for outcomes of 0 and 1, else a paired sign-flip test with bootstrap; 95 % intervals, and Holm's
    correction across tasks. "detectable" is the least difference that so many documents show with 80 % probability.
    """
    if output is not None:
        _check(output, force)
    from steerlens.evals.compare import compare as paired
    from steerlens.evals.compare import load

    found = paired(load(a), load(b), metrics=metrics, tasks=tasks, seed=seed)
    if output is not None:
        files.write(output, markdown(found))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False))
        return
    typer.echo(f"A: {described(found.before)}\nB: {described(found.after)}\n")
    show.table(COLUMNS, rows(found))
    typer.echo("\n" + "\n".join([*_sentences(found), *(f"note: {note}" for note in _notes(found))]))
    if output is not None:
        show.note(f"wrote {output}")


def rows(found: Comparison) -> list[tuple[str, ...]]:
    """A line per task and metric, under `COLUMNS`."""
    from steerlens.evals.compare import interval, shown

    return [
        (
            c.task,
            c.metric,
            str(c.difference.n),
            shown(c.before),
            shown(c.after),
            interval(c.difference),
            f"{c.difference.p:.2g}",
            f"{c.holm:.2g}",
            "–" if c.minimum_detectable is None else shown(c.minimum_detectable),
            c.verdict,
        )
        for c in found.contrasts
    ]


def described(run: Run) -> str:
    """Which run it is."""
    return f"{run.folder} ({', '.join(filter(None, (run.model, run.label)))})"


def markdown(found: Comparison) -> str:
    """The comparison as a Markdown document."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    parts = [
        "# Comparison",
        f"- A: {described(found.before)}\n- B: {described(found.after)}",
        "\n".join([line(COLUMNS), line(["---"] * len(COLUMNS)), *map(line, rows(found))]),
        "\n".join(f"- {sentence}" for sentence in _sentences(found)),
    ]
    if notes := _notes(found):
        parts.append("\n".join(["Notes:\n", *(f"- {note}" for note in notes)]))
    return "\n\n".join(parts) + "\n"


def _sentences(found: Comparison) -> list[str]:
    return [c.sentence for c in found.contrasts if c.primary]


def _notes(found: Comparison) -> list[str]:
    from steerlens.paired import UNSETTLED, unsettled

    told = any(unsettled(c.verdict, c.difference.low, c.difference.high) for c in found.contrasts)
    return [*([UNSETTLED] if told else []), *found.notes]


def _check(output: Path, force: bool) -> None:
    if output.suffix != ".md":
        raise UsageError(f"--output {output} must end in .md: it is a Markdown file")
    try:
        files.check(output)
    except OSError as error:
        raise UsageError(f"--output {error}") from None
    if output.exists() and not force:
        raise UsageError(f"--output: {output} exists; give another name, or --force to write over it")
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"--output {output}: nothing can be written in {output.parent}; give another folder")
