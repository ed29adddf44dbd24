"""Pairs of timings taken side by side, and what is reported of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from steerlens import caches

Timed = Callable[[], float]
"""Runs once and returns its seconds."""
Extra = Callable[[int], dict[str, Any]]
"""Further arguments of a decode step, given how many tokens are cached."""


def nothing(seen: int) -> dict[str, Any]:
    """No further arguments."""
    return {}


class Prefill:
    """One forward over the whole prompt into a fresh cache, the logits of its last token alone."""

    def __init__(self, model: Any, ids: torch.Tensor, extra: dict[str, Any]) -> None:
        self.model, self.ids, self.extra = model, ids, extra

    def __call__(self) -> float:
        cache = DynamicCache(config=self.model.config)
        return clock(
            lambda: self.model(self.ids, **{caches.NAME: cache}, use_cache=True, logits_to_keep=1, **self.extra),
            self.ids.device,
        )


class Decode:
    """One single-token step per call; after `steps` of them the cache is wound back to the prompt, untimed."""

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        steps: int,
        prefilled: Any = None,
        extra: Extra = nothing,
        prompt_extra: dict[str, Any] | None = None,
    ) -> None:
        """`prefilled` fills the cache (default `model`) given `prompt_extra`, `extra(seen)` is given to a step."""
        self.model, self.steps, self.extra = model, steps, extra
        self.prompt, self.done = ids.shape[1], 0
        self.token = ids[:, -1:]
        self.cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            given = {caches.NAME: self.cache, **(prompt_extra or {})}
            (prefilled or model)(ids, use_cache=True, logits_to_keep=1, **given)
        self._start = [dict(vars(layer)) for layer in self.cache.layers]

    def rewind(self) -> None:
        """Back to the prompt. A layer with a sliding window cannot be cropped; a step makes new tensors in any."""
        for layer, start in zip(self.cache.layers, self._start, strict=True):
            vars(layer).update(start)
        self.done = 0

    def __call__(self) -> float:
        if self.done == self.steps:
            self.rewind()
        extra = self.extra(self.prompt + self.done)
        self.done += 1
        return clock(
            lambda: self.model(self.token, **{caches.NAME: self.cache}, use_cache=True, **extra),
            self.token.device,
        )


def clock(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, with what it queued on an accelerator."""
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def pairs(unsteered: Timed, steered: Timed, count: int, warmup: int) -> list[tuple[float, float]]:
    """`count` (unsteered, steered) seconds; the two take turns in going first: neither profits from order."""
    for _ in range(warmup):
        unsteered()
        steered()
    found = []
    for number in range(count):
        if number % 2:
            later = steered()
            found.append((unsteered(), later))
        else:
            found.append((unsteered(), steered()))
    return found


def summary(timings: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians in milliseconds, and the spread of the ratios of the pairs."""
    return {
        "unsteered_ms": round(statistics.median(a for a, _ in timings) * 1e3, 4),
        "steered_ms": round(statistics.median(b for _, b in timings) * 1e3, 4),
        "ratio": spread([b / a for a, b in timings]),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Count, least, quartiles and greatest."""
    quartiles = list(values) * 3
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    names, found = ("min", "q1", "median", "q3", "max"), (min(values), *quartiles, max(values))
    return {"n": len(values)} | {name: round(value, 4) for name, value in zip(names, found, strict=True)}
