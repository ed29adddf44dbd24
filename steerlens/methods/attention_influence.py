"""AttentionInfluence: how much worse a document is predicted without the heads that retrieve (arXiv 2505.07293)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steerlens.edits import Ablate, Plan
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod
from steerlens.spans import Spans


@dataclass(frozen=True)
class AttentionInfluence(EditMethod):
    """The degraded reference model: in every row the heads give the mean of V over the visible keys.

    It scores documents: (L_ref - L_base) / L_base, with L the mean cross-entropy of a document's tokens under the
    degraded and the unsteered model (Eq. 5; the paper's figure 3 divides by L_ref). `steerlens.influence.score` and
    `steerlens influence` compute it. Scores compare within a domain only. No code was published.

    Args:
        heads: which query heads; there is no default. The paper takes the best 5 % by retrieval score, as
            `"retrieval.json:top16"` does for 320 heads.
    """

    heads: Heads | str | dict[int, list[int]]

    name: ClassVar[str] = "attention_influence"
    source: ClassVar[str] = "Hua et al. 2025, AttentionInfluence, arXiv 2505.07293"
    summary: ClassVar[str] = "take retrieval heads out everywhere, to score documents by the loss that this costs"
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._parse_heads()

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        return self._everywhere(facts, lambda heads: [Ablate(heads, "uniform")])
