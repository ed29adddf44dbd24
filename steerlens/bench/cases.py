"""The steered rows: which method, on which heads, within which budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from steerlens.bench.settings import Settings
from steerlens.methods import ACT, PASTA, HeadMask, ZeroTuning
from steerlens.methods.base import EditMethod

ALPHA = 0.1
FEW = 0.1
"""Share of heads of the rows that steer a subset, as profiled head sets have it."""


@dataclass(frozen=True)
class Case:
    """A steered row.

    Attributes:
        name: the entry in `settings.METHODS`, and a variant of it after a slash.
        method: what is steered with.
        law: which budget holds.
    """

    name: str
    method: EditMethod
    law: Literal["static", "act-few", "act-all"]


def cases(settings: Settings, layers: int) -> Iterator[Case]:
    """The rows of the methods asked for, on a model of `layers` layers."""
    few = few_heads(layers, settings.heads)
    everything = [
        Case("neutral", ZeroTuning(gamma=1.0), "static"),
        Case("zerotuning", ZeroTuning(gamma=1.5), "static"),
        Case("pasta", PASTA(alpha=ALPHA), "static"),
        Case("pasta/few", PASTA(alpha=ALPHA, heads=few), "static"),
        Case("headmask/few", HeadMask(heads=few), "static"),
        Case("act/few", ACT(heads=few), "act-few"),
        Case("act/all", ACT(), "act-all"),
        Case("act/few relative", ACT(threshold=5, threshold_mode="relative", heads=few), "act-few"),
        Case("act/all relative", ACT(threshold=5, threshold_mode="relative"), "act-all"),
    ]
    return (case for case in everything if case.name.split("/")[0] in settings.methods)


def few_heads(layers: int, heads: int) -> dict[int, list[int]]:
    """At most `FEW` of all heads (one at least), spread evenly over the layers."""
    count = max(1, int(FEW * layers * heads))
    found: dict[int, list[int]] = {}
    for number in range(count):
        layer, head = divmod(number * layers * heads // count, heads)
        found.setdefault(layer, []).append(head)
    return found


def span(prompt: int, pads: int = 0) -> tuple[int, int]:
    """The emphasised tokens: a quarter of the tokens behind the pads, off their start."""
    real = prompt - pads
    return pads + real // 4, pads + real // 2


def spans(prompt: int, pads: list[int]) -> list[list[tuple[int, int]]]:
    """`span` for every row, as `steer` takes it."""
    return [[span(prompt, n)] for n in pads]


def budget(case: Case, phase: str, tokens: int, backend: str, device: str, native: str = "sdpa") -> float | None:
    """The bound on steered over unsteered (`native` attention) that holds for a row, or `None`."""
    if backend == "triton":
        return 1.03 if torch.device(device).type == "cuda" and case.law == "static" and native == "sdpa" else None
    if backend not in ("sdpa", "auto"):
        return None
    if phase == "decode":
        return 1.05 if 1024 <= tokens <= 8192 else None
    if native != "sdpa" or torch.device(device).type != "cpu" or not 2048 <= tokens <= 8192:
        return None
    if case.law == "static":
        return 1.15 if tokens == 8192 else 1.10
    return 1.35 if case.law == "act-few" else 2.5


def describe(method: EditMethod) -> dict[str, Any]:
    """The method's parameters, with layers as JSON keys."""
    found = method.to_dict()
    if isinstance(found.get("heads"), dict):
        found["heads"] = {str(layer): heads for layer, heads in found["heads"].items()}
    return found
