"""What a job's result folders show: every steering against the baseline, its controls, and the published figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from steerlens.evals.compare import (
    CompareError,
    Comparison,
    Contrast,
    Document,
    Row,
    Run,
    compare,
    interval,
    load,
    newest,
    results_of,
    shown,
    verdict,
)
from steerlens.evals.doc import BASELINE

from steerlens.paired import Difference, difference, holm

CHANGED = 12
"""Samples shown of a comparison, at most."""
CLIPPED = 2000
"""Characters shown of a text, at most."""
SAME = 1e-4
"""How far numbers of one computation may lie apart, relative and absolute: batches differ in the order of additions."""

_ROLES = ("baseline", "method", "sweep", "random_heads", "neutral")


@dataclass(frozen=True)
class _Scores:
    """A task's primary metric per document, named by filter and document hash."""

    metric: str
    higher_is_better: bool
    of: dict[tuple[str, str], float]


@dataclass(frozen=True)
class _Side:
    """What is kept of a compared run: the rows of all runs at once would not fit for a large job.

    Attributes:
        run: its entry in the summary.
        scores: per task.
        moved: rows that differ from the baseline's, per task; of a neutral control only.
    """

    run: dict[str, Any]
    scores: dict[str, _Scores]
    moved: dict[str, int] = field(default_factory=dict)


def summarize(folder: str | Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """What the result folders of a job show, as plain JSON types.

    Every steering is compared with the baseline of its model, on every task and metric; Holm's correction is over the
    tasks of one steering. Random-head controls are averaged per document and compared with the method they belong to,
    with a correction of their own; the interval is over documents, for the sets that were drawn. A neutral control must
    give what the baseline gives, row by row.

    Args:
        folder: holds `<model>/<steering>/results_<date>.json` and the samples beside it.
        job: the resolved job: its order of models, steerings and tasks is kept; `published` is compared with.

    Raises:
        CompareError: if there are no results, a model has none of the baseline, or a file cannot be read; the message
            names file and line.
    """
    folder = Path(folder)
    places: dict[Path, list[Path]] = {}
    for place in sorted({path.parent for path in folder.glob("*/*/results_*.json")}):
        places.setdefault(place.parent, []).append(place)
    if not places:
        raise CompareError(f"{folder} holds no <model>/<steering>/results_<date>.json; run the job first")
    summary: dict[str, Any] = {
        "schema": 1,
        "name": str(job.get("name") or folder.name),
        "date": "",
        "models": [],
        "tasks": [],
        "runs": [],
        "comparisons": [],
        "controls": [],
        "published": [],
        "skipped": list(job.get("skipped") or []),
        "errors": [],
        "notes": [],
    }
    tasks: dict[str, dict[str, Any]] = {}
    for runs in places.values():
        _model(folder, runs, [_name(entry) for entry in job.get("steerings") or []], tasks, summary)
    models = [_name(entry) for entry in job.get("models") or []]
    order = [_name(entry) for entry in job.get("tasks") or []]
    summary["models"] = sorted(dict.fromkeys(run["model"] for run in summary["runs"]), key=_by(models))
    summary["tasks"] = sorted(tasks.values(), key=lambda task: _by(order)(task["task"]))
    for part in ("runs", "comparisons", "controls"):
        summary[part].sort(key=lambda entry: (summary["models"].index(entry["model"]), _by(order)(entry.get("task"))))
    for entry in job.get("published") or []:
        summary["published"] += _published(entry, summary["comparisons"])
    return summary


def _model(
    folder: Path,
    places: Sequence[Path],
    order: Sequence[str],
    tasks: dict[str, dict[str, Any]],
    summary: dict[str, Any],
) -> None:
    """Add what the runs of one model show."""
    steerings = {place: _steering(place) for place in places}
    baseline = next((place for place in places if steerings[place]["label"] == BASELINE), None)
    if baseline is None:
        there = ", ".join(steering["label"] for steering in steerings.values())
        raise CompareError(
            f"{places[0].parent} holds no run {BASELINE!r} to compare with, only {there}; resume the job"
        )
    before = load(baseline)

    def rank(place: Path) -> tuple[Any, ...]:
        steering = steerings[place]
        return (
            place != baseline,
            min(_by(order)(name) for name in (steering["label"], steering["of"] or steering["label"])),
            _ROLES.index(steering["role"]),
            steering["dose"]["value"] if steering["dose"] else 0,
            steering["label"],
        )

    sides: list[_Side] = []
    for place in sorted(places, key=rank):
        run = before if place == baseline else load(place)
        entry = {"model": before.model, **steerings[place], "folder": place.relative_to(folder).as_posix()}
        summary["runs"].append(entry)
        summary["date"] = max(summary["date"], run.date)
        summary["errors"] += _errors(before.model, run)
        for task in run.samples:
            tasks.setdefault(task, _described(run, task))
        if place == baseline:
            continue
        shared = [task for task in run.samples if task in before.samples]
        try:
            found = compare(before, run, tasks=shared)
        except CompareError as error:  # such as an error in every sample
            summary["notes"].append(f"{before.model}, {run.label}: {error}")
            continue
        said = [note for note in found.notes if note not in before.notes]
        summary["notes"] += [f"{before.model}, {run.label}: {note}" for note in said]
        summary["comparisons"] += [_compared(entry, contrast) for contrast in found.contrasts]
        sides.append(_side(entry, before, run, found))
    summary["controls"] += _controls(before.model, sides)


def _steering(place: Path) -> dict[str, Any]:
    path = newest(place)
    config = results_of(path).get("config")
    steering = config.get("steering") if isinstance(config, dict) else None
    if not isinstance(steering, dict) or not isinstance(steering.get("label"), str):
        raise CompareError(f"{path} does not say which steering of a job it is of (config.steering.label)")
    role = steering.get("role", "method")
    if role not in _ROLES:
        raise CompareError(f"{path}: config.steering.role is {role!r}; it must be one of {', '.join(_ROLES)}")
    return {"label": steering["label"], "role": role, "of": steering.get("of"), "dose": steering.get("dose")}


def _described(run: Run, task: str) -> dict[str, Any]:
    config = run.config(task)
    rows = run.samples[task].values()
    metrics = [metric for metric, single in run.metrics(task).items() if single]
    return {
        "task": task,
        "summary": str(config.get("summary") or config.get("description") or ""),
        "primary": metrics[0] if metrics else None,
        "metrics": metrics,
        "output": config.get("output") or config.get("output_type"),
        "cells": list(dict.fromkeys(name for row in rows for name in row.get("cell") or {})),
    }


def _errors(model: str, run: Run) -> list[dict[str, Any]]:
    # a filter of lm-eval's is a row of its own
    failed = {
        (task, row["seed"], row["doc_id"]): row["error"]
        for task, rows in run.samples.items()
        for row in rows.values()
        if "error" in row
    }
    return [
        {"model": model, "steering": run.label, "task": task, "seed": seed, "doc_id": doc_id, "error": error}
        for (task, seed, doc_id), error in failed.items()
    ]


def _compared(entry: Mapping[str, Any], contrast: Contrast) -> dict[str, Any]:
    found = contrast.to_dict()
    return {
        "model": entry["model"],
        "task": found.pop("task"),
        "metric": found.pop("metric"),
        "primary": found.pop("primary"),
        "before": BASELINE,
        "after": entry["label"],
        "role": entry["role"],
        "of": entry["of"],
        "dose": entry["dose"],
        "baseline": found.pop("before"),
        "steered": found.pop("after"),
        **found,
        "cells": _cells(contrast.documents),
        "changed": _changed(contrast) if contrast.primary and entry["role"] in ("method", "sweep") else [],
        "changed_total": sum(before != after for before, after in (d.scores for d in contrast.documents)),
    }


def _cells(documents: Iterable[Document]) -> list[dict[str, Any]]:
    """Mean scores per place in the task's grid, in the order of its coordinates."""
    grid: dict[str, tuple[dict[str, Any], list[tuple[float, float]]]] = {}
    for document in documents:
        cell = document.rows()[0].get("cell")
        if cell:
            grid.setdefault(json.dumps(cell, sort_keys=True), (cell, []))[1].append(document.scores)
    found = [
        {**cell, "n": len(scores), "before": _mean(x for x, _ in scores), "after": _mean(y for _, y in scores)}
        for cell, scores in grid.values()
    ]
    return sorted(found, key=lambda cell: [(isinstance(v, str), v) for v in cell.values()])


def _changed(contrast: Contrast) -> list[dict[str, Any]]:
    """Documents whose score changed: gains and losses in turn, the largest of each first."""
    gains = {id(d): d.scores[1] - d.scores[0] for d in contrast.documents}
    ranked = sorted((d for d in contrast.documents if gains[id(d)]), key=lambda d: -abs(gains[id(d)]))
    sides = [[d for d in ranked if (gains[id(d)] > 0) is positive] for positive in (True, False)]
    turns = [d for pair in zip_longest(*sides) for d in pair if d is not None]
    return [_sample(document) for document in turns[:CHANGED]]


def _sample(document: Document) -> dict[str, Any]:
    before, after = document.rows()
    return {
        "doc_id": before["doc_id"],
        "seed": before["seed"],
        "prompt": _clipped(_prompt(before)),
        "target": _clipped(_target(before)),
        "before": _clipped(_response(before)),
        "after": _clipped(_response(after)),
        "before_score": document.scores[0],
        "after_score": document.scores[1],
    }


def _arguments(row: Row) -> list[Mapping[str, Any]]:
    arguments = row.get("arguments")
    return list(arguments.values()) if isinstance(arguments, dict) else []


def _prompt(row: Row) -> str:
    arguments = _arguments(row)
    prompt = arguments[0].get("arg_0") if arguments else ""
    if isinstance(prompt, list):
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)
    return str(prompt)


def _choices(row: Row) -> list[str]:
    """The continuations that were compared; empty where text was generated."""
    arguments = _arguments(row)
    texts = [text for argument in arguments if isinstance(text := argument.get("arg_1"), str)]
    return texts if len(texts) == len(arguments) > 1 else []


def _target(row: Row) -> str:
    choices, target = _choices(row), str(row.get("target"))
    return choices[int(target)].strip() if target.isdecimal() and int(target) < len(choices) else target


def _response(row: Row) -> str:
    """What the model said, or the likeliest choice."""
    responses = row.get("filtered_resps")
    if not isinstance(responses, list):
        return str(responses)
    choices = _choices(row)
    if choices and len(choices) == len(responses):
        try:
            return choices[max(range(len(choices)), key=lambda i: float(responses[i][0]))].strip()
        except (TypeError, ValueError, IndexError):  # a filter of lm-eval may leave anything
            pass
    return "\n".join(response if isinstance(response, str) else json.dumps(response) for response in responses)


def _clipped(text: str) -> str:
    """Beginning and end of a long text, and what UTF-8 can hold of it."""
    text = text.encode(errors="replace").decode()
    half = CLIPPED // 2
    return text if len(text) <= CLIPPED else f"{text[: half - 3]} […] {text[-half + 2 :]}"


def _side(entry: dict[str, Any], before: Run, run: Run, found: Comparison) -> _Side:
    scores = {
        c.task: _Scores(c.metric, c.higher_is_better, {_identity(d): d.scores[1] for d in c.documents})
        for c in found.contrasts
        if c.primary
    }
    if entry["role"] != "neutral":
        return _Side(entry, scores)
    return _Side(entry, scores, {task: _moved(before, run, task) for task in run.samples if task in before.samples})


def _identity(document: Document) -> tuple[str, str]:
    row = document.rows()[0]
    return row["filter"], row["doc_hash"]


def _moved(before: Run, after: Run, task: str) -> int:
    """In how many rows the two differ, rows that only one has among them."""
    one, other = before.samples[task], after.samples[task]
    return sum(
        key not in one or key not in other or not _same(one[key], other[key]) for key in one.keys() | other.keys()
    )


def _same(one: Row, other: Row) -> bool:
    names = {*(one.get("metrics") or ()), *(other.get("metrics") or ())}
    return _alike(_responses(one), _responses(other)) and all(
        _alike(one.get(key), other.get(key)) for key in ("error", "logprob", *names)
    )


def _responses(row: Row) -> Any:
    """Texts as they are, and log-likelihoods as numbers, which lm-eval writes as texts.

    Whether a choice is the greedy one is left out: of a decoding method that is not always known.
    """
    found = row.get("filtered_resps")
    if not isinstance(found, list):
        return found
    return [
        [_as_number(part) for part in response if str(part) not in ("True", "False")]
        if isinstance(response, list)
        else response
        for response in found
    ]


def _as_number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=SAME, abs_tol=SAME) or (one != one and other != other)
    return bool(one == other)


def _controls(model: str, sides: Sequence[_Side]) -> list[dict[str, Any]]:
    """Per controlled steering and task: how it does against random heads, and whether neutral strength is neutral."""
    found = []
    for side in sides:
        label = side.run["label"]
        mine = [control for control in sides if control.run["of"] == label]
        against: dict[str, _AgainstRandom | None] = {}
        for task, scores in side.scores.items():
            drawn = [c.scores[task].of for c in mine if c.run["role"] == "random_heads" and task in c.scores]
            against[task] = _against_random(scores, drawn)
        tested = {task: test.contrast.p for task, test in against.items() if test}
        adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
        for task, test in against.items():
            moved = [c.moved[task] for c in mine if c.run["role"] == "neutral" and task in c.moved]
            if test or moved:
                found.append(
                    {
                        "model": model,
                        "task": task,
                        "metric": side.scores[task].metric,
                        "of": label,
                        **(test.described(f"{task}: {label}", adjusted[task], len(adjusted)) if test else _UNTESTED),
                        "neutral_identical": not any(moved) if moved else None,
                        "neutral_changed": sum(moved) if moved else None,
                    }
                )
    return found


_UNTESTED = dict.fromkeys(("random_heads", "against_random", "p_holm", "verdict", "sentence"))


@dataclass(frozen=True)
class _AgainstRandom:
    """A steering's scores beside those of its random-head sets."""

    own: float
    means: tuple[float, ...]
    contrast: Difference
    higher_is_better: bool

    def described(self, what: str, p_holm: float, tests: int) -> dict[str, Any]:
        mean, low, high = _mean(self.means), min(self.means), max(self.means)
        word = verdict(replace(self.contrast, p=p_holm), self.higher_is_better)
        adjusted = f", {p_holm:.2g} after Holm's correction for {tests} tests" if tests > 1 else ""
        return {
            "random_heads": {"mean": mean, "low": low, "high": high, "sets": len(self.means)},
            "against_random": self.contrast.to_dict(),
            "p_holm": p_holm,
            "verdict": word,
            "sentence": (
                f"{what} {shown(self.own)} against {shown(mean)} with random heads ({len(self.means)} drawn, "
                f"{shown(low)} to {shown(high)}) on {self.contrast.n} documents, a difference of "
                f"{interval(self.contrast)}, p = {self.contrast.p:.2g}{adjusted}: {word}."
            ),
        }


def _against_random(scores: _Scores, sets: Sequence[Mapping[tuple[str, str], float]]) -> _AgainstRandom | None:
    """On the documents that all have a score of; each counts with its mean over the sets."""
    shared = [key for key in scores.of if all(key in drawn for drawn in sets)]
    if not sets or not shared:
        return None
    own, averaged = [scores.of[key] for key in shared], [_mean(drawn[key] for drawn in sets) for key in shared]
    means = tuple(_mean(drawn[key] for key in shared) for drawn in sets)
    return _AgainstRandom(_mean(own), means, difference(averaged, own), scores.higher_is_better)


def _published(entry: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The published figures with ours, one for each model of the job that they are set beside."""
    found = [
        c
        for c in comparisons
        if (c["after"], c["task"]) == (entry["steering"], _name(entry["task"]))
        and (c["primary"] if entry.get("metric") is None else entry["metric"] in (c["metric"], _plain(c["metric"])))
        and entry.get("model") in (None, c["model"])
    ]
    if not found:
        nothing = {"measured_baseline": None, "measured_steered": None, "interval": None}
        return [{**entry, **nothing, "agrees": "not measured here"}]
    return [_beside(entry, comparison) for comparison in found]


def _beside(entry: Mapping[str, Any], comparison: Mapping[str, Any]) -> dict[str, Any]:
    baseline, steered = comparison["baseline"], comparison["steered"]
    shift = comparison["difference"]
    percent = entry.get("unit", "percent") == "percent" and 0 <= min(baseline, steered) <= max(baseline, steered) <= 1
    scale = 100 if percent else 1
    mean, low, high = (scale * value for value in (shift["mean"], *shift["interval"]))
    ours = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" if percent else f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"
    if entry.get("baseline") is None or entry.get("steered") is None:
        agrees = f"no published difference to compare with; measured {ours}"
    elif entry.get("other_model") is not None:
        agrees = _direction(entry, comparison, ours)
    else:
        theirs = entry["steered"] - entry["baseline"]
        within = low <= theirs <= high
        agrees = (
            f"{'agrees' if within else 'differs'}: the published difference {theirs:+.3g} lies "
            f"{'in' if within else 'outside'} the measured {ours}, n = {shift['n']}"
        )
    return {
        **entry,
        "model": comparison["model"],
        "metric": comparison["metric"],
        "measured_baseline": scale * baseline,
        "measured_steered": scale * steered,
        "interval": [low, high],
        "agrees": agrees,
    }


def _direction(entry: Mapping[str, Any], comparison: Mapping[str, Any], ours: str) -> str:
    """What a figure of another model says about ours: the way it goes, and no more."""
    theirs = entry["steered"] - entry["baseline"]
    if comparison["verdict"] == "within noise":
        word = "no direction to compare, within noise"
    else:
        word = "same direction" if theirs * comparison["difference"]["mean"] > 0 else "other direction"
    return (
        f"{word}: published {theirs:+.3g} on another model ({entry['other_model']}), measured {ours}, "
        f"n = {comparison['difference']['n']}"
    )


def _plain(metric: str) -> str:
    return metric.partition(",")[0]


def _name(entry: Any) -> str:
    """Of a model, steering or task in a job."""
    keys = ("label", "id", "recipe", "task", "lm_eval")
    name = str(next((entry[key] for key in keys if entry.get(key)), "") if isinstance(entry, Mapping) else entry)
    return Path(name).stem if name.endswith((".yaml", ".yml")) else name  # a task's file has its name


def _by(order: Sequence[str]) -> Any:
    """A key that sorts names as in `order`, and others behind."""
    return lambda name: order.index(name) if name in order else len(order)


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return math.fsum(every) / len(every)
