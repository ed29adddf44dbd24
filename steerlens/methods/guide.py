"""GUIDE: add a constant to the attention logits of a tagged span (arXiv 2409.19001)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from steerlens.edits import HIDE, Plan, Reweight, Scale, SpanKeys
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans, require

GROUP = "emphasis"
LEVELS = {"!": 0.5, "!!": 1.0, "!!!": 2.0}


@dataclass(frozen=True)
class GUIDE(EditMethod):
    """Add `delta` nats to the logits of the emphasised tokens: weights times e^Δ, renormalised.

    Every layer, head and row, prefill and decode.

    The released code leaves its hooks in place after a call, so that the n-th call adds n·Δ; here a context adds Δ.

    Args:
        delta: Δ of the middle level in nats; 0 is neutral, below 0 takes attention off. Its code: 1; the paper finds 1
            to 3 to help and more than 5 to break the text.
        level: `!`, `!!` or `!!!`: half, one or two times `delta`, the paper's three tags.
        heads: which query heads. Paper: all.
    """

    delta: float = 1.0
    level: Literal["!", "!!", "!!!"] = "!!"
    heads: Heads | str | dict[int, list[int]] = "all"

    name: ClassVar[str] = "guide"
    source: ClassVar[str] = "Silva et al. 2024, Pay Attention to What Matters, arXiv 2409.19001"
    summary: ClassVar[str] = "add a constant to the attention logits of emphasised spans"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {"delta": Search((0.5, 1.0, 2.0, 3.0, 5.0), neutral=0.0, log=False)}

    def __post_init__(self) -> None:
        self._number("delta", HIDE / 2, -HIDE / 2)
        self._choice("level", tuple(LEVELS))
        self._parse_heads()

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.delta == 0:
            return {}
        require(self.name, spans, GROUP)
        law = Scale(LEVELS[self.level] * self.delta)
        return self._everywhere(facts, lambda heads: [Reweight(heads, SpanKeys(GROUP), law)])
