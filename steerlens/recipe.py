"""Recipes: methods with their parameters for one model, in a YAML file that is data and runs no code.

`load_recipe` takes a file, a shipped name or a Hub repository; `steerlens.steer` takes the recipe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError

from steerlens import files, plainyaml
from steerlens.errors import HeadError, RecipeError, nearest
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.recipe_schema import SCORE_FILE, Evidence, EvidenceField, Methods, Part, RecipeModel, explain

__all__ = ["Evidence", "Recipe", "RecipeFetchError", "RecipeModel", "load_recipe", "shipped"]

HUB_FILE = "steerlens.yaml"
_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}\Z", re.ASCII)


class RecipeFetchError(RecipeError):
    """A Hub repository that could not be reached or does not exist: a failed run, not a wrong recipe."""

    exit_code = 1


class Recipe(Part):
    """Methods with their parameters for one model. Fields as in the file; `methods` are `Method` objects.

    Attributes:
        evidence: measured numbers, or a text that begins with "published, not reproduced here: ".
    """

    version: Annotated[Literal[1], Field(alias="schema")] = 1
    name: Annotated[str, Field(min_length=1, max_length=200)]
    model: RecipeModel
    methods: Annotated[Methods, Field(min_length=1)]
    task: Annotated[str, Field(min_length=1)] | None = None
    evidence: EvidenceField | None = None

    @classmethod
    def from_dict(cls, data: Any, source: str = "recipe", lines: plainyaml.Lines | None = None) -> Self:
        """A recipe from plain data; raises `RecipeError` naming `source`, the place and the nearest name."""
        if not isinstance(data, Mapping):
            raise RecipeError(
                f"{source}: holds {_kind(data)}; a recipe is a mapping with schema, name, model and methods"
            )
        if "schema" not in data:
            raise RecipeError(f"{source}: 'schema' is missing; write 'schema: 1'")
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise RecipeError(explain(error, cls, source, lines or {})) from error

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads it back. Fields that are not set are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def check(self, facts: ModelFacts) -> None:
        """Raise `RecipeError` unless the recipe fits a model with these facts."""
        found = {"layers": {facts.layers}, "heads": set(facts.heads) - {0}}
        for what, values in found.items():
            wanted = getattr(self.model, what)
            if wanted is not None and values != {wanted}:
                raise RecipeError(
                    f"recipe {self.name!r} is made for {self.model.id} with model.{what} {wanted}, "
                    f"but {facts.name} has {', '.join(map(str, sorted(values)))}; "
                    "choose the model it was made for, or another recipe"
                )
        for index, method in enumerate(self.methods):
            heads = getattr(method, "heads", None)
            if isinstance(heads, Heads):
                try:
                    heads.resolve(facts)
                except HeadError as error:
                    raise RecipeError(f"recipe {self.name!r}: methods[{index}]: {error}") from error

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write the recipe to a file, whole or not at all; returns its path."""
        path = Path(file)
        data = self.model_dump(mode="python", by_alias=True, exclude_none=True)
        files.write(path, plainyaml.dump(data))
        return path

    def push_to_hub(self, repo: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload it as `steerlens.yaml` to a Hub repository, made if missing; returns the commit's URL."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            text = plainyaml.dump(self.model_dump(mode="python", by_alias=True, exclude_none=True))
            commit = api.upload_file(
                path_or_fileobj=text.encode(),
                path_in_repo=HUB_FILE,
                repo_id=repo,
                commit_message=f"steerlens recipe {self.name}",
            )
        except Exception as error:  # the Hub client raises its own, requests' and httpx's errors
            raise RecipeFetchError(f"cannot upload recipe {self.name!r} to {repo!r}: {_first_line(error)}") from error
        return str(commit.commit_url)


def shipped() -> dict[str, Any]:
    """The recipes that come with the package: `{name: readable resource}`."""
    files = (f for f in resources.files("steerlens.recipes").iterdir() if f.name.endswith(".yaml"))
    return {f.name.removesuffix(".yaml"): f for f in sorted(files, key=lambda f: f.name)}


def load_recipe(recipe: str | os.PathLike[str] | Recipe) -> Recipe:
    """A recipe from a file, else one shipped under that name, else `steerlens.yaml` in a Hub repository.

    Nothing in it is run. A recipe from the Hub must have its heads written out: it may name no score file here.

    Raises:
        RecipeError: if it is not found or does not fit the schema; the message names the file, the place
            in it and, for an unknown name, the nearest one. `RecipeFetchError` if the Hub did not deliver.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str | os.PathLike):
        raise RecipeError(f"recipe {recipe!r:.80}: give a file, a shipped name or a Hub repository")
    name = os.fspath(recipe)
    try:
        path = Path(name)
        if path.is_file():
            with path.open("rb") as stream:
                return _read(stream.read(plainyaml.MAX_BYTES + 1), name)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{name!r:.200}: cannot be read: {error}") from error
    known = shipped()
    if name in known:
        return _read(known[name].read_bytes(), f"{name}.yaml")
    if _REPOSITORY.match(name):
        return _read(_fetch(name), f"{name}/{HUB_FILE}", fetched=True)
    raise RecipeError(
        f"recipe {name!r:.200} is neither a file, nor a shipped recipe ({', '.join(known)}), "
        f"nor a Hub repository such as owner/name{nearest(name, known)}"
    )


def _fetch(repo: str) -> bytes:
    from huggingface_hub import hf_hub_download

    from steerlens.models import hub_is_reachable

    try:
        file = hf_hub_download(repo, HUB_FILE, local_files_only=not hub_is_reachable())
        with Path(file).open("rb") as stream:
            return stream.read(plainyaml.MAX_BYTES + 1)
    except Exception as error:  # the Hub client raises its own, requests' and httpx's errors
        raise RecipeFetchError(
            f"recipe {repo!r} is no file here and cannot be fetched from the Hub: {_first_line(error)}; "
            f"give a local file, a shipped name ({', '.join(shipped())}), or HF_TOKEN for a private one"
        ) from error


def _read(content: bytes, source: str, *, fetched: bool = False) -> Recipe:
    try:
        data, lines = plainyaml.read(content)
    except plainyaml.PlainYamlError as error:
        raise RecipeError(f"{source}: {error}") from error
    if fetched and isinstance(data, dict) and (file := _named_file(data.get("methods"))):
        raise RecipeError(
            f"{source}: {file!r:.200} is a file on this machine, which a recipe from the Hub may not read; "
            "its author must write the heads out, as Recipe.save does"
        )
    return Recipe.from_dict(data, source, lines)


def _named_file(data: Any) -> str | None:
    """The first file of scores or vectors that is named anywhere in plain data."""
    if isinstance(data, str):
        return data if SCORE_FILE.search(data) or data.strip().endswith(".safetensors") else None
    inside = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return next(filter(None, map(_named_file, inside)), None)


def _kind(data: Any) -> str:
    return {type(None): "nothing", list: "a list", str: "text"}.get(type(data), f"{data!r:.40}")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
