"""Tasks of lm-evaluation-harness: found without its index of 14,000 names where they are local, bad samples kept out.

lm-eval knows no sample errors. Here a document with a failed response has no metrics: it is left out of every mean,
and its row says why.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable, hash_string
from steerlens.evals.harness_lm import SteerlensLM
from steerlens.evals.harness_options import HarnessError
from steerlens.evals.harness_record import Failed, Recording, recording

from steerlens.errors import nearest

log = logging.getLogger("steerlens")


class Tasks(lm_eval.tasks.TaskManager):
    """lm-eval's `TaskManager`, whose default index is built when a name is asked for that is not local."""

    def __init__(
        self,
        verbosity: str | None = None,
        include_path: Any = None,
        include_defaults: bool = True,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self._later = include_defaults
        super().__init__(verbosity, include_path, include_defaults=False, metadata=metadata)

    def build_defaults(self) -> None:
        """Add lm-eval's own tasks; takes some 20 s."""
        if self._later:
            self._later = False
            log.info("reading the index of lm-eval's tasks")
            super().__init__(include_path=self.include_path, include_defaults=True, metadata=self.metadata)

    def known(self, name: str) -> bool:
        """Whether a name, or the path of a YAML file, is a task, a group or a tag."""
        if name not in self._index and not Path(name).is_file():
            self.build_defaults()
        return name in self._index or Path(name).is_file()

    def leaves(self, name: str) -> set[str]:
        """The tasks that a name stands for, without those that a group defines for itself."""
        entry = self._index.get(name)
        if entry is None or entry.kind not in (Kind.GROUP, Kind.TAG):
            return {name}
        members = entry.tags if entry.kind is Kind.TAG else (entry.cfg or {}).get("task") or ()
        names = [m.get("group", m.get("task")) if isinstance(m, dict) else m for m in members]
        return set().union(*(self.leaves(one) for one in names if one in self._index))

    def match_tasks(self, task_list: list[str]) -> list[str]:
        """Names that match patterns; a folder's path is none."""
        if any(name not in self._index and not ("/" in name and Path(name).is_dir()) for name in task_list):
            self.build_defaults()
        found: list[str] = super().match_tasks(task_list)
        return found

    def list_all_tasks(self, *args: Any, **kwargs: Any) -> str:
        """A table of all tasks."""
        self.build_defaults()
        return str(super().list_all_tasks(*args, **kwargs))

    def load(self, task_list: Any) -> Any:
        """Tasks and groups by name, whose bad samples have no metrics."""
        for spec in task_list if isinstance(task_list, list) else [task_list]:
            self.reach(spec)
        loaded = super().load(task_list)
        for task in loaded["tasks"].values():
            _keep_out_failures(task)
        return loaded

    def reach(self, spec: Any) -> None:
        """Add lm-eval's own tasks if a task or group needs them."""
        if any(name not in self._index for name in self._members(spec)):
            self.build_defaults()

    def with_metadata(self, metadata: dict[str, Any]) -> Tasks:
        """The same index, for tasks that are made for a model."""
        found = copy.copy(self)
        found.metadata, found._factory = metadata, TaskFactory(meta=metadata)
        return found

    def _members(self, spec: Any) -> Iterator[str]:
        """The names that a task or group is made of, as far as they are not defined in it."""
        if isinstance(spec, str) and spec in self._index:
            spec = self._index[spec].cfg
        elif isinstance(spec, str) and Path(spec).is_file():
            spec = load_yaml(Path(spec), resolve_func=False)
        elif isinstance(spec, str):
            yield spec
        if not isinstance(spec, dict) or not isinstance(spec.get("task"), list):
            return
        for member in spec["task"]:
            if isinstance(member, str) or isinstance(member.get("task"), list):
                yield from self._members(member)
            elif "dataset_path" not in member:
                yield from self._members(member.get("group", member.get("task")))


def evaluate(model: Any, *args: Any, log_samples: bool = True, **kwargs: Any) -> dict[str, Any] | None:
    """lm-eval's `simple_evaluate`, with sample errors.

    Returns:
        Its results, where the rows of failed samples have "error" and no responses, and `config["steerlens_errors"]`
        lists them as {"task", "doc_id", "error"}; None in other processes than the first.
    """
    token = recording.set(Recording(model if isinstance(model, SteerlensLM) else None))
    try:
        results: Any = simple_evaluate(model, *args, log_samples=True, **kwargs)
    finally:
        recording.reset(token)
    if results is None:
        return None
    failed: dict[tuple[str, Any], str] = {}
    for task, rows in results["samples"].items():
        for row in rows:
            error = next((r.reason for r in _flat(row["resps"]) if isinstance(r, Failed)), None)
            if error is not None:
                row["error"], row["resps"], row["filtered_resps"] = error, [], []
                failed[task, row["doc_id"]] = error
    errors = [{"task": task, "doc_id": doc_id, "error": error} for (task, doc_id), error in failed.items()]
    results["config"]["steerlens_errors"] = errors
    for task in results["samples"]:
        results["results"][task]["sample_errors"] = sum(error["task"] == task for error in errors)
    if not log_samples:
        del results["samples"]
    return dict(results)


@functools.lru_cache(maxsize=8)
def indexed(include_path: str | None) -> Tasks:
    """The tasks of a folder and of lm-eval, whose index a process reads once."""
    return Tasks(include_path=include_path)


def check(names: Sequence[str], include_path: str | None = None) -> list[str]:
    """The tasks that the names stand for; see `harness.check`."""
    tasks = indexed(include_path)
    owners: dict[str, str] = {}
    for name in names:
        if not tasks.known(name):
            raise HarnessError(f"lm-eval has no task {name!r}{nearest(name, tasks.all_tasks)}")
        for task in sorted(tasks.leaves(name)):
            if (other := owners.setdefault(task, name)) != name:
                raise HarnessError(f"{other!r} and {name!r} both hold the task {task!r}: leave one of them out")
    return list(owners)


@functools.lru_cache(maxsize=8)
def load(name: str, include_path: str | None, metadata: str, settings: str = "") -> tuple[Tasks, list[Any]]:
    """A task by name or YAML file, or the tasks of a group, with their data, read once.

    Args:
        name: of the task, or the path of its file.
        include_path: folder of further task files.
        metadata: for tasks that are made for a model, as JSON.
        settings: of the run; lm-eval writes them into its tasks, so that each has tasks of its own.
    """
    index = indexed(include_path)
    if not index.known(name):
        raise HarnessError(f"lm-eval has no task {name!r}{nearest(name, index.all_tasks)}")
    index.reach(name)
    tasks = index.with_metadata(json.loads(metadata))
    loaded = tasks.load([name])
    # a group holds those below it
    return tasks, list(loaded["groups"].values())[:1] or list(loaded["tasks"].values())


def plain(value: Any) -> Any:
    """Plain JSON types, as lm-eval writes results into a file."""
    return json.loads(json.dumps(value, default=handle_non_serializable))


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """A sample row as lm-eval writes it into a file."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(given)}
        for i, given in enumerate(row["arguments"])
    }
    return dict(plain(row | {"arguments": arguments, "target": str(row["target"])}))


def hashes(samples: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """A digest of each task's documents, prompts and targets, as lm-eval makes it."""
    keys = ("doc_hash", "prompt_hash", "target_hash")
    return {task: hash_string("".join(row[key] for row in rows for key in keys)) for task, rows in samples.items()}


def _keep_out_failures(task: Any) -> None:
    if getattr(task, "_steerlens", False):
        return
    task._steerlens = True
    build, filters, process = task.build_all_requests, task.apply_filters, task.process_results

    def build_all_requests(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        run = recording.get()
        if run is not None and run.lm is not None:
            run.lm.expect(task.task_name, task.instances)

    def apply_filters() -> Any:
        filtered = filters()
        for request in task.instances:
            failed = next((r for r in request.resps if isinstance(r, Failed)), None)
            if failed is not None:
                request.filtered_resps = dict.fromkeys(request.filtered_resps, failed)
        return filtered

    def process_results(doc: Any, results: Any) -> Any:
        return {} if any(isinstance(r, Failed) for r in results) else process(doc, results)

    task.build_all_requests, task.apply_filters, task.process_results = (
        build_all_requests,
        apply_filters,
        process_results,
    )


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value
