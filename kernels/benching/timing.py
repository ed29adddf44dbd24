"""Times of functions that take turns, by device events; and the two ceilings that every time is held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from steerlens.kernels.benching.record import Failed, NotRunnable, Task, Values

from steerlens.bench.timing import spread

Call = Callable[[], object]
FLUSH = 256 * 2**20
"""Bytes written before each run: several times the L2."""


class Timer:
    """Times functions side by side, so that a clock that drifts moves all of them alike."""

    def __init__(self, device: torch.device, seconds: float = 0.6, most: int = 60) -> None:
        """`seconds` that a group of functions may take, and how often one runs at most."""
        self.device, self.seconds, self.most = device, seconds, most
        self.cuda = device.type == "cuda"
        self._flush: torch.Tensor | None = None

    def times(self, functions: Mapping[str, Call], graphs: bool = True) -> dict[str, Values]:
        """Per function `ms` (n, min, q1, median, q3, max) and `timed`, how.

        With `graphs` a function is captured once and replayed, so that launches cost nothing, behind a write that
        empties the L2; without, a call starts on an idle device and its launches count.
        """
        ready: dict[str, tuple[Call, str]] = {}
        for name, function in functions.items():
            for _ in range(3 if self.cuda else 0):
                function()
            ready[name] = self._ready(function, graphs)
        found: dict[str, list[float]] = {name: [] for name in functions}
        start = time.perf_counter()
        order = list(ready.items())
        for number in range(self.most):
            if number >= (5 if self.cuda else 1) and time.perf_counter() - start > self.seconds:
                break
            for name, (function, how) in order if number % 2 else reversed(order):
                found[name].append(self._once(function, how))
        return {name: {"ms": spread(found[name]), "timed": ready[name][1]} for name in functions}

    def _ready(self, function: Call, graphs: bool) -> tuple[Call, str]:
        if not self.cuda:
            return function, "wall clock"
        if not graphs:
            return function, "call"
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                function()
            graph.replay()
            torch.cuda.synchronize()
        except Exception as error:
            torch.cuda.synchronize()
            return function, f"call; not captured: {type(error).__name__}: {str(error)[:200]}"
        return graph.replay, "graph"

    def _once(self, function: Call, how: str) -> float:
        if not self.cuda:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        if self._flush is None:
            self._flush = torch.empty(FLUSH, dtype=torch.int8, device=self.device)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        if how != "graph":
            torch.cuda.synchronize()
        first.record()
        function()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)


def median(values: Values) -> float:
    """Of `Timer.times` of one function, in milliseconds."""
    return values["ms"]["median"]


def against(own: Values, base: Values, name: str) -> Values:
    """Own times beside those of a base by name, and the ratio of the medians."""
    return own | {f"{name}_ms": base["ms"], f"{name}_timed": base["timed"], "ratio": median(own) / median(base)}


def floors(timer: Timer, smoke: bool) -> list[Task]:
    """Copy rate, bytes read plus bytes written; bf16 matrix products on random data."""
    size, edge = (2**20, 64) if smoke else (2 * 2**30, 8192)
    dtype = torch.float32 if smoke else torch.bfloat16

    def copy() -> Values:
        source = torch.empty(size, dtype=torch.int8, device=timer.device).random_(-100, 100)
        target = torch.empty_like(source)
        return rate(lambda: target.copy_(source), 2.0 * size) | {"bytes": 2 * size}

    def product() -> Values:
        one, other = (torch.randn(edge, edge, device=timer.device, dtype=dtype) for _ in range(2))
        return rate(lambda: one @ other, 2.0 * edge**3) | {"flops": 2 * edge**3, "edge": edge}

    def rate(function: Call, work: float) -> Values:
        times = timer.times({"": function}, graphs=False)[""]
        return times | {"per_second": work / median(times) * 1e3}

    return [Task("floors", "copy", copy, 0), Task("floors", "matmul", product, 0)]


def cuda_only(device: torch.device) -> None:
    """Raise unless on CUDA."""
    if device.type != "cuda":
        raise NotRunnable("needs CUDA")


def room(device: torch.device, needed: float, what: str) -> None:
    """Raise unless so many bytes are free, with a tenth to spare."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    if needed > 0.9 * free:
        raise NotRunnable(f"{what} takes about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")


def agree(found: torch.Tensor, other: torch.Tensor, allowed: float) -> Values:
    """Largest difference over the largest of `other`.

    Raises:
        Failed: if it is larger than allowed; NaN is.
    """
    difference = float((found.float() - other.float()).abs().max() / other.float().abs().max())
    if not difference <= allowed:
        raise Failed(f"outputs differ by {difference:.2g} of the largest, allowed {allowed:.2g}", difference=difference)
    return {"difference": difference}


def checked(row: Values, check: Callable[[], Values], measure: Callable[[], Values]) -> Values:
    """A row with what its check and its timing give; it is timed all the same if the check fails, on a red gate.

    Raises:
        Failed: with all values, if the check failed.
    """
    try:
        row, reason = row | check(), None
    except Failed as failed:
        row, reason = row | failed.values, str(failed)
    row |= measure()
    if reason is not None:
        raise Failed(reason, **row | {"gate": "red", "met": None})
    return row


def relative_spread(values: Values) -> float:
    """Interquartile range over the median."""
    return (values["ms"]["q3"] - values["ms"]["q1"]) / median(values)
