"""What the model arguments of an lm-eval run say of its steering."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from steerlens.evals.doc import BASELINE, Steering

from steerlens import methods
from steerlens.errors import SteerlensError
from steerlens.methods.base import Method
from steerlens.recipe import Recipe

DEFAULT_TAG = {"emphasis": "em"}


class HarnessError(SteerlensError, ValueError):
    """A run through lm-eval that cannot be what its options say."""

    exit_code = 2


def tags_of(given: Any) -> dict[str, str]:
    """`{group: tag}`."""
    if not given:
        return {}
    if given is True:
        return dict(DEFAULT_TAG)
    if isinstance(given, Mapping):
        found = {str(group): tag for group, tag in given.items()}
    else:
        pairs = [pair.strip().partition(":") for pair in str(given).split(";")]
        found = {group or "emphasis": tag for tag, _, group in pairs}
        if len(found) < len(pairs):
            raise HarnessError(f"tags={given!r}: a group has two tags; give each its own, such as em:emphasis;b:query")
    for tag in found.values():
        if not isinstance(tag, str) or not re.fullmatch(r"[\w.-]+", tag):
            raise HarnessError(f"tags={given!r}: {tag!r} is no tag's name; for example tags=em:emphasis")
    return found


def steering_of(
    names: str | None, described: Any, recipe: Recipe | None, arguments: dict[str, Any]
) -> tuple[Steering, dict[str, Any]]:
    """The steering that model arguments describe, and the arguments that are the model's."""
    parts: list[dict[str, Any]] = [m.to_dict() for m in recipe.methods] if recipe else []
    if isinstance(described, str):
        try:
            described = json.loads(described)
        except ValueError as error:
            raise HarnessError(f"methods={described!r:.80} is not JSON: {error}") from None
    if isinstance(described, Mapping | Method):
        described = [described]
    if not isinstance(described, Sequence | None) or not all(
        isinstance(m, Method) or (isinstance(m, Mapping) and "method" in m) for m in described or ()
    ):
        raise HarnessError(
            f'methods={described!r:.80}: write a list such as [{{"method": "zerotuning", "gamma": 1.5}}]'
        )
    given = [m.to_dict() if isinstance(m, Method) else dict(m) for m in described or ()]
    parts += given + [{"method": methods.get(name.strip()).name} for name in str(names).split("+")] if names else given
    fields = {d["method"]: {f.name for f in dataclasses.fields(methods.get(d["method"]))} for d in parts}
    rest = {}
    for key, value in arguments.items():
        owner, dot, parameter = key.rpartition(".")
        if dot and owner not in fields:
            raise HarnessError(f"{key}={value!r}: {owner!r} is not a method of this run; it has {', '.join(fields)}")
        owners = [owner] if dot else [name for name, known in fields.items() if key in known]
        if len(owners) > 1:
            raise HarnessError(f"{key}={value!r}: {' and '.join(owners)} both have it; write {owners[0]}.{key}=…")
        if not owners:
            rest[key] = value
        for part in parts:
            if part["method"] in owners:
                part[parameter] = value
    found = tuple(methods.from_dict(part) for part in parts)
    label = recipe.name if recipe else "+".join(m.name for m in found) or BASELINE
    return Steering(label, found, "method" if found else "baseline"), rest
