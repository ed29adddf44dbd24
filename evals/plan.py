"""The frozen plan of a job: which documents are run together, under which steerings."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from steerlens.evals import controls
from steerlens.evals.doc import BASELINE, Doc, Steering
from steerlens.evals.job import Job, JobError, LmTask, ModelEntry, Shape, SteeringEntry

from steerlens import methods as registry
from steerlens.errors import SteerlensError
from steerlens.facts import ModelFacts
from steerlens.methods.base import DecodingMethod
from steerlens.models import ModelLoadError, hub_is_reachable
from steerlens.recipe import Recipe

if TYPE_CHECKING:
    from steerlens.evals.task import Task


@dataclass(frozen=True)
class Batch:
    """Documents that are run together under all their steerings; of an lm-eval task all documents, one steering.

    Attributes:
        id: its number in the plan.
        docs: doc_ids; empty for an lm-eval task.
        steerings: labels, the baseline first.
    """

    id: int
    model: str
    task: str
    seed: int
    docs: tuple[int, ...]
    steerings: tuple[str, ...]

    @property
    def runs(self) -> int:
        """Documents times steerings; 1 for an lm-eval task."""
        return max(1, len(self.docs)) * len(self.steerings)


@dataclass(frozen=True)
class Plan:
    """All batches of a job in the order in which they are dealt to workers.

    Attributes:
        date: when it was made, as lm-eval writes dates; results are named by it.
        batches: see `Batch`.
        steerings: per model all that are run on it.
        skipped: steerings that cannot be run on a task or model, and controls that cannot be made, each with `why`.
        digests: of the documents, per "task|seed": another version of a dataset is noticed.
    """

    date: str
    batches: tuple[Batch, ...]
    steerings: Mapping[str, tuple[Steering, ...]]
    skipped: tuple[Mapping[str, str], ...]
    digests: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads it back."""
        return {
            "schema": 1,
            "date": self.date,
            "digests": dict(self.digests),
            "skipped": [dict(skipped) for skipped in self.skipped],
            "steerings": {model: [s.to_dict() for s in found] for model, found in self.steerings.items()},
            "batches": [asdict(batch) for batch in self.batches],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote; raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        return cls(
            data["date"],
            tuple(
                Batch(b["id"], b["model"], b["task"], b["seed"], tuple(b["docs"]), tuple(b["steerings"]))
                for b in data["batches"]
            ),
            {model: tuple(map(_steering, found)) for model, found in data["steerings"].items()},
            tuple(data["skipped"]),
            data["digests"],
        )


def _steering(data: Mapping[str, Any]) -> Steering:
    dose = data["dose"] and (data["dose"]["parameter"], data["dose"]["value"])
    methods = tuple(map(registry.from_dict, data["methods"]))
    return Steering(data["label"], methods, data["role"], data["of"], dose)


class Documents:
    """The documents of a job's tasks; those of the last few draws are kept."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.of: Callable[[str, int], list[Doc]] = lru_cache(maxsize=8)(self._of)
        # a batch asks for it each time, and it reads every document
        self._digest_of = lru_cache(maxsize=None)(lambda task, seed: digest_of(self.of(task, seed)))

    def _of(self, task: str, seed: int) -> list[Doc]:
        found: Any = self._job.loaded[task]
        docs: list[Doc] = found.docs(self._job.limit_of(task), seed)
        if not docs:
            raise JobError(f"task {task!r} has no documents; look at its 'where' and its data")
        return docs

    def checked(self, task: str, seed: int, digest: str) -> list[Doc]:
        """The documents, if they are those of the plan."""
        docs = self.of(task, seed)
        if self._digest_of(task, seed) != digest:
            raise JobError(
                f"task {task!r}: its documents are not those that this job was planned with; its data set has changed "
                "(pin its 'revision'), or another version of steerlens generates them: start anew in another --output"
            )
        return docs


def digest_of(docs: Sequence[Doc]) -> str:
    """A fingerprint of documents in their order."""
    return hashlib.sha256("".join(doc.doc_hash for doc in docs).encode()).hexdigest()


# --- the network ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def offline_unless_reachable(job: Job, note: Callable[[str], Any]) -> Iterator[None]:
    """Use only what is in the cache where the Hub does not answer; its clients would ask again for every file.

    Args:
        job: asked only if a model or a task of it may be on the Hub.
        note: called with a line if the Hub is out of reach.
    """
    from huggingface_hub import constants

    remote = any("/" in model.target and not _is_folder(model.target) for model in job.models)
    remote = remote or any(isinstance(task, LmTask) or not task.offline for task in job.loaded.values())
    if not remote or constants.HF_HUB_OFFLINE or hub_is_reachable():
        yield
        return
    note("the Hub cannot be reached: models and data are taken from the cache")
    settings = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    before = [module.HF_HUB_OFFLINE for module in settings]
    for module in settings:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


# --- models without their weights -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """What is known of a model without its weights.

    Attributes:
        declared: why its sizes are the job's and not its config's; None where they are the config's.
        dtype: of the checkpoint, where the config says so.
        tokenizer: None where it cannot be had.
    """

    facts: ModelFacts
    shape: Shape
    declared: str | None
    dtype: str | None
    tokenizer: Any


def know(entry: ModelEntry, *, offline: bool = False) -> Known:
    """Config and tokenizer of a model.

    Args:
        entry: the model.
        offline: fall back on the sizes that the job declares.

    Raises:
        ModelLoadError: if they cannot be had.
    """
    from transformers import AutoConfig, AutoTokenizer

    source: dict[str, Any] = {"revision": entry.revision, "trust_remote_code": entry.trust_remote_code}
    source |= {key: entry.args[key] for key in ("cache_dir", "subfolder", "token") if key in entry.args}
    if "/" in entry.target and not _is_folder(entry.target) and not hub_is_reachable():
        source["local_files_only"] = True
    try:
        config = AutoConfig.from_pretrained(entry.target, **source)
        tokenizer = AutoTokenizer.from_pretrained(entry.target, padding_side="left", **source)
    except Exception as error:  # transformers and the Hub client raise some ten kinds for "not there"
        why = " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
        if offline and entry.shape is not None:
            return Known(controls.facts_of_shape(entry.name, entry.shape), entry.shape, why, None, None)
        way_out = "give its 'shape' in the job for a dry run" if offline else "--prefetch fetches models beforehand"
        raise ModelLoadError(
            f"model {entry.id}: its config and tokenizer cannot be fetched: {why}; {way_out}"
        ) from error
    facts, shape = _measured(config, entry)
    if entry.shape is not None:
        _check_shape(entry, shape)
    dtype = getattr(config, "dtype", None)
    # a path of the installation says less than the alias
    facts = replace(facts, name=entry.name)
    return Known(facts, shape, None, None if dtype is None else str(dtype).removeprefix("torch."), tokenizer)


def _is_folder(target: str) -> bool:
    from pathlib import Path

    return Path(target).is_dir()


def _measured(config: Any, entry: ModelEntry) -> tuple[ModelFacts, Shape]:
    import torch
    from transformers import AutoModelForCausalLM

    from steerlens import decoder

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=entry.trust_remote_code)
    facts, _ = decoder.read(decoder.find(model))
    text = config.get_text_config(decoder=True)
    heads = max(facts.heads)
    return facts, Shape(
        parameters=float(model.num_parameters()),
        layers=facts.layers,
        heads=heads,
        kv_heads=max(facts.kv_heads),
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        width=text.hidden_size,
        vocab=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None),
    )


def _check_shape(entry: ModelEntry, found: Shape) -> None:
    assert entry.shape is not None
    for key, said in entry.shape.model_dump(exclude_none=True).items():
        is_ = getattr(found, key)
        # published counts of parameters are rounded
        same = is_ is None or (abs(said / is_ - 1) < 0.05 if key == "parameters" else said == is_)
        if not same:
            raise JobError(f"model {entry.name!r}: shape.{key} is {said:g} in the job, {is_:g} in the model's config")


# --- steerings --------------------------------------------------------------------------------------------------------


def steerings_of(
    job: Job, model: ModelEntry, facts: ModelFacts
) -> tuple[dict[str, list[Steering]], list[dict[str, str]]]:
    """Per task the steerings of a model, the baseline first, and what is skipped.

    Raises:
        JobError, RecipeError, HeadError: for a steering that does not fit the model, or a task that it names.
    """
    per_task = {task: [Steering(BASELINE, (), "baseline")] for task in job.loaded}
    skipped: list[dict[str, str]] = []
    for entry in job.steerings:
        if entry.models is not None and model.name not in entry.models:
            continue
        found = entry.steerings()
        for steering in found:
            _check_fits(entry, steering, facts, several=len(job.models) > 1)
        if entry.sweep is None:
            extra, without = controls.of(found[0], job.controls, facts, job.seeds[0])
            found += extra
            skipped += [{"model": model.name, "steering": label, "task": "*", "why": why} for label, why in without]
        for name, task in job.loaded.items():
            if not job.names_task(entry, name):
                continue
            if why := _cannot(found[0], task):
                if entry.tasks is not None:
                    raise JobError(f"steering {entry.label!r} names the task {name!r}, but {why}")
                skipped.append({"model": model.name, "steering": str(entry.label), "task": name, "why": why})
            else:
                per_task[name] += found
    return per_task, skipped


def _check_fits(entry: SteeringEntry, steering: Steering, facts: ModelFacts, *, several: bool) -> None:
    made_for = entry.made_for or {"id": facts.name}
    try:
        Recipe.from_dict(
            {"schema": 1, "name": steering.label, "model": made_for, "methods": list(steering.methods)}
        ).check(facts)
    except SteerlensError as error:
        text = str(error).removeprefix(f"recipe {steering.label!r}: ")
        elsewhere = "; or list the models that it is for: models: […]" if several else ""
        raise JobError(f"steering {steering.label!r}: {text}{elsewhere}") from error


def _cannot(steering: Steering, task: Task | LmTask) -> str | None:
    for method in steering.methods:
        chooses = not isinstance(task, LmTask) and task.output == "choices"
        if chooses and isinstance(method, DecodingMethod) and not method.scores:
            return f"{method.name} gives no text a probability, and {task.name} compares those of choices"
        if missing := [group for group in method.needs if group not in task.groups]:
            has = ", ".join(sorted(task.groups)) or "none"
            why = f"{method.name} needs the span group {', '.join(missing)}, and {task.name} has {has}"
            if not isinstance(task, LmTask):
                return why
            tags = "em" if missing == ["emphasis"] else ";".join(f"{group}:{group}" for group in missing)
            first = tags.partition(":")[0]
            return (
                f"{why}: mark it in the task's template as <{first}>…</{first}> and name the tag, by 'tags: {tags}' in "
                f"its job entry or --task-set '{task.name}.tags={tags}'"
            )
    return None


# --- the plan ---------------------------------------------------------------------------------------------------------


def make(job: Job, documents: Documents, know: Callable[[ModelEntry], Known] = know) -> Plan:
    """The plan of a job: configs, tokenizers and documents are read, no weights.

    Batches are cut from documents ordered by the length of their prompts, the longest first: shares of workers that
    take every n-th batch are alike, and what does not fit into memory shows at once.

    Raises:
        JobError: if a steering is run nowhere.
    """
    batches: list[Batch] = []
    every: dict[str, tuple[Steering, ...]] = {}
    skipped: list[dict[str, str]] = []
    digests: dict[str, str] = {}
    for model in job.models:
        known = know(model)
        per_task, without = steerings_of(job, model, known.facts)
        skipped += without
        distinct = {steering.label: steering for found in per_task.values() for steering in found}
        every[model.name] = tuple(distinct.values())
        for name, task in job.loaded.items():
            labels = tuple(steering.label for steering in per_task[name])
            for seed, docs in _draws(job, name, task, labels, documents, known, digests):
                batches += [
                    Batch(number, model.name, name, seed, ids, run)
                    for number, (ids, run) in enumerate(docs, len(batches))
                ]
    check_all_run(job, every, skipped)
    date = datetime.datetime.now().isoformat().replace(":", "-")
    return Plan(date, tuple(batches), every, tuple(skipped), digests)


def _draws(
    job: Job,
    name: str,
    task: Task | LmTask,
    labels: tuple[str, ...],
    documents: Documents,
    known: Known,
    digests: dict[str, str],
) -> Iterator[tuple[int, list[tuple[tuple[int, ...], tuple[str, ...]]]]]:
    """Per seed the (doc_ids, labels) of its batches."""
    if isinstance(task, LmTask):
        # its documents are the same for every seed, only demonstrations are drawn
        for seed in job.seeds if task.entry.num_fewshot else job.seeds[:1]:
            yield seed, [((), (label,)) for label in labels]
        return
    for seed in job.seeds:
        docs = documents.of(name, seed)
        digests[f"{name}|{seed}"] = digest_of(docs)
        lengths = lengths_of(known.tokenizer, task, docs)
        rows = [max(1, len(doc.choices)) for doc in docs]
        yield seed, [(ids, labels) for ids in cut(lengths, job.batch_size, job.batch_tokens, rows)]


def lengths_of(tokenizer: Any, task: Task, docs: Sequence[Doc]) -> list[int]:
    """Tokens of each prompt; an estimate from its characters where there is no tokenizer."""
    from steerlens.evals import batch

    return [batch.length(tokenizer, task, doc) for doc in docs]


def cut(
    lengths: Sequence[int], batch_size: int, batch_tokens: int | None = None, rows: Sequence[int] | None = None
) -> list[tuple[int, ...]]:
    """Indices in batches of like lengths, the longest first.

    Args:
        lengths: tokens per prompt.
        batch_size: most prompts of a batch.
        batch_tokens: most padded tokens of a batch; one prompt alone may have more.
        rows: how often each prompt is run, once per choice; once unless given.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    found: list[list[int]] = []
    longest = count = 0
    for i in order:
        more = 1 if rows is None else rows[i]
        full = not found or len(found[-1]) == batch_size
        if full or (batch_tokens is not None and (count + more) * longest > batch_tokens):
            found.append([])
            longest, count = lengths[i], 0
        found[-1].append(i)
        count += more
    return [tuple(sorted(batch)) for batch in found]


def check_all_run(job: Job, every: Mapping[str, Sequence[Steering]], skipped: Sequence[Mapping[str, str]]) -> None:
    """Raise `JobError` for a steering that is run on no task of any model."""
    planned = {steering.label for found in every.values() for steering in found}
    for entry in job.steerings:
        if not any(steering.label in planned for steering in entry.steerings()):
            why = "; ".join(s["why"] for s in skipped if s["steering"] == entry.label)
            raise JobError(
                f"steering {entry.label!r} is run on no task: {why}; choose tasks that have it (see `list tasks`)"
            )


def share(batches: Sequence[Batch], index: int, count: int) -> list[Batch]:
    """Every `count`-th batch from `index` on."""
    return [batch for batch in batches if batch.id % count == index]
