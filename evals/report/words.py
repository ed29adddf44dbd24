"""The summary in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from steerlens.evals.report.figures import Effect, Grid
from steerlens.evals.report.view import Report

NAMED = 3


def sentences(report: Report) -> list[tuple[str, str]]:
    """Three to six, each a heading and a text: what was compared, what helped, hurt or is within noise, and so on."""
    found = [("Compared", _compared(report))]
    if report.primary:
        found += [("Helped", _direction(report, "better")), ("Hurt", _direction(report, "worse"))]
        found.append(("Within noise", _noise(report)))
    found += [("Controls", _controls(report)), ("Missing", _missing(report))]
    return [(heading, text) for heading, text in found if text]


def count(number: int, one: str, many: str | None = None) -> str:
    """The number with its noun."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def listed(items: Sequence[str]) -> str:
    """With commas and an "and"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def samples_per_cell(grid: Grid) -> str:
    """How many samples stand behind a cell."""
    counts = [n for place, n in grid.counts.items() if place in grid.values]
    if not counts:
        return "no samples"
    low, high = min(counts), max(counts)
    return f"{count(low, 'sample')} per cell" if low == high else f"{low} to {high} samples per cell"


def _compared(report: Report) -> str:
    effects = report.primary
    if not effects:
        return "Nothing with the unsteered model."
    steerings = {e.steering for e in effects}
    tasks = {e.task for e in effects}
    sizes = sorted({e.n for e in effects})
    samples = count(sizes[0], "sample") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} samples"
    models = {e.model for e in effects}
    of = f"{next(iter(models))}" if len(models) == 1 else count(len(models), "model")
    return (
        f"{count(len(steerings), 'steering')} of {of} on {count(len(tasks), 'task')} with the unsteered model, each on "
        f"the same {samples}: paired {report.level} intervals, verdicts corrected for the number of tasks (Holm)."
    )


def _direction(report: Report, verdict: str) -> str:
    effects = [e for e in report.primary if e.verdict == verdict]
    if not effects:
        return "Nothing beyond noise."
    # the strongest first, where sizes can be compared at all; of a sweep the strongest strength speaks for the others
    ordered = sorted(effects, key=lambda e: (e.role == "sweep", not e.unit.percent, -abs(e.mean or 0.0)))
    series: dict[tuple[str | None, ...], list[Effect]] = {}
    for e in ordered:
        series.setdefault((*e.key, e.of if e.role == "sweep" else e.steering, e.parameter), []).append(e)
    named = [_moved(report, found) for found in list(series.values())[:NAMED]]
    more = len(effects) - sum(map(len, list(series.values())[:NAMED]))
    return "; ".join(named) + (f"; and {more} more." if more else ".")


def _moved(report: Report, series: Sequence[Effect]) -> str:
    effect, unit = series[0], series[0].unit
    others = f", the largest effect of {len(series)} strengths" if len(series) > 1 else ""
    return (
        f"{report.named(effect)} from {unit.score(effect.baseline)} to {unit.score(effect.steered)} "
        f"({effect.difference}{others})"
    )


def _noise(report: Report) -> str:
    effects = [e for e in report.primary if e.kind == "noise"]
    if not effects:
        return "Nothing."
    ordered = sorted(effects, key=lambda e: e.role == "sweep")
    sizes = sorted(e.detectable for e in effects if e.detectable is not None and e.unit.percent)
    text = listed(_few([report.named(e) for e in ordered]))
    if sizes:
        unit = next(e.unit for e in effects if e.unit.percent)
        low, high = unit.size(sizes[0]), unit.size(sizes[-1])
        span = low if low == high else f"{low} to {high}"
        text += f". A difference would have had to be about {span} points to show"
    return text + "."


def _controls(report: Report) -> str:
    parts = []
    helped = sorted((c for c in report.controls if c.verdict and c.helped), key=lambda c: -abs(c.mean or 0.0))
    for wanted, wording in ((True, "Better than random heads too"), (False, "No better than random heads")):
        named = [report.named(c) for c in helped if (c.verdict == "better") is wanted]
        if named:
            parts.append(f"{wording}: {listed(_few(named))}.")
    neutral = [c for c in report.controls if c.neutral is not None]
    differing = [report.named(c) for c in neutral if not c.neutral]
    if differing:
        parts.append(f"Neutral parameters changed outputs of {listed(_few(differing))}, which must not happen.")
    elif neutral:
        parts.append("Neutral parameters changed no output.")
    return " ".join(parts)


def _few(named: Sequence[str]) -> list[str]:
    return [*named[:NAMED], *([f"{len(named) - NAMED} more"] if len(named) > NAMED else [])]


def _missing(report: Report) -> str:
    parts = []
    if report.failed:
        parts.append(f"{count(report.failed, 'sample')} failed and {'is' if report.failed == 1 else 'are'} left out")
    if report.skipped:
        parts.append(f"{count(len(report.skipped), 'pair')} of steering and task could not be run")
    return f"{'; '.join(parts)}." if parts else ""
