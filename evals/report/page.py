"""`report.html`: one file, no script, nothing from elsewhere."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from steerlens.evals.report import charts, figures, view, words


def render(report: view.Report) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        report=report,
        sentences=words.sentences(report),
        sections=_sections(report),
        charts=charts,
        count=words.count,
        p_value=figures.p_value,
        grouped=view.grouped,
        by_measure=attrgetter("key"),
        by_steering=attrgetter("of"),
        missing=figures.MISSING,
        shown=lambda value: f"{value:g}" if isinstance(value, float) else value,
        shown_errors=view.SHOWN_ERRORS,
        score_text=charts.score_text,
        tick_text=charts.tick_text,
        samples_per_cell=words.samples_per_cell,
        axis_of=lambda forest: _axis(report, forest),
        controls_by_unit=_by_unit(report.controls),
        control_axis=lambda controls: charts.Axis.over(
            v for c in controls for v in (c.baseline, c.steered, c.random, c.low, c.high)
        ),
    )


def _sections(report: view.Report) -> list[tuple[str, str]]:
    every: list[tuple[str, str, Any]] = [
        ("effects", "Effects", report.primary),
        ("doses", "Dose–response", report.curves),
        ("grids", "Where in the prompt", report.grids),
        ("controls", "Controls", report.controls),
        ("published", "Published", report.published),
        ("figures", "All figures", report.primary),
        ("samples", "Samples", report.samples),
        ("missing", "Missing", report.skipped or report.failures or report.notes),
        ("made", "How made", True),
    ]
    return [(name, title) for name, title, content in every if content]


def _axis(report: view.Report, forest: figures.Forest) -> charts.Axis:
    effects = [e for group in forest.groups for e in group.effects]
    values: list[float | None] = [0.0]
    for effect in effects:
        values += [effect.mean, effect.low, effect.high, *(report.random_range(effect) or ())]
    return charts.Axis.over(values)


def _by_unit(controls: tuple[figures.Control, ...]) -> list[tuple[figures.Unit, list[figures.Control]]]:
    found = view.grouped(controls, lambda c: "" if c.unit.percent else c.metric)
    return [(group[0].unit, group) for group in found.values()]
