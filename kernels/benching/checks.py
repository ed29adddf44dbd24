"""Kernels against the definition in fp64, on random inputs, with every output poisoned beforehand.

The bound is that of the design: in fp32 1e-5 of the largest output; in 16 bit twice the error that SDPA itself makes on
the same q, k, v and visible keys, plus one rounding.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from steerlens.kernels import attention as kernels
from steerlens.kernels import column_sums as columns
from steerlens.kernels import definition
from steerlens.kernels.attention import Result
from steerlens.kernels.benching import peers
from steerlens.kernels.benching.inputs import Shape, edit, qkv
from steerlens.kernels.benching.record import Failed, Task, Values

STATS = 1e-4
"""Bound on statistics: of the largest, at least of 1."""


@dataclass(frozen=True)
class Check:
    """A combination of shape and features."""

    kernel: str
    shape: Shape
    features: tuple[str, ...]

    @property
    def name(self) -> str:
        s = self.shape
        dims = f"{s.dim}" if s.dim == s.value_dim else f"{s.dim}/{s.value_dim}"
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[s.dtype]
        return f"{self.kernel} {dtype} D={dims} {s.rows}x{s.keys} {'+'.join(self.features) or 'plain'}"


LAWS = (
    (), ("static",), ("first", "static"), ("gate",), ("keep",), ("reach",), ("spotlight",), ("transfer",), ("raw",),
    ("static", "keep"),
)  # fmt: skip
SETTINGS = (
    ("padding", "static"), ("window", "keep"), ("softcap", "static"), ("softcap", "reach"), ("sinks", "keep"),
    ("sinks", "static", "stats"), ("offset", "keep"), ("padding", "window", "transfer"), ("boolean", "keep"),
    ("additive", "static"), ("cut",), ("padding", "window", "cut_rows"), ("static", "stats"), ("keep", "stats"),
    ("transfer", "stats"), ("keep", "rows"), ("window", "sinks", "softcap", "padding", "reach", "stats"),
)  # fmt: skip
ALWAYS = ((), ("padding", "static"), ("padding", "sinks", "keep", "stats"))
COLUMNS = ((), ("padding", "static"), ("window", "sinks"))


def grid(smoke: bool) -> Iterator[Check]:
    """The checks: every feature in bf16 at D=128, and what depends on widths at every head dim and dtype."""
    if smoke:
        small = Shape(2, 4, 2, 37, 41, 16, 16, torch.float16)
        step = replace(small, rows=1, keys=45)
        for features in ((), ("static", "keep"), ("padding", "window", "cut_rows"), ("transfer", "sinks", "stats")):
            yield Check("prefill", small, features)
        yield Check("prefill", replace(small, dim=40, value_dim=24, dtype=torch.float32), ("reach",))
        yield Check("decode", step, ("static", "stats"))
        yield Check("decode", step, ("sinks", "keep"))
        yield Check("columns", small, ("padding", "static"))
        return
    base = Shape(2, 32, 8, 211, 237, 128, 128, torch.bfloat16)
    step = replace(base, rows=1, keys=1003)
    yield from (Check("prefill", base, features) for features in (*LAWS, *SETTINGS))
    yield from (Check("decode", step, features) for features in (*LAWS, *SETTINGS))
    yield from (Check("columns", base, features) for features in COLUMNS)
    yield Check("decode", replace(base, rows=5, keys=301), ("padding", "keep"))
    yield Check("prefill", replace(base, rows=128, keys=512), ("static", "keep"))
    for dim, value in ((64, 64), (80, 80), (96, 96), (192, 128), (256, 256)):
        for features in ALWAYS:
            yield Check("prefill", replace(base, dim=dim, value_dim=value), features)
        yield Check("decode", replace(step, dim=dim, value_dim=value), ALWAYS[-1])
        yield Check("columns", replace(base, dim=dim, value_dim=value), COLUMNS[1])
    for dtype, dims in ((torch.float16, (64, 128)), (torch.float32, (64, 128, 256))):
        for dim in dims:
            for features in ALWAYS[1:]:
                yield Check("prefill", replace(base, dim=dim, value_dim=dim, dtype=dtype), features)
            yield Check("decode", replace(step, dim=dim, value_dim=dim, dtype=dtype), ALWAYS[-1])
        yield Check("columns", replace(base, dtype=dtype), COLUMNS[1])


def tasks(device: torch.device, smoke: bool) -> list[Task]:
    """A row for each check."""

    def task(number: int, check: Check) -> Task:
        return Task("checks", check.name, lambda: {"kernel": check.kernel} | run(check, device, number), 0, 1.0)

    return [task(number, check) for number, check in enumerate(grid(smoke))]


def launch(check: Check, device: torch.device) -> None:
    """The launches of a check, on hollow inputs: for compiling."""
    q, k, v = qkv(check.shape, device, hollow=True)
    arguments = edit(check.shape, check.features, device)
    if check.kernel == "columns":
        lse = torch.zeros(check.shape.batch, check.shape.heads, check.shape.rows, device=device)
        columns.column_sums(q, k, lse, counted=_counted(check, device), **_of_columns(arguments))
    else:
        kernels.attention(q, k, v, **arguments)


def run(check: Check, device: torch.device, seed: int) -> Values:
    """One check.

    Raises:
        Failed: if an output is further from the definition than it may be.
    """
    q, k, v = qkv(check.shape, device, seed)
    arguments = edit(check.shape, check.features, device, seed)
    asked = {name: arguments[name] for name in arguments if name not in ("stats", "output")}
    truth, weights = definition.attention(q, k, v, **asked)
    try:
        if check.kernel == "columns":
            values = _columns(check, q, k, arguments, truth, weights)
        else:
            for _ in range(1 if q.device.type == "cpu" else 2):  # the second time as what was asked before
                with poisoned():
                    found = kernels.attention(q, k, v, **arguments)
            values = compare(found, truth, weights, bound(q, k, v, arguments))
    except Failed as failed:
        failed.values["kernel"] = check.kernel
        raise
    return values


def bound(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: dict[str, Any]) -> float:
    """How far an output may be from the definition, over the largest output."""
    if q.dtype == torch.float32:
        return 1e-5
    given = {name: arguments.get(name) for name in ("scaling", "offset", "window", "mask", "labels")}
    seen, _, _ = definition.logits(q, k, softcap=None, dtype=torch.float32, **given)
    sees = seen.any(-1)
    truth, _ = definition.attention(q, k, v, mask=seen)
    own = peers.masked((q, k, v), seen)()
    return 2 * _error(own[sees], truth.output[sees]) + torch.finfo(q.dtype).eps / 2


def compare(found: Result, truth: Result, weights: torch.Tensor, allowed: float) -> Values:
    """Errors of the outputs that are there.

    Raises:
        Failed: if one is too large.
    """
    values: Values = {"allowed": allowed}
    wrong = []
    if found.output is not None:
        values["error"] = _error(found.output, truth.output)
        if not values["error"] <= allowed:
            wrong.append(f"output off by {values['error']:.2g} of the largest, allowed {allowed:.2g}")
    for name in ("lse", "lse_before", "entropy", "top", "mass"):
        if (one := getattr(found, name)) is None:
            continue
        other = getattr(truth, name)
        if name == "top":
            other = torch.where(found.argmax < 0, one.to(other.dtype), other)
        values[name] = _error(one, other, least=1.0)
        if not values[name] <= STATS:
            wrong.append(f"{name} off by {values[name]:.2g}, allowed {STATS:.2g}")
    if found.argmax is not None:
        picked = weights.gather(-1, found.argmax.clamp(min=0)[..., None])[..., 0]
        best = weights.max(-1).values
        good = torch.where(found.argmax < 0, truth.argmax < 0, picked >= best * (1 - STATS))
        if not bool(good.all()):
            wrong.append(f"argmax wrong in {int((~good).sum())} rows")
    if wrong:
        raise Failed("; ".join(wrong), **values)
    return values


def _columns(
    check: Check, q: torch.Tensor, k: torch.Tensor, arguments: dict[str, Any], truth: Result, weights: torch.Tensor
) -> Values:
    counted = _counted(check, q.device)
    given = {name: arguments.get(name) for name in ("scaling", "offset", "window", "mask", "labels")}
    seen, _, _ = definition.logits(q, k, softcap=None, dtype=torch.float32, **given)
    sums, observers = definition.column_sums(q, k, weights, seen, counted)
    with poisoned():
        got = columns.column_sums(q, k, truth.lse.float(), counted=counted, **_of_columns(arguments))
    values = {"error": _error(got[0], sums, least=1.0), "observers": _error(got[1], observers), "allowed": STATS}
    if not (values["error"] <= STATS and values["observers"] == 0):
        raise Failed(f"sums off by {values['error']:.2g}, observers by {values['observers']:.2g}", **values)
    return values


def _counted(check: Check, device: torch.device) -> torch.Tensor:
    return torch.arange(check.shape.rows, device=device)[None] % 3 != 1


def _of_columns(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in arguments if name not in ("sinks", "law", "cut", "stats", "output")}


def _error(found: torch.Tensor, truth: torch.Tensor, least: float = 0.0) -> float:
    """Largest difference over the largest of the truth (at least `least`); infinities must agree, NaN is infinite."""
    found, truth = found.double(), truth.double()
    same = torch.where(truth.isfinite(), False, found == truth)
    difference = torch.where(same, 0, (found - truth).abs()).nan_to_num(nan=torch.inf)
    size = torch.where(truth.isfinite(), truth.abs(), 0)
    if not difference.numel():
        return 0.0
    return float(difference.max() / size.max().clamp(min=max(least, 1e-30)))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` and its like give with NaN, and integers with their largest."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled
