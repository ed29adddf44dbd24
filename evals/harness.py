"""Tasks of lm-evaluation-harness under steering.

    python -m steerlens.evals.harness run --model steerlens --model_args pretrained=tiny,recipe=pasta-tiny,tags=em \
        --tasks my_task --include_path tasks/ --batch_size 16

is lm-eval's own command line, all its flags included, with a further model (see `harness_lm.SteerlensLM`); data
parallel under `accelerate launch -m steerlens.evals.harness run …`. Values that hold commas need JSON: `--model_args
'{"pretrained": "tiny", "methods": [{"method": "pasta", "alpha": 0.1}]}'`. Several processes on CPUs:
`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m steerlens.evals.harness run …`, or torchrun
in the same way; `accelerate launch --cpu` starts one.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done with sample errors. Launchers have their own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlens.evals.harness_options import HarnessError

from steerlens.errors import HeadError, MethodError, RecipeError, SpanError, SteerlensError, nearest

if TYPE_CHECKING:
    from steerlens.evals.doc import Steering

KEYS = (
    "lm_eval",
    "include_path",
    "limit",
    "num_fewshot",
    "tags",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "system_instruction",
    "gen_kwargs",
    "max_length",
    "metadata",
)
SAMPLE_ERRORS = 3


class MissingError(SteerlensError, RuntimeError):
    """lm-eval is not installed."""

    exit_code = 2


def available() -> bool:
    """Whether lm-eval and what it needs are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("lm_eval", "datasets", "evaluate"))


def check(names: Sequence[str], include_path: str | None = None) -> list[str]:
    """The tasks that the names stand for, without those that a group defines for itself.

    lm-eval's index of its own tasks is read only for names that `include_path` does not have.

    Raises:
        HarnessError: for a folder that is not there; for a name that is no task, group, tag or YAML file, with the
            nearest; for a task that two of the names hold, whose samples would be there twice.
    """
    _require()
    from steerlens.evals import harness_tasks

    if include_path is not None and not Path(include_path).is_dir():
        raise HarnessError(f"include_path {include_path!r} is no folder; give the one with the task files of lm-eval")
    return harness_tasks.check(names, include_path)


def run(
    model: Any,
    tokenizer: Any,
    entry: Mapping[str, Any],
    steering: Steering,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int | str = 1,
    backend: str = "auto",
    name: str | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run one lm-eval task under one steering. A task is read once, however many steerings run on it.

    Args:
        model: as loaded; the steering is off again afterwards.
        tokenizer: the model's.
        entry: `{"lm_eval": name, …}`, see `KEYS`; its `limit` wins over the argument.
        steering: without methods it is lm-eval's own run.
        limit: first documents of the task, or a share below 1.
        seed: of few-shot examples and of sampling.
        batch_size: as of lm-eval.
        backend: of `steerlens.steer`.
        name: of the model, for the rows and the results.

    Returns:
        lm-eval's results without their samples, and the samples as lm-eval writes them, with `model`, `steering`,
        `task` and `seed` in front, and `error` where a sample could not be steered as asked.

    Raises:
        SteerlensError: before the run, where steering and task do not fit.
    """
    _require()
    import lm_eval.evaluator
    from steerlens.evals import harness_tasks
    from steerlens.evals.harness_lm import SteerlensLM
    from steerlens.evals.results import git_hash

    for key in entry:
        if key not in KEYS:
            raise HarnessError(f"lm_eval task: unknown key {key!r}; allowed: {', '.join(KEYS)}{nearest(key, KEYS)}")
    metadata = json.dumps({"pretrained": name} | dict(entry.get("metadata") or {}), sort_keys=True)
    settings = json.dumps({key: value for key, value in entry.items() if key != "limit"}, sort_keys=True)
    with _quiet():
        tasks, loaded = harness_tasks.load(entry["lm_eval"], entry.get("include_path"), metadata, settings)
        lm = SteerlensLM(
            model,
            tokenizer=tokenizer,
            steering=steering,
            tags=entry.get("tags"),
            backend=backend,
            batch_size=batch_size,
            max_length=entry.get("max_length"),
        )
        lm.name = name or lm.name
        chat = entry.get("apply_chat_template", False)
        # lm-eval's own lets git complain on stderr outside a repository
        with _every_rank(), _replaced(lm_eval.evaluator, "get_git_commit_hash", git_hash):
            results = harness_tasks.evaluate(
                model=lm,
                model_args={"pretrained": lm.name, "steering": steering.to_dict()},
                tasks=loaded,
                task_manager=tasks,
                num_fewshot=entry.get("num_fewshot"),
                batch_size=batch_size,
                limit=entry.get("limit") or limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=entry.get("fewshot_as_multiturn", bool(chat)),
                system_instruction=entry.get("system_instruction"),
                gen_kwargs=entry.get("gen_kwargs"),
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    assert results is not None
    results["config"]["model"] = "steerlens"
    samples = results.pop("samples")
    where = {"model": lm.name, "steering": steering.label}
    rows = [
        where | {"task": task, "seed": seed} | harness_tasks.plain_row(row)
        for task, found in samples.items()
        for row in found
    ]
    results["task_hashes"] = harness_tasks.hashes(samples)
    return harness_tasks.plain(results), rows


def main() -> int:
    """lm-eval's command line with `--model steerlens`; returns the exit code."""
    try:
        _require()
        import lm_eval
        import lm_eval.tasks
        from lm_eval.__main__ import cli_evaluate
        from steerlens.evals import harness_tasks

        failed: list[Any] = []

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            results = harness_tasks.evaluate(*args, **kwargs)
            failed.extend(results["config"]["steerlens_errors"] if results else ())
            return results

        with (
            _replaced(lm_eval, "simple_evaluate", evaluate),
            _replaced(lm_eval.tasks, "TaskManager", harness_tasks.Tasks),
        ):
            cli_evaluate()
    except SteerlensError as error:
        if os.environ.get("STEERLENS_DEBUG") == "1":
            raise
        sys.stderr.write(f"steerlens: {error}\n")
        usage = isinstance(error, MethodError | HeadError | SpanError | RecipeError)
        return int(getattr(error, "exit_code", 2 if usage else 1))
    for one in failed[:10]:
        sys.stderr.write(f"steerlens: task {one['task']}, doc_id {one['doc_id']}: {one['error']}\n")
    if len(failed) > 10:
        sys.stderr.write(f"steerlens: and {len(failed) - 10} more sample errors\n")
    return SAMPLE_ERRORS if failed else 0


def _require() -> None:
    if not available():
        raise MissingError("lm-eval tasks need lm-eval: pip install 'steerlens[eval]'")


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def _every_rank() -> Iterator[None]:
    """lm-eval gives results to the process whose LOCAL_RANK is 0; here every process runs a task of its own."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out lm-eval's advice about models that are given loaded."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    if os.environ.get("STEERLENS_DEBUG") != "1":
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


if __name__ == "__main__":
    sys.exit(main())
