"""Examples of methods: commands that run on the bundled model, kept in the first lines of the recipes beside it."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from steerlens.heads import Heads

if TYPE_CHECKING:
    from steerlens.methods.base import Method


def command(recipe: str) -> str:
    """The command in the first line of a shipped recipe; empty if there is no such recipe."""
    from steerlens.recipe import shipped

    found = shipped().get(recipe)
    if found is None:
        return ""
    return str(found.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# "))


def of_method(name: str) -> str:
    """The command that runs a method by its recipe for the bundled model; empty for a method that has none."""
    return command(f"{name}-tiny")


def spelled(recipe: str) -> str:
    """The same command without the recipe: its model, methods and parameters as options."""
    from steerlens.recipe import load_recipe

    loaded = load_recipe(recipe)
    options = ["--model", loaded.model.id]
    for method in loaded.methods:
        options += ["--method", method.name, *_options(method, f"{method.name}." if len(loaded.methods) > 1 else "")]
    return command(recipe).replace(f"--recipe {recipe}", shlex.join(options), 1)


def _options(method: Method, prefix: str) -> list[str]:
    found = []
    for key, value in _given(method).items():
        text = value if isinstance(value, str) else json.dumps(value)
        direct = key in ("heads", "vectors") and not prefix
        found += [f"--{key}", text] if direct else ["--set", f"{prefix}{key}={text}"]
    return found


def _given(method: Method) -> dict[str, Any]:
    """Parameters that are not the method's defaults, as plain data."""
    values = {field.name: (_plain(getattr(method, field.name)), field.default) for field in fields(method)}
    return {name: value for name, (value, default) in values.items() if value != _plain(default)}


def _plain(value: Any) -> Any:
    from steerlens.methods.base import Method

    if isinstance(value, Heads):
        return str(value)
    if isinstance(value, Method):
        return {"method": value.name, **_given(value)}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
