"""Spans: named groups of token ranges per prompt row, tied to the inputs they were resolved on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steerlens.errors import SpanError

if TYPE_CHECKING:
    import torch

Range = tuple[int, int]
Rows = tuple[tuple[Range, ...], ...]


@dataclass(frozen=True)
class Spans:
    """Token ranges that methods act on.

    Attributes:
        groups: `{group: per row a tuple of (start, stop)}`; half-open ranges in padded columns, each one a section.
        fingerprint: a digest per row of the inputs they belong to, checked at prefill; `None` checks nothing.
    """

    groups: Mapping[str, Rows]
    fingerprint: tuple[str, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        counts = {group: len(rows) for group, rows in self.groups.items()}
        if len(set(counts.values())) > 1:
            raise SpanError(
                f"span groups have different numbers of rows: {counts}; each needs one entry per prompt row"
            )
        if self.fingerprint is not None and counts and len(self.fingerprint) not in counts.values():
            raise SpanError(f"spans have {self.rows} rows but {len(self.fingerprint)} fingerprints")
        for group, rows in self.groups.items():
            for row, sections in enumerate(rows):
                for start, stop in sections:
                    if not 0 <= start < stop:
                        raise SpanError(
                            f"spans: group {group!r}, row {row}: ({start}, {stop}) is not a range; "
                            "allowed: 0 <= start < stop, half-open, in padded token columns"
                        )

    @classmethod
    def of(cls, spans: Spans | Sequence[Any] | Mapping[str, Sequence[Any]]) -> Spans:
        """Spans as they are, or from plain ranges.

        Args:
            spans: `Spans`, a list per row of `(start, stop)` (the group "emphasis"), or `{group: list per row}`.
        """
        if isinstance(spans, Spans):
            return spans
        groups = spans if isinstance(spans, Mapping) else {"emphasis": spans}
        return cls({str(group): tuple(_row(r, i, group) for i, r in enumerate(rows)) for group, rows in groups.items()})

    @property
    def rows(self) -> int:
        """Number of prompt rows."""
        return len(next(iter(self.groups.values()), ()))

    def most_sections(self, group: str) -> int:
        """The largest number of sections that any row has in `group`."""
        return max((len(row) for row in self.groups[group]), default=0)

    def check(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, *, longer: bool = False) -> None:
        """Raise `SpanError` if these are not the inputs that the spans were resolved on.

        Args:
            input_ids: [B, T]; B may be a multiple of the rows (beams, `num_return_sequences`).
            attention_mask: [B, T] or None.
            longer: T may also be larger, a continuation behind the prompt, or smaller, its first chunk (not checked).
        """
        if self.fingerprint is None:
            return
        width = int(self.fingerprint[0].partition(":")[0]) if self.fingerprint else 0
        if longer and input_ids.shape[1] < width:
            return
        if longer:
            input_ids = input_ids[:, :width]
            attention_mask = None if attention_mask is None else attention_mask[:, :width]
        seen = digests(input_ids, attention_mask)
        expand = len(seen) // len(self.fingerprint)
        for row, digest in enumerate(seen):
            if digest != self.fingerprint[row // max(expand, 1)]:
                raise SpanError(
                    f"row {row} of the inputs is not what the spans were resolved on: use the inputs and the spans of "
                    "one steerlens.encode call together, unchanged"
                )

    def preview(self, tokenizer: Any, input_ids: Any) -> list[dict[str, list[str]]]:
        """Per row and group the text of each section, to look at before a run."""
        return [
            {g: [tokenizer.decode(list(input_ids[r][a:b])) for a, b in rows[r]] for g, rows in self.groups.items()}
            for r in range(self.rows)
        ]


def require(method: str, spans: Spans | None, *groups: str) -> Spans:
    """The spans, which have these groups; raises `SpanError` naming the method and the group that is missing."""
    for group in groups:
        if spans is None or group not in spans.groups:
            has = f"these spans have {', '.join(spans.groups) or 'none'}" if spans is not None else "there are no spans"
            ranges = "a list of (start, stop) token ranges per row"
            how = (
                f"from steerlens.encode(…, emphasize=[…]) or {ranges}"
                if group == "emphasis"
                else f"{{{group!r}: {ranges}}}"
            )
            raise SpanError(f"{method} needs the span group {group!r}, and {has}: pass spans= {how}")
    assert spans is not None
    return spans


def digests(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[str, ...]:
    """One digest per row over its token ids and its mask: `"<columns>:<hash>"`."""
    ids = input_ids.tolist()
    masks = [[1] * len(row) for row in ids] if attention_mask is None else attention_mask.long().tolist()
    return tuple(
        f"{len(row)}:{hashlib.blake2b(repr((row, mask)).encode(), digest_size=8).hexdigest()}"
        for row, mask in zip(ids, masks, strict=True)
    )


def _row(sections: Iterable[Any], row: int, group: str) -> tuple[Range, ...]:
    try:
        return tuple((int(start), int(stop)) for start, stop in sections)
    except (TypeError, ValueError):
        raise SpanError(
            f"spans: group {group!r}, row {row}: {sections!r} is not a list of (start, stop); "
            "give one list per prompt row, for example spans=[[(4, 9)], [(2, 5), (7, 8)]]"
        ) from None
