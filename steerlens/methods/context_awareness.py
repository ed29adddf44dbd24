"""Context-awareness steering: scale what is not the user's message (arXiv 2411.02688)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from steerlens.edits import OutsideSpan, Plan, Reweight, Scale
from steerlens.errors import MethodError
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans, require

GROUP = "emphasis"


@dataclass(frozen=True)
class ContextAwareness(EditMethod):
    """Scale the weights of prompt tokens outside the emphasised user message by `alpha`, and renormalise.

    Those are the system message, the chat template and BOS. The message and generated tokens keep their weights. Every
    layer, head and row: PASTA's rule without a choice of heads.

    The released code edits one mask that all layers share, so that the n-th steered layer uses α^n
    (`accumulate=True`): with α = 0.9 that is 0.034 in the last of 32 layers. Its published settings belong to that.

    Args:
        alpha: factor, > 0; 1 is neutral. Its code: 0.95 for retrieval, 0.9 for questions, both accumulated.
        accumulate: the n-th steered layer uses α^n, as the released code does.
        heads: which query heads. Paper: all.
    """

    alpha: float = 0.9
    accumulate: bool = False
    heads: Heads | str | dict[int, list[int]] = "all"

    name: ClassVar[str] = "context_awareness"
    source: ClassVar[str] = "Wang et al. 2024, On the Loss of Context-awareness, arXiv 2411.02688"
    summary: ClassVar[str] = "scale the attention on prompt tokens that are not the user's message"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {"alpha": Search((0.95, 0.9, 0.7, 0.5, 0.2))}

    def __post_init__(self) -> None:
        self._number("alpha", 0, open_low=True)
        if not isinstance(self.accumulate, bool):
            raise MethodError(f"{self.name}: accumulate={self.accumulate!r} is unknown; allowed: true, false")
        self._parse_heads()

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.alpha == 1:
            return {}
        require(self.name, spans, GROUP)
        plan = {}
        for number, (layer, heads) in enumerate(sorted(self.heads.resolve(facts).items()), 1):  # type: ignore[union-attr]
            weight = math.log(self.alpha) * (number if self.accumulate else 1)
            plan[layer] = (Reweight(heads, OutsideSpan(GROUP), Scale(weight)),)
        return plan
