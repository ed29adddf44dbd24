"""Prefill: the kernels against SDPA pinned to FlashAttention, with its peers; causal, one sequence, GQA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from steerlens.kernels import attention as kernels
from steerlens.kernels import column_sums as columns
from steerlens.kernels import definition
from steerlens.kernels.attention import Result
from steerlens.kernels.benching import checks, peers
from steerlens.kernels.benching.inputs import Shape, edit, qkv
from steerlens.kernels.benching.record import Record, Task, Values
from steerlens.kernels.benching.timing import Call, Timer, against, agree, checked, median
from steerlens.kernels.key_index import Labels

STATIC, ROW_DEPENDENT, CAPTURE = 1.05, 1.25, 1.15
LENGTHS = (4096, 8192, 16384, 32768)
SPOT = 32
"""Rows whose outputs are held against the definition, in the middle and at the end."""


@dataclass(frozen=True)
class Case:
    """A timed row: features of `inputs`, the bound on its ratio to flash, whether the labels' index is timed too.

    `work` is its share of the operations of attention.
    """

    name: str
    features: tuple[str, ...] = ()
    bound: float | None = STATIC
    index: bool = False
    importance: int = 1
    work: float = 1.0


CASES = (
    Case("plain"),
    Case("static span", ("static",)),
    Case("static first token", ("first",), importance=2),
    Case("static span, index timed", ("static",), index=True, importance=2),
    Case("keep", ("keep",), ROW_DEPENDENT),
    Case("keep, index timed", ("keep",), ROW_DEPENDENT, index=True, importance=2),
    Case("reach", ("reach",), ROW_DEPENDENT),
    Case("transfer of 4 groups", ("transfer",), ROW_DEPENDENT),
    Case("statistics", ("capture",), CAPTURE),
    Case("lse only", ("lse",), CAPTURE, importance=2, work=0.5),
    Case("uniform half", ("uniform",), importance=2),
)
SMOKED = ("plain", "static span", "keep, index timed", "transfer of 4 groups", "statistics", "uniform half")
COLUMN_SUMS = "column sums"
PEERS = ("cudnn", "flex", "channels", "eager")


def shapes(smoke: bool) -> list[Shape]:
    """Of every length; D=128, 32 query heads on 8 key/value heads."""
    if smoke:
        return [Shape(1, 2, 1, 32, 32, 16, 16, torch.float16)]
    return [Shape(rows=length, keys=length) for length in LENGTHS]


def tasks(timer: Timer, record: Record, smoke: bool) -> list[Task]:
    """All rows of all lengths."""
    found = []
    for shape in shapes(smoke):
        runs = Runs(shape, timer, record)
        for case in (case for case in CASES if not smoke or case.name in SMOKED):
            name = f"{case.name} T={shape.rows}"
            found.append(Task("prefill", name, functools.partial(runs.case, case), case.importance))
        found.append(Task("prefill", f"{COLUMN_SUMS} T={shape.rows}", runs.column_sums, 2))
        for peer in PEERS:
            seconds, importance = (25.0, 2 if shape.rows <= 8192 else 3) if peer == "flex" else (3.0, 2)
            name = f"peer {peer} T={shape.rows}"
            found.append(Task("prefill", name, functools.partial(runs.peer, peer), importance, seconds))
    return found


def launch(shape: Shape, case: Case, device: torch.device) -> None:
    """A case's launches on hollow inputs: for compiling."""
    kernels.attention(*qkv(shape, device, hollow=True), **edit(shape, case.features, device))


def launch_column_sums(shape: Shape, device: torch.device) -> None:
    """The same of the column sums."""
    q, k, _ = qkv(shape, device, hollow=True)
    columns.column_sums(q, k, torch.zeros(shape.batch, shape.heads, shape.rows, device=device))


class Runs:
    """The rows of one length."""

    def __init__(self, shape: Shape, timer: Timer, record: Record) -> None:
        self.shape, self.timer, self.record, self.device = shape, timer, record, timer.device

    @property
    def inputs(self) -> peers.Tensors:
        """Query, key, value: those of the length that was used last are kept."""
        return inputs(self.shape, self.device)

    def case(self, case: Case) -> Values:
        """Check some rows of a case, then time it beside flash."""
        arguments = edit(self.shape, case.features, self.device)
        call = ours(self.inputs, arguments, case.index)
        row = self._row("prefill", case.bound)
        return checked(
            row, lambda: self._spot(call(), arguments), lambda: self._beside(call, case.bound, "prefill", case.work)
        )

    def column_sums(self) -> Values:
        """The second pass of ACT, on log-sum-exps of the first."""
        q, k, v = self.inputs
        lse = kernels.attention(q, k, v, stats=("lse",), output=False).lse
        row = self._row("columns", None)
        return row | self._beside(lambda: columns.column_sums(q, k, lse), None, "columns", 0.5)

    def peer(self, name: str) -> Values:
        """A peer on the same bias as the static span; cuDNN without any."""
        row: Values = {"peer": name} | self.shape.describe()
        if name == "cudnn":
            call, how, own = self._cudnn()
        else:
            arguments = edit(self.shape, ("static",), self.device)
            keys, nats = arguments["labels"].bits[0, 0] != 0, arguments["bias"][0, :, 0, 0].contiguous()
            call, how = getattr(peers, name)(self.inputs, keys, nats), "the bias of the static span"
            own = kernels.attention(*self.inputs, **arguments).output
        row["how"] = how
        allowed = 4 * torch.finfo(self.shape.dtype).eps
        return checked(row, lambda: agree(own, call(), allowed), lambda: self._beside(call, None, None))

    def _cudnn(self) -> tuple[Call, str, torch.Tensor]:
        call, how = peers.sdpa(self.inputs, "cudnn"), "enable_gqa"
        try:
            call()
        except RuntimeError:
            call, how = peers.repeated(self.inputs, "cudnn"), "key/value heads repeated beforehand, untimed"
        return call, how, kernels.attention(*self.inputs).output

    def _row(self, kernel: str, bound: float | None) -> Values:
        return {"kernel": kernel, "bound": bound} | self.shape.describe()

    def _beside(self, call: Call, bound: float | None, kernel: str | None, work: float = 1.0) -> Values:
        times = self.timer.times({"own": call, "flash": peers.sdpa(self.inputs)})
        found = against(times["own"], times["flash"], "flash")
        ms = median(times["own"])
        found["tflops"] = work * self.shape.flops / ms / 1e9
        found |= floor(self.shape, ms, self.record, work)
        if kernel is not None:
            found |= verdict(found["ratio"], bound, self.record.gate(kernel))
        return found

    def _spot(self, found: Result, arguments: dict[str, Any]) -> Values:
        """Rows in the middle and at the end against the definition.

        Raises:
            Failed: if they are further off than they may be.
        """
        q, k, v = self.inputs
        most: Values = {}
        asked = {name: arguments[name] for name in arguments if name not in ("stats", "output")}
        count = min(SPOT, self.shape.rows // 2)
        for start in (self.shape.rows // 2 - count, self.shape.rows - count):
            rows = slice(start, start + count)
            few = q[:, :, rows]
            asked["offset"] = start + self.shape.keys - self.shape.rows
            truth, weights = definition.attention(few, k, v, **asked, dtype=torch.float32)
            part = Result(**{n: None if t is None else t[:, :, rows] for n, t in vars(found).items()})
            plain = {"offset": asked["offset"]}
            allowed = checks.bound(few, k, v, plain)
            values = checks.compare(part, truth, weights, allowed)
            most = {f"spot_{n}": max(x, most.get(f"spot_{n}", 0.0)) for n, x in values.items()}
        return most


def ours(inputs: peers.Tensors, arguments: dict[str, Any], index: bool) -> Callable[[], Result]:
    """A call of the kernels; with `index` on labels that have no index yet, as in the first layer of a pass."""
    labels = arguments.get("labels")
    if not index or labels is None:
        return lambda: kernels.attention(*inputs, **arguments)

    def call() -> Result:
        fresh = Labels(labels.bits, labels.groups, labels.terms)
        return kernels.attention(*inputs, **(arguments | {"labels": fresh}))

    return call


def floor(shape: Shape, ms: float, record: Record, work: float = 1.0) -> Values:
    """The larger of operations and bytes over their measured rates, and the time over it."""
    flops, copies = record.rate("matmul"), record.rate("copy")
    if flops is None or copies is None:
        return {"floor_ms": None, "over_floor": None}
    by = {"matmul": work * shape.flops / flops * 1e3, "copy": shape.bytes / copies * 1e3}
    name = max(by, key=lambda name: by[name])
    return {"floor_ms": by[name], "floor_by": name, "over_floor": ms / by[name]}


def verdict(ratio: float, bound: float | None, gate: str) -> Values:
    """Whether a bound is met; on a gate that is not green there is no verdict."""
    return {"gate": gate, "met": None if bound is None or gate != "green" else ratio <= bound}


@functools.lru_cache(1)
def inputs(shape: Shape, device: torch.device) -> peers.Tensors:
    """Query, key and value of a shape; those of the last shape are kept."""
    return qkv(shape, device)


def release() -> None:
    """Let the inputs go."""
    inputs.cache_clear()
