"""`steerlens list`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from steerlens.cli import worked
from steerlens.cli.guard import UsageError
from steerlens.errors import nearest

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
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Only this one; a method or a recipe in full.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list, or with NAME one object.")] = False,
) -> None:
    """List methods, models, recipes, tasks, jobs or metrics.

    For example: steerlens list methods spotlight

    Of a method that is its formula, its parameters, what it needs, and commands that run it on the bundled model.
    """
    kinds = {
        What.methods: methods,
        What.models: models,
        What.recipes: recipes,
        What.tasks: tasks,
        What.jobs: jobs,
        What.metrics: metrics,
    }
    found = kinds[what]()
    if name is not None:
        one = next((item for item in found if item["name"] == name), None)
        if one is None:
            known = [str(item["name"]) for item in found]
            raise UsageError(f"{name!r} is not among the {what.value}: {', '.join(known)}{nearest(name, known)}")
        details: dict[What, Callable[[str], dict[str, Any]]] = {What.methods: _method, What.recipes: _recipe}
        one |= details[what](name) if what in details else {}
        texts = {What.methods: _method_text, What.recipes: _recipe_text}
        typer.echo(json.dumps(one, ensure_ascii=False) if as_json else texts.get(what, _row_text)(one))
        return
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    if not found:
        typer.echo(f"no {what.value} in this installation", err=True)
    for item in found:
        typer.echo("\n".join(_shown(item)))


def methods() -> list[dict[str, Any]]:
    """Every method: name, summary, parameters with defaults (null: required), what it needs, source, an example."""
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
                "fit": cls.fit,
                "source": cls.source,
                "example": worked.of_method(name),
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


def _method(name: str) -> dict[str, Any]:
    """What a method's row leaves out: its docstring, its parameters' types, and its examples."""
    from steerlens import methods as registry

    cls = registry.get(name)
    recipe = f"{name}-tiny"
    examples = [worked.command(recipe), worked.spelled(recipe)] if worked.command(recipe) else []
    types = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    return {"documentation": inspect.getdoc(cls) or "", "types": types, "examples": examples}


def _method_text(item: dict[str, Any]) -> str:
    parts = [
        f"{item['name']}: {item['summary']}\n{item['source']}",
        item["documentation"],
        "Parameters:\n" + "\n".join(_signature(item, name) for name in item["parameters"]),
        f"Needs:\n    {_needs(item)}",
    ]
    if item["examples"]:
        parts.append("Examples, by its recipe and by its parameters:\n    " + "\n\n    ".join(item["examples"]))
    return "\n\n".join(parts)


def _signature(item: dict[str, Any], name: str) -> str:
    start = f"    {name}: {item['types'][name]}"
    return start if name in item["required"] else f"{start} = {item['parameters'][name]!r}"


def _needs(item: dict[str, Any]) -> str:
    """Span groups and parameters without which a method does nothing, and what gives them."""
    from steerlens.cli.session import option

    found = [f"{group} ({option(group)})" for group in item["needs"]]
    source = f", from {item['fit']}" if item["fit"] else ""
    for name in item["required"]:
        given = {"heads": "--heads SPEC", "vectors": "--vectors F.safetensors"}.get(name, f"--set {name}=…")
        found.append(f"{name} ({given}{source if name != 'heads' else ''})")
    return "; ".join(found) or "nothing"


def _recipe(name: str) -> dict[str, Any]:
    """What a recipe's row leaves out: the notes above it, the whole of it, and its command."""
    from steerlens.recipe import load_recipe, shipped

    first, *rest = shipped()[name].read_text(encoding="utf-8").splitlines()
    notes = [line.removeprefix("#").strip() for line in itertools.takewhile(lambda line: line[:1] == "#", rest)]
    return {"notes": notes, **load_recipe(name).to_dict(), "examples": [first.removeprefix("# ")]}


def _recipe_text(item: dict[str, Any]) -> str:
    from steerlens.recipe import shipped

    return str(shipped()[item["name"]].read_text(encoding="utf-8")).rstrip()


def _row_text(item: dict[str, Any]) -> str:
    return "\n".join(_shown(item))


def _shown(item: dict[str, Any]) -> list[str]:
    head, *rest = (
        [key for key in item if key == "name"],
        *[key for key in item if key not in ("name", "required", "fit")],
    )
    lines = [f"{item[head[0]]}"]
    for key in rest:
        value = item[key]
        if key == "parameters":
            value = ", ".join(
                name if name in item["required"] else f"{name}={default}" for name, default in value.items()
            )
        elif key == "needs":
            value = _needs(item)
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
