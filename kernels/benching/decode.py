"""Decode: one query row over a long cache, against the better of SDPA's ways to call it."""

from __future__ import annotations

import functools

import torch
from steerlens.kernels import attention as kernels
from steerlens.kernels import definition
from steerlens.kernels.attention import Result
from steerlens.kernels.benching import checks, peers
from steerlens.kernels.benching.inputs import Shape, edit, qkv
from steerlens.kernels.benching.prefill import Case, floor, ours, verdict
from steerlens.kernels.benching.record import Record, Task, Values
from steerlens.kernels.benching.timing import Call, Timer, against, agree, checked, median, room

BOUND = 1.05
CASES = (
    Case("plain", (), BOUND),
    Case("static", ("static",), BOUND),
    Case("keep", ("keep",), BOUND),
)
WAYS = {
    "flash gqa": "SDPA flash, q [B, H, 1, D], enable_gqa",
    "flash packed": "SDPA flash, q packed as [B, G, H/G, D], no mask",
    "cudnn gqa": "SDPA cuDNN, q [B, H, 1, D], enable_gqa",
    "efficient packed": "SDPA memory-efficient, q packed as [B, G, H/G, D], no mask",
}
BATCHES, KEYS = (1, 32), (4096, 32768, 131072)


def shapes(smoke: bool) -> list[Shape]:
    """Every batch and cache length."""
    if smoke:
        return [Shape(1, 2, 1, 1, 64, 16, 16, torch.float16)]
    return [Shape(batch=batch, rows=1, keys=keys) for batch in BATCHES for keys in KEYS]


def tasks(timer: Timer, record: Record, smoke: bool) -> list[Task]:
    """All rows: SDPA's ways first, since the kernels are held against the best of them."""
    found = []
    for shape in shapes(smoke):
        runs = Runs(shape, timer, record)
        where = f"B={shape.batch} Tk={shape.keys}"
        for way in WAYS:
            found.append(Task("decode", f"peer {way} {where}", functools.partial(runs.peer, way), 1, 2.0))
        for case in CASES:
            found.append(Task("decode", f"{case.name} {where}", functools.partial(runs.case, case, where), 1, 3.0))
    return found


def launch(shape: Shape, case: Case, device: torch.device) -> None:
    """A case's launches on hollow inputs: for compiling."""
    kernels.attention(*qkv(shape, device, hollow=True), **edit(shape, case.features, device))


class Runs:
    """The rows of one shape."""

    def __init__(self, shape: Shape, timer: Timer, record: Record) -> None:
        self.shape, self.timer, self.record, self.device = shape, timer, record, timer.device

    @property
    def inputs(self) -> peers.Tensors:
        """Query, key, value: those of the shape that was used last are kept.

        Raises:
            NotRunnable: if there is no room for them.
        """
        return inputs(self.shape, self.device)

    def way(self, name: str) -> Call:
        """SDPA as `WAYS` describes it."""
        backend, how = name.split()
        return peers.packed(self.inputs, backend) if how == "packed" else peers.sdpa(self.inputs, backend, causal=False)

    def peer(self, name: str) -> Values:
        """One of SDPA's ways, held against the kernels' plain output."""
        call = self.way(name)
        own = kernels.attention(*self.inputs).output
        row = {"peer": name, "how": WAYS[name]} | self.shape.describe()
        allowed = 4 * torch.finfo(self.shape.dtype).eps

        def measure() -> Values:
            times = self.timer.times({"own": call})["own"]
            return times | self._floor(median(times))

        return checked(row, lambda: agree(own, call(), allowed), measure)

    def case(self, case: Case, where: str) -> Values:
        """Check a case, then time it beside the best way, by graph and by call."""
        call = ours(self.inputs, edit(self.shape, case.features, self.device), index=False)
        row = {"kernel": "decode", "bound": case.bound} | self.shape.describe()
        return checked(row, lambda: self._spot(call(), case), lambda: self._beside(call, case, self._best(where)))

    def _beside(self, call: Call, case: Case, way: str) -> Values:
        pair = {"own": call, "base": self.way(way)}
        times = self.timer.times(pair)
        found = against(times["own"], times["base"], "sdpa") | {"sdpa": way}
        plain = self.timer.times(pair, graphs=False)
        found |= {"call_ms": plain["own"]["ms"], "sdpa_call_ms": plain["base"]["ms"]}
        found["call_ratio"] = median(plain["own"]) / median(plain["base"])
        found |= self._floor(median(times["own"]))
        return found | verdict(found["ratio"], case.bound, self.record.gate("decode"))

    def _best(self, where: str) -> str:
        timed = {
            row["peer"]: median(row)
            for row in self.record.of("decode")
            if row["name"].endswith(f" {where}") and "peer" in row and "ms" in row
        }
        return min(timed, key=lambda way: timed[way], default="flash gqa")

    def _floor(self, ms: float) -> Values:
        return floor(self.shape, ms, self.record) | {"gb_per_second": self.shape.bytes / ms / 1e6}

    def _spot(self, found: Result, case: Case) -> Values:
        """The first sequence against the definition.

        Raises:
            Failed: if it is further off than it may be.
        """
        q, k, v = (tensor[:1] for tensor in self.inputs)
        truth, weights = definition.attention(
            q, k, v, **edit(self.shape, case.features, self.device), dtype=torch.float32
        )
        assert found.output is not None
        values = checks.compare(Result(found.output[:1]), truth, weights, checks.bound(q, k, v, {}))
        return {f"spot_{name}": value for name, value in values.items()}


@functools.lru_cache(1)
def inputs(shape: Shape, device: torch.device) -> peers.Tensors:
    """Query, key and value of a shape; those of the last shape are kept.

    Raises:
        NotRunnable: if there is no room for them.
    """
    room(device, 1.2 * shape.bytes + 2**30, "the cache")
    return qkv(shape, device)


def release() -> None:
    """Let the inputs go."""
    inputs.cache_clear()
