"""What `capture` gives: the statistics of each layer, whole in memory or read from a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from steerlens.massive import Massive
from steerlens.passes import fit

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]
    import pyarrow  # type: ignore[import-untyped]

STATS = ("mass", "entropy", "argmax", "lse", "column_mean")
"""Statistics of the attention, which `capture` records unless told otherwise."""
KNOWN = (*STATS, "massive")
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
        columns: padded column of each query row, int64 [B, Tq]; -1 for pads.
        massive: the largest activations of the hidden state after this decoder layer.
        map_heads: query heads along h of `map`, as `heads`.
        map_rows: padded column of each row along R of `map`.
    """

    heads: tuple[int, ...]
    mass: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    argmax: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    column_mean: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    massive: Massive | None = None
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


class Captured:
    """Captured statistics: `record[layer]`.

    Attributes:
        groups: names of the last axis of `mass`: the span groups, or `("first_token",)` without spans.
        stats: the statistics recorded.
        rows: `all` query rows, the `last` of each forward, or how many of its last ones.
    """

    def __init__(
        self, groups: Sequence[str], stats: Sequence[str], rows: str | int, layers: dict[int, LayerRecord], model: str
    ) -> None:
        self.groups, self.stats, self.rows = tuple(groups), tuple(stats), rows
        self._layers, self._name = layers, model

    @property
    def layers(self) -> tuple[int, ...]:
        """Captured layers."""
        return tuple(self._layers)

    def __getitem__(self, layer: int) -> LayerRecord:
        if layer not in self._layers:
            raise KeyError(f"layer {layer} is not captured; captured: {list(self._layers)}")
        return self._layers[layer]

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write all of it to a safetensors file, whole or not at all; `steerlens.recording.load` reads it back."""
        from steerlens import export

        return export.save(self, self._name, file)

    def to_pandas(self, table: str = "rows") -> pandas.DataFrame:
        """A long table, pads left out.

        Args:
            table: `rows`: layer, head, batch_row, query_column, entropy, lse, argmax and mass_<group> each;
                `keys`: layer, head, batch_row, key_column, column_mean (keys that no row saw left out);
                `massive`: layer, batch_row, query_column, rank, channel, value, median.

        Raises:
            UnsupportedError: without pandas. SteeringStateError: if nothing is captured yet. ValueError: for a table
                that is not known or whose statistics were not asked for.
        """
        from steerlens import export

        return export.to_pandas(self, table)

    def to_arrow(self, table: str = "rows") -> pyarrow.Table:
        """As `to_pandas`, as an Arrow table."""
        from steerlens import export

        return export.to_arrow(self, table)

    def attentions(self, row: int = 0) -> tuple[torch.Tensor, ...]:
        """Dense maps of one batch row without its pads, per layer [1, h, T, T] on the CPU.

        It is what bertviz's `head_view` and `model_view` take, with as many heads in each layer, and inspectus's
        `attention` as well, as it is or as the [layers, h, T, T] of `torch.cat`. They number layers and heads from 0,
        in the order of `layers` and `map_heads`.

        Raises:
            ValueError: if the maps do not hold all rows (`capture(…, maps=…, map_rows="all")`), or have no such row.
        """
        from steerlens import export

        return export.attentions(self, row)
