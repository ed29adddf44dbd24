"""What a job takes, before it runs and without weights: batches, memory, tokens and floating-point operations.

Every figure is of what is known: sizes from the model's config and lengths from its tokenizer and the documents where
these are here or can be fetched, else what the job's `shape` and the task's `rows` and `tokens` declare.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from steerlens.evals.doc import Steering
from steerlens.evals.job import Job, LmTask, ModelEntry, Shape
from steerlens.evals.plan import Documents, Known, check_all_run, cut, know, lengths_of, steerings_of

from steerlens.errors import SteerlensError
from steerlens.models import DTYPES

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_ASSUMED = "bfloat16"
_CHARACTERS = 4


@dataclass
class TaskCost:
    """What a task takes on a model, all steerings and seeds together. None where nothing is known.

    Attributes:
        documents: of all seeds.
        steerings: the baseline included.
        batches: each of them under all steerings.
        longest: tokens of the longest prompt.
        forwards: passes through the model, at most: every answer as long as allowed, nothing shared.
        prompt_tokens: that are read, at most.
        new_tokens: that are generated, at most; None for a task of lm-eval, where the other figures leave them out.
        flops: two per parameter and token, and attention; at most.
        declared: which of these rest on what is declared, and by whom.
    """

    task: str
    documents: int | None
    steerings: int
    batches: int | None = None
    longest: int | None = None
    forwards: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    flops: float | None = None
    declared: list[str] = field(default_factory=list)


@dataclass
class Memory:
    """Bytes of one copy of a model at work; activations inside a layer come on top.

    Attributes:
        weights: parameters times bytes per parameter.
        cache: keys and values of the largest batch, its answers included.
        logits: of the largest batch, in float32.
        steering: what steered attention may take more than unsteered.
    """

    weights: float
    cache: float = 0.0
    logits: float = 0.0
    steering: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.cache + self.logits + self.steering


@dataclass
class ModelCost:
    """What a model's part of a job takes."""

    model: str
    parameters: float
    dtype: str
    memory: Memory
    tasks: list[TaskCost]
    declared: list[str]


@dataclass
class _Doc:
    """One document in numbers: tokens of its prompt, rows in a forward, turns, and tokens of a choice."""

    length: int
    rows: int = 1
    turns: int = 1
    choice: int = 0


def estimate(job: Job) -> dict[str, Any]:
    """Costs of a job as plain JSON types: `models`, each with `memory` in bytes and `tasks`; `total`; `skipped`.

    Raises:
        JobError: for a job that cannot be run.
        ModelLoadError: for a model of which nothing is known.
    """
    documents, found, skipped = Documents(job), [], []
    every: dict[str, list[Steering]] = {}
    for entry in job.models:
        known = know(entry, offline=True)
        per_task, without = steerings_of(job, entry, known.facts)
        skipped += without
        every[entry.name] = [steering for of_task in per_task.values() for steering in of_task]
        dtype, declared = _dtype(entry, known)
        cost = ModelCost(
            entry.name, known.shape.parameters, dtype, Memory(_weights(entry, known.shape, dtype)), [], declared
        )
        for name in job.loaded:
            cost.tasks.append(_task(job, name, len(per_task[name]), documents, known, _BYTES[dtype], cost.memory))
        found.append(cost)
    check_all_run(job, every, skipped)
    models = [asdict(cost) | {"memory": {**asdict(cost.memory), "total": cost.memory.total}} for cost in found]
    tasks = [task for cost in found for task in cost.tasks]
    keys = ("batches", "forwards", "prompt_tokens", "new_tokens", "flops")
    total = {key: sum(getattr(task, key) or 0 for task in tasks) for key in keys}
    unknown = [task.task for task in tasks if task.flops is None]
    uncounted = [task.task for task in tasks if task.flops is not None and task.new_tokens is None]
    return {
        "schema": 1,
        "name": job.name,
        "fingerprint": job.fingerprint,
        "models": models,
        "total": total
        | {"without": list(dict.fromkeys(unknown)), "without_new_tokens": list(dict.fromkeys(uncounted))},
        "skipped": skipped,
    }


def _dtype(entry: ModelEntry, known: Known) -> tuple[str, list[str]]:
    declared = []
    if known.declared is not None:
        declared.append(f"sizes: the job's shape, as the config is out of reach ({known.declared})")
    wanted = DTYPES[entry.dtype]
    if wanted == "auto":
        wanted = known.dtype or _ASSUMED
        if known.dtype is None:
            declared.append(f"dtype: {_ASSUMED} assumed")
    return (wanted if wanted in _BYTES else _ASSUMED), declared


def _weights(entry: ModelEntry, shape: Shape, dtype: str) -> float:
    per_weight = 0.5 if entry.args.get("load_in_4bit") else 1.0 if entry.args.get("load_in_8bit") else _BYTES[dtype]
    # embeddings stay as they are where layers are quantised
    embedded = min(float(shape.vocab * shape.width), shape.parameters)
    return (shape.parameters - embedded) * per_weight + embedded * _BYTES[dtype]


def _task(
    job: Job, name: str, steerings: int, documents: Documents, known: Known, width: float, memory: Memory
) -> TaskCost:
    task = job.loaded[name]
    declared: list[str] = []
    draws = _draws(job, name, documents, known, declared)
    if draws is None:
        rows, _ = task.expected
        return TaskCost(name, rows, steerings, declared=declared)
    shape, new = known.shape, 0 if isinstance(task, LmTask) or task.output == "choices" else task.max_new_tokens
    if isinstance(task, LmTask):
        declared.append("new tokens: unknown for a task of lm-eval; operations are of its prompts alone")
    cost = TaskCost(name, sum(map(len, draws)), steerings, 0, 0, 0, 0, 0, 0.0, declared)
    batches = [
        [docs[i] for i in batch]
        for docs in draws
        for batch in cut([d.length for d in docs], job.batch_size, job.batch_tokens, [d.rows for d in docs])
    ]
    for batch in batches:
        _add(cost, batch, new, shape)
        _fit(memory, batch, new, shape, width, steered=steerings > 1)
    if isinstance(task, LmTask):
        cost.new_tokens = None
    cost.batches = len(batches)
    cost.longest = max(doc.length for docs in draws for doc in docs)
    return cost


def _add(cost: TaskCost, batch: Sequence[_Doc], new: int, shape: Shape) -> None:
    times = cost.steerings
    turns = max(doc.turns for doc in batch)
    prompt = sum(doc.length * doc.rows * doc.turns for doc in batch)
    answered = sum(doc.turns for doc in batch) * new
    mixed = 4.0 * shape.layers * shape.heads * shape.head_dim
    attended = sum(doc.rows * doc.turns * (doc.length**2 / 2 + new * doc.length + new**2 / 2) for doc in batch)
    cost.forwards = (cost.forwards or 0) + times * turns * max(new, 1)
    cost.prompt_tokens = (cost.prompt_tokens or 0) + times * prompt
    cost.new_tokens = (cost.new_tokens or 0) + times * answered
    cost.flops = (cost.flops or 0) + times * (2 * shape.parameters * (prompt + answered) + mixed * attended)


def _fit(memory: Memory, batch: Sequence[_Doc], new: int, shape: Shape, width: float, *, steered: bool) -> None:
    """Raise the needs to those of a batch, padded to its longest prompt."""
    rows, longest = sum(doc.rows for doc in batch), max(doc.length for doc in batch)
    kept = 2 * shape.layers * shape.kv_heads * shape.head_dim * width
    memory.cache = max(memory.cache, rows * (longest + new) * kept)
    memory.logits = max(memory.logits, rows * (max(doc.choice for doc in batch) + 1) * shape.vocab * 4.0)
    if steered:
        # twice one layer's q, k and v is what steering may take at most
        layer = (shape.heads + 2 * shape.kv_heads) * shape.head_dim * width
        memory.steering = max(memory.steering, 2 * rows * longest * layer)


def _draws(job: Job, name: str, documents: Documents, known: Known, declared: list[str]) -> list[list[_Doc]] | None:
    """Per seed its documents in numbers, or None where nothing says how many or how long they are."""
    task, limit = job.loaded[name], job.limit_of(name)
    rows, tokens = task.expected
    if isinstance(task, LmTask):
        seeds = len(job.seeds) if task.entry.num_fewshot else 1
    else:
        seeds = len(job.seeds)
        try:
            return [_measured(task, documents.of(name, seed), known, declared) for seed in job.seeds]
        except SteerlensError as error:
            if getattr(error, "exit_code", 2) != 1:
                raise
            declared.append(f"data: out of reach ({' '.join(str(error).split())[:120]})")
    count = min((n for n in (rows, limit) if n is not None), default=None)
    if count is None or tokens is None:
        lacking = " and ".join(w for w, v in (("documents", count), ("prompt tokens", tokens)) if v is None)
        where = "; give rows and tokens in its job entry" if isinstance(task, LmTask) else ""
        declared.append(f"{lacking}: unknown; the task declares none{where}")
        return None
    by = "the job" if isinstance(task, LmTask) else "the task"
    declared.append(f"documents and prompt tokens: declared by {by} ({rows} and {tokens}, limit {limit})")
    choices = None if isinstance(task, LmTask) else task.config.get("choices")
    if isinstance(task, LmTask) or (task.output == "choices" and not isinstance(choices, list)):
        declared.append("choices: their number is unknown, each document is counted once")
    doc = _Doc(tokens, len(choices), 1, _longest(choices)) if isinstance(choices, list) else _Doc(tokens)
    return [[doc] * count for _ in range(seeds)]


def _measured(task: Any, docs: Sequence[Any], known: Known, declared: list[str]) -> list[_Doc]:
    tokens = task.expected[1]
    if known.tokenizer is None:
        how = f"declared by the task ({tokens})" if tokens else f"estimated, a token per {_CHARACTERS} characters"
        if (said := f"prompt tokens: {how}, as there is no tokenizer") not in declared:
            declared.append(said)
    by_hand = known.tokenizer is None and tokens is not None
    lengths = [tokens] * len(docs) if by_hand else lengths_of(known.tokenizer, task, docs)
    return [
        _Doc(length, max(1, len(doc.choices)), 1 + len(doc.turns), _longest(doc.choices))
        for length, doc in zip(lengths, docs, strict=True)
    ]


def _longest(choices: Iterable[str]) -> int:
    return max((math.ceil(len(choice) / _CHARACTERS) for choice in choices), default=0)


# --- downloads --------------------------------------------------------------------------------------------------------

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_OTHERS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")


def prefetch(job: Job, note: Any) -> None:
    """Download models, tokenizers and data of a job, for machines without a network.

    Args:
        job: with its tasks.
        note: called with a line per thing that is there.

    Raises:
        ModelLoadError, TaskError, MetricError: for what cannot be had.
    """
    from steerlens.evals.evaluate import prepare_metrics

    for entry in job.models:
        _prefetch_model(entry)
        note(f"model {entry.name} is here")
    prepare_metrics(job)
    for name, task in job.loaded.items():
        if isinstance(task, LmTask):
            from steerlens.evals import harness_tasks

            harness_tasks.load(task.name, task.entry.include_path, json.dumps({"pretrained": job.models[0].target}))
        else:
            task.prefetch()
        note(f"task {name} is here")


def _prefetch_model(entry: ModelEntry) -> None:
    from pathlib import Path

    from huggingface_hub import HfApi, snapshot_download

    from steerlens.models import ModelLoadError

    if Path(entry.target).is_dir():
        return
    try:
        names = HfApi().list_repo_files(entry.target, revision=entry.revision)
        weights = _WEIGHTS if any(name.endswith(".safetensors") for name in names) else ("*.bin", "*.bin.index.json")
        snapshot_download(
            entry.target,
            revision=entry.revision,
            allow_patterns=[*weights, *_OTHERS],
            ignore_patterns=["original/*", "*/*"],
            cache_dir=entry.args.get("cache_dir"),
        )
    except Exception as error:  # the Hub client raises its own, requests' and httpx's errors
        why = " ".join(str(error).split()).split(". ")[0][:300] or type(error).__name__
        raise ModelLoadError(f"model {entry.name} cannot be fetched: {why}; a gated model needs HF_TOKEN") from error
