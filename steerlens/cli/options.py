"""Options that several commands share, and what they mean: the methods of a run and the model to load."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerlens.cli.guard import UsageError
from steerlens.errors import MethodError, nearest

if TYPE_CHECKING:
    from steerlens.methods.base import Method
    from steerlens.recipe import Recipe


class Backend(StrEnum):
    """How steered attention is computed."""

    auto = "auto"
    reference = "reference"
    sdpa = "sdpa"
    triton = "triton"


Methods = Annotated[
    list[str] | None,
    typer.Option("--method", metavar="NAME", help="Method to steer with; repeatable. `list methods` names them."),
]
Recipes = Annotated[
    str | None,
    typer.Option("--recipe", metavar="R", help="Recipe: a file, a shipped name, or a Hub repository."),
]
HeadSpec = Annotated[
    str | None,
    typer.Option("--heads", metavar="SPEC", help='Heads: "all", "3:17,7;8:*" or "scores.json:top20".'),
]
Vectors = Annotated[
    str | None,
    typer.Option("--vectors", metavar="F.safetensors", help="Vectors of a method that has some, as from its fit."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Parameter, as alpha=0.1 or pasta.alpha=0.1; overrides the recipe; repeatable.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="Alias, Hub id or local path. Default: the recipe's model, else tiny."),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cuda, cuda:1, xpu, mps or cpu. Default: the first of these that works."),
]
DeviceMap = Annotated[str | None, typer.Option("--device-map", help='Spread over devices, for example "auto".')]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Commit, tag or branch of the model on the Hub.")]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="KEY=VALUE", help="Loading option such as load_in_4bit=true; repeatable."),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")]
BackendOption = Annotated[Backend, typer.Option("--backend", help="A named backend never falls back to another.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model to load, and how."""

    name: str
    device: str | None = None
    device_map: Any = None
    dtype: str = "auto"
    revision: str | None = None
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    trust_remote_code: bool = False

    @classmethod
    def of(
        cls,
        model: str | None,
        recipe: Recipe | None,
        *,
        device: str | None,
        device_map: str | None,
        dtype: str,
        revision: str | None,
        model_args: Sequence[str],
        trust_remote_code: bool,
    ) -> ModelOptions:
        """From the command line; a recipe says which model where `--model` does not."""
        revision_of_recipe = None
        if model is None:
            model = recipe.model.id if recipe else "tiny"
        if recipe and model == recipe.model.id:
            revision_of_recipe = recipe.model.revision
        arguments = dict(assignment(text, "--model-arg") for text in model_args)
        placed = None if device_map is None else value_of(device_map, "--device-map")
        return cls(model, device, placed, dtype, revision or revision_of_recipe, arguments, trust_remote_code)

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        from transformers.utils import logging

        from steerlens import models

        logging.disable_progress_bar()
        return models.load(
            self.name,
            self.device,
            self.device_map,
            self.dtype,
            self.revision,
            self.model_args,
            self.trust_remote_code,
        )


def assignment(text: str, option: str) -> tuple[str, Any]:
    """`key=value` with the value typed as YAML would."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{option} {text!r} is not KEY=VALUE")
    return key.strip(), value_of(value, f"{option} {key}")


def value_of(text: str, option: str) -> Any:
    """A value typed as YAML would."""
    from steerlens import plainyaml

    try:
        return plainyaml.scalar(text)
    except plainyaml.PlainYamlError as error:
        raise UsageError(f"{option}: {text!r} cannot be read: {error}") from None


def build_methods(
    names: Sequence[str],
    recipe: Recipe | None,
    heads: str | None,
    settings: Sequence[str],
    vectors: str | None = None,
) -> list[Method]:
    """The methods of a run: the recipe's, then the named ones, with `--heads`, `--vectors` and `--set` put in.

    Raises:
        UsageError, MethodError, HeadError: naming the option, what is allowed and the nearest name.
    """
    from steerlens import methods as registry

    if not names and recipe is None:
        raise UsageError(
            f"neither --method nor --recipe: say what to steer with; methods: {', '.join(registry.names())}"
        )
    described = [method.to_dict() for method in recipe.methods] if recipe else []
    described += [{"method": registry.get(name).name} for name in names]
    given = [] if heads is None else [("heads", value_of(heads, "--heads"), "--heads")]
    given += [] if vectors is None else [("vectors", vectors, "--vectors")]
    given += [(*assignment(text, "--set"), f"--set {text}") for text in settings]
    for key, value, option in given:
        method, dot, parameter = key.partition(".")
        for target in _named(described, method, option) if dot else _having(described, key, option):
            target[parameter if dot else key] = value
    return [registry.from_dict(description) for description in described]


def _named(described: list[dict[str, Any]], name: str, option: str) -> list[dict[str, Any]]:
    here = [d["method"] for d in described]
    if name not in here:
        raise UsageError(
            f"{option}: {name!r} is not a method of this run; it has {', '.join(here)}{nearest(name, here)}"
        )
    return [d for d in described if d["method"] == name]


def _having(described: list[dict[str, Any]], key: str, option: str) -> list[dict[str, Any]]:
    from steerlens import methods as registry

    parameters = {d["method"]: [f.name for f in dataclasses.fields(registry.get(d["method"]))] for d in described}
    targets = [d for d in described if key in parameters[d["method"]]]
    if len(targets) > 1:
        owners = [d["method"] for d in targets]
        if len(set(owners)) == 1:
            raise UsageError(f"{option}: {owners[0]} is there {len(owners)} times; --set {owners[0]}.{key}=… sets all")
        either = " or ".join(f"--set {owner}.{key}=…" for owner in dict.fromkeys(owners))
        raise UsageError(f"{option}: {' and '.join(dict.fromkeys(owners))} both have {key!r}; write {either}")
    if not targets:
        has = "; ".join(f"{name} has {', '.join(known)}" for name, known in parameters.items())
        known = sorted({p for names in parameters.values() for p in names})
        raise MethodError(f"{option}: no method of this run has the parameter {key!r}; {has}{nearest(key, known)}")
    return targets
