"""SpotLight: give emphasised spans a minimum share of the attention (arXiv 2505.12025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from steerlens.edits import MassLaw, Plan, Redistribute, SpanKeys
from steerlens.errors import MethodError
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans, require

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "emphasis"


@dataclass(frozen=True)
class Reach(MassLaw):
    """Raise a mass ψ below `target` τ by log(τ/ψ) nats, to τ/(1+τ-ψ); or with `odds` by logit τ - logit ψ, to τ."""

    target: float
    odds: bool = False

    def log_weights(self, mass: Tensor, row: Tensor, real: Tensor) -> Tensor:
        low = (mass > 0) & (mass < self.target)
        mass = mass.masked_fill(~low, self.target / 2)  # what is not used must be finite, for gradients
        found = math.log(self.target) - mass.log()
        if self.odds:
            found = found + (-mass).log1p() - math.log1p(-self.target)
        return found.where(low, 0)

    def floor(self) -> tuple[str, float] | None:
        return ("reach" if self.odds else "spotlight"), self.target


@dataclass(frozen=True)
class ReachOnAverage(Reach):
    """`Reach` for the mean mass of a layer's heads and rows: the same weight for all of them."""

    pooled: ClassVar[bool] = True

    def floor(self) -> None:
        return None

    def log_weights(self, mass: Tensor, row: Tensor, real: Tensor) -> Tensor:
        counted = real[:, None, :, None].to(mass.dtype)
        rows = counted.sum((1, 2), keepdim=True).clamp(min=1)
        mean = (mass.mean(1, keepdim=True) * counted).sum(2, keepdim=True) / rows
        return super().log_weights(mean, row, real).expand_as(mass)


@dataclass(frozen=True)
class SpotLight(EditMethod):
    """Raise the attention on the emphasised spans, together, towards `target` where it is below.

    A row and head with mass 0 < ψ < τ on the spans gets log(τ/ψ) nats on their keys, which gives ψ' = τ/(1+τ-ψ): less
    than τ, as the paper corrects the ratio and not the odds. Rows at or above τ and rows that see nothing of the spans
    stay. Every layer, every row, prefill and decode.

    The released code differs: it takes one ψ for each layer and sample, the mean over all heads and all rows, those
    before the span too (`granularity="layer"`). Late rows then overshoot τ, and heads above it are raised too. It also
    adds 1e-10 to every weight before the logarithm, which gives mass to masked keys; that is not reproduced.

    Args:
        target: τ in [0, 1); 0 is neutral. Paper: 0.1; 0.2 in its code.
        law: `ratio` as published, or `odds`, logit τ - logit ψ nats, which reaches τ exactly.
        granularity: `row`: each head and row by its own mass; `layer`: one scalar per layer and prompt, the mean over
            the heads and the real rows of the forward. `layer` lets later tokens change earlier rows, and cached
            decoding is not recomputation.
        heads: which query heads. Paper: all.
    """

    target: float = 0.1
    law: Literal["ratio", "odds"] = "ratio"
    granularity: Literal["row", "layer"] = "row"
    heads: Heads | str | dict[int, list[int]] = "all"

    name: ClassVar[str] = "spotlight"
    source: ClassVar[str] = "Venkateswaran & Contractor 2025, Spotlight Your Instructions, arXiv 2505.12025"
    summary: ClassVar[str] = "raise the attention on emphasised spans to a target share"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {"target": Search((0.05, 0.1, 0.2, 0.3, 0.5), neutral=0.0, log=False)}

    def __post_init__(self) -> None:
        self._number("target", 0, 1)
        if self.target == 1:
            raise MethodError("spotlight: target=1 is out of range; allowed: a number >= 0 and < 1")
        self._choice("law", ("ratio", "odds"))
        self._choice("granularity", ("row", "layer"))
        self._parse_heads()
        if self.granularity == "layer":
            for promise in ("causal", "cache_exact", "chunk_exact"):
                object.__setattr__(self, promise, False)

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.target == 0:
            return {}
        require(self.name, spans, GROUP)
        law = (Reach if self.granularity == "row" else ReachOnAverage)(self.target, self.law == "odds")
        return self._everywhere(facts, lambda heads: [Redistribute(heads, (SpanKeys(GROUP),), law)])
