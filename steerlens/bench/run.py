"""Measures every row and makes the record."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache

from steerlens import caches, models
from steerlens.attach import steer
from steerlens.bench import cases, machine, model, peers, timing
from steerlens.bench.cases import Case
from steerlens.bench.settings import Settings
from steerlens.errors import SteerlensError
from steerlens.methods import PASTA

SCHEMA = 1
TOLERANCE = 1e-4
CHECKED = 320
Progress = Callable[[dict[str, Any]], None]


def bench(settings: Settings | None = None, progress: Progress = lambda record: None) -> dict[str, Any]:
    """Run a benchmark.

    Args:
        settings: what to measure; by default the setting of the CPU budgets.
        progress: is given the record so far after each row.

    Returns:
        The record, of JSON types: `schema`, `settings`, `machine` (`seconds` and `load_after` when done) and
        `rows`. A row has `phase` (prefill or decode), `head_dim`, `tokens`, `case`, `backend` (a peer's is
        "peer"), `method`, and either `skipped`, the reason, or `unsteered_ms`, `steered_ms`, `ratio` (n, min,
        q1, median, q3, max of steered over unsteered), `moved` (largest change of a logit over the largest
        logit, 0 where nothing was found to steer; prefill only), `check` (`error` and `moved` on a small
        fp32 model, against the definition and against unsteered), `extra_mib` (peak memory over unsteered;
        prefill on CUDA only), `budget` and `met`.
    """
    settings = settings or Settings()
    device = settings.device or models.devices()[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "settings": settings.to_dict(),
            "machine": machine.describe(device),
            "rows": [],
        }
        start = time.perf_counter()
        for head_dim in settings.head_dims:
            for row in Bench(settings, head_dim, device).rows():
                record["rows"].append(row)
                progress(record)
        record["machine"] |= {"seconds": round(time.perf_counter() - start), "load_after": machine.load()}
        return record
    finally:
        torch.set_num_threads(threads)


def over_budget(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a record that miss their budget."""
    return [row for row in record["rows"] if row.get("met") is False]


class Bench:
    """All rows of one head dim."""

    def __init__(self, settings: Settings, head_dim: int, device: str) -> None:
        self.settings, self.head_dim, self.device = settings, head_dim, device
        longest = max((*settings.lengths, *settings.decode_lengths, settings.reference_length, CHECKED))
        build = functools.partial(
            model.build, settings, head_dim, device, positions=longest + settings.decode_steps + 1
        )
        self.model = build(layers=settings.layers, mlp=settings.mlp, dtype=settings.dtype)
        self.steered = model.share(self.model)
        self._native: dict[int, tuple[torch.Tensor, int | None]] = {}
        self._steppers: dict[int, timing.Decode] = {}
        # What is timed must be right: the same heads, small otherwise, in fp32, attention far from uniform.
        self.small = build(layers=min(settings.layers, 2), mlp=0.5, dtype="float32", sharpen=4.0)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Measure row after row."""
        small = list(cases.cases(self.settings, self.small.config.num_hidden_layers))
        for backend in self.settings.backends:
            for case, checked in zip(cases.cases(self.settings, self.settings.layers), small, strict=True):
                yield from self._steered(case, checked, backend)
        for peer in self.settings.peers:
            yield from self._peer(peer)

    def _plan(self, lengths: tuple[int, ...]) -> Iterator[tuple[str, int]]:
        yield from itertools.product(["prefill"], lengths)
        yield from itertools.product(["decode"], self.settings.decode_lengths)

    def _steered(self, case: Case, checked: Case, backend: str) -> Iterator[dict[str, Any]]:
        reference = backend == "reference"
        short = [("prefill", self.settings.reference_length)]
        check, reason = {}, None
        try:
            check = self._check(checked, backend)
            reason = _wrong(check)
        except SteerlensError as refused:
            reason = str(refused)
        for phase, tokens in short if reference else self._plan(self.settings.lengths):
            row = self._row(phase, tokens, case.name, backend, cases.describe(case.method))
            if reason is not None:
                yield row | {"skipped": reason}
                continue
            ids = self._ids(tokens)
            with steer(self.steered, case.method, cases.spans(tokens, len(ids)), backend=backend):
                if phase == "prefill":
                    measured = self._prefill(ids, self.steered, self.settings.repeats, {})
                else:
                    measured = self._decode(ids, self.steered, self.settings.repeats)
            bound = cases.budget(case, phase, tokens, backend, self.device)
            met = None if bound is None else measured["ratio"]["median"] <= bound
            yield row | measured | {"check": check, "budget": bound, "met": met}

    def _check(self, case: Case, backend: str) -> dict[str, float]:
        ids = self._ids(CHECKED)
        native = _logits(self.small, ids)
        given = cases.spans(CHECKED - 2, len(ids))
        with steer(self.small, case.method, given, backend="reference"):
            truth = _logits(self.small, ids)
        with steer(self.small, case.method, given, backend=backend):
            found = _logits(self.small, ids)
        return {"error": _difference(found, truth), "moved": _difference(found, native)}

    def _peer(self, name: str) -> Iterator[dict[str, Any]]:
        check, reason = {}, None
        try:
            check = self._check_peer(name)
            reason = _wrong(check)
        except peers.NotRunnableError as why:
            reason = f"not runnable here: {why}"
        for phase, tokens in self._plan(self.settings.lengths):
            row = self._row(phase, tokens, name, "peer", None)
            skip = reason or (self._too_large(name, tokens) if phase == "prefill" else None)
            if skip:
                yield row | {"skipped": skip}
                continue
            ids = self._ids(tokens)
            try:
                with peers.prepare(name, self.model, tokens, len(ids)) as peer:
                    repeats = self.settings.peer_repeats
                    if phase == "prefill":
                        measured = self._prefill(ids, peer.model, repeats, peer.prefill())
                    else:
                        measured = self._decode(ids, peer.model, repeats, peer.step, self.model)
            except peers.NotRunnableError as why:
                yield row | {"skipped": f"not runnable here: {why}"}
                continue
            yield row | measured | {"check": check, "budget": None, "met": None}

    def _check_peer(self, name: str) -> dict[str, float]:
        ids = self._ids(CHECKED)
        prompt = CHECKED - 2
        native = _logits(self.small, ids)
        pasta = PASTA(alpha=1 if name == "eager" else cases.ALPHA)
        with steer(self.small, pasta, cases.spans(prompt, len(ids)), backend="reference"):
            truth = _logits(self.small, ids)
        with peers.prepare(name, self.small, prompt, len(ids)) as peer:
            found = _logits(peer.model, ids, peer.prefill(), peer.step)
        return {"error": _difference(found, truth), "moved": _difference(found, native)}

    def _too_large(self, name: str, tokens: int) -> str | None:
        if tokens > self.settings.peer_limit:
            return f"longer than peer_limit={self.settings.peer_limit}"
        itemsize = torch.finfo(self.model.dtype).bits // 8
        needed = peers.memory(name, self.settings.batch_size, self.settings.heads, tokens, itemsize)
        free = machine.free_memory(self.device)
        if free is None or needed < 0.7 * free:
            return None
        return f"its {tokens}x{tokens} matrices need about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"

    def _row(self, phase: str, tokens: int, case: str, backend: str, method: Any) -> dict[str, Any]:
        return {
            "phase": phase,
            "head_dim": self.head_dim,
            "tokens": tokens,
            "case": case,
            "backend": backend,
            "method": method,
        }

    def _ids(self, tokens: int) -> torch.Tensor:
        return model.tokens(self.settings.batch_size, tokens, self.settings.seed + tokens, self.device)

    def _prefill(self, ids: torch.Tensor, steered: Any, repeats: int, extra: dict[str, Any]) -> dict[str, Any]:
        tokens = ids.shape[1]
        if tokens not in self._native:
            self._native[tokens] = self._peak(lambda: self.model(ids, logits_to_keep=1).logits)
        native, peak = self._native[tokens]
        own, peak_steered = self._peak(lambda: steered(ids, logits_to_keep=1, **extra).logits)
        unsteered = timing.Prefill(self.model, ids, {})
        found = timing.pairs(unsteered, timing.Prefill(steered, ids, extra), count=repeats, warmup=0)
        more = None if peak is None or peak_steered is None else round((peak_steered - peak) / 2**20, 1)
        return timing.summary(found) | {"moved": _difference(own, native), "extra_mib": more}

    def _decode(
        self,
        ids: torch.Tensor,
        steered: Any,
        repeats: int,
        step: timing.Extra = timing.nothing,
        prefilled: Any = None,
    ) -> dict[str, Any]:
        steps, tokens = self.settings.decode_steps, ids.shape[1]
        if tokens not in self._steppers:
            self._steppers[tokens] = timing.Decode(self.model, ids, steps)
        unsteered, own = self._steppers[tokens], timing.Decode(steered, ids, steps, prefilled, step)
        found = timing.pairs(unsteered, own, count=repeats * steps, warmup=min(steps, 3))
        return timing.summary(found) | {"moved": None, "extra_mib": None}

    @torch.inference_mode()
    def _peak(self, function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int | None]:
        """The result of a call, which also warms up, and its peak memory where the device counts it."""
        if torch.device(self.device).type != "cuda":
            return function(), None
        torch.cuda.reset_peak_memory_stats(self.device)
        result = function()
        return result, torch.cuda.max_memory_allocated(self.device)


@torch.inference_mode()
def _logits(
    subject: Any,
    ids: torch.Tensor,
    extra: dict[str, Any] | None = None,
    step: timing.Extra = timing.nothing,
) -> torch.Tensor:
    """Logits [B, T, V] of a prefill of all tokens but two and two cached steps."""
    cache = DynamicCache(config=subject.config)
    prompt = ids.shape[1] - 2
    found = [subject(ids[:, :prompt], **{caches.NAME: cache}, use_cache=True, **(extra or {})).logits]
    for seen in range(prompt, ids.shape[1]):
        token = ids[:, seen : seen + 1]
        found.append(subject(token, **{caches.NAME: cache}, use_cache=True, **step(seen)).logits)
    return torch.cat(found, 1)


def _wrong(check: dict[str, float]) -> str | None:
    if check["error"] <= TOLERANCE:
        return None
    return f"differs from the definition by {check['error']:.2g} of the largest logit; not timed"


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(f"{float((one.float() - other.float()).abs().max() / other.float().abs().max()):.3g}")
