"""Runs a job: each worker its batches, and whoever finds all of them done writes the results."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from steerlens.evals import results
from steerlens.evals.doc import Doc, Outcome, Steering, sample_row
from steerlens.evals.folder import Folder, FolderError, Worker
from steerlens.evals.job import Job, JobError, LmTask, ModelEntry
from steerlens.evals.plan import Batch, Documents, make, offline_unless_reachable, share

from steerlens import files, models

if TYPE_CHECKING:
    from steerlens.evals.cache import Cache
    from steerlens.evals.runner import Runner


@dataclass(frozen=True)
class Options:
    """How a job is run here; nothing of it changes what is measured.

    Attributes:
        output: the job's folder.
        worker: which part this process does.
        resume: go on with a folder that is there.
        cache: folder of outcomes that jobs share.
        device: as of `models.load`.
    """

    output: Path
    worker: Worker = field(default_factory=Worker)
    resume: bool = False
    cache: Path | None = None
    device: str | None = None


@dataclass(frozen=True)
class State:
    """How far a job is.

    Attributes:
        batches: of the plan.
        missing: of them, those that no worker has finished.
        errors: samples that failed.
        summary: what was found, once nothing is missing.
        written: whether this call wrote it.
    """

    batches: int
    missing: int
    errors: int
    summary: Mapping[str, Any] | None = None
    written: bool = False


def nothing(_: Any) -> None:
    """For `advance` and `note`."""


class Evaluation:
    """One process of a job.

    Args:
        job: what to run; its tasks are loaded and checked.
        options: how.
        advance: called with the number of samples of every finished batch.
        note: called with a line whenever this worker is done with a task on a model.
        begin: called with the samples to do and those done already, before the first batch.
    """

    def __init__(
        self,
        job: Job,
        options: Options,
        *,
        advance: Callable[[int], None] = nothing,
        note: Callable[[str], None] = nothing,
    ) -> None:
        self.job, self.options = job, options
        self.advance, self.note = advance, note
        self.documents = Documents(job)

    def run(self, begin: Callable[[int, int], Any] = lambda total, done: None) -> State:
        """Do this worker's share; then, if no batch is missing, write the results.

        Raises:
            JobError: if the folder is not this job's, or is at work; nothing is written then.
        """
        folder = Folder(self.options.output)
        folder.check(self.job, self.options.worker, self.options.resume)
        prepare_metrics(self.job)
        with offline_unless_reachable(self.job, self.note):
            self._share(folder, begin)
        return finish(self.job, folder, self._described())

    def _share(self, folder: Folder, begin: Callable[[int, int], Any]) -> None:
        """Run the batches of this worker that are not done."""
        from accelerate.utils.memory import clear_device_cache

        options = self.options
        with folder.enter(self.job, lambda: make(self.job, self.documents), options.worker, resume=options.resume):
            done = folder.done()
            mine = share(folder.plan.batches, options.worker.index, options.worker.count)
            todo = [batch for batch in mine if batch.id not in done]
            begin(sum(b.runs for b in mine), sum(b.runs for b in mine if b.id in done))
            for name, batches in groupby(todo, key=lambda batch: batch.model):
                self._model(folder, self.job.model(name), list(batches))
                # the next model needs the room
                clear_device_cache(garbage_collection=True)

    def _model(self, folder: Folder, entry: ModelEntry, batches: Sequence[Batch]) -> None:
        from steerlens.evals.runner import Runner

        model, tokenizer = load(entry, self.options.worker, self.options.device)
        runner = Runner(model, tokenizer, backend=self.job.backend)
        steerings = {steering.label: steering for steering in folder.plan.steerings[entry.name]}
        with contextlib.closing(self._cache(entry, model)) if self.options.cache else contextlib.nullcontext() as cache:
            for name, of_task in groupby(batches, key=lambda batch: batch.task):
                task, begun, failed, count = self.job.loaded[name], time.perf_counter(), 0, 0
                for batch in of_task:
                    used = [steerings[label] for label in batch.steerings]
                    if isinstance(task, LmTask):
                        rows, seconds, extra = self._lm_eval(runner, task, used[0], batch)
                    else:
                        docs = self.documents.checked(name, batch.seed, folder.plan.digests[f"{name}|{batch.seed}"])
                        rows, seconds = self._batch(runner, cache, task, [docs[i] for i in batch.docs], used, batch)
                        extra = {}
                    folder.append(batch.id, rows, seconds, extra)
                    failed += sum("error" in row for row in rows)
                    count += len(rows)
                    self.advance(batch.runs)
                took = time.perf_counter() - begun
                errors = f", {failed} with errors" if failed else ""
                self.note(f"{entry.name}, {name}: {count} samples{errors} in {took:.1f} s")

    def _cache(self, entry: ModelEntry, model: Any) -> Cache:
        import torch
        import transformers
        from steerlens.evals.cache import Cache, identity

        import steerlens

        versions = [steerlens.__version__, torch.__version__, transformers.__version__]
        assert self.options.cache is not None
        return Cache(self.options.cache, {**identity(entry, model), "backend": self.job.backend, "versions": versions})

    def _batch(
        self,
        runner: Runner,
        cache: Cache | None,
        task: Any,
        docs: Sequence[Doc],
        steerings: Sequence[Steering],
        batch: Batch,
    ) -> tuple[list[dict[str, Any]], float]:
        begun = time.perf_counter()
        outcomes = self._outcomes(runner, cache, task, docs, steerings, batch.seed)
        shown = results.settings(task)
        rows = []
        for steering in steerings:
            for doc, outcome in zip(docs, outcomes[steering.label], strict=True):
                scores, outcome = _scored(task, doc, outcome)
                rows.append(sample_row(batch.model, steering.label, doc, outcome, scores, shown, batch.id))
        return rows, time.perf_counter() - begun

    def _outcomes(
        self,
        runner: Runner,
        cache: Cache | None,
        task: Any,
        docs: Sequence[Doc],
        steerings: Sequence[Steering],
        seed: int,
    ) -> dict[str, list[Outcome]]:
        if cache is None:
            return runner.run(task, docs, steerings, seed=seed)
        keys = {s.label: [cache.key(task, doc, s, seed) for doc in docs] for s in steerings}
        known = cache.get([key for found in keys.values() for key in found])
        missing: dict[tuple[int, ...], list[Steering]] = {}
        for s in steerings:
            if places := tuple(i for i, key in enumerate(keys[s.label]) if key not in known):
                missing.setdefault(places, []).append(s)
        fresh: dict[str, Outcome] = {}
        for places, together in missing.items():
            for label, outcomes in runner.run(task, [docs[i] for i in places], together, seed=seed).items():
                fresh |= {keys[label][i]: outcome for i, outcome in zip(places, outcomes, strict=True)}
        if fresh:
            cache.put(fresh)
        known |= fresh
        return {s.label: [known[key] for key in keys[s.label]] for s in steerings}

    def _lm_eval(
        self, runner: Runner, task: LmTask, steering: Steering, batch: Batch
    ) -> tuple[list[dict[str, Any]], float, dict[str, Any]]:
        from steerlens.evals import harness

        begun = time.perf_counter()
        entry = self.job.model(batch.model)
        settings = task.settings
        if self.job.chat is not None:
            settings.setdefault("apply_chat_template", self.job.chat)
        if self.job.max_new_tokens is not None:
            settings.setdefault("gen_kwargs", {"max_gen_toks": self.job.max_new_tokens})
        found, rows = harness.run(
            runner.model,
            runner.tokenizer,
            settings,
            steering,
            limit=self.job.limit_of(task.name),
            seed=batch.seed,
            batch_size=self.job.batch_size,
            backend=self.job.backend,
            name=entry.target,
        )
        marked = [{**row, "model": entry.name, "batch": batch.id} for row in rows]
        # configs may hold functions
        return marked, time.perf_counter() - begun, json.loads(json.dumps({"lm_eval": found}, default=str))

    def _described(self) -> dict[str, Any]:
        worker = self.options.worker
        return {"device": self.options.device or models.devices()[0], "workers": worker.count}


def _scored(task: Any, doc: Doc, outcome: Outcome) -> tuple[Mapping[str, float], Outcome]:
    if outcome.output is None:
        return {}, outcome
    try:
        return task.score(doc, outcome.output), outcome
    except Exception as error:  # a metric, ours or a plug-in's, on whatever a model may say
        return {}, Outcome(None, f"the metrics failed: {type(error).__name__}: {error}", outcome.seconds)


def prepare_metrics(job: Job) -> None:
    """Raise `MetricError` for a metric of the job that lacks a library or data."""
    from steerlens.evals import metrics

    for task in job.loaded.values():
        for name, arguments in () if isinstance(task, LmTask) else task.spec.metrics:
            metrics.get(name).prepare(arguments)


# --- the end ----------------------------------------------------------------------------------------------------------


def merge(job: Job, output: Path) -> State:
    """Write the results of a job whose batches are done, by whatever workers.

    Raises:
        FolderError: if there is no such job, or it has batches that are missing.
    """
    folder = Folder(output)
    if not folder.planned:
        raise FolderError(f"--merge: {output} holds no job; run it first")
    folder.check(job, Worker(), resume=True)
    folder.plan = folder.read_plan()
    state = finish(job, folder, {}, again=True)
    if state.missing:
        raise FolderError(
            f"--merge: {state.missing} of {state.batches} batches in {output} are not done: run the missing shards, "
            "or the whole job with --resume"
        )
    return state


def finish(job: Job, folder: Folder, describe: Mapping[str, Any], *, again: bool = False) -> State:
    """How far the job is; if all of it is done, its results are written first, by one process at a time.

    Args:
        job: the job.
        folder: with its plan.
        describe: further keys of the results' `config`.
        again: write results that are there once more.
    """
    done = folder.done()
    batches = folder.plan.batches
    missing = sum(batch.id not in done for batch in batches)
    errors = sum(done[batch.id].errors for batch in batches if batch.id in done)
    if missing:
        return State(len(batches), missing, errors)
    with FileLock(folder.work / "results.lock"):
        last = folder.path / "report.html"
        if (
            not again
            and last.exists()
            and last.stat().st_mtime_ns > max(e.path.stat().st_mtime_ns for e in done.values())
        ):
            return State(len(batches), 0, errors, json.loads((folder.path / "summary.json").read_bytes()))
        return State(len(batches), 0, errors, _write(job, folder, describe), written=True)


def _write(job: Job, folder: Folder, describe: Mapping[str, Any]) -> dict[str, Any]:
    from steerlens.evals import report, stats

    failed = results.write(folder, job, describe)
    summary: dict[str, Any] = stats.summarize(folder.path, {**job.to_dict(), "skipped": list(folder.plan.skipped)})
    summary["notes"] = [*failed, *summary["notes"]]
    summary |= results.origin() | {"fingerprint": job.fingerprint, "job": job.described()}
    files.write(folder.path / "summary.json", json.dumps(summary, indent=1) + "\n")
    report.write(folder.path, summary)
    return summary


# --- devices ----------------------------------------------------------------------------------------------------------


def load(entry: ModelEntry, worker: Worker, device: str | None) -> tuple[Any, Any]:
    """The model on this worker's device or devices, and its tokenizer."""
    import torch

    free = (
        [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    placed, device_map, arguments = place(entry, worker, device, free)
    return models.load(entry.id, placed, device_map, entry.dtype, entry.revision, arguments, entry.trust_remote_code)


def place(
    entry: ModelEntry, worker: Worker, device: str | None, free: Sequence[int]
) -> tuple[str | None, Any, dict[str, Any]]:
    """Device, device map and loading options of a worker's copy of a model.

    Args:
        entry: the model.
        worker: whose copy it is.
        device: that the user names; None for this worker's own.
        free: bytes free on each GPU of this machine; empty if there is none.

    Raises:
        JobError: if there are too few GPUs for this worker, or several would spread over the same ones.
    """
    arguments = dict(entry.args)
    if entry.gpus_per_replica is not None:
        if device is not None:
            raise JobError(f"--device {device} and gpus_per_replica of model {entry.name!r} exclude each other")
        arguments["max_memory"] = replica_memory(worker.local or 0, entry.gpus_per_replica, free)
        return None, "auto", arguments
    if entry.device_map is not None:
        if worker.local is not None and len(free) > 1 and worker.count > 1:
            raise JobError(
                f"model {entry.name!r}: with several processes device_map {entry.device_map!r} would put each copy on "
                "the same GPUs; say how many each copy gets: gpus_per_replica"
            )
        return device, entry.device_map, arguments
    if device is None and worker.local is not None and free:
        if worker.local >= len(free):
            raise JobError(f"process {worker.local} of this machine has no GPU; there are {len(free)}: start as many")
        device = f"cuda:{worker.local}"
    return device, None, arguments


def replica_memory(local: int, gpus: int, free: Sequence[int]) -> dict[int, int]:
    """The `max_memory` that gives a process its own GPUs and no room elsewhere.

    Args:
        local: number of the process on its machine.
        gpus: GPUs per process.
        free: bytes free on each GPU.

    Returns:
        Bytes per GPU: nine tenths of what is free on its own, the rest is for activations.

    Raises:
        JobError: if the machine has too few.
    """
    first, last = local * gpus, (local + 1) * gpus
    if last > len(free):
        raise JobError(
            f"process {local} of this machine needs GPUs {first} to {last - 1} (gpus_per_replica: {gpus}); "
            f"there are {len(free)}: start at most {len(free) // gpus} processes here"
        )
    return {gpu: int(0.9 * free[gpu]) for gpu in range(first, last)}
