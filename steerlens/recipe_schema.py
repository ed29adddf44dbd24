"""The parts of a recipe file, what may stand in them, and how a mistake is told."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
)

from steerlens import plainyaml
from steerlens.errors import SteerlensError, nearest
from steerlens.methods import from_dict
from steerlens.methods.base import Method

UNPROVED = "published, not reproduced here: "
SCORE_FILE = re.compile(r"\.json(:top\d+)?\s*\Z")
_ENDLESS = re.compile(r"\d{6}")


def _date(value: Any) -> Any:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return datetime.date.fromisoformat(value)
        raise ValueError(f"{value!r} is not a date such as 2026-11-20")
    return value


def _ordered(interval: list[float]) -> list[float]:
    if interval[0] > interval[1]:
        raise ValueError(f"{interval!r}: the lower bound is above the upper one")
    return interval


def _source(text: str) -> str:
    if not text.startswith(UNPROVED) or not text[len(UNPROVED) :].strip():
        raise ValueError(f"{text[:60]!r} must be measured numbers, or begin with {UNPROVED!r} and name its source")
    return text


def _method(value: Any) -> Method:
    if isinstance(value, Method):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r:.80} is not a mapping such as {{method: zerotuning, gamma: 1.5}}")
    heads = value.get("heads")
    if isinstance(heads, str) and not SCORE_FILE.search(heads) and _ENDLESS.search(heads):
        raise ValueError(f"heads: {heads!r:.80} is out of range for every model")
    try:
        return from_dict(value)
    except SteerlensError:
        raise
    except Exception as error:  # whatever a method, ours or a plug-in's, does with values of the wrong type
        raise ValueError(f"{value!r:.200}: a parameter has a value of the wrong type ({error})") from error


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RecipeModel(Part):
    """The model a recipe was made for.

    Attributes:
        id: alias, Hub id or path.
        revision: commit, tag or branch on the Hub.
        layers: its decoder layers; checked against the model.
        heads: its query heads per layer; checked against the model.
    """

    id: Annotated[str, Field(min_length=1, max_length=1000)]
    revision: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    layers: Annotated[int, Field(ge=1, le=100_000)] | None = None
    heads: Annotated[int, Field(ge=1, le=100_000)] | None = None


_Finite = Annotated[float, Field(allow_inf_nan=False)]


class Evidence(Part):
    """What was measured: `metric` of the unsteered and the steered model on `n` paired samples, and when.

    Attributes:
        interval: confidence interval of the paired difference steered minus baseline.
    """

    metric: Annotated[str, Field(min_length=1)]
    baseline: _Finite
    steered: _Finite
    n: Annotated[int, Field(ge=1)]
    interval: Annotated[list[_Finite], Field(min_length=2, max_length=2), AfterValidator(_ordered)]
    date: Annotated[datetime.date, BeforeValidator(_date)]


Methods = list[Annotated[Any, BeforeValidator(_method), PlainSerializer(lambda method: method.to_dict())]]
_MEASURED, _TEXT = "<measured>", "<text>"
EvidenceField = Annotated[
    Annotated[Evidence, Tag(_MEASURED)] | Annotated[str, AfterValidator(_source), Tag(_TEXT)],
    Discriminator(lambda value: _TEXT if isinstance(value, str) else _MEASURED),
]
_MOST_PROBLEMS = 20


def explain(
    error: ValidationError,
    root: type[BaseModel],
    source: str,
    lines: plainyaml.Lines,
    parts: Mapping[str, type[BaseModel]] = MappingProxyType({"model": RecipeModel, "evidence": Evidence}),
) -> str:
    """The problems of a recipe or another YAML file, one a line: file, line, place, value, what is allowed.

    Args:
        error: what the schema found.
        root: the schema.
        source: the file; "" for data that come from none.
        lines: of its places.
        parts: schemas of the mappings in it, by the key that holds them.
    """
    found = []
    problems = error.errors(include_url=False)
    for problem in problems[:_MOST_PROBLEMS]:
        path = problem["loc"]
        if path[:1] == ("evidence",) and path[1:2] in ((_MEASURED,), (_TEXT,)):
            path = (path[0], *path[2:])
        place = "".join(f"[{p}]" if isinstance(p, int) else f".{_shown(p)}" for p in path).removeprefix(".")
        line = next((lines[path[:i]] for i in range(len(path), 0, -1) if path[:i] in lines), None)
        where = f"{source}:{line}: " if line else f"{source}: " if source else ""
        if problem["type"] in ("extra_forbidden", "invalid_key"):
            owner = next((parts[key] for key in reversed(path[:-1]) if isinstance(key, str) and key in parts), root)
            known = [field.alias or name for name, field in owner.model_fields.items()]
            # pydantic leaves a key that is no text out of the place, or puts its repr there
            what = f"unknown key; allowed: {', '.join(known)}{nearest(str(path[-1])[:80] if path else '', known)}"
        elif problem["type"] == "missing":
            what = "is missing"
        else:
            text = problem["msg"].removeprefix("Value error, ")
            what = (
                text if problem["type"] == "value_error" else f"{problem['input']!r:.80}: {text[:1].lower()}{text[1:]}"
            )
        found.append(f"{where}{place}: {_shown(what, 1000)}")
    if len(problems) > len(found):
        found.append(f"{len(problems) - len(found)} problems more{f' in {source}' if source else ''}")
    return "\n".join(found)


def _shown(text: str, most: int = 80) -> str:
    """Text of a file as a part of one line of a message: short, and nothing that a terminal obeys."""
    short = text if len(text) <= most else f"{text[:most]}…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)
