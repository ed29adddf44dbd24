"""Massive activations: channels of the hidden state that are thousands of times larger than the rest of it.

Shapes: B batch rows, Tq query rows, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

LARGEST = 3
"""Activations kept of each token."""
_AT_ONCE = 1 << 24
"""Activations whose magnitudes are held at once."""


class Activation(NamedTuple):
    """One massive activation: batch row, padded column of its token, channel, and its signed value."""

    row: int
    column: int
    channel: int
    value: float


@dataclass
class Massive:
    """The largest activations of the hidden state after a decoder layer; forwards appended along Tq.

    Attributes:
        values: the three of largest magnitude in descending order, signed, fp32 [B, Tq, 3]; pads NaN.
        channels: where they are, int64 [B, Tq, 3]; pads -1.
        median: median magnitude of the token's D activations, of the middle two the lower, fp32 [B, Tq]; pads NaN.
        columns: padded column of each token, int64 [B, Tq]; pads -1.
    """

    values: torch.Tensor
    channels: torch.Tensor
    median: torch.Tensor
    columns: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, hidden: torch.Tensor, columns: torch.Tensor) -> Self:
        """Those of a hidden state [B, Tq, D] of tokens in `columns`."""
        parts = [_largest(part) for part in hidden.split(_size(hidden), 1)]
        values, channels, median = (torch.cat(some, 1) for some in zip(*parts, strict=True))
        pads = columns < 0
        return cls(
            values.masked_fill(pads[..., None], torch.nan),
            channels.masked_fill(pads[..., None], -1),
            median.masked_fill(pads, torch.nan),
            columns,
        )

    def then(self, later: Massive) -> Massive:
        """With the tokens of a later forward."""
        return Massive(*(torch.cat(pair, 1) for pair in zip(self.tensors(), later.tensors(), strict=True)))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """`values`, `channels`, `median`, `columns`."""
        return self.values, self.channels, self.median, self.columns

    def find(self, least: float = 100.0, ratio: float = 1000.0) -> list[Activation]:
        """The massive activations: |x| > `least` and |x| >= `ratio` times the median magnitude of the same token.

        At most three of each token, in order of batch row, column and magnitude.
        """
        size = self.values.abs()
        found = (size > least) & (size >= ratio * self.median[..., None])
        row, token, _ = places = found.nonzero(as_tuple=True)
        columns = self.columns[row, token].tolist()
        channels, values = self.channels[places].tolist(), self.values[places].tolist()
        return [Activation(*each) for each in zip(row.tolist(), columns, channels, values, strict=True)]


def median_magnitude(hidden: torch.Tensor) -> torch.Tensor:
    """Median of |x| of each token of a hidden state [B, Tq, D], of the middle two the lower, fp32 [B, Tq]."""
    return torch.cat([part.float().abs().median(-1).values for part in hidden.split(_size(hidden), 1)], 1)


def _size(hidden: torch.Tensor) -> int:
    """Tokens of a row that are looked at together."""
    return max(1, _AT_ONCE // max(hidden.shape[0] * hidden.shape[2], 1))


def _largest(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = hidden.float().abs()
    channels = size.topk(LARGEST, -1).indices
    return hidden.gather(-1, channels).float(), channels, size.median(-1).values
