"""Two result folders side by side: which documents they share, and whether their scores differ by more than noise.

Folders are of `steerlens eval` or of lm-eval, which have the same layout: `results_<date>.json` and beside it one
`samples_<task>_<date>.jsonl` per task.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steerlens.errors import SteerlensError, nearest
from steerlens.paired import Difference, difference, holm, minimum_detectable, sign

_DATED = re.compile(r"(?P<name>.+)_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?)")
_SHOWN = 10
LEVEL = 0.05

Row = dict[str, Any]
Key = tuple[str, str, int, int]
"""Filter, document hash, seed, and number in the draw: what tells the rows of a task apart."""


class CompareError(SteerlensError, ValueError):
    """A folder that holds no results to compare, or two that have nothing in common."""

    exit_code = 2


@dataclass(frozen=True)
class Run:
    """One model under one steering: what a result folder holds.

    Attributes:
        folder: where the results file lies.
        model: its name.
        label: of the steering; empty for a folder of lm-eval.
        role: of the steering in its job; "method" for a folder of lm-eval.
        date: as in the name of the results file.
        results: what the results file holds.
        samples: rows per task.
        notes: what was left aside, in words.
    """

    folder: Path
    model: str
    label: str
    role: str
    date: str
    results: Mapping[str, Any] = field(repr=False)
    samples: Mapping[str, Mapping[Key, Row]] = field(repr=False)
    notes: tuple[str, ...] = ()

    def config(self, task: str) -> Mapping[str, Any]:
        """The task's configuration, empty if none is recorded."""
        return dict(self.results.get("configs", {}).get(task) or {})

    def metrics(self, task: str) -> dict[str, bool]:
        """Every metric of its rows, the primary one first: whether its values are single numbers, so that it can be
        compared. Names as in `Contrast.metric`.
        """
        aggregated = {key.partition(",")[0] for key in self.results["results"].get(task) or {}}
        found: dict[tuple[str, str], bool] = {}
        for (kept, *_), row in self.samples[task].items():
            listed = row.get("metrics")
            for name in listed if isinstance(listed, list) else [n for n in row if n in aggregated]:
                spread = self.is_loglikelihood(task, name) and isinstance(row.get(name), list)
                single = spread or row.get(name) is None or isinstance(row[name], (int, float))
                found[kept, name] = found.get((kept, name), True) and single
        config = self.config(task)
        entries = config.get("metric_list") or config.get("metrics") or []
        first = [entry.get("metric") if isinstance(entry, dict) else entry for entry in entries]
        filters = list(dict.fromkeys(kept for kept, _ in found))
        order = sorted(found, key=lambda m: (filters.index(m[0]), first.index(m[1]) if m[1] in first else len(first)))
        return {name if kept == "none" else f"{name},{kept}": found[kept, name] for kept, name in order}

    def higher_is_better(self, task: str, metric: str) -> bool | None:
        """As the results file has it; None if it has not."""
        name = metric.partition(",")[0]
        found = (self.results.get("higher_is_better", {}).get(task) or {}).get(name)
        return None if found is None else bool(found)

    def is_loglikelihood(self, task: str, metric: str) -> bool:
        """Whether the rows hold log-likelihoods, of which lm-eval makes a perplexity or bits when it aggregates."""
        name, config = metric.partition(",")[0], self.config(task)
        listed = {entry.get("metric"): entry for entry in config.get("metric_list") or [] if isinstance(entry, dict)}
        aggregation = listed.get(name, {}).get("aggregation") or name
        return "output_type" in config and aggregation.rpartition("_")[2] in ("perplexity", "byte")


@dataclass(frozen=True)
class Document:
    """One document in both runs. Its score is the mean over the seeds that drew it.

    Attributes:
        before, after: its rows, by seed and number in the draw.
        scores: before and after, for one metric.
    """

    before: Mapping[tuple[int, int], Row] = field(repr=False)
    after: Mapping[tuple[int, int], Row] = field(repr=False)
    scores: tuple[float, float] = (math.nan, math.nan)

    def rows(self) -> tuple[Row, Row]:
        """A row of each side, of the same draw where there is one."""
        for place, row in self.before.items():
            if place in self.after:
                return row, self.after[place]
        return next(iter(self.before.values())), next(iter(self.after.values()))

    def concerns(self, metric: str) -> bool:
        """Whether a side has the metric, or an error where it might have had it."""
        return any(metric in row or "error" in row for side in (self.before, self.after) for row in side.values())

    def numbers(self, metric: str) -> tuple[float, float] | None:
        """The scores of a metric, or None where a side has none: an error, or no finite number."""
        shared = self.before.keys() & self.after.keys()
        if shared:
            pairs = [(_score(self.before[p].get(metric)), _score(self.after[p].get(metric))) for p in sorted(shared)]
            whole = [(x, y) for x, y in pairs if x is not None and y is not None]
            sides: Any = zip(*whole, strict=True) if whole else ((), ())
        else:
            sides = ([_score(row.get(metric)) for row in side.values()] for side in (self.before, self.after))
        before, after = ([x for x in side if x is not None] for side in sides)
        return (math.fsum(before) / len(before), math.fsum(after) / len(after)) if before and after else None


@dataclass(frozen=True)
class Contrast:
    """One metric of one task in two runs.

    Attributes:
        task: name.
        metric: name, with ",filter" unless the filter is "none".
        primary: whether it is the metric that the task is judged by.
        higher_is_better: of the scores.
        documents: in both runs, with their scores.
        errors: documents in both runs that have no score on one side, and are left out.
        difference: after minus before, over documents.
        holm: p adjusted for the number of tasks; metrics that are not primary are adjusted apart, all together.
        tests: over how many it is adjusted.
        minimum_detectable: see `steerlens.paired.minimum_detectable`.
    """

    task: str
    metric: str
    primary: bool
    higher_is_better: bool
    documents: tuple[Document, ...] = field(repr=False)
    errors: int
    difference: Difference
    holm: float
    tests: int
    minimum_detectable: float | None

    @property
    def before(self) -> float:
        """Mean over documents."""
        return math.fsum(d.scores[0] for d in self.documents) / len(self.documents)

    @property
    def after(self) -> float:
        """Mean over documents."""
        return math.fsum(d.scores[1] for d in self.documents) / len(self.documents)

    @property
    def verdict(self) -> str:
        """In a word or two: better, worse, or within noise, after Holm's correction."""
        return verdict(replace(self.difference, p=self.holm), self.higher_is_better)

    @property
    def sentence(self) -> str:
        """What was found, in words."""
        d, least = self.difference, self.minimum_detectable
        documents = "1 document" if d.n == 1 else f"{d.n} documents"
        lower = "" if self.higher_is_better else " (lower is better)"
        text = f"{self.task}: {self.metric}{lower} {shown(self.before)} → {shown(self.after)} on {documents}"
        if all(before == after for before, after in (document.scores for document in self.documents)):
            text += ", none of them with another score"
        else:
            adjusted = f", {self.holm:.2g} after Holm's correction for {self.tests} tests" if self.tests > 1 else ""
            text += f", a difference of {interval(d)}, p = {d.p:.2g}{adjusted}"
        if self.verdict != "within noise":
            return f"{text}: {self.verdict}."
        if least is None:
            return f"{text}: within noise; nothing can be said of what so few or such uniform scores would show."
        return f"{text}: within noise; {shown(least)} or more would show with 80 % probability."

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the documents."""
        return {
            "task": self.task,
            "metric": self.metric,
            "primary": self.primary,
            "higher_is_better": self.higher_is_better,
            "n": self.difference.n,
            "errors": self.errors,
            "before": self.before,
            "after": self.after,
            "difference": self.difference.to_dict(),
            "p_holm": self.holm,
            "minimum_detectable": self.minimum_detectable,
            "verdict": self.verdict,
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class Comparison:
    """Two runs on the documents that they share.

    Attributes:
        before, after: the runs.
        contrasts: per task and metric.
        notes: what limits the comparison, in words.
    """

    before: Run
    after: Run
    contrasts: tuple[Contrast, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        described = {
            side: {"folder": str(run.folder), "model": run.model, "label": run.label, "date": run.date}
            for side, run in (("before", self.before), ("after", self.after))
        }
        return {**described, "contrasts": [c.to_dict() for c in self.contrasts], "notes": list(self.notes)}


def load(folder: str | Path) -> Run:
    """The run in a folder of `steerlens eval` or lm-eval, of the newest date.

    Args:
        folder: the one that holds `results_<date>.json`, one above it, or the results file itself.

    Raises:
        CompareError: if there are no results or several runs, no samples, or a row that cannot be read or paired; the
            message names file and line.
    """
    path = newest(folder)
    return _run(path, _date(path))


def newest(folder: str | Path) -> Path:
    """The results file of the newest date in the one folder that has any.

    Raises:
        CompareError: if there is none, or results of several runs.
    """
    path = Path(folder)
    if path.is_file():
        return path
    found = sorted(p for p in path.rglob("results_*.json") if _DATED.fullmatch(p.stem))
    if not found:
        why = "holds no results_<date>.json" if path.is_dir() else "does not exist"
        raise CompareError(f"{path} {why}; give a folder that `steerlens eval` or lm-eval --output_path wrote")
    places = sorted({p.parent for p in found})
    if len(places) > 1:
        listed = ", ".join(map(str, places[:_SHOWN])) + (", …" if len(places) > _SHOWN else "")
        raise CompareError(f"{path} holds {len(places)} runs; give one of them: {listed}")
    return max(found, key=_date)


def results_of(path: Path) -> dict[str, Any]:
    """What a results file holds.

    Raises:
        CompareError: if it cannot be read, is not JSON, naming file and line, or is no results file.
    """
    try:
        results = json.loads(path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise CompareError(f"{path} cannot be read: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise CompareError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON: {error}") from None
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        raise CompareError(f"{path} is no results file of steerlens or lm-eval: it has no 'results'")
    return results


def compare(
    a: Run, b: Run, *, metrics: Sequence[str] | None = None, tasks: Sequence[str] | None = None, seed: int = 0
) -> Comparison:
    """The difference b minus a for every task and metric that both have, on the documents that both have.

    A document under several seeds counts once, with its mean. Each task is judged by its primary metric, the first of
    its configuration, or of `metrics`.

    Args:
        a: the run before.
        b: the run after.
        metrics: only these, as "acc" or "exact_match,strict-match".
        tasks: only these.
        seed: of the resampling.

    Raises:
        CompareError: if the two have no document with a score in common, or not the tasks or metrics that are asked
            for.
    """
    common = [task for task in a.samples if task in b.samples]
    for task in tasks or ():
        if task not in common:
            raise CompareError(
                f"task {task!r} is not in both runs; {_tasks(a)}; {_tasks(b)}{nearest(task, [*a.samples, *b.samples])}"
            )
    if not common:
        raise CompareError(f"the runs have no task in common: {_tasks(a)}; {_tasks(b)}")
    notes = [*a.notes, *b.notes] if a is not b else list(a.notes)
    if tasks is None:
        for run, other in ((a, b), (b, a)):
            alone = [task for task in run.samples if task not in other.samples]
            if alone:
                notes.append(f"only in {run.folder}: {_listed(alone)}")
    else:
        common = [task for task in common if task in tasks]
    contrasts: list[Contrast] = []
    known: list[str] = []
    empty: list[str] = []
    for task in common:
        documents, said = _paired(a, b, task)
        notes += said
        if not documents:
            empty.append(task)
            continue
        found, names, said = _contrasts(a, b, task, documents, metrics, seed)
        contrasts += found
        known += names
        notes += said
    missing = [m for m in metrics or () if not any(m in (name, name.partition(",")[0]) for name in known)]
    if missing and known:
        raise CompareError(
            f"metric {missing[0]!r} is in none of the tasks; there are {_listed(dict.fromkeys(known))}"
            f"{nearest(missing[0], dict.fromkeys(known))}"
        )
    if not contrasts:
        raise CompareError(
            f"{a.folder} and {b.folder} share no document with a score"
            + (f": other documents in {_listed(empty)} (doc_hash); compare runs on the same data" if empty else "")
            + "".join(f"; {note}" for note in notes)
        )
    return Comparison(a, b, tuple(_adjusted(contrasts)), tuple(notes))


def verdict(d: Difference, higher_is_better: bool) -> str:
    """In a word or two: better, worse, or within noise."""
    word = sign(d)
    return word if higher_is_better else {"better": "worse", "worse": "better"}.get(word, word)


def shown(value: float) -> str:
    """A score or difference with three places, more where it is tiny and fewer where it is large."""
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.3g}"


def interval(d: Difference) -> str:
    """A difference with its interval."""
    mean, low, high = (f"{'' if value < 0 else '+'}{shown(value + 0.0)}" for value in (d.mean, d.low, d.high))
    return f"{mean} [{low}, {high}]"


def _run(path: Path, date: str) -> Run:
    results = results_of(path)
    samples: dict[str, dict[Key, Row]] = {}
    model = label = ""
    for file in sorted(path.parent.glob(f"samples_*_{date}.jsonl")):
        named = _DATED.fullmatch(file.stem)
        assert named is not None
        for where, row in _rows(file):
            task = str(row.get("task", named["name"].removeprefix("samples_")))
            rows = samples.setdefault(task, {})
            key = _key(where, row)
            if key in rows:
                raise CompareError(f"{where}: doc_id {row['doc_id']} stands twice, with the same doc_hash and filter")
            rows[key] = row
            model, label = str(row.get("model", model)), str(row.get("steering", label))
    if not samples:
        raise CompareError(
            f"{path.parent} holds no samples_<task>_{date}.jsonl, and without the samples nothing can be paired; "
            "run lm-eval again with --log_samples"
        )
    notes = []
    if path.name.startswith("results_"):
        older = [p for p in path.parent.glob("results_*.json") if p != path and _DATED.fullmatch(p.stem)]
        if older:
            notes.append(f"{path.parent} holds results of {len(older) + 1} dates: those of {date} are compared")
    settings = results.get("config")
    steering = (settings.get("steering") if isinstance(settings, dict) else None) or {}
    return Run(
        folder=path.parent,
        model=model or str(results.get("model_name") or path.parent.name),
        label=str(steering.get("label", label)),
        role=str(steering.get("role", "method")),
        date=date,
        results=results,
        samples=samples,
        notes=tuple(notes),
    )


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a file, each behind the "file:line" where it stands; texts may hold halves of characters."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise CompareError(f"{path} cannot be read: {error.strerror or error}") from None
    with stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CompareError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise CompareError(f"{path}:{number}: {str(row)[:60]!r} is not a JSON object")
            yield f"{path}:{number}", row


def _key(where: str, row: Row) -> Key:
    row.setdefault("seed", 0)
    row.setdefault("filter", "none")
    for name, kind in (("doc_id", int), ("doc_hash", str), ("seed", int), ("filter", str)):
        if not isinstance(row.get(name), kind):
            raise CompareError(
                f"{where}: {name!r} is {row.get(name)!r:.60}; rows are paired by it, so it must be "
                f"{'a number' if kind is int else 'a text'}, as lm-eval since 0.4.3 and steerlens write it"
            )
    return row["filter"], row["doc_hash"], row["seed"], row["doc_id"]


def _date(path: Path) -> str:
    found = _DATED.fullmatch(path.stem)
    if found is None:
        raise CompareError(f"{path} is no results file: its name must end in _<date>.json, as results_<date>.json")
    return found["date"]


def _paired(a: Run, b: Run, task: str) -> tuple[dict[str, list[Document]], list[str]]:
    """Per filter the documents in both, and what to say about the rest."""
    before, after = (_by_document(run.samples[task]) for run in (a, b))
    shared = [key for key in before if key in after]
    documents: dict[str, list[Document]] = {}
    for key in shared:
        documents.setdefault(key[0], []).append(Document(before[key], after[key]))
    notes = []
    alone = [(_alone(before, after), a), (_alone(after, before), b)]
    if any(count for count, _ in alone):
        text = " and ".join(f"{count} only in {run.folder}" for count, run in alone if count)
        notes.append(f"{task}: {text}; the {len({key[1] for key in shared})} documents in both are compared")
    other = {key[1] for key in shared if _prompts(before[key]).isdisjoint(_prompts(after[key]))}
    if other:
        notes.append(
            f"{task}: {len(other)} of {len({key[1] for key in shared})} documents have other prompts in the two runs "
            "(prompt_hash): the difference is one of prompts too"
        )
    versions = [run.results.get("versions", {}).get(task) for run in (a, b)]
    if versions[0] != versions[1]:
        notes.append(f"{task}: version {versions[0]} in {a.folder}, {versions[1]} in {b.folder}")
    return documents, notes


def _by_document(rows: Mapping[Key, Row]) -> dict[tuple[str, str], dict[tuple[int, int], Row]]:
    found: dict[tuple[str, str], dict[tuple[int, int], Row]] = {}
    for (kept, doc_hash, seed, doc_id), row in rows.items():
        found.setdefault((kept, doc_hash), {})[seed, doc_id] = row
    return found


def _alone(mine: Iterable[tuple[str, str]], other: Iterable[tuple[str, str]]) -> int:
    return len({doc_hash for _, doc_hash in mine} - {doc_hash for _, doc_hash in other})


def _prompts(rows: Mapping[tuple[int, int], Row]) -> set[Any]:
    return {row.get("prompt_hash") for row in rows.values()}


def _contrasts(
    a: Run, b: Run, task: str, documents: Mapping[str, list[Document]], metrics: Sequence[str] | None, seed: int
) -> tuple[list[Contrast], list[str], list[str]]:
    """What was found, the metrics there are, and what to say."""
    found: list[Contrast] = []
    known: list[str] = []
    asked: list[str] = []
    notes: list[str] = []
    numeric, other = a.metrics(task), b.metrics(task)
    for metric in numeric:
        name, _, kept = metric.partition(",")
        docs = documents.get(kept or "none")
        if metric not in other or docs is None:
            continue
        if not (numeric[metric] and other[metric]):
            notes.append(f"{task}: {metric} is left out, as its samples hold no single numbers")
            continue
        known.append(metric)
        if metrics is not None and metric not in metrics and name not in metrics:
            continue
        asked.append(metric)
        concerned = [d for d in docs if d.concerns(name)]
        scored = [(d, d.numbers(name)) for d in concerned]
        whole = tuple(replace(d, scores=scores) for d, scores in scored if scores is not None)
        errors = len(concerned) - len(whole)
        if errors:
            why = f"{errors} of {len(concerned)} documents have no score on one side and are left out"
            notes.append(f"{task}: {metric}: {why}")
        if not whole:
            continue
        higher, said = _direction(a, b, task, metric)
        notes += said
        sides = [[d.scores[i] for d in whole] for i in (0, 1)]
        found.append(
            Contrast(
                task=task,
                metric=metric,
                primary=metric == asked[0],
                higher_is_better=higher,
                documents=whole,
                errors=errors,
                difference=difference(*sides, seed=seed),
                holm=1.0,
                tests=1,
                minimum_detectable=minimum_detectable(*sides, alpha=LEVEL),
            )
        )
    if not known:
        notes.append(f"{task}: no metric has numbers in both runs")
    return found, known, notes


def _direction(a: Run, b: Run, task: str, metric: str) -> tuple[bool, list[str]]:
    """Whether more is better, and what to say about it."""
    if a.is_loglikelihood(task, metric):
        return True, [f"{task}: {metric} is compared as the documents' log-likelihoods, where more is better"]
    for run in (a, b):
        higher = run.higher_is_better(task, metric)
        if higher is not None:
            return higher, []
    return True, [f"{task}: whether more {metric} is better is not recorded; it is taken to be"]


def _adjusted(contrasts: Sequence[Contrast]) -> list[Contrast]:
    found = list(contrasts)
    for primary in (True, False):
        family = [i for i, c in enumerate(contrasts) if c.primary is primary]
        for i, p in zip(family, holm([contrasts[i].difference.p for i in family]), strict=True):
            found[i] = replace(contrasts[i], holm=p, tests=len(family))
    return found


def _score(value: Any) -> float | None:
    """A row's value as a number: as it is, or a log-likelihood over what it is spread over, words or bytes."""
    if isinstance(value, list) and len(value) == 2 and value[1]:
        value = value[0] / value[1]
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _tasks(run: Run) -> str:
    return f"{run.folder} has {_listed(run.samples)}"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")
