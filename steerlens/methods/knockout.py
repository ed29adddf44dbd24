"""Attention knockout: cut the edges from some rows to some keys (arXiv 2304.14767)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steerlens.edits import HIDE, Phase, Plan, Reweight, Scale, SpanKeys
from steerlens.errors import MethodError
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod
from steerlens.spans import Spans, require

PHASES: dict[str, Phase] = {"all": "all", "decode": "decode"}


@dataclass(frozen=True)
class Knockout(EditMethod):
    """Keep query rows from attending to a group of keys, to see what flows along these edges.

    The keys get no weight and the others of the row take all of it, as under a mask. A row that sees nothing but these
    keys stays as it is. The paper cuts the last position off the subject, in a window of layers at a time.

    Args:
        keys: span group of the tokens that are not to be seen.
        rows: `decode`: the last prompt row and those of generated tokens; `all`; or a span group, its tokens' rows.
        heads: which query heads; a window of layers is `"9:*;10:*;11:*"`.
    """

    keys: str = "emphasis"
    rows: str = "decode"
    heads: Heads | str | dict[int, list[int]] = "all"

    name: ClassVar[str] = "knockout"
    source: ClassVar[str] = "Geva et al. 2023, Dissecting Recall of Factual Associations, arXiv 2304.14767"
    summary: ClassVar[str] = "keep rows from attending to a span group"
    needs: ClassVar[tuple[str, ...]] = ("emphasis",)
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("keys", "rows"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value:
                raise MethodError(f"{self.name}: {field}={value!r} is out of range; allowed: the name of a span group")
        self._parse_heads()
        needs = (self.keys,) if self.rows in PHASES else (self.keys, self.rows)
        object.__setattr__(self, "needs", needs)

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        require(self.name, spans, *self.needs)
        phase = PHASES.get(self.rows, "all")
        queries = None if self.rows in PHASES else SpanKeys(self.rows)
        law = Scale(HIDE)
        return self._everywhere(facts, lambda h: [Reweight(h, SpanKeys(self.keys), law, phase, queries=queries)])
