"""The parts of a report, and how their numbers are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MISSING = "–"


@dataclass(frozen=True)
class Unit:
    """How a metric's numbers are written: as percentages, and their differences as points, or as they are."""

    percent: bool

    def number(self, value: float | None) -> str:
        """A score without its unit."""
        if value is None:
            return MISSING
        return f"{100 * value:.1f}" if self.percent else f"{value:.4g}"

    def score(self, value: float | None) -> str:
        """A score with its unit."""
        return self.number(value) + ("\u00a0%" if self.percent and value is not None else "")

    def change(self, value: float | None) -> str:
        """A signed difference."""
        if value is None:
            return MISSING
        text = f"{100 * value:+.1f}" if self.percent else f"{value:+.3g}"
        return text[1:] if float(text) == 0 else text

    def interval(self, low: float | None, high: float | None) -> str:
        """Bounds of a difference."""
        return MISSING if low is None or high is None else f"[{self.change(low)}, {self.change(high)}]"

    def size(self, value: float | None) -> str:
        """A difference without a sign."""
        return self.change(value).lstrip("+")


@dataclass(frozen=True)
class Effect:
    """One comparison of a steering with the unsteered model; a number is None where the summary has none."""

    model: str
    task: str
    metric: str
    steering: str
    role: str
    of: str | None
    parameter: str | None
    dose: float | None
    primary: bool
    higher_is_better: bool
    n: int
    errors: int
    baseline: float | None
    steered: float | None
    mean: float | None
    low: float | None
    high: float | None
    confidence: float
    p: float | None
    p_holm: float | None
    detectable: float | None
    verdict: str
    sentence: str
    cells: tuple[Mapping[str, Any], ...]
    changed: tuple[Mapping[str, Any], ...]
    changed_total: int | None
    unit: Unit

    @property
    def kind(self) -> str:
        """The verdict as a class name: better, worse or noise."""
        return self.verdict if self.verdict in ("better", "worse") else "noise"

    @property
    def measure(self) -> str:
        """The metric, and which way it is good where that is not up."""
        return self.metric if self.higher_is_better else f"{self.metric}, lower is better"

    @property
    def difference(self) -> str:
        """Mean and interval."""
        return f"{self.unit.change(self.mean)} {self.unit.interval(self.low, self.high)}"

    @property
    def key(self) -> tuple[str, str, str]:
        """What it was measured on and by."""
        return self.model, self.task, self.metric


@dataclass(frozen=True)
class Group:
    """Effects that belong together, under a heading."""

    title: str
    effects: tuple[Effect, ...]

    @property
    def note(self) -> str:
        """Metric, unsteered score and samples; ranges where the effects differ in them."""
        unit = self.effects[0].unit
        scores = sorted({e.baseline for e in self.effects if e.baseline is not None})
        sizes = sorted({e.n for e in self.effects})
        shown = [unit.number(scores[0])] if len(scores) > 1 else []
        shown += [unit.score(scores[-1] if scores else None)]
        counts = "–".join(str(n) for n in dict.fromkeys((sizes[0], sizes[-1])))
        return f"{self.effects[0].measure} · unsteered {'–'.join(shown)} · n\u00a0=\u00a0{counts}"


@dataclass(frozen=True)
class Forest:
    """Effects on one axis, by task."""

    model: str
    unit: Unit
    metric: str | None
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Curve:
    """One steering at several strengths on one task, weakest first."""

    model: str
    task: str
    metric: str
    parameter: str
    points: tuple[Effect, ...]


@dataclass(frozen=True)
class Grid:
    """Scores over a task's grid.

    Attributes:
        title: whose scores.
        x, y: names of the coordinates; y may be missing.
        columns, rows: their values, in order.
        values: by (column, row); a cell without samples is left out.
        counts: samples per cell.
    """

    title: str
    x: str
    y: str | None
    columns: tuple[Any, ...]
    rows: tuple[Any, ...]
    values: Mapping[tuple[Any, Any], float]
    counts: Mapping[tuple[Any, Any], int]


@dataclass(frozen=True)
class Grids:
    """Grids with one colour scale: the unsteered model's, then one per steering that has the same baseline.

    Attributes:
        low, high: ends of the scale.
        before: the unsteered model.
        after: steerings; `swept`: the strengths of a sweep, where there are others too.
    """

    model: str
    task: str
    metric: str
    unit: Unit
    low: float
    high: float
    before: Grid
    after: tuple[Grid, ...]
    swept: tuple[Grid, ...]


@dataclass(frozen=True)
class Control:
    """A steering beside random heads and neutral parameters; a number is None where the summary has none.

    Attributes:
        random, low, high: mean, lowest and highest score of the random sets.
        mean, interval_low, interval_high, p: the paired difference, steered minus random.
        helped: whether the steering is better than the unsteered model.
        neutral: whether neutral parameters gave the unsteered outputs.
    """

    model: str
    task: str
    metric: str
    of: str
    unit: Unit
    baseline: float | None
    steered: float | None
    random: float | None
    low: float | None
    high: float | None
    sets: int | None
    mean: float | None
    interval_low: float | None
    interval_high: float | None
    p: float | None
    verdict: str
    sentence: str
    helped: bool
    neutral: bool | None

    @property
    def kind(self) -> str:
        """The verdict as a class name: better, worse or noise."""
        return self.verdict if self.verdict in ("better", "worse") else "noise"

    @property
    def difference(self) -> str:
        """Steered minus random heads."""
        return f"{self.unit.change(self.mean)} {self.unit.interval(self.interval_low, self.interval_high)}"


@dataclass(frozen=True)
class Published:
    """A published figure and what was measured; texts."""

    model: str
    task: str
    metric: str
    steering: str
    source: str
    baseline: str
    steered: str
    change: str
    measured: bool
    measured_baseline: str
    measured_steered: str
    measured_change: str
    interval: str
    agrees: str
    note: str


@dataclass(frozen=True)
class Changed:
    """A sample whose output changed; the sides are (text, whether it differs)."""

    doc_id: str
    prompt: str
    target: str
    before: tuple[tuple[str, bool], ...]
    after: tuple[tuple[str, bool], ...]
    before_score: str
    after_score: str
    kind: str


@dataclass(frozen=True)
class Samples:
    """Changed samples of one comparison, the first of them."""

    effect: Effect
    shown: tuple[Changed, ...]

    def count(self, shown: int) -> str:
        """How many of how many: of all where the summary says, else of those that it lists."""
        total, listed = self.effect.changed_total, len(self.effect.changed)
        if total is not None:
            return f"{shown} of {total}"
        return f"{shown}, {listed - shown} more in summary.json" if listed > shown else str(shown)


@dataclass(frozen=True)
class Failure:
    """Samples that failed the same way."""

    model: str
    steering: str
    task: str
    error: str
    docs: tuple[str, ...]

    @property
    def where(self) -> str:
        """The documents, the first ten by number."""
        more = len(self.docs) - 10
        return ", ".join(self.docs[:10]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Task:
    """What was asked."""

    name: str
    summary: str
    primary: str
    metrics: tuple[str, ...]


def p_value(p: float | None) -> str:
    """Two digits; what lies below the smallest double is said to."""
    if p is None:
        return MISSING
    return "<1e-300" if p == 0 else f"{p:.2g}"
