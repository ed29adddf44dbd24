"""Charts as inline SVG whose text keeps its size at any width.

Places along the width are percentages of the element, so that a chart fills its column on a phone and on a desk without
scaling its text; heights are pixels. Axis labels stand outside the plot: the page leaves margins for them. Colours are
the page's, by class.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from steerlens.evals.report.figures import Control, Curve, Effect, Unit

ROW, PLOT = 28, 210
LEAST_GAP = 13.0
# Cividis, readable with any colour vision; each stop is (red, green, blue)
_STOPS = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))


@dataclass(frozen=True)
class Axis:
    """A range of numbers as 0 to 100 percent of a width or height."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, in percent; what lies outside is at the edge."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 2)

    @classmethod
    def over(cls, values: Iterable[float | None], *, ticks: int = 7) -> Axis:
        """Around the values, with round ticks inside."""
        from matplotlib.ticker import MaxNLocator

        found = [v for v in values if v is not None]
        low, high = min(found, default=0.0), max(found, default=1.0)
        room = 0.04 * (high - low) or max(0.1 * abs(low), 1e-3)
        low, high = low - room, high + room
        places = MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        # adding 0.0 turns a negative zero around
        return cls(low, high, tuple(round(float(place), 12) + 0.0 for place in places if low <= place <= high))

    @classmethod
    def of_doses(cls, values: Sequence[float]) -> Axis:
        """With a tick at each value; logarithmic where that spaces them more evenly."""
        ordered = sorted(set(values))
        low, high = ordered[0], ordered[-1]
        log = low > 0 and len(ordered) > 2 and _unevenness(map(math.log, ordered)) < _unevenness(ordered)
        if low == high:
            return cls(low - 1, high + 1, (low,))
        if log:
            room = (high / low) ** 0.06
            return cls(low / room, high * room, tuple(ordered), True)
        room = 0.06 * (high - low)
        return cls(low - room, high + room, tuple(ordered))


def effect(shown: Effect, axis: Axis, random: tuple[float, float] | None = None) -> Markup:
    """A row of a forest plot: the difference with its interval; a grey band is what random heads made."""
    said = shown.sentence or f"{shown.steering} on {shown.task}: {shown.difference}, {shown.verdict}"
    svg = _svg(ROW, said, "effect")
    _grid(svg, axis, "100%")
    if random is not None:
        low, high = (axis.at(v) for v in random)
        width = max(high - low, 0.6)
        _add(svg, "rect", x=_pc(low), width=_pc(width), y="6", height=str(ROW - 12), rx="3", class_="random")
    if shown.low is not None and shown.high is not None:
        ends = _pc(axis.at(shown.low)), _pc(axis.at(shown.high))
        _add(svg, "line", x1=ends[0], x2=ends[1], y1="50%", y2="50%", class_=f"interval {shown.kind}")
        for end in ends:
            _add(svg, "line", x1=end, x2=end, y1=str(ROW / 2 - 5), y2=str(ROW / 2 + 5), class_=f"interval {shown.kind}")
    if shown.mean is not None:
        _mark(svg, axis.at(shown.mean), f"{ROW / 2:g}", shown.kind, f"{shown.steering}: {shown.difference}")
    return _done(svg)


def scale(axis: Axis, text: Callable[[float], str]) -> Markup:
    """The labelled axis under rows."""
    svg = _svg(22, None, "scale")
    for tick in axis.ticks:
        x = _pc(axis.at(tick))
        _add(svg, "line", x1=x, x2=x, y1="0", y2="4", class_="tick")
        _add(svg, "text", text(tick), x=x, y="18", text_anchor="middle")
    return _done(svg)


def control(shown: Control, axis: Axis) -> Markup:
    """Scores in a row: unsteered, the range of random heads, steered."""
    unit = shown.unit
    said = shown.sentence or (
        f"{shown.of} on {shown.task}: unsteered {unit.score(shown.baseline)}, random heads {unit.score(shown.random)} "
        f"(from {unit.score(shown.low)} to {unit.score(shown.high)}), steered {unit.score(shown.steered)}"
    )
    svg = _svg(ROW, said, "effect")
    _grid(svg, axis, "100%", zero=False)
    if shown.low is not None and shown.high is not None:
        low, high = axis.at(shown.low), axis.at(shown.high)
        width = max(high - low, 0.6)
        _add(svg, "rect", x=_pc(low), width=_pc(width), y="6", height=str(ROW - 12), rx="3", class_="random")
    if shown.baseline is not None:
        x = _pc(axis.at(shown.baseline))
        _add(svg, "line", x1=x, x2=x, y1="2", y2=str(ROW - 2), class_="unsteered")
    if shown.steered is not None:
        _mark(svg, axis.at(shown.steered), f"{ROW / 2:g}", shown.kind, f"{shown.of}: {unit.score(shown.steered)}")
    return _done(svg)


def curve(shown: Curve) -> Markup:
    """Score over strength; the dashed line is the unsteered model, an interval is that of the difference from it."""
    points = [p for p in shown.points if p.steered is not None and p.dose is not None]
    unit = shown.points[0].unit
    ends = [(_plus(p.baseline, p.low), _plus(p.baseline, p.high)) for p in points]
    values = [v for p, end in zip(points, ends, strict=True) for v in (p.baseline, p.steered, *end)]
    inside = [min(1.0, max(0.0, v)) if unit.percent else v for v in values if v is not None]
    if unit.percent and inside:
        # a few points must not fill the height
        middle = min(0.9, max(0.1, (min(inside) + max(inside)) / 2))
        inside += [middle - 0.1, middle + 0.1]
    y, x = Axis.over(inside, ticks=6), Axis.of_doses([p.dose or 0.0 for p in points] or [1.0])
    said = "; ".join(f"{p.dose:g}: {unit.score(p.steered)} ({p.verdict})" for p in points)
    baselines = [p.baseline for p in points if p.baseline is not None]
    unsteered = statistics.fmean(baselines) if baselines else None
    svg = _svg(PLOT, f"{shown.metric} on {shown.task} over {shown.parameter}: {said}", "curve")
    for tick in y.ticks:
        level = _pc(100 - y.at(tick))
        _add(svg, "line", x1="0", x2="100%", y1=level, y2=level, class_="rule")
        _add(svg, "text", unit.number(tick).removesuffix(".0"), x="-8", y=level, dy="0.35em", text_anchor="end")
    last = -math.inf
    for tick in x.ticks:
        place = x.at(tick)
        _add(svg, "line", x1=_pc(place), x2=_pc(place), y1="100%", y2=str(PLOT + 4), class_="tick")
        if place - last >= LEAST_GAP:
            _add(svg, "text", f"{tick:g}", x=_pc(place), y=str(PLOT + 18), text_anchor="middle")
            last = place
    if unsteered is not None:
        level = _pc(100 - y.at(unsteered))
        _add(svg, "line", x1="0", x2="100%", y1=level, y2=level, class_="baseline")
    places = [(x.at(p.dose or 0.0), 100 - y.at(p.steered or 0.0)) for p in points]
    for (x1, y1), (x2, y2) in pairwise(places):
        _add(svg, "line", x1=_pc(x1), y1=_pc(y1), x2=_pc(x2), y2=_pc(y2), class_="series")
    for point, (place, height), (low, high) in zip(points, places, ends, strict=True):
        if low is not None and high is not None:
            top, bottom = (_pc(100 - y.at(v)) for v in (high, low))
            _add(svg, "line", x1=_pc(place), x2=_pc(place), y1=top, y2=bottom, class_=f"interval {point.kind}")
        title = f"{shown.parameter}={point.dose:g}: {unit.score(point.steered)}, {point.difference}, {point.verdict}"
        _mark(svg, place, _pc(height), point.kind, title)
    return _done(svg)


def sample(kind: str) -> Markup:
    """A mark of a legend: better, worse, noise, random, unsteered (a score) or baseline (a line through a plot)."""
    svg = _svg(16, None, "sample")
    if kind == "random":
        _add(svg, "rect", x="3", y="3", width="22", height="10", rx="3", class_="random")
    elif kind == "unsteered":
        _add(svg, "line", x1="14", x2="14", y1="0", y2="16", class_="unsteered")
    elif kind == "baseline":
        _add(svg, "line", x1="2", x2="26", y1="8", y2="8", class_="baseline")
    else:
        _add(svg, "line", x1="2", x2="26", y1="8", y2="8", class_=f"interval {kind}")
        _mark(svg, 50, "8", kind, None)
    return _done(svg)


def shade(value: float, low: float, high: float) -> str:
    """Background and readable text colour of a heat map's cell, as CSS."""
    share = 1.0 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
    place = share * (len(_STOPS) - 1)
    first = min(int(place), len(_STOPS) - 2)
    red, green, blue = (
        round(a + (b - a) * (place - first)) for a, b in zip(_STOPS[first], _STOPS[first + 1], strict=True)
    )
    # by WCAG's relative luminance, the text colour with more contrast
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red / 255, green / 255, blue / 255)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    text = "#fff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000"
    return f"background:rgb({red},{green},{blue});color:{text}"


def tick_text(unit: Unit) -> Callable[[float], str]:
    """Signed labels of a difference's axis."""

    def text(value: float) -> str:
        return unit.change(value).removesuffix(".0") if value else "0"

    return text


def score_text(unit: Unit) -> Callable[[float], str]:
    """Labels of a score's axis."""
    return lambda value: unit.number(value).removesuffix(".0")


def _unevenness(values: Iterable[float]) -> float:
    gaps = [b - a for a, b in pairwise(values)]
    return statistics.pstdev(gaps) / statistics.fmean(gaps)


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _pc(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") + "%"


def _svg(height: int, said: str | None, name: str) -> ElementTree.Element:
    attributes = {"class": name, "height": str(height), "width": "100%"}
    attributes |= {"aria-hidden": "true"} if said is None else {"role": "img", "aria-label": said}
    return ElementTree.Element("svg", attributes)


def _add(parent: ElementTree.Element, tag: str, text: str | None = None, /, **attributes: Any) -> ElementTree.Element:
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    child = ElementTree.SubElement(parent, tag, named)
    child.text = text
    return child


def _grid(svg: ElementTree.Element, axis: Axis, height: str, *, zero: bool = True) -> None:
    for tick in axis.ticks:
        x = _pc(axis.at(tick))
        _add(svg, "line", x1=x, x2=x, y1="0", y2=height, class_="zero" if zero and tick == 0 else "rule")


def _mark(svg: ElementTree.Element, x: float, y: str, kind: str, title: str | None) -> None:
    """Kinds differ in shape too: better a disc, worse a diamond, noise a ring."""
    inner = _add(svg, "svg", x=_pc(x), y=y, overflow="visible")
    if kind == "worse":
        mark = _add(inner, "path", d="M0-7L7 0L0 7L-7 0Z", class_="mark worse")
    else:
        mark = _add(inner, "circle", r="5.5" if kind == "better" else "4.5", class_=f"mark {kind}")
    if title is not None:
        _add(mark, "title", title)


def _done(svg: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
