"""The search: profile heads one unit at a time, choose a set and a strength, compare once on an untouched split.

1. *Profile*: every unit (a head, a head index in all layers, or a layer) steered alone, on the profile split, by
   successive halving. Units are ranked by the mean gain over the unsteered model.
2. *Choose*: the top k of the ranking for several k, all units that gained, and all heads, with the method's strengths;
   on the validation split, by successive halving, or by Optuna's sampler. Of those that are
   within a standard error of the best, the one with fewest heads.
3. *Test*: the choice, the method's defaults, and random sets of other heads of the same size, against the unsteered
   model on the test split, in pairs.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from steerlens.errors import MethodError, SteerlensError
from steerlens.examples import Example, ExampleError
from steerlens.facts import ModelFacts
from steerlens.heads import Heads, draw_others
from steerlens.methods.base import EditMethod
from steerlens.paired import Difference, difference
from steerlens.tuning import halving
from steerlens.tuning.journal import Journal, name
from steerlens.tuning.scoring import Candidate, Score, Scorer

Head = tuple[int, int]
Unit = tuple[Head, ...]
Per = Literal["head", "index", "layer"]
Objective = Literal["logprob", "accuracy", "entropy"]
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
FINALISTS = 8
"""Choices that are judged by the whole validation split, as far as the budget goes."""


class TuneError(SteerlensError, ValueError):
    """A search that cannot be done as asked."""

    exit_code = 2


@dataclass(frozen=True)
class Settings:
    """How to search.

    Attributes:
        method: the method's class; it needs heads to choose, or strengths.
        fixed: parameters that are not searched.
        objective: what is maximised: `logprob` of the answer, `accuracy` of greedy decoding, or `entropy` of the next
            token, minimised (needs no answers; ZeroTuning's unsupervised variant).
        per: what is profiled: each head, each head index in all layers, or each layer.
        within: heads to choose from.
        budget: forwards, one prompt row of one candidate each.
        controls: random head sets compared on the test split.
        seed: of the controls, the bootstrap and the sampler.
        sampler: `grid`, or `optuna`, which draws strengths from between the ends of the grid.
    """

    method: type[EditMethod]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    objective: Objective = "logprob"
    per: Per = "head"
    within: Heads = field(default_factory=lambda: Heads(None))
    budget: int = 10_000
    controls: int = 5
    seed: int = 0
    sampler: Literal["grid", "optuna"] = "grid"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        found = asdict(self) | {"method": self.method.name, "within": str(self.within)}
        return found | {"fixed": dict(self.fixed)}


@dataclass(frozen=True)
class Profiled:
    """One unit under one setting: its mean gain and standard error over `n` profile examples."""

    setting: str
    task: str
    unit: Unit
    gain: float
    error: float
    n: int


@dataclass(frozen=True)
class Side:
    """One side of the test: its mean scores, and its paired differences from the unsteered model."""

    name: str
    accuracy: float
    logprob: float
    entropy: float
    versus: Mapping[str, Difference]


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        method: the choice.
        gained: whether it was better than the unsteered model on the validation split, be it by chance.
        profile: every unit that was profiled, best first per setting and task.
        tried: candidates of the choice with their mean gain and examples on the validation split, best first.
        sides: `baseline`, `default`, `random` (mean over the control sets) and `tuned` on the test split.
        contrasts: paired differences of `tuned` from the other sides, per score.
        controls: the random head sets.
        forwards: what was spent.
        notes: what a reader should know.
    """

    method: EditMethod
    gained: bool
    profile: list[Profiled]
    tried: list[tuple[EditMethod, float, int]]
    sides: dict[str, Side]
    contrasts: dict[str, dict[str, Difference]]
    controls: list[Heads]
    forwards: int
    notes: list[str]


class Search:
    """One search.

    Args:
        scorer: scores candidates on the model.
        settings: how to search.
        profile: examples per task whose rankings are intersected.
        validation, test: examples to choose and to compare on.
        journal: keeps every score.
        advance: called with the forwards of every batch; `planned` is about how many there will be.
    """

    def __init__(
        self,
        scorer: Scorer,
        facts: ModelFacts,
        settings: Settings,
        profile: Mapping[str, Sequence[Example]],
        validation: Sequence[Example],
        test: Sequence[Example],
        journal: Journal,
        advance: Callable[[int], None] = lambda forwards: None,
    ) -> None:
        self.scorer, self.facts, self.settings, self.journal, self.advance = scorer, facts, settings, journal, advance
        self.splits: dict[str, Sequence[Example]] = {f"profile {task}": found for task, found in profile.items()}
        self.splits |= {"validation": validation, "test": test}
        self.tasks = list(profile)
        self.forwards = 0
        self.notes: list[str] = []
        self._known: dict[tuple[str, str, int], Score] = {}
        self._random = random.Random(settings.seed)
        self.units = self._units()
        check(scorer, settings, [example for found in self.splits.values() for example in found])
        self.shares = self._shares()

    # --- what is searched --------------------------------------------------------------------------------------------

    def _units(self) -> list[Unit]:
        if "heads" not in self.settings.method.__dataclass_fields__ or "heads" in self.settings.fixed:
            return []
        heads = [(layer, h) for layer, found in self.settings.within.resolve(self.facts).items() for h in found]
        key = {"head": lambda at: at, "index": lambda at: at[1], "layer": lambda at: at[0]}[self.settings.per]
        groups: dict[Any, list[Head]] = {}
        for head in heads:
            groups.setdefault(key(head), []).append(head)
        return [tuple(sorted(found)) for _, found in sorted(groups.items())]

    def _make(self, values: Mapping[str, Any], heads: Sequence[Head] | None) -> EditMethod:
        parameters = {**values, **self.settings.fixed}
        if self.units:
            every = {head for unit in self.units for head in unit}
            whole = self.settings.within.table is None and (heads is None or set(heads) == every)
            parameters["heads"] = "all" if whole else _table(heads or sorted(every))
        return self.settings.method.from_parameters(parameters)

    def _settings(self) -> dict[str, Mapping[str, Any]]:
        """Settings in which units are profiled; one if what tells them apart is fixed."""
        found: dict[str, Mapping[str, Any]] = {}
        for label, values in self.settings.method.profile.items():
            free = {k: v for k, v in values.items() if k not in self.settings.fixed}
            if free or not values:
                found[label] = free
        return found or {"fixed": {}}

    def _strengths(self, setting: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The grid of the free parameters, on the side that a setting was profiled on."""
        search = {k: v for k, v in self.settings.method.search.items() if k not in self.settings.fixed}
        grids = []
        for parameter, space in search.items():
            values = space.grid
            if parameter in setting and space.neutral is not None:
                up = setting[parameter] > space.neutral
                values = tuple(v for v in values if (v > space.neutral) == up)
            grids.append([(parameter, v) for v in values])
        return [dict(combination) for combination in itertools.product(*grids)]

    def _shares(self) -> dict[str, int]:
        """Forwards of each stage.

        Raises:
            TuneError: with the least budget, if it is too small.
        """
        sizes = {split: len(found) for split, found in self.splits.items()}
        sides = 2 + bool(self._default()) + (self.settings.controls if self.units else 0)
        test = sides * sizes["test"]
        profiled = len(self._settings()) * len(self.tasks) if self.units else 0
        base = sum(sizes.values()) - sizes["test"]
        left = self.settings.budget - test - base
        keep = self._kept()
        strengths = max(len(self._strengths(s)) for s in self._settings().values())
        sets = (len([k for k in SIZES if k <= max(1, len(self.units) // 2)]) + 2) if self.units else 1
        candidates = sets * strengths * max(1, len(self._settings()) if self.units else 1)
        fewest = min(sizes[f"profile {task}"] for task in self.tasks)
        most = max(sizes[f"profile {task}"] for task in self.tasks)
        least_profile = profiled * halving.least(len(self.units), most, keep) if profiled else 0
        least_choice = halving.least(candidates, sizes["validation"], FINALISTS)
        least = max(2 * least_profile, 2 * least_choice) if profiled else least_choice
        if left < least:
            raise TuneError(
                f"--budget {self.settings.budget} is too small: {test} forwards go to the test split, {base} to the "
                f"unsteered model, and a search over {len(self.units) or 'no'} units and {candidates} choices needs "
                f"{least}; give at least {test + base + least}, fewer --controls, or smaller splits"
            )
        share = left // 2 // profiled if profiled else 0
        profile = 0
        if profiled:
            rungs = halving.schedule(len(self.units), fewest, share, keep)
            profile = profiled * halving.cost(rungs)
        choice = halving.cost(halving.schedule(candidates, sizes["validation"], left - profile, FINALISTS))
        self.planned = test + base + profile + choice
        return {"test": test, "profile": share}

    def _kept(self) -> int:
        return max(1, min(len(self.units), max(8, len(self.units) // 8)))

    def _default(self) -> EditMethod | None:
        """The method as it comes, where it comes with heads."""
        try:
            return self.settings.method.from_parameters({})
        except MethodError:
            return None

    # --- the stages --------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """All stages."""
        profile = self._profile() if self.units else []
        tried = self._choose(self._sets(profile))
        best, gain = self._simplest(tried)
        if gain <= 0:
            self.notes.append("no choice was better than the unsteered model on the validation split")
        else:
            gains = self._gains([best], "validation", max(n for _, _, n in tried))[0]
            if difference([0.0] * len(gains), gains, seed=self.settings.seed).noise:
                self.notes.append("the choice's gain on the validation split is within noise")
        sides, contrasts, controls = self._test(best)
        return Outcome(best, gain > 0, profile, tried, sides, contrasts, controls, self.forwards, self.notes)

    def _profile(self) -> list[Profiled]:
        found: list[Profiled] = []
        for (label, values), task in itertools.product(self._settings().items(), self.tasks):
            split = f"profile {task}"
            candidates = [self._make(values, unit) for unit in self.units]
            order = self._halve(candidates, split, self.shares["profile"], self._kept())
            for index, gain, error, n in order:
                found.append(Profiled(label, task, self.units[index], gain, error, n))
        return found

    def _sets(self, profile: Sequence[Profiled]) -> list[tuple[str, Unit | None]]:
        """(setting, heads) to choose from; None for every head."""
        sets: list[tuple[str, Unit | None]] = []
        for label in self._settings():
            rankings = [[p for p in profile if (p.setting, p.task) == (label, task)] for task in self.tasks]
            found: list[Unit | None] = []
            if self.units:
                for k in [k for k in SIZES if k <= max(1, len(self.units) // 2)]:
                    common = set.intersection(*({p.unit for p in ranking[:k]} for ranking in rankings))
                    found.append(_union(common))
                better = set.intersection(*({p.unit for p in ranking if p.gain > 0} for ranking in rankings))
                found.append(_union(better))
            found.append(None)
            sets += [(label, heads) for heads in dict.fromkeys(found) if heads is None or heads]
        return sets

    def _choose(self, sets: Sequence[tuple[str, Unit | None]]) -> list[tuple[EditMethod, float, int]]:
        budget = self.settings.budget - self.shares["test"] - self.forwards - len(self.splits["validation"])
        if self.settings.sampler == "optuna":
            return self._draw(sets, budget)
        settings = self._settings()
        described: dict[str, EditMethod] = {}
        for label, heads in sets:
            for strength in self._strengths(settings[label]):
                method = self._make(strength, heads)
                described.setdefault(name(method.to_dict()), method)
        candidates = list(described.values())
        order = self._halve(candidates, "validation", budget, FINALISTS)
        return [(candidates[index], gain, n) for index, gain, _, n in order]

    def _simplest(self, tried: Sequence[tuple[EditMethod, float, int]]) -> tuple[EditMethod, float]:
        """Of those that are within one standard error of the best, the one with fewest heads and mildest strength."""
        n = max(n for _, _, n in tried)
        finalists = [(method, gain) for method, gain, seen in tried if seen == n]
        gains = self._gains([method for method, _ in finalists], "validation", n)
        top = max(range(len(finalists)), key=lambda i: finalists[i][1])
        close = []
        for (method, gain), own in zip(finalists, gains, strict=True):
            lost = [b - a for a, b in zip(own, gains[top], strict=True)]
            error = statistics.stdev(lost) / math.sqrt(n) if n > 1 else 0.0
            # what did not gain is no simpler way to gain
            if statistics.fmean(lost) <= error and (gain > 0 or finalists[top][1] <= 0):
                close.append((self._size(method), -gain, method))
        _, gain, method = min(close, key=lambda item: item[:2])
        return method, -gain

    def _size(self, method: EditMethod) -> tuple[int, float]:
        heads = getattr(method, "heads", None)
        count = 0 if heads is None else sum(map(len, heads.resolve(self.facts).values()))
        away = 0.0
        for parameter, space in method.search.items():
            value = getattr(method, parameter)
            if space.neutral is None:
                continue
            if space.log and space.neutral > 0 and value > 0:
                away += abs(math.log(value / space.neutral))
            else:
                away += abs(value - space.neutral)
        return count, away

    def _draw(self, sets: Sequence[tuple[str, Unit | None]], budget: int) -> list[tuple[EditMethod, float, int]]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        settings, n = self._settings(), min(len(self.splits["validation"]), budget)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=self.settings.seed))
        found: dict[str, tuple[EditMethod, float, int]] = {}
        for _ in range(max(1, budget // n)):
            trial = study.ask()
            label, heads = sets[trial.suggest_categorical("set", list(range(len(sets))))]
            values = {}
            for parameter, space in self.settings.method.search.items():
                grid = [s[parameter] for s in self._strengths(settings[label]) if parameter in s]
                if grid:
                    drawn = trial.suggest_float(
                        f"{label} {parameter}", min(grid), max(grid), log=space.log and min(grid) > 0
                    )
                    values[parameter] = float(f"{drawn:.3g}")
            method = self._make(values, heads)
            gain = statistics.fmean(self._gains([method], "validation", n)[0])
            study.tell(trial, gain)
            found[name(method.to_dict())] = (method, gain, n)
        return sorted(found.values(), key=lambda item: -item[1])

    def _test(self, best: EditMethod) -> tuple[dict[str, Side], dict[str, dict[str, Difference]], list[Heads]]:
        n = len(self.splits["test"])
        controls = self._controls(best)
        methods: dict[str, Candidate] = {"baseline": None}
        if default := self._default():
            methods["default"] = default
        methods |= {f"random {i}": self._with_heads(best, heads) for i, heads in enumerate(controls)}
        methods["tuned"] = best
        scores = dict(zip(methods, self._evaluate(list(methods.values()), "test", n), strict=True))
        columns = {
            side: {key: [getattr(s, key) for s in found] for key in ("hit", "logprob", "entropy")}
            for side, found in scores.items()
        }
        if controls:
            rows = [columns.pop(f"random {i}") for i in range(len(controls))]
            columns["random"] = {
                key: [statistics.fmean(values) for values in zip(*(row[key] for row in rows), strict=True)]
                for key in rows[0]
            }
        order: list[str] = [side for side in ("baseline", "default", "random", "tuned") if side in columns]
        answered = not any(math.isnan(hit) for hit in columns["baseline"]["hit"])
        keys = ["hit", "logprob", "entropy"] if answered else ["entropy"]

        def contrast(before: str, after: str) -> dict[str, Difference]:
            seed = self.settings.seed
            return {
                "accuracy" if key == "hit" else key: difference(columns[before][key], columns[after][key], seed=seed)
                for key in keys
            }

        sides = {
            side: Side(
                side,
                statistics.fmean(columns[side]["hit"]),
                statistics.fmean(columns[side]["logprob"]),
                statistics.fmean(columns[side]["entropy"]),
                {} if side == "baseline" else contrast("baseline", side),
            )
            for side in order
        }
        return sides, {side: contrast(side, "tuned") for side in order if side != "tuned"}, controls

    def _controls(self, best: EditMethod) -> list[Heads]:
        """Random head sets of the same size without any of the chosen heads."""
        if not self.units or not self.settings.controls:
            return []
        found = draw_others(best.heads, self.facts, self.settings.controls, self._random)  # type: ignore[attr-defined]
        if not found:
            table: dict[int, tuple[int, ...]] = best.heads.resolve(self.facts)  # type: ignore[attr-defined]
            chosen = sum(len(heads) for heads in table.values())
            left = sum(self.facts.heads) - chosen
            self.notes.append(f"no random-head control: {chosen} heads are chosen, {left} are left to draw from")
        return found

    def _with_heads(self, method: EditMethod, heads: Heads) -> EditMethod:
        described = {k: v for k, v in method.to_dict().items() if k != "method"}
        return type(method).from_parameters(described | {"heads": heads})

    # --- scores ------------------------------------------------------------------------------------------------------

    def _halve(
        self, candidates: Sequence[EditMethod], split: str, budget: int, keep: int
    ) -> list[tuple[int, float, float, int]]:
        """(index, mean gain, its standard error, examples) of every candidate, best first, later rungs before."""
        rungs = halving.schedule(len(candidates), len(self.splits[split]), budget, keep)
        if not rungs:
            raise TuneError(
                f"--budget {self.settings.budget} is too small: {budget} forwards are left for {len(candidates)} "
                f"candidates on the {split} split; give {halving.least(len(candidates), 10**9, keep) - budget} more"
            )
        alive = list(range(len(candidates)))
        out: list[tuple[int, float, float, int]] = []
        for number, rung in enumerate(rungs):
            gains = self._gains([candidates[i] for i in alive], split, rung.examples)
            judged = [
                (i, statistics.fmean(g), statistics.stdev(g) / math.sqrt(len(g)) if len(g) > 1 else 0.0, len(g))
                for i, g in zip(alive, gains, strict=True)
            ]
            judged.sort(key=lambda item: -item[1])
            stay = rungs[number + 1].alive if number + 1 < len(rungs) else len(judged)
            out = judged[stay:] + out
            alive = sorted(item[0] for item in judged[:stay])
        return judged + out

    def _gains(self, candidates: Sequence[EditMethod], split: str, n: int) -> list[list[float]]:
        before = [self._value(s) for s in self._evaluate([None], split, n)[0]]
        return [
            [self._value(s) - b for s, b in zip(scores, before, strict=True)]
            for scores in self._evaluate(candidates, split, n)
        ]

    def _value(self, score: Score) -> float:
        return {"accuracy": score.hit, "logprob": score.logprob, "entropy": -score.entropy}[self.settings.objective]

    def _evaluate(self, candidates: Sequence[Candidate], split: str, n: int) -> list[list[Score]]:
        """Scores per candidate on the first `n` examples of a split; what was computed is not computed again."""
        examples = self.splits[split]
        names = [name(candidate.to_dict() if candidate else None) for candidate in candidates]
        missing: dict[tuple[str, str, int], tuple[Candidate, Example]] = {}
        # example by example, so that those of one example come together
        for i in range(n):
            for key, candidate in zip(names, candidates, strict=True):
                if (key, split, i) not in self._known:
                    missing[key, split, i] = candidate, examples[i]
        keys, pairs = list(missing), list(missing.values())
        # the batches depend on what the search asks for, never on what a stopped run has left
        for batch in self.scorer.plan(pairs):
            found = [self.journal.get(keys[i]) for i in batch]
            if any(score is None for score in found):
                found = list(self.scorer.score([pairs[i] for i in batch]))
                self.journal.add([(keys[i], s) for i, s in zip(batch, found, strict=True) if s is not None])
            self._known |= {keys[i]: score for i, score in zip(batch, found, strict=True) if score is not None}
            self.forwards += len(batch)
            self.advance(len(batch))
        return [[self._known[key, split, i] for i in range(n)] for key in names]


def check(scorer: Scorer, settings: Settings, examples: Iterable[Example]) -> None:
    """Raise `ExampleError` naming the first example that cannot be searched on."""
    for example in examples:
        missing = [f"spans for {group}" for group in settings.method.needs if not example.groups.get(group)]
        if missing:
            raise ExampleError(f"{example}: {settings.method.name} needs {', '.join(missing)}, and it has none")
        if settings.objective != "entropy" and example.answer is None:
            raise ExampleError(f"{example}: --objective {settings.objective} needs an 'answer'; entropy needs none")
        scorer.row(example)


def _table(heads: Sequence[Head]) -> dict[int, list[int]]:
    table: dict[int, list[int]] = {}
    for layer, head in heads:
        table.setdefault(layer, []).append(head)
    return table


def _union(units: set[Unit]) -> Unit:
    return tuple(sorted(head for unit in units for head in unit))
