"""`steerlens list`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

_MOST_SHOWN = 8


class What(StrEnum):
    """Kinds of things to list."""

    methods = "methods"
    models = "models"
    recipes = "recipes"
    tasks = "tasks"
    jobs = "jobs"
    metrics = "metrics"


def listing(
    what: Annotated[What, typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List methods, models, recipes, tasks, jobs or metrics."""
    kinds = {
        What.methods: methods,
        What.models: models,
        What.recipes: recipes,
        What.tasks: tasks,
        What.jobs: jobs,
        What.metrics: metrics,
    }
    found = kinds[what]()
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    if not found:
        typer.echo(f"no {what.value} in this installation", err=True)
    for item in found:
        typer.echo("\n".join(_shown(item)))


def methods() -> list[dict[str, Any]]:
    """Every method: name, summary, parameters with defaults (null: required), span groups needed, source."""
    from steerlens import methods as registry

    found = []
    for name in registry.names():
        cls = registry.get(name)
        fields = dataclasses.fields(cls)
        parameters = {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields}
        required = [
            f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        found.append(
            {
                "name": name,
                "summary": cls.summary,
                "parameters": parameters,
                "required": required,
                "needs": list(cls.needs),
                "source": cls.source,
            }
        )
    return found


def models() -> list[dict[str, Any]]:
    """Every alias and what it stands for; any Hub id and local path works too."""
    from steerlens.models import ALIASES

    return [{"name": alias, "id": target} for alias, target in ALIASES.items()]


def recipes() -> list[dict[str, Any]]:
    """Every shipped recipe."""
    from steerlens.recipe import load_recipe, shipped

    found = []
    for name in shipped():
        data = load_recipe(name).to_dict()
        found.append(
            {"name": name, "model": data["model"]["id"], "methods": data["methods"]}
            | {key: data[key] for key in ("task", "evidence") if key in data}
        )
    return found


def tasks() -> list[dict[str, Any]]:
    """Every shipped task: name, summary, output, metrics (the primary one first), span groups, source of its data."""
    try:
        task = importlib.import_module("steerlens.evals.task")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("steerlens.evals"):
            raise
        return []
    loaded = [task.load(name) for name in task.names()]
    return [
        {
            "name": one.name,
            "summary": one.summary,
            "output": one.output,
            "metrics": list(one.metrics),
            "groups": sorted(one.groups),
            "data": one.data.place,
            "offline": one.offline,
        }
        for one in loaded
    ]


def jobs() -> list[dict[str, Any]]:
    """Every shipped job, with what it runs."""
    from steerlens.evals.job import Job, shipped

    loaded = {name: Job.from_file(path) for name, path in shipped().items()}
    return [
        {
            "name": name,
            "models": [model.name for model in job.models],
            "steerings": [entry.label for entry in job.steerings],
            "tasks": [Path(task.lm_eval or str(task.task)).name.removesuffix(".yaml") for task in job.tasks],
        }
        for name, job in loaded.items()
    ]


def metrics() -> list[dict[str, Any]]:
    """Every metric of tasks, with the output that it judges."""
    registry = importlib.import_module("steerlens.evals.metrics")
    found = [registry.get(name) for name in registry.names()]
    return [{"name": m.name, "summary": _summary(m.function), "output": m.output} for m in found]


def _summary(function: Any) -> str:
    return " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())


def _shown(item: dict[str, Any]) -> list[str]:
    head, *rest = (
        [key for key in item if key == "name"],
        *[key for key in item if key not in ("name", "required")],
    )
    lines = [f"{item[head[0]]}"]
    for key in rest:
        value = item[key]
        if key == "parameters":
            value = ", ".join(
                name if name in item["required"] else f"{name}={default}" for name, default in value.items()
            )
        elif key == "methods":
            value = "; ".join(" ".join(_argument(k, v) for k, v in method.items()) for method in value)
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        if value:
            lines.append(f"    {key + ':':<12} {value}")
    return lines


def _argument(key: str, value: Any) -> str:
    """A recipe's parameter as `--set` takes it; many heads only by number."""
    if key == "method":
        return str(value)
    if key == "heads" and isinstance(value, dict):
        count = sum(len(h) for h in value.values())
        if count > _MOST_SHOWN:
            return f"heads=({count} in {len(value)} layers)"
        value = ";".join(f"{layer}:{h if isinstance(h, str) else ','.join(map(str, h))}" for layer, h in value.items())
    return f"{key}={value}"
