"""`steerlens eval`: steered against unsteered on tasks, with paired statistics."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerlens.cli import guard, options, show
from steerlens.cli.guard import UsageError
from steerlens.errors import SteerlensError, nearest

if TYPE_CHECKING:
    from steerlens.evals.evaluate import State
    from steerlens.evals.job import Job
    from steerlens.recipe import Recipe

_SELECTING = {
    "method": "--method",
    "recipe": "--recipe",
    "heads": "--heads",
    "vectors": "--vectors",
    "settings": "--set",
    "tasks": "--tasks",
    "task_set": "--task-set",
    "num_fewshot": "--num-fewshot",
    "include_path": "--include-path",
    "model": "--model",
    "device_map": "--device-map",
    "dtype": "--dtype",
    "revision": "--revision",
    "model_arg": "--model-arg",
    "trust_remote_code": "--trust-remote-code",
}
"""What a job file says itself."""


def evaluate(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="JOB.yaml", help="A job file or a shipped job: see `list jobs`."),
    ] = None,
    method: options.Methods = None,
    recipe: options.Recipes = None,
    heads: options.HeadSpec = None,
    vectors: options.Vectors = None,
    settings: options.Settings = None,
    model: options.Model = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="T,T…", help="Tasks: names that `list tasks` shows, task files, or tasks of lm-eval."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder for samples, results and the report.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, metavar="N", help="Most documents per task. Default: the job's, or 200 without --config."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=900, help="Of documents and controls.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, metavar="N", help="Documents per batch. Default: 16.")
    ] = None,
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Also run random sets of other heads, and the strength that does nothing."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an --output that was stopped.")] = False,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Do the I-th of N parts, from 0/N to N-1/N.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Only write the results of an --output whose shards are done.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it takes: batches, memory, tokens, operations.")
    ] = False,
    prefetch: Annotated[
        bool, typer.Option("--prefetch", help="Only download models and data, for machines without a network.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Keep outcomes here, and use those that are there.")
    ] = None,
    task_set: Annotated[
        list[str] | None,
        typer.Option(
            "--task-set", metavar="T.KEY=VALUE", help="Parameter of a task's data, as needle.length=256; repeatable."
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Render prompts by the chat template. Default: as the task says."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer. Default: the task's.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, metavar="N", help="Demonstrations, for tasks of lm-eval.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="Folder with task files of lm-eval.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary instead of the table.")] = False,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    model_arg: options.ModelArgs = None,
    trust_remote_code: options.TrustRemoteCode = False,
    backend: options.BackendOption = options.Backend.auto,
) -> int:
    """Evaluate a steering on tasks against the unsteered model, document by document, and report the difference.

    For example: steerlens eval --recipe pasta-tiny --tasks conflict,needle --limit 200 --controls --output results

    What a method needs, and its parameters: steerlens list methods NAME. Span groups of tasks: steerlens list tasks.

    Every batch is on the disk when it is done: a run that was stopped goes on with --resume. Several processes share
    the work by --shard, or under `accelerate launch -m steerlens.cli eval …`.
    """
    given = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT"
    }
    _check(given, config, tasks, output, merge=merge, dry_run=dry_run, prefetch=prefetch)
    from steerlens.evals.folder import Worker

    worker = Worker.of(shard, os.environ)
    if merge and config is None and tasks is None:
        from steerlens.evals.job import Job

        assert output is not None
        job = Job.from_folder(output)
    elif config is not None:
        job = _from_file(config, output, limit, seed, batch_size, controls, chat, max_new_tokens, backend, given)
    else:
        loaded = _recipe(recipe)
        chosen = options.ModelOptions.of(
            model,
            loaded,
            device=device,
            device_map=device_map,
            dtype=dtype,
            revision=revision,
            model_args=model_arg or [],
            trust_remote_code=trust_remote_code,
        )
        job = _from_options(
            chosen,
            options.build_methods(method or [], loaded, heads, settings or [], vectors),
            loaded,
            _tasks(str(tasks), task_set or [], num_fewshot, include_path),
            output=None if output is None else str(output),
            limit=200 if limit is None else limit,
            seeds=[seed or 0],
            batch_size=batch_size or 16,
            controls=controls,
            chat=chat,
            max_new_tokens=max_new_tokens,
            backend=backend.value,
        )
    others = [str(task.lm_eval) for task in job.tasks if task.lm_eval is not None]
    # those of --tasks have been looked for
    if others and tasks is None:
        _slow(others)
    assert job.loaded
    if dry_run or prefetch:
        return _ahead(job, as_json, prefetch=prefetch)
    target = output if output is not None else Path(job.output) if job.output is not None else None
    if target is None:
        raise UsageError(f"no --output, and {config} names none: say which folder the results go into")
    from steerlens.evals import evaluate as driver

    if merge:
        return _finish(driver.merge(job, target), target, as_json, show_it=True)
    state = _run(job, driver.Options(target, worker, resume, cache, device))
    code = _finish(state, target, as_json, show_it=state.written or worker.count == 1)
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        show.note(f"this is one of several processes, which all end when one fails: exit 0 here, --merge gives {code}")
        return 0
    return code


def _check(
    given: set[str],
    config: Path | None,
    tasks: str | None,
    output: Path | None,
    *,
    merge: bool,
    dry_run: bool,
    prefetch: bool,
) -> None:
    only = [name for name, on in {"--merge": merge, "--dry-run": dry_run, "--prefetch": prefetch}.items() if on]
    if len(only) > 1:
        raise UsageError(f"{' and '.join(only)} exclude each other")
    if config is not None:
        if twice := [option for name, option in _SELECTING.items() if name in given]:
            raise UsageError(f"--config says which models, steerings and tasks; leave {', '.join(twice)} out")
    else:
        if tasks is None and not merge:
            raise UsageError(
                "give --tasks T,T… with --method or --recipe, or --config JOB.yaml; `list tasks` names tasks"
            )
        if output is None and not (dry_run or prefetch):
            raise UsageError("no --output: say which folder the results go into")
    if only:
        running = {"resume": "--resume", "shard": "--shard", "cache": "--cache"}
        if idle := [option for name, option in running.items() if name in given]:
            raise UsageError(f"{only[0]} runs nothing; leave {', '.join(idle)} out")


def _recipe(name: str | None) -> Recipe | None:
    if name is None:
        return None
    from steerlens.recipe import load_recipe

    return load_recipe(name)


def _from_file(
    path: Path,
    output: Path | None,
    limit: int | None,
    seed: int | None,
    batch_size: int | None,
    controls: bool,
    chat: bool | None,
    max_new_tokens: int | None,
    backend: options.Backend,
    given: set[str],
) -> Job:
    """The job of a file, with the options that may replace what it says."""
    from steerlens.evals.job import Job

    job = Job.from_file(path)
    changed: dict[str, Any] = {
        "output": None if output is None else str(output),
        "limit": limit,
        "seeds": None if seed is None else [seed],
        "batch_size": batch_size,
        "controls": True if controls else None,
        "chat": chat,
        "max_new_tokens": max_new_tokens,
        "backend": backend.value if "backend" in given else None,
    }
    if limit is not None:
        tasks = job.to_dict()["tasks"]
        changed["tasks"] = [{key: value for key, value in task.items() if key != "limit"} for task in tasks]
    return job.changed(**{key: value for key, value in changed.items() if value is not None})


def _from_options(
    chosen: options.ModelOptions,
    methods: Sequence[Any],
    recipe: Recipe | None,
    tasks: Sequence[Mapping[str, Any]],
    **settings: Any,
) -> Job:
    from steerlens.evals.job import Job

    model = {
        "id": chosen.name,
        "revision": chosen.revision,
        "dtype": chosen.dtype,
        "device_map": chosen.device_map,
        "args": chosen.model_args,
        "trust_remote_code": chosen.trust_remote_code,
    }
    return Job.of(
        model=model,
        methods=methods,
        label=recipe.name if recipe else None,
        made_for=recipe.model if recipe else None,
        tasks=tasks,
        **settings,
    )


def _tasks(
    text: str, changes: Sequence[str], num_fewshot: int | None, include_path: Path | None
) -> list[dict[str, Any]]:
    """The task entries of a job."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(
            f"--tasks {text!r} has an empty name; write names with a comma between, such as needle,conflict"
        )
    own = [name for name in names if _is_own(name)]
    others = [name for name in names if name not in own]
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"--include-path {include_path} is no folder; give the one with the task files of lm-eval")
    _check_others(others, include_path)
    unused = {"--num-fewshot": num_fewshot, "--include-path": include_path}
    if not others and (idle := [option for option, value in unused.items() if value is not None]):
        raise UsageError(f"{', '.join(idle)}: only tasks of lm-eval have that, and {text} are none")
    entries: dict[str, dict[str, Any]] = {}
    for name in names:
        few = {"num_fewshot": num_fewshot, "include_path": None if include_path is None else str(include_path)}
        entries[name] = {"task": name} if name in own else {"lm_eval": name, **few}
    for change in changes:
        key, value = options.assignment(change, "--task-set")
        name, dot, parameter = key.rpartition(".")
        if not dot or name not in entries:
            raise UsageError(
                f"--task-set {change!r}: write TASK.KEY=VALUE with a task of this run, one of {', '.join(names)}"
                f"{nearest(name, names)}"
            )
        entries[name][parameter] = value
    return list(entries.values())


def _is_own(name: str) -> bool:
    from steerlens.evals import task

    return name in task.names() or (name.endswith((".yaml", ".yml")) and Path(name).is_file())


def _check_others(names: Sequence[str], include_path: Path | None) -> None:
    """Raise an error for a name that is no task of lm-eval either, with the nearest of both."""
    if not names:
        return
    from steerlens.evals import harness, task

    if harness.available():
        _slow(names)
    for name in names:
        here = f"no task {name!r}{nearest(name, task.names())}"
        if not harness.available():
            raise UsageError(f"{here}; for the tasks of lm-eval: pip install 'steerlens[eval]'")
        try:
            harness.check([name], None if include_path is None else str(include_path))
        except SteerlensError as error:
            raise UsageError(f"{here}; {error}") from None


def _slow(names: Sequence[str]) -> None:
    show.note(f"looking for {', '.join(names)} among the tasks of lm-eval; its index may take 20 s to read")


# --- what a person sees -----------------------------------------------------------------------------------------------


def _run(job: Job, how: Any) -> State:
    from steerlens.evals.evaluate import Evaluation

    with contextlib.ExitStack() as stack:
        moved = [lambda count: None]

        def begin(total: int, done: int) -> None:
            if done:
                show.note(f"going on: {done} of {total} samples are there")
            moved[0] = stack.enter_context(show.progress(total, done, what="samples"))

        def advance(count: int) -> None:
            moved[0](count)
            guard.check_stop()

        try:
            return Evaluation(job, how, advance=advance, note=show.note).run(begin)
        except (guard.Stopped, OSError):
            # a signal may come between a batch's end on the disk and the word of it
            if any(path.stat().st_size for path in how.output.glob("work/worker-*.jsonl")):
                show.note(f"stopped; {how.output} keeps every finished batch: run again with --resume to go on")
            raise


def _finish(state: State, output: Path, as_json: bool, *, show_it: bool) -> int:
    if state.summary is None:
        show.note(
            f"{state.missing} of {state.batches} batches are not done: other workers have them, or --resume runs them"
        )
    elif show_it:
        if as_json:
            typer.echo(json.dumps(state.summary, ensure_ascii=False))
        else:
            _show(state.summary)
        show.note(f"wrote {output / 'report.html'}, report.md and summary.json, and the samples beside them")
        for line in state.summary["notes"]:
            show.note(line)
    if state.errors:
        show.note(f"{state.errors} samples have errors; the report lists them")
    return guard.SAMPLE_ERRORS if state.errors else 0


def _show(summary: Mapping[str, Any]) -> None:
    from steerlens.paired import UNSETTLED, unsettled

    several = len(summary["models"]) > 1
    found = [c for c in summary["comparisons"] if c["primary"] and c["role"] in ("method", "sweep")]
    columns = ["task", "metric", "steering", "n", "baseline", "steered", "difference [95 %]", "verdict"]
    rows = []
    for c in found:
        difference = c["difference"]
        low, high = difference["interval"]
        change = f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
        sides = [f"{c['baseline']:.3f}", f"{c['steered']:.3f}"]
        row = [c["task"], c["metric"], c["after"], str(c["n"]), *sides, change, c["verdict"]]
        rows.append([c["model"], *row] if several else row)
    if rows:
        show.table(["model", *columns] if several else columns, rows)
        if any(unsettled(c["verdict"], *c["difference"]["interval"]) for c in found):
            typer.echo(UNSETTLED)
    else:
        show.note("nothing to compare: no steering has a document in common with the unsteered model")
    for control in summary["controls"]:
        typer.echo(_control(control))
    for skipped in summary["skipped"]:
        show.note(f"left out: {skipped['steering']} on {skipped['task']}: {skipped['why']}")


def _control(control: Mapping[str, Any]) -> str:
    parts = []
    if drawn := control.get("random_heads"):
        parts.append(
            f"{drawn['sets']} random head sets {drawn['mean']:.3f} ({drawn['low']:.3f} to {drawn['high']:.3f})"
        )
    if control.get("neutral_identical") is not None:
        parts.append(f"neutral {'gives' if control['neutral_identical'] else 'does NOT give'} the unsteered outputs")
    return f"controls of {control['of']} on {control['task']} ({control['metric']}): {', '.join(parts)}"


def _ahead(job: Job, as_json: bool, *, prefetch: bool) -> int:
    from steerlens.evals import cost
    from steerlens.evals.plan import offline_unless_reachable

    with offline_unless_reachable(job, show.note):
        if not prefetch:
            return _estimate(cost.estimate(job), as_json)
        cost.prefetch(job, show.note)
        return 0


def _estimate(found: Mapping[str, Any], as_json: bool) -> int:
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return 0
    columns = ("model", "task", "documents", "steerings", "batches", "longest", "prompt tokens", "new tokens", "FLOPs")
    rows = []
    for model in found["models"]:
        for task in model["tasks"]:
            keys = ("documents", "steerings", "batches", "longest", "prompt_tokens", "new_tokens")
            numbers = ["?" if task[key] is None else f"{task[key]:,}" for key in keys]
            rows.append(
                (model["model"], task["task"], *numbers, "?" if task["flops"] is None else f"{task['flops']:.2e}")
            )
    show.table(columns, rows)
    for model in found["models"]:
        parts = ", ".join(f"{key} {_bytes(value)}" for key, value in model["memory"].items() if key != "total")
        total = _bytes(model["memory"]["total"])
        typer.echo(f"{model['model']}: {model['parameters']:.3g} parameters in {model['dtype']}: {total} ({parts})")
        for line in dict.fromkeys(model["declared"]):
            typer.echo(f"  declared, not measured: {line}")
    said: dict[str, list[str]] = {}
    for task in (task for model in found["models"] for task in model["tasks"]):
        for line in task["declared"]:
            said.setdefault(line.partition(":")[0], []).append(task["task"])
    for what, tasks in said.items():
        typer.echo(f"declared or assumed, not measured (--json says how): {what} of {', '.join(dict.fromkeys(tasks))}")
    total = found["total"]
    if total["batches"]:
        uncounted = ", ".join(total["without_new_tokens"])
        without = [*total["without"], *([f"the new tokens of {uncounted}"] if uncounted else [])]
        most = "" if total["without_new_tokens"] else "at most "
        typer.echo(
            f"{most}{total['flops']:.2e} floating-point operations in {total['forwards']:,} forwards of "
            f"{total['batches']:,} batches{', without ' if without else ''}{', '.join(without)}"
        )
    else:
        typer.echo(f"floating-point operations: unknown, as is the size of {', '.join(total['without'])}")
    for skipped in found["skipped"]:
        show.note(f"left out: {skipped['steering']} on {skipped['task']}: {skipped['why']}")
    return 0


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
