"""InstABoost: multiply the attention on the instruction (arXiv 2506.13734)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from steerlens.edits import Keys, Plan, Reweight, Scale, SpanKeys, UntilSpan
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans, require

GROUP = "emphasis"


@dataclass(frozen=True)
class InstABoost(EditMethod):
    """Multiply the weights of the instruction's tokens by `multiplier` and renormalise: log M nats on their keys.

    Every layer, head and row, prefill and decode; the instruction is the emphasised spans.

    The released code takes all tokens from the first to the end of the templated instruction, so that BOS and the chat
    header are raised as well (`extent="prefix"`); its end is a fixed number of tokens for Llama 3's template. It keeps
    no cache; with one the numbers are the same.

    Args:
        multiplier: M > 0; 1 is neutral. Its code: 3; the paper chooses among 1, 3, … 19 on a validation set.
        extent: `span`: the emphasised tokens; `prefix`: every prompt token up to the end of the last of them.
        heads: which query heads. Paper: all.
    """

    multiplier: float = 3.0
    extent: Literal["span", "prefix"] = "span"
    heads: Heads | str | dict[int, list[int]] = "all"

    name: ClassVar[str] = "instaboost"
    source: ClassVar[str] = "Guardieiro et al. 2025, Instruction Following by Boosting Attention, arXiv 2506.13734"
    summary: ClassVar[str] = "multiply the attention on the instruction"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {"multiplier": Search(tuple(map(float, range(3, 20, 2))))}

    def __post_init__(self) -> None:
        self._number("multiplier", 0, open_low=True)
        self._choice("extent", ("span", "prefix"))
        self._parse_heads()

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.multiplier == 1:
            return {}
        require(self.name, spans, GROUP)
        keys: Keys = SpanKeys(GROUP) if self.extent == "span" else UntilSpan(GROUP)
        return self._everywhere(facts, lambda heads: [Reweight(heads, keys, Scale(math.log(self.multiplier)))])
