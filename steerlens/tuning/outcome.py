"""What a search leaves behind: a recipe with its evidence, a report, the ranking of heads, and a table."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from steerlens import __version__
from steerlens.facts import ModelFacts
from steerlens.measures.base import HeadScores
from steerlens.paired import Difference, sign
from steerlens.recipe import Evidence, Recipe, RecipeModel
from steerlens.tuning.search import Outcome, Profiled, Settings

NAMES = {"baseline": "unsteered", "default": "default", "random": "random heads", "tuned": "tuned"}
AGAINST = {"baseline": "the unsteered model", "default": "the method's defaults", "random": "random heads"}
SCORES = {"accuracy": "accuracy", "logprob": "log-prob", "entropy": "entropy"}
UNITS = {"head": "heads", "index": "head indices", "layer": "layers"}


def recipe(outcome: Outcome, name: str, model: str, revision: str | None, facts: ModelFacts, task: str) -> Recipe:
    """The choice as a recipe, its evidence from the test split."""
    heads = set(facts.heads) - {0}
    metric = "entropy" if math.isnan(outcome.sides["tuned"].accuracy) else "accuracy"
    found = outcome.contrasts["baseline"][metric]
    evidence = Evidence(
        metric=metric,
        baseline=_round(getattr(outcome.sides["baseline"], metric)),
        steered=_round(getattr(outcome.sides["tuned"], metric)),
        n=found.n,
        interval=[_round(found.low), _round(found.high)],
        date=datetime.datetime.now(datetime.UTC).date(),
    )
    made_for = RecipeModel(
        id=model, revision=revision, layers=facts.layers, heads=heads.pop() if len(heads) == 1 else None
    )
    return Recipe.model_validate(
        {"schema": 1, "name": name, "model": made_for, "methods": [outcome.method], "task": task, "evidence": evidence}
    )


def report(outcome: Outcome, settings: Settings, run: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as plain JSON types; `run` says what else shaped it."""
    from importlib.metadata import version

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"steerlens": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers")},
        "run": dict(run),
        "settings": settings.to_dict(),
        "forwards": outcome.forwards,
        "method": outcome.method.to_dict(),
        "notes": outcome.notes,
        "test": {
            side: {
                "accuracy": _number(found.accuracy),
                "logprob": _number(found.logprob),
                "entropy": _number(found.entropy),
                "versus_unsteered": {key: d.to_dict() for key, d in found.versus.items()},
            }
            for side, found in outcome.sides.items()
        },
        "tuned_versus": {
            side: {key: d.to_dict() for key, d in found.items()} for side, found in outcome.contrasts.items()
        },
        "random_heads": [heads.to_json() for heads in outcome.controls],
        "effective_heads": effective(outcome.profile),
        "validation": [{"method": m.to_dict(), "gain": gain, "n": n} for m, gain, n in outcome.tried],
        "profile": [
            {
                "setting": p.setting,
                "task": p.task,
                "unit": [f"{layer}-{head}" for layer, head in p.unit],
                "gain": p.gain,
                "standard_error": p.error,
                "n": p.n,
            }
            for p in outcome.profile
        ],
    }


def effective(profile: Sequence[Profiled]) -> dict[str, dict[str, int]]:
    """Per setting (ZeroTuning: up and down) how many units gain, and how many of them by more than two errors.

    A unit counts where it gains on every task it was profiled on.
    """
    found: dict[str, dict[str, int]] = {}
    for setting in dict.fromkeys(p.setting for p in profile):
        units: dict[Any, list[Profiled]] = {}
        for p in profile:
            if p.setting == setting:
                units.setdefault(p.unit, []).append(p)
        found[setting] = {
            "units": len(units),
            "gain": sum(all(p.gain > 0 for p in ps) for ps in units.values()),
            "beyond_noise": sum(all(p.gain > 2 * p.error and p.n > 1 for p in ps) for ps in units.values()),
        }
    return found


def head_scores(outcome: Outcome, settings: Settings, model: Mapping[str, Any]) -> dict[str, HeadScores]:
    """The gains of single heads per setting, where single heads were profiled; the lowest over several tasks."""
    if settings.per != "head":
        return {}
    found: dict[str, HeadScores] = {}
    for setting in dict.fromkeys(p.setting for p in outcome.profile):
        gains: dict[tuple[int, int], float] = {}
        for p in outcome.profile:
            if p.setting == setting:
                gains[p.unit[0]] = min(p.gain, gains.get(p.unit[0], math.inf))
        measure = f"{settings.method.name} gain" + (f", {setting}" if setting not in ("default", "fixed") else "")
        found[setting] = HeadScores(
            measure, model, {head: (gain,) for head, gain in gains.items()}, settings=settings.to_dict()
        )
    return found


def table(outcome: Outcome, settings: Settings) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the test split: scores, and the differences from the unsteered model."""
    differ = _judged(outcome, settings)
    shown = ["accuracy", "entropy"] if "accuracy" in differ else ["entropy"]
    if differ == ["accuracy"]:
        shown.insert(1, "logprob")
    columns = [""]
    for key in shown:
        columns += [SCORES[key], *(["difference [95 %]"] if key in differ else [])]
    rows = []
    for side, found in outcome.sides.items():
        row = [NAMES[side]]
        for key in shown:
            value = getattr(found, key)
            row.append(f"{100 * value:.1f} %" if key == "accuracy" else f"{value:.3f}")
            if key in differ:
                row.append(interval(found.versus[key], key) if found.versus else "")
        rows.append(row)
    return columns, rows


def sentences(outcome: Outcome, settings: Settings) -> list[str]:
    """The verdicts in words."""
    found = []
    for side, contrasts in outcome.contrasts.items():
        for key in _judged(outcome, settings):
            d, verdict = contrasts[key], sign(contrasts[key])
            if key == "entropy" and verdict != "within noise":
                verdict = "lower" if d.mean < 0 else "higher"
            text = f"{key} {interval(d, key, mark=False)}, p = {d.p:.2g}: {verdict}"
            found.append(f"tuned against {AGAINST[side]}: {text}")
    for setting, counts in effective(outcome.profile).items():
        name = "" if setting in ("default", "fixed") else f"{setting}-"
        found.append(
            f"{name}effective {UNITS[settings.per]}: {counts['gain']} of {counts['units']} gain when steered alone, "
            f"{counts['beyond_noise']} of them beyond noise"
        )
    return found + outcome.notes


def _judged(outcome: Outcome, settings: Settings) -> list[str]:
    """The scores that a difference is shown of: the objective's, and the accuracy where there are answers."""
    answered = not math.isnan(outcome.sides["baseline"].accuracy)
    return [*(["entropy"] if settings.objective == "entropy" else []), *(["accuracy"] if answered else [])]


def interval(d: Difference, key: str, mark: bool = True) -> str:
    """A difference with its interval, accuracy in percent, marked where it is within noise."""
    values = (d.mean, d.low, d.high)
    if key == "accuracy":
        # adding 0 makes a rounded -0 a 0
        mean, low, high = (f"{round(100 * value, 1) + 0.0:+.1f}" for value in values)
    else:
        mean, low, high = (f"{value:+.2g}" for value in values)
    text = f"{mean} [{low}, {high}]"
    return f"{text} within noise" if mark and d.noise else text


def _round(value: float) -> float:
    return round(value, 4)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
