"""The result files of a finished job, in lm-eval's layout: <model>/<steering>/results_<date>.json and samples."""

from __future__ import annotations

import functools
import json
import math
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from steerlens.evals.doc import Steering, slug
from steerlens.evals.folder import End, Folder, sample
from steerlens.evals.job import Job, LmTask, ModelEntry
from steerlens.evals.plan import Batch

import steerlens
from steerlens import files
from steerlens.models import TINY

CONFIDENCE = 0.95
_SECTIONS = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "task_hashes",
)
_RESAMPLES = 1000


@dataclass
class _Samples:
    """Where the samples of one model, steering and task lie, and what was measured."""

    places: list[tuple[int, int, str, Path, int]] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    known: set[tuple[Any, ...]] = field(default_factory=set)
    failed: set[tuple[Any, ...]] = field(default_factory=set)
    error: str = ""
    seconds: float = 0.0
    reports: list[dict[str, Any]] = field(default_factory=list)


def write(folder: Folder, job: Job, describe: Mapping[str, Any]) -> list[str]:
    """Write results and samples of every model and steering; files of an earlier call are replaced by equal ones.

    Args:
        folder: with every batch of its plan done.
        job: that it belongs to.
        describe: further keys of the results' `config`, such as the device.

    Returns:
        A line per steering and task of which no sample could be run, with the first error.
    """
    done, failed = folder.done(), []
    for model in job.models:
        every = _gather(folder, [batch for batch in folder.plan.batches if batch.model == model.name], done)
        for steering in folder.plan.steerings[model.name]:
            found = every[steering.label]
            failed += [
                f"{model.name}, {steering.label}: none of the {len(samples.known)} samples of {task} could be run; "
                f"the first error: {samples.error}"
                for task, samples in found.items()
                if samples.known and samples.failed == samples.known
            ]
            target = folder.path / slug(model.name) / slug(steering.label)
            target.mkdir(parents=True, exist_ok=True)
            for task, samples in found.items():
                if not samples.places:
                    continue
                files.write(target / f"samples_{slug(task)}_{folder.plan.date}.jsonl", _lines(samples))
            results = _results(job, model, steering, found, folder.plan.date, describe)
            files.write(target / f"results_{folder.plan.date}.json", json.dumps(results, indent=2) + "\n")
    return failed


def _gather(folder: Folder, batches: Sequence[Batch], done: Mapping[int, End]) -> dict[str, dict[str, _Samples]]:
    """By steering and task."""
    found: dict[str, dict[str, _Samples]] = {}
    for batch in batches:
        end = done[batch.id]
        for label in batch.steerings:
            samples = found.setdefault(label, {}).setdefault(batch.task, _Samples())
            samples.reports.extend(filter(None, [end.extra.get("lm_eval")]))
        for at, row in folder.rows(end):
            # lm-eval's groups give several tasks per batch
            samples = found[row["steering"]].setdefault(row["task"], _Samples())
            samples.places.append((row["seed"], row["doc_id"], str(row.get("filter", "")), end.path, at))
            samples.known.add(sample(row))
            samples.seconds += row.get("seconds") or 0.0
            if "error" in row:
                samples.failed.add(sample(row))
                samples.error = samples.error or str(row["error"])[:500]
                continue
            for metric in row["metrics"]:
                samples.values.setdefault(metric, []).append(row[metric])
    return found


def _lines(samples: _Samples) -> str:
    return "".join(_read(samples))


def _read(samples: _Samples) -> Iterator[str]:
    streams = {path: path.open("rb") for path in {place[3] for place in samples.places}}
    try:
        for *_, path, at in sorted(samples.places, key=lambda place: place[:3]):
            streams[path].seek(at)
            row = json.loads(streams[path].readline())
            row.pop("batch", None)
            yield json.dumps(row, ensure_ascii=False) + "\n" if _whole(row) else json.dumps(row) + "\n"
    finally:
        for stream in streams.values():
            stream.close()


def _whole(row: Mapping[str, Any]) -> bool:
    """Whether no text holds half a character, which UTF-8 cannot hold."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _results(
    job: Job,
    model: ModelEntry,
    steering: Steering,
    found: Mapping[str, _Samples],
    date: str,
    describe: Mapping[str, Any],
) -> dict[str, Any]:
    sections: dict[str, dict[str, Any]] = {key: {} for key in _SECTIONS}
    for name, samples in found.items():
        task = job.loaded.get(name)
        parts = samples.reports if task is None or isinstance(task, LmTask) else [_task(name, task, samples)]
        for key in _SECTIONS:
            sections[key] |= _over_seeds(key, [part.get(key) or {} for part in parts])
    for name, samples in found.items():
        if name in sections["results"]:
            sections["results"][name] |= {"sample_errors": len(samples.failed)}
    arguments = {
        "pretrained": model.id if model.id == TINY else model.target,
        "revision": model.revision,
        "dtype": model.dtype,
        "backend": job.backend,
        **model.args,
    }
    config = {
        "model": "steerlens",
        "model_name": model.name,
        "model_args": arguments,
        "batch_size": job.batch_size,
        "limit": job.limit,
        "seeds": job.seeds,
        "steering": steering.to_dict(),
        **describe,
    }
    return {
        **sections,
        "config": config,
        "git_hash": origin()["git_hash"],
        "date": date,
        **{f"{name}_version": version for name, version in origin()["versions"].items()},
        "model_name": model.name,
        "total_evaluation_time_seconds": str(round(sum(samples.seconds for samples in found.values()), 3)),
    }


def _over_seeds(section: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A section of lm-eval's results over its runs with several seeds: means of figures, sums of counts."""
    found = dict(parts[-1]) if parts else {}
    if len(parts) < 2 or section not in ("results", "groups", "n-samples"):
        return found
    for task, last in found.items():
        found[task] = dict(last)
        for key, value in last.items():
            values = [part[task][key] for part in parts if key in part.get(task, {})]
            if isinstance(value, bool) or not all(isinstance(v, int | float) for v in values):
                continue
            count = section == "n-samples" or key == "sample_len"
            found[task][key] = sum(values) if count else sum(values) / len(values)
    return found


def _task(name: str, task: Any, samples: _Samples) -> dict[str, Any]:
    """What each section of the results says of a task, by its name."""
    numbers: dict[str, Any] = {"alias": name}
    for metric in task.metrics:
        if values := samples.values.get(metric):
            value, error, interval = estimate(values, functools.partial(task.aggregate, metric))
            numbers |= {f"{metric},none": value, f"{metric}_stderr,none": _known(error)}
            numbers[f"{metric}_ci95,none"] = [_known(bound) for bound in interval]
    numbers |= {"sample_len": len(samples.known)}
    expected = task.expected[0]
    said = {
        "results": numbers,
        "group_subtasks": [],
        "configs": {"task": name, **task.config, "primary": task.metrics[0]},
        "versions": task.version,
        "n-shot": task.shots,
        "higher_is_better": dict(task.higher_is_better),
        "n-samples": {"original": expected or len(samples.known), "effective": len(samples.known)},
        "task_hashes": task.fingerprint,
    }
    return {key: {name: value} for key, value in said.items()}


def _known(number: float) -> float | str:
    """As lm-eval writes what one document leaves open, for which JSON has no number."""
    return "N/A" if math.isnan(number) else number


def estimate(values: Sequence[float], aggregate: Any) -> tuple[float, float, list[float]]:
    """An aggregate of per-document values, its standard error and its 95 % interval.

    For a mean: Wilson's interval where all values are 0 or 1, else Student's; for any other aggregate, percentiles of
    a bootstrap over documents. NaN where one document leaves it open.
    """
    from scipy import stats

    numbers = np.asarray(values, dtype=float)
    value = float(aggregate(list(values)))
    n, low, high = len(numbers), math.nan, math.nan
    if math.isclose(value, float(numbers.mean()), rel_tol=1e-9, abs_tol=1e-12):
        error = float(numbers.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        if bool(np.isin(numbers, (0, 1)).all()):
            found = stats.binomtest(int(numbers.sum()), n).proportion_ci(CONFIDENCE, method="wilson")
            low, high = float(found.low), float(found.high)
        elif n > 1:
            reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
            low, high = value - reach, value + reach
        return value, error, [low, high]
    rng = np.random.default_rng(0)
    again = np.array([aggregate(list(numbers[rng.integers(0, n, n)])) for _ in range(_RESAMPLES)])
    low, high = np.percentile(again, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return value, float(again.std(ddof=1)), [float(low), float(high)]


def settings(task: Any) -> dict[str, Any]:
    """How a task's answers are generated, as the samples say it."""
    return {"max_new_tokens": task.max_new_tokens, "until": list(task.stop), "do_sample": False}


@functools.cache
def origin() -> dict[str, Any]:
    """What computed the results: `versions`, and `git_hash` of the working directory, as lm-eval has it."""
    import platform

    import torch
    import transformers

    versions = {
        "steerlens": steerlens.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {"versions": versions, "git_hash": git_hash()}


def git_hash() -> str | None:
    """Of the working directory; None outside git."""
    try:
        found = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
