"""What a report shows: `summary.json` in groups."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from steerlens.evals.report.figures import (
    MISSING,
    Changed,
    Control,
    Curve,
    Effect,
    Failure,
    Forest,
    Grid,
    Grids,
    Group,
    Published,
    Samples,
    Task,
    Unit,
)

from steerlens.errors import SteerlensError

SCHEMA = 1
CONTROLS = ("random_heads", "neutral")
SHOWN_SAMPLES = 5
SHOWN_IN_ALL = 100
SHOWN_ERRORS = 20
LONGEST_PROMPT = 1600
LONGEST_ANSWER = 2000
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

T = TypeVar("T")


class ReportError(SteerlensError, ValueError):
    """A summary that no report can be made of."""

    exit_code = 2


class Report:
    """Everything that the pages show.

    Raises:
        ReportError: if the summary is not one, or of another schema.
    """

    def __init__(self, summary: Mapping[str, Any]) -> None:
        if not isinstance(summary, Mapping) or summary.get("schema") != SCHEMA:
            found = summary.get("schema") if isinstance(summary, Mapping) else summary
            raise ReportError(
                f"report: the summary has schema {found!r:.80}, this version reads {SCHEMA}; make it anew from the "
                "result folders with `steerlens eval --resume`"
            )
        self.summary: dict[str, Any] = clean(summary)
        try:
            self._read()
        except (KeyError, TypeError, AttributeError) as error:
            raise ReportError(
                f"report: the summary {summary.get('name')!r:.80} lacks what a report shows or holds something else "
                f"there: {error!r:.200}; make it anew from the result folders"
            ) from None

    def _read(self) -> None:
        summary = self.summary
        self.name = str(summary.get("name") or "evaluation")
        # lm-eval's dates have hyphens for colons, as file names
        self.date = re.sub(r"T(\d\d)[-:](\d\d).*", r" \1:\2", str(summary.get("date") or ""))
        self.models = tuple(_model(model) for model in summary.get("models") or ())
        self.tasks = tuple(_task(task) for task in summary.get("tasks") or ())
        units = _units(summary["comparisons"])
        every = tuple(_effect(entry, units[entry["metric"]]) for entry in summary["comparisons"])
        self.effects = tuple(e for e in every if e.role not in CONTROLS)
        self.control_runs = tuple(e for e in every if e.primary and e.role in CONTROLS)
        self.primary = tuple(e for e in self.effects if e.primary)
        self.secondary = tuple(e for e in self.effects if not e.primary)
        if not self.models:
            self.models = tuple(dict.fromkeys(e.model for e in every))
        self.confidence = every[0].confidence if every else 0.95
        self.forests = tuple(self._forests())
        self.curves = tuple(self._curves())
        self.grids = tuple(self._grids())
        self.controls = tuple(self._controls(units))
        self.published = tuple(_published(entry) for entry in summary.get("published") or ())
        self.samples = tuple(self._samples())
        self.unshown = sum(bool(e.changed) for e in self.primary) - len(self.samples)
        self.skipped = tuple(_skipped(entry) for entry in summary.get("skipped") or ())
        self.notes = tuple(map(str, summary.get("notes") or ()))
        self.failures = tuple(_failures(summary.get("errors") or ()))
        self.failed = len(summary.get("errors") or ())
        self.runs = tuple(summary.get("runs") or ())
        self.made = tuple(_made(summary, self.date))
        self.job = json.dumps(summary["job"], indent=2, ensure_ascii=False) if summary.get("job") else ""

    @property
    def level(self) -> str:
        """The confidence of the intervals."""
        return f"{100 * self.confidence:.4g}\u00a0%"

    def named(self, effect: Effect | Control) -> str:
        """A comparison in words: steering, task, and the model where there are several."""
        label = effect.steering if isinstance(effect, Effect) else effect.of
        return f"{label} on {effect.task}" + (f" ({effect.model})" if len(self.models) > 1 else "")

    def random_range(self, effect: Effect) -> tuple[float, float] | None:
        """Lowest and highest difference that random heads made, for the steering that they control."""
        for control in self.controls:
            if (*effect.key, effect.steering) == (control.model, control.task, control.metric, control.of):
                if control.low is None or control.high is None or effect.baseline is None:
                    return None
                return control.low - effect.baseline, control.high - effect.baseline
        return None

    def _forests(self) -> Iterator[Forest]:
        def axis(effect: Effect) -> tuple[str, str]:
            return effect.model, "" if effect.unit.percent else effect.metric

        for (model, metric), effects in grouped(self.primary, axis).items():
            groups = grouped(effects, lambda e: (e.task, e.metric))
            found = tuple(Group(task, tuple(group)) for (task, _), group in groups.items())
            yield Forest(model, effects[0].unit, metric or None, found)

    def _curves(self) -> Iterator[Curve]:
        def series(effect: Effect) -> tuple[str, str, str, str]:
            return effect.model, effect.of or effect.steering, effect.parameter or "", effect.task

        doses = [e for e in self.primary if e.dose is not None and e.parameter is not None]
        for points in grouped(doses, series).values():
            if len(points) > 1:
                first = points[0]
                ordered = tuple(sorted(points, key=lambda e: e.dose or 0.0))
                yield Curve(first.model, first.task, first.metric, first.parameter or "", ordered)

    def _grids(self) -> Iterator[Grids]:
        with_cells = [e for e in self.primary if len(e.cells) > 1]

        def shared(effect: Effect) -> tuple[str, ...]:
            before = [{k: v for k, v in cell.items() if k != "after"} for cell in effect.cells]
            return (*effect.key, json.dumps(before, sort_keys=True))

        for effects in grouped(with_cells, shared).values():
            first = effects[0]
            declared = next((t.get("cells") for t in self.summary.get("tasks") or () if t["task"] == first.task), None)
            names = [n for n in declared or first.cells[0] if n not in ("n", "before", "after")][:2]
            if not names:
                continue
            before = _grid("unsteered", first.cells, names, "before")
            grids = {e.steering: _grid(e.steering, e.cells, names, "after") for e in effects}
            swept = tuple(grids[e.steering] for e in effects if e.role == "sweep")
            after = tuple(grid for grid in grids.values() if grid not in swept)
            after, swept = (after, swept) if after else (swept, ())
            values = [v for grid in (before, *grids.values()) for v in grid.values.values()]
            low, high = (0.0, 1.0) if first.unit.percent else (min(values, default=0.0), max(values, default=1.0))
            yield Grids(first.model, first.task, first.metric, first.unit, low, high, before, after, swept)

    def _controls(self, units: Mapping[str, Unit]) -> Iterator[Control]:
        effects = {(*e.key, e.steering): e for e in self.effects}
        for entry in self.summary.get("controls") or ():
            found = effects.get((entry["model"], entry["task"], entry["metric"], entry["of"]))
            heads, against = entry.get("random_heads") or {}, entry.get("against_random") or {}
            low, high = _bounds(against.get("interval"))
            yield Control(
                model=entry["model"],
                task=entry["task"],
                metric=entry["metric"],
                of=entry["of"],
                unit=self._unit(units, entry),
                baseline=found.baseline if found else None,
                steered=found.steered if found else None,
                random=_number(heads.get("mean")),
                low=_number(heads.get("low")),
                high=_number(heads.get("high")),
                sets=heads.get("sets"),
                mean=_number(against.get("mean")),
                interval_low=low,
                interval_high=high,
                p=_number(against.get("p")),
                verdict=str(entry.get("verdict") or ""),
                sentence=str(entry.get("sentence") or ""),
                helped=found is not None and found.verdict == "better",
                neutral=entry.get("neutral_identical"),
            )

    def _unit(self, units: Mapping[str, Unit], entry: Mapping[str, Any]) -> Unit:
        return units.get(str(entry.get("metric")), Unit(False))

    def _samples(self) -> Iterator[Samples]:
        room = SHOWN_IN_ALL
        # what steering is judged by first: every comparison is represented before strengths of a sweep take the room
        for effect in sorted(self.primary, key=lambda e: e.role == "sweep"):
            if effect.changed and room:
                count = min(SHOWN_SAMPLES, room, len(effect.changed))
                room -= count
                shown = tuple(_changed(entry, effect) for entry in effect.changed[:count])
                yield Samples(effect, shown)


def clean(value: Any) -> Any:
    """The same JSON value with what cannot be printed or encoded replaced by U+FFFD."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value.replace("\r\n", "\n").replace("\r", "\n"))
    if isinstance(value, Mapping):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


def words(before: str, after: str) -> tuple[tuple[tuple[str, bool], ...], tuple[tuple[str, bool], ...]]:
    """Both texts in pieces, each with whether the other text differs there."""
    old, new = (re.findall(r"\s+|\S+", text) for text in (before, after))
    sides: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for side, piece in zip(sides, ("".join(old[a:b]), "".join(new[c:d])), strict=True):
            if piece:
                side.append((piece, kind != "equal"))
    return tuple(sides[0]), tuple(sides[1])


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _bounds(interval: Any) -> tuple[float | None, float | None]:
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    return _number(low), _number(high)


def _units(comparisons: Sequence[Mapping[str, Any]]) -> dict[str, Unit]:
    """A metric whose every score lies in [0, 1] is a share."""
    scores: dict[str, list[float]] = {}
    for entry in comparisons:
        found = scores.setdefault(entry["metric"], [])
        found += [v for v in map(_number, (entry.get("baseline"), entry.get("steered"))) if v is not None]
    return {metric: Unit(bool(found) and all(0 <= v <= 1 for v in found)) for metric, found in scores.items()}


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """By key, in the order in which keys come first."""
    found: dict[Any, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _model(model: Any) -> str:
    return str(model.get("id") or model.get("model") or model.get("name")) if isinstance(model, Mapping) else str(model)


def _task(entry: Mapping[str, Any]) -> Task:
    metrics = tuple(entry.get("metrics") or ())
    return Task(entry["task"], str(entry.get("summary") or ""), str(entry.get("primary") or ""), metrics)


def _effect(entry: Mapping[str, Any], unit: Unit) -> Effect:
    found = entry.get("difference") or {}
    low, high = _bounds(found.get("interval"))
    dose, changed = entry.get("dose") or {}, entry.get("changed") or []
    return Effect(
        model=entry["model"],
        task=entry["task"],
        metric=entry["metric"],
        steering=entry["after"],
        role=entry.get("role") or "method",
        of=entry.get("of"),
        parameter=dose.get("parameter"),
        dose=_number(dose.get("value")),
        primary=bool(entry.get("primary", True)),
        higher_is_better=entry.get("higher_is_better") is not False,
        n=int(entry.get("n") or 0),
        errors=int(entry.get("errors") or 0),
        baseline=_number(entry.get("baseline")),
        steered=_number(entry.get("steered")),
        mean=_number(found.get("mean")),
        low=low,
        high=high,
        confidence=_number(found.get("confidence")) or 0.95,
        p=_number(found.get("p")),
        p_holm=_number(entry.get("p_holm")),
        detectable=_number(entry.get("minimum_detectable")),
        verdict=entry["verdict"],
        sentence=str(entry.get("sentence") or ""),
        cells=tuple(entry.get("cells") or ()),
        changed=tuple(changed),
        changed_total=None if entry.get("changed_total") is None else int(entry["changed_total"]),
        unit=unit,
    )


def _grid(title: str, cells: Sequence[Mapping[str, Any]], names: Sequence[str], side: str) -> Grid:
    x, y = names[0], names[1] if len(names) > 1 else None
    sums: dict[tuple[Any, Any], float] = {}
    counts: dict[tuple[Any, Any], int] = {}
    for cell in cells:
        value, n = _number(cell.get(side)), int(cell.get("n") or 0)
        if value is not None and n > 0:
            # a third coordinate is averaged over
            place = cell.get(x), cell.get(y) if y else None
            sums[place] = sums.get(place, 0.0) + n * value
            counts[place] = counts.get(place, 0) + n
    values = {place: total / counts[place] for place, total in sums.items()}
    columns, rows = _ordered(place[0] for place in values), _ordered(place[1] for place in values)
    return Grid(title, x, y, columns, rows, values, counts)


def _ordered(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(sorted(set(values), key=lambda v: (_number(v) is None, _number(v) or 0.0, str(v))))


def _published(entry: Mapping[str, Any]) -> Published:
    # published and measured figures come in the unit that the job names
    percent = entry.get("unit", "percent") == "percent"

    def score(key: str) -> str:
        value = _number(entry.get(key))
        return MISSING if value is None else f"{value:.1f}\u00a0%" if percent else f"{value:.4g}"

    def change(value: float | None) -> str:
        return MISSING if value is None else f"{value:+.1f}" if percent else f"{value:+.3g}"

    def gain(before: str, after: str) -> str:
        a, b = _number(entry.get(before)), _number(entry.get(after))
        return change(None if a is None or b is None else b - a)

    low, high = _bounds(entry.get("interval"))
    return Published(
        model=str(entry.get("model") or MISSING),
        task=str(entry.get("task") or MISSING),
        metric=str(entry.get("metric") or MISSING),
        steering=str(entry.get("steering") or MISSING),
        source=str(entry.get("source") or MISSING),
        baseline=score("baseline"),
        steered=score("steered"),
        change=gain("baseline", "steered"),
        measured=entry.get("measured_steered") is not None,
        measured_baseline=score("measured_baseline"),
        measured_steered=score("measured_steered"),
        measured_change=gain("measured_baseline", "measured_steered"),
        interval=MISSING if low is None or high is None else f"[{change(low)}, {change(high)}]",
        agrees=str(entry.get("agrees") or "not measured here"),
        note=str(entry.get("note") or ""),
    )


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, Mapping) and "content" in m for m in value):
        return "\n".join(f"{m.get('role', '')}: {_text(m['content'])}" for m in value)
    if isinstance(value, list) and len(value) == 1:
        return _text(value[0])
    return json.dumps(value, ensure_ascii=False)


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    head, tail = longest // 3, longest - longest // 3
    return f"{text[:head]} … [{len(text) - longest} characters left out] … {text[-tail:]}"


def _changed(entry: Mapping[str, Any], effect: Effect) -> Changed:
    before, after = (_shortened(_text(entry.get(side)).strip(), LONGEST_ANSWER) for side in ("before", "after"))
    old, new = _number(entry.get("before_score")), _number(entry.get("after_score"))
    up = "same" if old is None or new is None or old == new else "up" if new > old else "down"
    sides = words(before, after)
    target = entry.get("target")
    return Changed(
        doc_id=str(entry.get("doc_id")),
        prompt=_shortened(_text(entry.get("prompt") or ""), LONGEST_PROMPT),
        target="" if target is None else _shortened(_text(target), LONGEST_ANSWER),
        before=sides[0],
        after=sides[1],
        before_score=MISSING if old is None else f"{old:.4g}",
        after_score=MISSING if new is None else f"{new:.4g}",
        kind=up,
    )


def _failures(errors: Sequence[Mapping[str, Any]]) -> Iterator[Failure]:
    def same(entry: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(entry.get(key) or MISSING) for key in ("model", "steering", "task", "error"))

    for (model, steering, task, error), entries in grouped(errors, same).items():
        docs = tuple(str(entry.get("doc_id")) for entry in entries)
        yield Failure(model, steering, task, _shortened(error, 600), docs)


def _skipped(entry: Mapping[str, Any]) -> tuple[str, str]:
    """A steering and where it did not run, and why."""
    where = "all tasks" if entry["task"] == "*" else entry["task"]
    return f"{entry['steering']} on {where}", str(entry.get("why") or "")


def _made(summary: Mapping[str, Any], date: str) -> Iterator[tuple[str, str]]:
    """Names and texts of what the summary says about how it was made."""
    if date:
        yield "Date", date
    labels = {
        "command": "Command",
        "versions": "Versions",
        "git_hash": "Commit",
        "fingerprint": "Fingerprint",
        "device": "Device",
        "seeds": "Seeds",
        "limit": "Samples asked for",
        "backend": "Backend",
        "seconds": "Seconds",
    }
    job = summary.get("job") if isinstance(summary.get("job"), Mapping) else {}
    for key, label in labels.items():
        value = summary.get(key, job.get(key) if isinstance(job, Mapping) else None)
        if value in (None, "", [], {}):
            continue
        if isinstance(value, Mapping):
            yield label, ", ".join(f"{name} {_text(item)}" for name, item in value.items() if item is not None)
        elif isinstance(value, list):
            yield label, (" " if key == "command" else ", ").join(map(_text, value))
        else:
            yield label, _text(value)
