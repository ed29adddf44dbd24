"""PAI, pay attention to image: lift the logits of chosen tokens in the row that predicts (arXiv 2407.21771)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from steerlens.edits import LiftLogits, Plan, SpanKeys
from steerlens.errors import SpanError
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans

GROUP = "emphasis"


@dataclass(frozen=True)
class PAI(EditMethod):
    """x' = x + α·|x| for the attention logits x of the emphasised tokens, in the rows that produce generated tokens.

    Made for image tokens; any span will do. Those rows are the last prompt row and all later ones; what they do to the
    logits depends on q·k, so it is no constant factor on the weights. The paper adds contrastive decoding against the
    model without the image (γ 1.1), which is no part of it here. Published code knows models without grouped queries.

    Args:
        alpha: strength; 0 is neutral, below 0 lowers. Published: 0.2.
        first_layer: layers before it are left alone; published: 2.
        heads: which query heads.
    """

    alpha: float = 0.2
    first_layer: int = 2
    heads: Heads | str | dict[int, list[int]] = "all"

    name: ClassVar[str] = "pai"
    source: ClassVar[str] = "Liu et al. 2024, PAI, arXiv 2407.21771"
    summary: ClassVar[str] = "lift the attention logits of emphasised tokens, in the rows that predict"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {"alpha": Search((0.1, 0.2, 0.3, 0.5, 0.7, 1.0), neutral=0.0, log=False)}

    def __post_init__(self) -> None:
        self._number("alpha", -math.inf)
        self._count("first_layer", 0)
        self._parse_heads()

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.alpha == 0:
            return {}
        if spans is None or GROUP not in spans.groups:
            raise SpanError(
                f"pai needs the span group {GROUP!r}: pass spans= from steerlens.encode(…, emphasize=[…]) or a list of "
                "(start, stop) token ranges per row"
            )
        found = self._everywhere(facts, lambda heads: [LiftLogits(heads, SpanKeys(GROUP), self.alpha)])
        return {layer: edits for layer, edits in found.items() if layer >= self.first_layer}
