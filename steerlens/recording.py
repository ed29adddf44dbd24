"""`capture`: summaries of the attention that was finally used, without keeping its matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.hooks import RemovableHandle

from steerlens import backends, decoder
from steerlens.backends import fused, reference, sdpa
from steerlens.backends.call import Call, Cut, MoveMass
from steerlens.captured import KNOWN, PADDING, STATS, Captured, LayerRecord
from steerlens.edits import FirstToken, SpanKeys
from steerlens.errors import SpanError, SteeringStateError, UnsupportedError, nearest
from steerlens.export import load
from steerlens.heads import Heads
from steerlens.massive import Massive
from steerlens.observing import Observer
from steerlens.passes import Pass, fit
from steerlens.spans import Spans

__all__ = ["KNOWN", "STATS", "Captured", "LayerRecord", "Massive", "Record", "capture", "load"]

MAP_LIMIT = 256 << 20
"""Bytes that dense maps may take over all layers unless told otherwise."""


class Record(Captured, Observer):
    """Captured statistics: `record[layer]`, filled by every forward inside the context.

    Attributes:
        groups: names of the last axis of `mass`: the span groups, or `("first_token",)` without spans.
        stats: the statistics recorded.
        rows: `all` query rows, the `last` of each forward, or how many of its last ones.
    """

    def __init__(
        self,
        model: Any,
        spans: Any,
        stats: str | Sequence[str],
        rows: str | int,
        heads: Any,
        maps: Any = None,
        map_rows: str | Iterable[int] = "all",
        map_limit: int = MAP_LIMIT,
    ) -> None:
        stats = (stats,) if isinstance(stats, str) else stats
        for stat in stats:
            if stat not in KNOWN:
                raise ValueError(f"unknown statistic {stat!r}; known: {', '.join(KNOWN)}{nearest(stat, KNOWN)}")
        if rows not in ("all", "last") and (type(rows) is not int or rows < 1):
            raise ValueError(
                f"rows={rows!r} is unknown; allowed: 'all', 'last' (the last row of each forward), or a number >= 1 of "
                "last rows"
            )
        Observer.__init__(self, model)
        facts = self._engine.facts
        self._batch: int | None = None
        self.spans = None if spans is None else Spans.of(spans)
        named = self.spans is not None and self.spans.groups
        self._heads = Heads.parse(heads).resolve(facts)
        self._map_heads = {} if maps is None else Heads.parse(maps).resolve(facts)
        self._map_rows, self.map_limit = _map_rows(map_rows), map_limit
        layers = {
            layer: LayerRecord(self._heads.get(layer, ()), map_heads=self._map_heads.get(layer, ()))
            for layer in sorted(self._heads.keys() | self._map_heads.keys())
        }
        Captured.__init__(
            self,
            tuple(self.spans.groups) if self.spans and named else ("first_token",),
            stats,
            rows,
            layers,
            facts.name,
        )
        self._attention = tuple(stat for stat in self.stats if stat in STATS)
        self._massive: dict[int, torch.nn.Module] = {}
        if "massive" in self.stats:
            self._massive = decoder.layers(self._engine.base, self._heads, "leave 'massive' out of stats")
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            for layer, module in self._massive.items():
                self._hooks.append(module.register_forward_hook(self._watch(layer)))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().__exit__(kind, error, trace)

    def check_rows(self, batch: int, expand: int) -> None:
        """Raise if a batch of `batch` rows is not that of the spans, or of what is recorded already."""
        if self._batch not in (None, batch):
            raise SteeringStateError(f"this capture holds {self._batch} rows, the batch has {batch}: open another one")
        if self.spans and self.spans.groups and batch not in (self.spans.rows, self.spans.rows * expand):
            raise SpanError(f"spans describe {self.spans.rows} prompt rows, the batch has {batch}")

    def expect(self, now: Pass) -> None:
        """Raise if the dense maps would be larger than `map_limit` after this forward."""
        rows, size, widest = sum(map(len, self._rows_of_maps(now))), 0, now.columns
        for layer, heads in self._map_heads.items():
            record = self._layers[layer]
            widest = max([widest, *(part.shape[-1] for part in record._maps)])
            size += 4 * now.prompt.batch * len(heads) * (len(record.map_rows) + rows) * widest
        if size > self.map_limit:
            layers, held = len(self._map_heads), sum(map(len, self._map_heads.values()))
            raise UnsupportedError(
                f"steerlens.capture: dense maps of {held} heads in {layers} layers would take {_bytes(size)} at "
                f"{widest} columns, map_limit is {_bytes(self.map_limit)}: capture fewer heads (maps=) or rows "
                "(map_rows='last' or a list of columns), or give a larger map_limit"
            )

    def observe(self, layer: int, call: Call, now: Pass) -> None:
        """Record one attention call."""
        if layer not in self._layers:
            return
        self._batch = call.query.shape[0]
        record = self._layers[layer]
        # Under tensor parallelism a process records the heads that it holds.
        held = range(call.first, call.first + call.query.shape[1])
        record.heads, record.map_heads = (
            tuple(h for h in wanted.get(layer, ()) if h in held) for wanted in (self._heads, self._map_heads)
        )
        real = now.real_rows()
        real = torch.ones(call.query.shape[0], now.q_len, dtype=torch.bool) if real is None else real
        real = real.to(call.query.device)
        if record.heads and self._attention:
            self._statistics(record, call, now, real, now.keys[layer])
        if record.map_heads:
            self._map(record, call, now, real, now.keys[layer][1])

    def _watch(self, layer: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            now = self._engine.current
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            if now is None:  # a forward that is left native
                return
            if hidden.ndim != 3:
                raise UnsupportedError(
                    f"steerlens.capture: layer {layer} of {self._name} gives a hidden state of shape "
                    f"{list(hidden.shape)}; 'massive' knows [batch, tokens, channels]: leave it out of stats"
                )
            now = now.on(hidden.device).last(hidden.shape[1])
            first = self._first(now)
            record = self._layers[layer]
            found = Massive.of(hidden[:, first:], _columns(now, len(hidden), first))
            record.massive = found if record.massive is None else record.massive.then(found)

        return hook

    def _first(self, now: Pass) -> int:
        """The first query row of this forward that is recorded."""
        last = 1 if self.rows == "last" else self.rows
        return max(now.q_len - last, 0) if isinstance(last, int) else 0

    def _statistics(
        self, record: LayerRecord, call: Call, now: Pass, real: torch.Tensor, keys: tuple[int, int]
    ) -> None:
        heads, (length, start) = [h - call.first for h in record.heads], keys
        groups = self._group_keys(now, length, start)
        first = self._first(now)
        cut = any(isinstance(edit, Cut) or (isinstance(edit, MoveMass) and edit.raw) for edit in call.edits)
        found = None
        if self.rows == "all" and not cut:
            found = backends.by_kernels(
                self._engine.backend, call, lambda: fused.statistics(call, heads, groups, real, self._attention)
            )
        if found is None:
            found = self._by_blocks(call, heads, groups, real, first)
        for stat in (stat for stat in self._attention if stat in PADDING):
            values, before = found[stat], getattr(record, stat)
            if stat == "argmax":  # of a token that sees no key it is the first
                values = values.clamp(min=0) + start
            keep = real[:, None, first:]
            values = torch.where(keep[..., None] if values.ndim == 4 else keep, values, PADDING[stat])
            setattr(record, stat, values if before is None else torch.cat([before, values], 2))
        columns = _columns(now, len(real), first)
        record.columns = columns if record.columns is None else torch.cat([record.columns, columns], 1)
        if "column_mean" in self.stats:
            self._average(record, found["sums"], found["observers"], now, start)

    def _by_blocks(
        self, call: Call, heads: list[int], groups: torch.Tensor, real: torch.Tensor, first: int
    ) -> dict[str, torch.Tensor]:
        """What `fused.statistics` gives, of the rows from `first` on, by the reference."""
        budget, (B, _, Tq, _), Tk = sdpa.budget(call), call.query.shape, call.key.shape[2]
        edits = reference.resolve(call, budget)
        # Whole from the start: small pieces that stay between large ones that go would leave holes in the heap.
        found: dict[str, torch.Tensor] = {}
        for stat in (stat for stat in self._attention if stat in PADDING):
            shape = (B, len(heads), Tq - first, *([len(self.groups)] if stat == "mass" else []))
            found[stat] = torch.empty(shape, device=real.device, dtype=torch.int64 if stat == "argmax" else None)
        if "column_mean" in self.stats:
            per_head = call.mask is not None and call.mask.shape[1] > 1
            found["sums"] = torch.zeros(B, len(heads), Tk, device=real.device)
            found["observers"] = torch.zeros(B, len(heads) if per_head else 1, Tk, device=real.device)
        for block in reference.blocks(call, budget, len(heads)):
            rows = slice(max(block.start, first), block.stop)
            if rows.start >= rows.stop:
                continue
            near, kept, place = reference.near(call, edits, rows)
            keys = slice(place, place + near.key.shape[2])
            a, lse = reference.weights_and_lse(near, kept, rows, heads)
            a = a.float()
            for stat, values in self._rows(a, lse, groups[..., keys], place).items():
                found[stat][:, :, rows.start - first : rows.stop - first] = values
            if "column_mean" in self.stats:
                counted = real[:, None, None, rows].float()
                visible = near.visible(rows)
                visible = visible if visible.shape[1] == 1 else visible[:, heads]
                found["sums"][..., keys] += (counted @ a)[:, :, 0]
                found["observers"][..., keys] += (counted @ visible.float())[:, :, 0]
        return found

    def _map(self, record: LayerRecord, call: Call, now: Pass, real: torch.Tensor, start: int) -> None:
        wanted = self._rows_of_maps(now)
        if not wanted:
            return
        heads, budget = [h - call.first for h in record.map_heads], sdpa.budget(call)
        edits, R = reference.resolve(call, budget), sum(map(len, wanted))
        found = torch.zeros(len(real), len(heads), R, now.columns, device=call.query.device)
        size, place = max(1, budget // max(len(real) * len(heads) * call.key.shape[2], 1)), 0
        for run in wanted:
            for i in range(run.start, run.stop, size):
                rows = slice(i, min(i + size, run.stop))
                a = reference.weights(call, edits, rows, heads)
                found[:, :, place : place + a.shape[2], start : start + a.shape[3]] = a
                place += a.shape[2]
        if now.real is not None:
            tokens = torch.cat([real[:, run.start : run.stop] for run in wanted], 1)
            found.masked_fill_(~tokens[:, None, :, None], torch.nan)
            found.masked_fill_(~now.real[:, None, None], torch.nan)
        record._maps.append(found)
        record._real = now.real
        record.map_rows += tuple(now.q_offset + i for run in wanted for i in run)

    def _rows_of_maps(self, now: Pass) -> list[range]:
        """Query rows of this forward whose maps are kept."""
        if not self._map_heads:
            return []
        if self._map_rows == "all":
            return [range(now.q_len)]
        if self._map_rows == "last":
            return [range(now.q_len - 1, now.q_len)]
        assert not isinstance(self._map_rows, str)
        places = (column - now.q_offset for column in self._map_rows)
        return [range(i, i + 1) for i in places if 0 <= i < now.q_len]

    def _rows(self, a: torch.Tensor, lse: torch.Tensor, groups: torch.Tensor, place: int) -> dict[str, torch.Tensor]:
        """Statistics of a block whose first key has `place`."""
        found: dict[str, torch.Tensor] = {}
        if "mass" in self.stats:
            found["mass"] = torch.einsum("bhrk,bgk->bhrg", a, groups.float())
        if "entropy" in self.stats:
            found["entropy"] = torch.special.entr(a).sum(-1)
        if "argmax" in self.stats:
            # argmax does not promise the first of equal maxima
            back = torch.arange(a.shape[-1], 0, -1, dtype=torch.int32, device=a.device)
            found["argmax"] = place + a.shape[-1] - torch.where(a == a.amax(-1, keepdim=True), back, 0).amax(-1).long()
        if "lse" in self.stats:
            found["lse"] = lse.float()
        return found

    def _average(self, record: LayerRecord, sums: torch.Tensor, counts: torch.Tensor, now: Pass, start: int) -> None:
        place = (start, now.columns - start - sums.shape[-1])
        sums, counts = torch.nn.functional.pad(sums, place), torch.nn.functional.pad(counts, place)
        if record._sums is not None and record._counts is not None:
            sums, counts = fit(record._sums, now.columns) + sums, fit(record._counts, now.columns) + counts
        record._sums, record._counts = sums, counts
        mean = sums / counts.clamp(min=1)
        known = torch.ones_like(mean[:, :1], dtype=torch.bool) if now.real is None else now.real[:, None]
        record.column_mean = torch.where(known & (counts > 0), mean, torch.nan)

    def _group_keys(self, now: Pass, length: int, start: int) -> torch.Tensor:
        keys = [FirstToken()] if self.spans is None or not self.spans.groups else [SpanKeys(g) for g in self.groups]
        return torch.stack([fit(now.key_columns(k, self.spans), length, start) for k in keys], 1)


def _columns(now: Pass, batch: int, first: int) -> torch.Tensor:
    """Padded columns of the query rows from `first` on, int64 [B, r], -1 for pads."""
    columns = torch.arange(now.q_offset + first, now.columns, device=now.prompt.first.device).expand(batch, -1)
    real = now.real_rows()
    return columns if real is None else torch.where(real[:, first:], columns, -1)


def _map_rows(rows: str | Iterable[int]) -> str | tuple[int, ...]:
    if isinstance(rows, str):
        if rows in ("all", "last"):
            return rows
    elif (columns := list(rows)) and all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in columns):
        return tuple(sorted(set(columns)))
    raise ValueError(
        f"map_rows={rows!r} is unknown; allowed: 'all', 'last' (the last row of each forward), or padded columns >= 0 "
        "such as [5, 9]"
    )


def _bytes(size: int) -> str:
    unit = next((unit for unit in (30, 20, 10) if size >= 1 << unit), 0)
    return f"{size / (1 << unit):.4g} {({30: 'GiB', 20: 'MiB', 10: 'KiB', 0: 'bytes'})[unit]}"


def capture(
    model: Any,
    spans: Any = None,
    stats: str | Sequence[str] = STATS,
    rows: str | int = "all",
    heads: Any = "all",
    maps: Any = None,
    map_rows: str | Iterable[int] = "all",
    map_limit: int = MAP_LIMIT,
) -> Record:
    """Record attention statistics of every forward inside the context, after any steering.

    A batch row is a row of each forward: in a beam search whatever beam was in that place then.

    Args:
        model: a transformers decoder model.
        spans: groups whose mass is recorded: `Spans`, or a list of (start, stop) ranges per prompt row.
        stats: one or some of `mass`, `entropy`, `argmax`, `lse`, `column_mean`, and `massive`, the largest activations
            of the hidden state after each layer.
        rows: `all` query rows, the `last` of each forward, or how many of its last ones.
        heads: a head specification.
        maps: heads whose weights are kept whole, as `LayerRecord.map`; they need not be in `heads`. `None` for none.
        map_rows: rows of these maps: `all`, the `last` of each forward, or a list of padded columns.
        map_limit: bytes that the maps of all layers may take together; a forward that needs more is refused.

    Raises:
        ValueError: for an unknown statistic or choice of rows. HeadError, SpanError, UnsupportedError: as `steer`.
    """
    return Record(model, spans, stats, rows, heads, maps, map_rows, map_limit)
