"""Measures every row and makes the record."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import DynamicCache

from steerlens import caches, models
from steerlens.attach import steer
from steerlens.bench import cases, machine, memory, model, peers, timing
from steerlens.bench.cases import Case
from steerlens.bench.settings import Settings
from steerlens.errors import SteerlensError
from steerlens.methods import PASTA

SCHEMA = 2
"""2 adds `family`, `batch`, `padding`, `extra_bound_mib` and `extra_met` to the rows."""
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
        `rows`. A row has `family`, `phase` (prefill or decode), `head_dim`, `batch`, `padding`, `tokens`, `case`,
        `backend` (a peer's is "peer"), `method`, and either `skipped`, the reason, or `unsteered_ms`, `steered_ms`,
        `ratio` (n, min, q1, median, q3, max of steered over unsteered), `moved` (largest change of a logit over the
        largest logit, 0 where nothing was found to steer; prefill only), `check` (`error` and `moved` on a small
        fp32 model, against the definition and against unsteered), `budget` and `met`, and of peak memory (CPU and
        CUDA) `extra_mib` over unsteered, its bound `extra_bound_mib` (none for `reference` and peers) and `extra_met`.
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
        for family, head_dim in itertools.product(settings.families, settings.head_dims):
            for row in Bench(settings, head_dim, device, family).rows():
                record["rows"].append(row)
                progress(record)
        record["machine"] |= {"seconds": round(time.perf_counter() - start), "load_after": machine.load()}
        return record
    finally:
        torch.set_num_threads(threads)


def over_budget(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a record that miss their budget."""
    return [row for row in record["rows"] if row.get("met") is False]


def over_memory(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a record that take more memory than they may."""
    return [row for row in record["rows"] if row.get("extra_met") is False]


class Bench:
    """All rows of one family and head dim."""

    def __init__(self, settings: Settings, head_dim: int, device: str, family: str) -> None:
        self.settings, self.head_dim, self.device, self.family = settings, head_dim, device, family
        self.native = model.FAMILIES[family].native
        longest = max((*settings.lengths, *settings.decode_lengths, settings.reference_length, CHECKED))
        build = functools.partial(
            model.build, settings, head_dim, device, positions=longest + settings.decode_steps + 1, family=family
        )
        self.model = build(layers=settings.layers, mlp=settings.mlp, dtype=settings.dtype)
        self.steered = model.share(self.model)
        self._native: dict[int, tuple[torch.Tensor, int | None]] = {}
        self._steppers: dict[int, timing.Decode] = {}
        # What is timed must be right: the same heads, small otherwise, in fp32, attention far from uniform.
        window = min(settings.window, CHECKED // 4)
        self.small = build(layers=min(settings.layers, 2), mlp=0.5, dtype="float32", window=window, sharpen=4.0)

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
            skip = reason or (self._no_room("eager", tokens) if self.native == "eager" else None)
            if skip:
                yield row | {"skipped": skip}
                continue
            ids = self._ids(tokens)
            with steer(self.steered, case.method, self._spans(tokens), backend=backend):
                if phase == "prefill":
                    measured = self._prefill(ids, self.steered, self.settings.repeats)
                else:
                    measured = self._decode(ids, self.steered, self.settings.repeats)
            bound = cases.budget(case, phase, tokens, backend, self.device, self.native)
            met = None if bound is None else measured["ratio"]["median"] <= bound
            measured |= self._memory(measured, exempt=reference)
            yield row | measured | {"check": check, "budget": bound, "met": met}

    def _memory(self, measured: dict[str, Any], exempt: bool) -> dict[str, Any]:
        bound, extra = measured["extra_bound_mib"], measured["extra_mib"]
        if exempt or extra is None:
            return {"extra_bound_mib": None, "extra_met": None}
        return {"extra_met": extra <= bound}

    def _check(self, case: Case, backend: str) -> dict[str, float]:
        native = self._logits(self.small)
        given = self._spans(CHECKED - 2)
        with steer(self.small, case.method, given, backend="reference"):
            truth = self._logits(self.small)
        with steer(self.small, case.method, given, backend=backend):
            found = self._logits(self.small)
        return {"error": _difference(found, truth), "moved": _difference(found, native)}

    def _peer(self, name: str) -> Iterator[dict[str, Any]]:
        check, reason = {}, None
        try:
            check = self._check_peer(name)
            reason = _wrong(check)
        except peers.NotRunnableError as why:
            reason = f"not runnable here: {why}"
        except SteerlensError as refused:
            reason = str(refused)
        for phase, tokens in self._plan(self.settings.lengths):
            row = self._row(phase, tokens, name, "peer", None)
            skip = reason or (self._too_long(name, tokens) if phase == "prefill" else None)
            if skip:
                yield row | {"skipped": skip}
                continue
            ids = self._ids(tokens)
            try:
                with self._prepare(name, self.model, tokens) as peer:
                    repeats = self.settings.peer_repeats
                    if phase == "prefill":
                        measured = self._prefill(ids, peer.model, repeats, peer.prefill())
                    else:
                        measured = self._decode(ids, peer.model, repeats, peer.step, self.model)
            except peers.NotRunnableError as why:
                yield row | {"skipped": f"not runnable here: {why}"}
                continue
            measured |= self._memory(measured, exempt=True)
            yield row | measured | {"check": check, "budget": None, "met": None}

    def _check_peer(self, name: str) -> dict[str, float]:
        prompt = CHECKED - 2
        native = self._logits(self.small)
        pasta = PASTA(alpha=1 if name == "eager" else cases.ALPHA)
        with steer(self.small, pasta, self._spans(prompt), backend="reference"):
            truth = self._logits(self.small)
        with self._prepare(name, self.small, prompt) as peer:
            found = self._logits(peer.model, peer.prefill(), peer.step)
        return {"error": _difference(found, truth), "moved": _difference(found, native)}

    def _prepare(self, name: str, subject: Any, prompt: int) -> AbstractContextManager[peers.Prepared]:
        return peers.prepare(name, subject, prompt, self.settings.batch_size, padded=self.settings.padding > 0)

    def _too_long(self, name: str, tokens: int) -> str | None:
        if tokens > self.settings.peer_limit:
            return f"longer than peer_limit={self.settings.peer_limit}"
        return self._no_room(name, tokens)

    def _no_room(self, name: str, tokens: int) -> str | None:
        itemsize = torch.finfo(self.model.dtype).bits // 8
        needed = peers.memory(name, self.settings.batch_size, self.settings.heads, tokens, itemsize)
        free = machine.free_memory(self.device)
        if free is None or needed < 0.7 * free:
            return None
        return f"its {tokens}x{tokens} matrices need about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"

    def _row(self, phase: str, tokens: int, case: str, backend: str, method: Any) -> dict[str, Any]:
        return {
            "family": self.family,
            "phase": phase,
            "head_dim": self.head_dim,
            "batch": self.settings.batch_size,
            "padding": self.settings.padding,
            "tokens": tokens,
            "case": case,
            "backend": backend,
            "method": method,
        }

    def _ids(self, tokens: int) -> torch.Tensor:
        return model.tokens(self.settings.batch_size, tokens, self.settings.seed + tokens, self.device)

    def _spans(self, prompt: int) -> list[list[tuple[int, int]]]:
        return cases.spans(prompt, self.settings.pads(prompt))

    def _mask(self, prompt: int, length: int) -> dict[str, Any]:
        """The attention mask of a left-padded prompt with tokens behind it, as an argument; none without padding."""
        mask = model.mask(self.settings.pads(prompt), length, self.device)
        return {} if mask is None else {"attention_mask": mask}

    def _prefill(
        self, ids: torch.Tensor, steered: Any, repeats: int, extra: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        tokens = ids.shape[1]
        padded = self._mask(tokens, tokens)
        given = padded | (extra or {})
        if tokens not in self._native:
            self._native[tokens] = self._peak(lambda: self.model(ids, logits_to_keep=1, **padded).logits)
        native, peak = self._native[tokens]
        own, peak_steered = self._peak(lambda: steered(ids, logits_to_keep=1, **given).logits)
        unsteered = timing.Prefill(self.model, ids, padded)
        found = timing.pairs(unsteered, timing.Prefill(steered, ids, given), count=repeats, warmup=0)
        moved = {"moved": _difference(own, native)}
        return timing.summary(found) | moved | self._extra(peak, peak_steered, tokens, tokens)

    def _decode(
        self,
        ids: torch.Tensor,
        steered: Any,
        repeats: int,
        step: timing.Extra = timing.nothing,
        prefilled: Any = None,
    ) -> dict[str, Any]:
        steps, tokens = self.settings.decode_steps, ids.shape[1]
        prompt = self._mask(tokens, tokens)

        def padded(seen: int) -> dict[str, Any]:
            return self._mask(tokens, seen + 1)

        def given(seen: int) -> dict[str, Any]:
            return padded(seen) | step(seen)

        if tokens not in self._steppers:
            self._steppers[tokens] = timing.Decode(self.model, ids, steps, None, padded, prompt)
        unsteered = self._steppers[tokens]
        own = timing.Decode(steered, ids, steps, prefilled, given, prompt)
        found = timing.pairs(unsteered, own, count=repeats * steps, warmup=min(steps, 3))
        unsteered.rewind()
        own.rewind()
        keys = max(own.cache.get_mask_sizes(0, layer)[0] for layer in range(self.settings.layers))
        extra = self._extra(self._peak(unsteered)[1], self._peak(own)[1], 1, keys)
        return timing.summary(found) | {"moved": None} | extra

    @torch.inference_mode()
    def _peak(self, function: Callable[[], memory.Result]) -> tuple[memory.Result, int | None]:
        return memory.peak(function, self.device)

    def _extra(self, native: int | None, steered: int | None, rows: int, keys: int) -> dict[str, Any]:
        itemsize = torch.finfo(self.model.dtype).bits // 8
        bound = memory.bound(self.model.config, self.settings.batch_size, rows, keys, itemsize)
        more = None if native is None or steered is None else round((steered - native) / 2**20, 2) + 0.0  # no -0.0
        return {"extra_mib": more, "extra_bound_mib": round(bound / 2**20, 2)}

    @torch.inference_mode()
    def _logits(
        self, subject: Any, extra: dict[str, Any] | None = None, step: timing.Extra = timing.nothing
    ) -> torch.Tensor:
        """Logits [tokens, V] of a prefill of all `CHECKED` tokens but two and two cached steps, without the pads'."""
        ids = self._ids(CHECKED)
        cache, prompt = DynamicCache(config=subject.config), CHECKED - 2
        given = self._mask(prompt, prompt) | (extra or {})
        found = [subject(ids[:, :prompt], **{caches.NAME: cache}, use_cache=True, **given).logits]
        for seen in range(prompt, CHECKED):
            token, given = ids[:, seen : seen + 1], self._mask(prompt, seen + 1) | step(seen)
            found.append(subject(token, **{caches.NAME: cache}, use_cache=True, **given).logits)
        logits, mask = torch.cat(found, 1), model.mask(self.settings.pads(prompt), CHECKED, self.device)
        return logits.flatten(0, 1) if mask is None else logits[mask.bool()]


def _wrong(check: dict[str, float]) -> str | None:
    if check["error"] <= TOLERANCE:
        return None
    return f"differs from the definition by {check['error']:.2g} of the largest logit; not timed"


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(f"{float((one.float() - other.float()).abs().max() / other.float().abs().max()):.3g}")
