"""Where a forward stands: which rows are prompt, which columns are real, which keys an edit means.

Columns are absolute: column c is the c-th position since the cache was empty, pads included. A layer's key axis holds
the columns `kv_offset .. kv_offset + Tk`, which a sliding-window cache moves along.
Shapes: B batch rows, H query heads, Tq query rows of this forward, Tk keys of a layer, C columns so far.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from steerlens.edits import FirstToken, Keys, Outliers, Phase, PromptKeys, Sinks, SpanKeys, UntilSpan
from steerlens.errors import SpanError
from steerlens.spans import Spans


@dataclass
class SinkState:
    """Sinks of one edit in one layer: the frozen set, and for `running` the sums that go on.

    Attributes:
        keys: bool [B, h, C] over the edit's heads.
        sums: attention summed over the rows counted so far, fp32 [B, h, C].
        counts: how many counted rows see each column, fp32 [B, 1 or h, C].
        kept: what a backend keeps of the frozen keys.
    """

    keys: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def select(self, index: torch.Tensor) -> SinkState:
        """These rows of it, int64 [B']."""
        index = index.to(self.keys.device)
        return SinkState(self.keys[index], self.sums[index], self.counts[index])

    @cached_property
    def index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The frozen keys as columns, int64 [B, h, n], and which of them are meant, bool [B, h, n]."""
        count = int(self.keys.sum(-1).max())
        found = self.keys.long().topk(count, dim=-1)
        return torch.where(found.values.bool(), found.indices, 0), found.values.bool()


@dataclass
class Prompt:
    """What every later forward on the same cache needs to know of the prompt.

    Attributes:
        batch: B.
        width: columns the prompt takes, pads included.
        first: column of the first real token, int64 [B].
        stop: column after the last real prompt token, int64 [B].
        real: real prompt columns, bool [B, width], or `None` if all are.
        beams: whether rows will be reordered between forwards.
        origin: the row of the first forward that each row comes from, int64 [B]; `None` while none has moved.
        sinks: states of the edits that find sinks, by (context, layer, edit).
        started: B of the first forward.
        notes: what edits wrote down of what the cache holds.
        peaks: max_c |x_c| / rms(x) of the columns read so far, fp32 [B, columns], by (layer, channels); see `Outliers`.
        choices: what edits chose by the whole prompt, per row of the first forward.
    """

    batch: int
    width: int
    first: torch.Tensor
    stop: torch.Tensor
    real: torch.Tensor | None
    beams: bool = False
    origin: torch.Tensor | None = None
    sinks: dict[Hashable, SinkState] = field(default_factory=dict)
    started: int = 0
    notes: set[Hashable] = field(default_factory=set)
    peaks: dict[tuple[int, tuple[int, ...]], torch.Tensor] = field(default_factory=dict)
    choices: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    _columns: dict[Hashable, tuple[Spans | None, torch.Tensor]] = field(default_factory=dict)
    _elsewhere: dict[torch.device, Prompt] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        width: int,
        real: torch.Tensor | None,
        batch: int,
        device: torch.device,
        lengths: tuple[int, ...] | None = None,
    ) -> Prompt:
        """A prompt of `width` columns; `real` [B, >= width] marks its tokens; `lengths` cut it per row, in tokens."""
        real = None if real is None else real[:, :width].to(device)
        first = torch.zeros(batch, dtype=torch.long, device=device)
        stop = torch.full((batch,), width, dtype=torch.long, device=device)
        if real is not None:
            columns = torch.arange(real.shape[1], device=device)
            first = real.long().argmax(1)
            stop = torch.where(real, columns + 1, 0).amax(1)
        if lengths is not None:
            stop = first + torch.tensor(lengths, device=device)
            width = int(stop.max())
            # What a first chunk does not show yet is tokens.
            missing = 0 if real is None else max(width - real.shape[1], 0)
            real = None if real is None else torch.nn.functional.pad(real, (0, missing), value=True)[:, :width]
        return cls(batch, width, first, stop, real, started=batch)

    def select(self, index: torch.Tensor) -> Prompt:
        """The prompt of a cache whose rows are now these rows of it, int64 [B']."""
        origin = index if self.origin is None else self.origin[index]
        real = None if self.real is None else self.real[index]
        sinks = {key: state.select(index) for key, state in self.sinks.items()}
        first, stop = self.first[index], self.stop[index]
        peaks = {key: table[index.to(table.device)] for key, table in self.peaks.items()}
        return Prompt(
            len(index),
            self.width,
            first,
            stop,
            real,
            self.beams,
            origin,
            sinks,
            self.started,
            set(self.notes),
            peaks,
            dict(self.choices),
        )

    def on(self, device: torch.device) -> Prompt:
        """The same prompt with its tensors on another device; states stay common, each on its layer's device."""
        if device not in self._elsewhere:
            real, origin = (None if t is None else t.to(device) for t in (self.real, self.origin))
            first, stop = self.first.to(device), self.stop.to(device)
            self._elsewhere[device] = replace(
                self, first=first, stop=stop, real=real, origin=origin, _columns={}, _elsewhere={}
            )
        return self._elsewhere[device]

    @property
    def tokens(self) -> torch.Tensor:
        """Number of real prompt tokens per row, int64 [B]."""
        if self.real is None:
            return self.stop - self.first
        columns = torch.arange(self.real.shape[1], device=self.real.device)
        return (self.real & (columns < self.stop[:, None])).sum(1)

    def span(self, spans: Spans, group: str, section: int | None) -> torch.Tensor:
        """The group's columns, bool [B, width]."""
        table = torch.zeros(spans.rows, self.width, dtype=torch.bool)
        for row, sections in enumerate(spans.groups[group]):
            for start, stop in sections if section is None else sections[section : section + 1]:
                if stop > self.width:
                    raise SpanError(
                        f"span ({start}, {stop}) of group {group!r}, row {row}, ends after the prompt of "
                        f"{self.width} columns; spans count padded columns of the same inputs"
                    )
                table[row, start:stop] = True
        return self.expand(table)

    def sections(self, spans: Spans, group: str) -> torch.Tensor:
        """Number of sections per row, int64 [B]."""
        return self.expand(torch.tensor([len(row) for row in spans.groups[group]]))

    def key_columns(self, keys: Keys, spans: Spans | None) -> torch.Tensor:
        """The prompt columns an edit means, bool [B, width]."""
        known = (keys, id(spans))
        if known not in self._columns:
            # The spans are kept with what they gave, so that their id names nothing else.
            self._columns[known] = (spans, self._find(keys, spans))
        return self._columns[known][1]

    def _find(self, keys: Keys, spans: Spans | None) -> torch.Tensor:
        columns = torch.arange(self.width, device=self.first.device)
        if isinstance(keys, FirstToken):
            return columns == self.first[:, None]
        in_prompt = columns < self.stop[:, None]
        if isinstance(keys, PromptKeys) and not keys.sections:
            return in_prompt
        assert spans is not None and not isinstance(keys, Sinks | Outliers)
        if isinstance(keys, PromptKeys):
            return in_prompt & (self.sections(spans, keys.group) >= keys.sections)[:, None]
        if isinstance(keys, UntilSpan):
            inside = self.span(spans, keys.group, None)
            return in_prompt & (columns >= self.first[:, None]) & (inside.flip(1).long().cumsum(1).flip(1) > 0)
        inside = self.span(spans, keys.group, keys.section)
        if isinstance(keys, SpanKeys):
            return inside
        needed = 1 if keys.section is None else keys.section + 1
        return in_prompt & ~inside & (self.sections(spans, keys.group) >= needed)[:, None]

    def expand(self, table: torch.Tensor) -> torch.Tensor:
        """A table per prompt row, [rows, ...], as one per batch row, [B, ...]."""
        # Beams and num_return_sequences repeat each prompt row next to itself.
        table = table.repeat_interleave(self.started // table.shape[0], 0).to(self.first.device)
        return table if self.origin is None else table[self.origin]


@dataclass
class Pass:
    """One forward of the decoder.

    Attributes:
        q_offset: column of its first query row.
        q_len: Tq.
        real: real columns, bool [B, C], or `None` if all are.
        plain: visibility is causal and padding, nothing else (no 4-D mask of the user's).
        keys: per layer (Tk that the layer will see, column of its first key), read before the cache update.
    """

    prompt: Prompt
    q_offset: int
    q_len: int
    real: torch.Tensor | None
    plain: bool
    keys: dict[int, tuple[int, int]]
    memo: dict[Hashable, object] = field(default_factory=dict)

    def on(self, device: torch.device) -> Pass:
        """This forward for a layer on `device`: the same, or a copy made once."""
        if device == self.prompt.first.device:
            return self
        if ("on", device) not in self.memo:
            real = None if self.real is None else self.real.to(device)
            self.memo["on", device] = replace(self, prompt=self.prompt.on(device), real=real, memo={})
        return self.memo["on", device]  # type: ignore[return-value]

    @property
    def columns(self) -> int:
        """C, the columns seen when this forward is done."""
        return self.q_offset + self.q_len

    @property
    def whole_prompt(self) -> bool:
        """Whether every prompt row is in this forward."""
        return self.q_offset == 0 and self.columns >= self.prompt.width

    def last(self, rows: int) -> Pass:
        """This forward for a layer that computes its last `rows` query rows alone."""
        if rows >= self.q_len:
            return self
        return replace(self, q_offset=self.columns - rows, q_len=rows, memo={})

    def rows(self, phase: Phase) -> torch.Tensor | None:
        """Query rows of a phase, bool [B, Tq]; `None` for all of them."""
        if phase == "all" or (phase == "decode" and self.q_offset >= self.prompt.width):
            return None
        rows = torch.arange(self.q_offset, self.columns, device=self.prompt.first.device)
        stop = self.prompt.stop[:, None]
        if phase == "prompt":
            return rows < stop
        return rows >= stop - 1 if phase == "decode" else rows < stop - 1

    def real_rows(self) -> torch.Tensor | None:
        """Query rows that are tokens, bool [B, Tq]; `None` for all of them."""
        return None if self.real is None else self.real[:, self.q_offset : self.columns]

    def key_columns(self, keys: Keys, spans: Spans | None) -> torch.Tensor:
        """The columns an edit means, bool [B, C]; all of them are prompt columns."""
        return fit(self.prompt.key_columns(keys, spans), self.columns)


def fit(table: torch.Tensor, length: int, start: int = 0) -> torch.Tensor:
    """Columns `start .. start + length` of a table [..., C]; columns it does not have are False or 0."""
    table = table[..., start : start + length]
    missing = length - table.shape[-1]
    return torch.nn.functional.pad(table, (0, missing)) if missing else table
