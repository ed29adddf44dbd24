"""What a steering is compared with besides the unsteered model: random heads, and the strength that changes nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from steerlens.evals.doc import Steering
from steerlens.evals.job import Controls, Shape

from steerlens import methods as registry
from steerlens.facts import ModelFacts
from steerlens.heads import Heads, draw_others
from steerlens.methods.base import Method


def of(
    steering: Steering, wanted: Controls, facts: ModelFacts, seed: int
) -> tuple[list[Steering], list[tuple[str, str]]]:
    """The controls of a steering on a model.

    Args:
        steering: of the role "method".
        wanted: which controls.
        facts: of the model.
        seed: of the random heads; the label takes part in the draw.

    Returns:
        The controls, and (label, why) of those that cannot be made.

    Raises:
        HeadError: if the model does not have the steering's heads.
    """
    found: list[Steering] = []
    skipped: list[tuple[str, str]] = []
    if wanted.random_heads:
        sets, why = _random_heads(steering, wanted.random_heads, facts, seed)
        found += [
            Steering(f"{steering.label} random {number}", methods, "random_heads", steering.label)
            for number, methods in enumerate(sets, 1)
        ]
        if why:
            skipped.append((f"{steering.label} random", why))
    if wanted.neutral:
        neutral = [_neutral(method) for method in steering.methods]
        if without := [m.name for m, n in zip(steering.methods, neutral, strict=True) if n is None]:
            skipped.append((f"{steering.label} neutral", f"{', '.join(without)} has no strength that changes nothing"))
        else:
            methods = tuple(method for method in neutral if method is not None)
            found.append(Steering(f"{steering.label} neutral", methods, "neutral", steering.label))
    return found, skipped


def _random_heads(
    steering: Steering, sets: int, facts: ModelFacts, seed: int
) -> tuple[Sequence[tuple[Method, ...]], str | None]:
    """Per set the methods with other heads than they have; or why there are none."""
    own = [getattr(method, "heads", None) for method in steering.methods]
    chosen = [heads if isinstance(heads, Heads) and heads.table is not None else None for heads in own]
    if not any(chosen):
        if not any(isinstance(heads, Heads) for heads in own):
            return [], f"{', '.join(method.name for method in steering.methods)} takes no heads to draw others for"
        return [], "all heads are steered: none is left to draw from"
    rng = random.Random(f"random heads|{seed}|{steering.label}")
    drawn: list[list[Method]] = [[] for _ in range(sets)]
    for method, heads in zip(steering.methods, chosen, strict=True):
        others = draw_others(heads, facts, sets, rng) if heads else []
        if heads and not others:
            count = sum(map(len, heads.resolve(facts).values()))
            return [], f"{count} heads are chosen, {sum(facts.heads) - count} are left to draw from"
        for number, methods in enumerate(drawn):
            methods.append(_with(method, heads=others[number]) if others else method)
    return [tuple(methods) for methods in drawn], None


def _neutral(method: Method) -> Method | None:
    values = {name: search.neutral for name, search in method.search.items() if search.neutral is not None}
    return _with(method, **values) if values else None


def _with(method: Method, **changed: Any) -> Method:
    described = {key: value for key, value in method.to_dict().items() if key != "method"} | changed
    return registry.get(method.name).from_parameters(described)


def facts_of_shape(name: str, shape: Shape) -> ModelFacts:
    """Facts of a model whose config is out of reach."""
    layers = shape.layers
    return ModelFacts(name, "unknown", layers, (shape.heads,) * layers, (shape.kv_heads,) * layers)
