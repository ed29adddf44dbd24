"""`capture`: summaries of the attention that was finally used, without keeping its matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch

from steerlens import decoder
from steerlens.backends import fused, reference, sdpa
from steerlens.backends.call import Call, Cut
from steerlens.edits import FirstToken, SpanKeys
from steerlens.engine import Engine
from steerlens.errors import SpanError, SteeringStateError, UnsupportedError, nearest
from steerlens.heads import Heads
from steerlens.passes import Pass, fit
from steerlens.spans import Spans
from steerlens.wrapping import unwrap

STATS = ("mass", "entropy", "argmax", "lse", "column_mean")
MAP_LIMIT = 256 << 20
"""Bytes that dense maps may take over all layers unless told otherwise."""
PADDING = {"mass": torch.nan, "entropy": torch.nan, "lse": torch.nan, "argmax": -1}


@dataclass
class LayerRecord:
    """What was captured in one layer; fp32 on the layer's device, forwards appended along Tq, pads NaN.

    Attributes:
        heads: query heads along H; under tensor parallelism those that this process holds, maybe none.
        mass: attention mass per span group, [B, H, Tq, G], G as `Record.groups`.
        entropy: of each row in nats, [B, H, Tq].
        argmax: padded column of the most attended key, int64 [B, H, Tq]; lowest column on a tie, -1 for pads.
        lse: log-sum-exp of the scaled, masked logits before any edit, learned sinks included, in nats, [B, H, Tq].
        column_mean: mean weight of a key over the captured real rows that see it, [B, H, Tk].
        map_heads: query heads along h of `map`, as `heads`.
        map_rows: padded column of each row along R of `map`.
    """

    heads: tuple[int, ...]
    mass: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    argmax: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    column_mean: torch.Tensor | None = None
    map_heads: tuple[int, ...] = ()
    map_rows: tuple[int, ...] = ()
    _sums: torch.Tensor | None = field(default=None, repr=False)
    _counts: torch.Tensor | None = field(default=None, repr=False)
    _maps: list[torch.Tensor] = field(default_factory=list, repr=False)
    _real: torch.Tensor | None = field(default=None, repr=False)

    @property
    def map(self) -> torch.Tensor | None:
        """Weights finally used, [B, h, R, Tk]: rows and columns of pads NaN, 0 where a row does not see a key."""
        if len(self._maps) > 1:
            width = max(part.shape[-1] for part in self._maps)
            self._maps = [torch.cat([self._grown(part, width) for part in self._maps], 2)]
        return self._maps[0] if self._maps else None

    def _grown(self, part: torch.Tensor, width: int) -> torch.Tensor:
        """A map with the columns of later forwards, which its rows did not see."""
        before, pads = part.shape[-1], part.isnan().all(-1, keepdim=True)
        part = torch.nn.functional.pad(part, (0, width - before)).masked_fill_(pads, torch.nan)
        if self._real is not None and width > before:
            part[..., before:].masked_fill_(~fit(self._real, width - before, before)[:, None, None], torch.nan)
        return part


class Observer:
    """A context that watches attention calls, of `layers`; what it does not override it does not look at."""

    name = "steerlens.capture"
    spans: Spans | None = None

    def __init__(self, model: Any) -> None:
        self.model = unwrap(model)
        self._engine = Engine.of(decoder.find(self.model))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose calls are seen."""
        return self._engine.facts.attention_layers

    def __enter__(self) -> Self:
        self._engine = Engine.of(self._engine.base)
        if self in self._engine.records:
            raise SteeringStateError("this capture is on already: open another one")
        self._engine.claim()
        self._engine.records.append(self)
        try:
            self._engine.update()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.records.remove(self)
        self._engine.update()

    def check_rows(self, batch: int, expand: int) -> None:
        """Raise if a batch of `batch` rows is not the one that is watched."""

    def expect(self, now: Pass) -> None:
        """Raise if the forward that begins cannot be watched."""

    def observe(self, layer: int, call: Call, now: Pass) -> None:
        """See what goes into an attention call, without gradients."""

    def output(self, layer: int, output: torch.Tensor, now: Pass) -> None:
        """See what an attention call gives, [B, Tq, H, Dv], with its gradient history, before the layer gets it."""


class Record(Observer):
    """Captured statistics: `record[layer]`, filled by every forward inside the context.

    Attributes:
        groups: names of the last axis of `mass`: the span groups, or `("first_token",)` without spans.
        stats: the statistics recorded.
    """

    def __init__(
        self,
        model: Any,
        spans: Any,
        stats: Sequence[str],
        rows: str | int,
        heads: Any,
        maps: Any = None,
        map_rows: str | Iterable[int] = "all",
        map_limit: int = MAP_LIMIT,
    ) -> None:
        for stat in stats:
            if stat not in STATS:
                raise ValueError(f"unknown statistic {stat!r}; known: {', '.join(STATS)}{nearest(stat, STATS)}")
        if rows not in ("all", "last") and (type(rows) is not int or rows < 1):
            raise ValueError(
                f"rows={rows!r} is unknown; allowed: 'all', 'last' (the last row of each forward), or a number >= 1 of "
                "last rows"
            )
        super().__init__(model)
        self.stats, self.rows = tuple(stats), rows
        self._batch: int | None = None
        self.spans = None if spans is None else Spans.of(spans)
        named = self.spans is not None and self.spans.groups
        self.groups: tuple[str, ...] = tuple(self.spans.groups) if self.spans and named else ("first_token",)
        self._heads = Heads.parse(heads).resolve(self._engine.facts)
        self._map_heads = {} if maps is None else Heads.parse(maps).resolve(self._engine.facts)
        self._map_rows, self.map_limit = _map_rows(map_rows), map_limit
        self._layers: dict[int, LayerRecord] = {
            layer: LayerRecord(self._heads.get(layer, ()), map_heads=self._map_heads.get(layer, ()))
            for layer in sorted(self._heads.keys() | self._map_heads.keys())
        }

    @property
    def layers(self) -> tuple[int, ...]:
        """Captured layers."""
        return tuple(self._layers)

    def __getitem__(self, layer: int) -> LayerRecord:
        if layer not in self._layers:
            raise KeyError(f"layer {layer} is not captured; captured: {list(self._layers)}")
        return self._layers[layer]

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
        if record.heads and self.stats:
            self._statistics(record, call, now, real, now.keys[layer])
        if record.map_heads:
            self._map(record, call, now, real, now.keys[layer][1])

    def _statistics(
        self, record: LayerRecord, call: Call, now: Pass, real: torch.Tensor, keys: tuple[int, int]
    ) -> None:
        heads, (length, start) = [h - call.first for h in record.heads], keys
        groups = self._group_keys(now, length, start)
        last = 1 if self.rows == "last" else self.rows
        first = max(call.query.shape[2] - last, 0) if isinstance(last, int) else 0
        parts: dict[str, list[torch.Tensor]] = {stat: [] for stat in self.stats if stat in PADDING}
        cut = any(isinstance(edit, Cut) for edit in call.edits)
        if self._engine.backend == "triton" and self.rows == "all" and not cut:
            self._by_kernels(record, parts, call, heads, groups, real, now.columns, start)
            self._append(record, parts, now)
            return
        edits = reference.resolve(call, sdpa.budget(call))
        for block in reference.blocks(call, sdpa.budget(call), len(heads)):
            rows = slice(max(block.start, first), block.stop)
            if rows.start >= rows.stop:
                continue
            a = reference.weights(call, edits, rows, heads).float()
            for stat, values in self._rows(a, call, rows, heads, groups, start).items():
                keep = real[:, None, rows]
                keep = keep[..., None] if values.ndim == 4 else keep
                parts[stat].append(torch.where(keep, values, PADDING[stat]))
            if "column_mean" in self.stats:
                self._columns(record, a, call, rows, heads, real, now.columns, start)
        self._append(record, parts, now)

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

    def _by_kernels(
        self,
        record: LayerRecord,
        parts: dict[str, list[torch.Tensor]],
        call: Call,
        heads: list[int],
        groups: torch.Tensor,
        real: torch.Tensor,
        columns: int,
        start: int,
    ) -> None:
        found = fused.statistics(call, heads, groups, real, self.stats)
        for stat in parts:
            # as of the reference, the argmax of a token that sees no key is the first
            values = found[stat].clamp(min=0) + start if stat == "argmax" else found[stat]
            keep = real[:, None]
            parts[stat].append(torch.where(keep[..., None] if values.ndim == 4 else keep, values, PADDING[stat]))
        if "column_mean" in self.stats:
            self._sum(record, found["sums"], found["observers"], columns, start)

    def _append(self, record: LayerRecord, parts: dict[str, list[torch.Tensor]], now: Pass) -> None:
        for stat, found in parts.items():
            joined, before = torch.cat(found, 2), getattr(record, stat)
            setattr(record, stat, joined if before is None else torch.cat([before, joined], 2))
        if record._sums is not None and record._counts is not None:
            mean = record._sums / record._counts.clamp(min=1)
            known = torch.ones_like(mean[:, :1], dtype=torch.bool) if now.real is None else now.real[:, None]
            record.column_mean = torch.where(known & (record._counts > 0), mean, torch.nan)

    def _rows(
        self, a: torch.Tensor, call: Call, rows: slice, heads: list[int], groups: torch.Tensor, start: int
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        if "mass" in self.stats:
            found["mass"] = torch.einsum("bhrk,bgk->bhrg", a, groups.float())
        if "entropy" in self.stats:
            found["entropy"] = torch.special.entr(a).sum(-1)
        if "argmax" in self.stats:
            # argmax does not promise the first of equal maxima.
            found["argmax"] = (a == a.amax(-1, keepdim=True)).long().cummax(-1).values.eq(0).sum(-1) + start
        if "lse" in self.stats:
            found["lse"] = reference.lse(call, rows, heads).float()
        return found

    def _columns(
        self,
        record: LayerRecord,
        a: torch.Tensor,
        call: Call,
        rows: slice,
        heads: list[int],
        real: torch.Tensor,
        columns: int,
        start: int,
    ) -> None:
        counted = real[:, None, rows, None]
        visible = call.visible(rows)
        seen = (visible if visible.shape[1] == 1 else visible[:, heads]) & counted
        self._sum(record, (a * counted).sum(2), seen.sum(2).float(), columns, start)

    def _sum(self, record: LayerRecord, sums: torch.Tensor, counts: torch.Tensor, columns: int, start: int) -> None:
        place = (start, columns - start - sums.shape[-1])
        sums, counts = torch.nn.functional.pad(sums, place), torch.nn.functional.pad(counts, place)
        if record._sums is None or record._counts is None:
            record._sums, record._counts = sums, counts
        else:
            record._sums = fit(record._sums, columns) + sums
            record._counts = fit(record._counts, columns) + counts

    def _group_keys(self, now: Pass, length: int, start: int) -> torch.Tensor:
        keys = [FirstToken()] if self.spans is None or not self.spans.groups else [SpanKeys(g) for g in self.groups]
        return torch.stack([fit(now.key_columns(k, self.spans), length, start) for k in keys], 1)


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
    stats: Sequence[str] = STATS,
    rows: str | int = "all",
    heads: Any = "all",
    maps: Any = None,
    map_rows: str | Iterable[int] = "all",
    map_limit: int = MAP_LIMIT,
) -> Record:
    """Record attention statistics of every forward inside the context, after any steering.

    Args:
        model: a transformers decoder model.
        spans: groups whose mass is recorded: `Spans`, or a list of (start, stop) ranges per prompt row.
        stats: some of `mass`, `entropy`, `argmax`, `lse`, `column_mean`.
        rows: `all` query rows, the `last` of each forward, or how many of its last ones.
        heads: a head specification.
        maps: heads whose weights are kept whole, as `LayerRecord.map`; they need not be in `heads`. `None` for none.
        map_rows: rows of these maps: `all`, the `last` of each forward, or a list of padded columns.
        map_limit: bytes that the maps of all layers may take together; a forward that needs more is refused.

    Raises:
        ValueError: for an unknown statistic or choice of rows. HeadError, SpanError, UnsupportedError: as `steer`.
    """
    return Record(model, spans, stats, rows, heads, maps, map_rows, map_limit)
