"""ZeroTuning: scale the attention on the initial token (arXiv 2505.11739)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from steerlens.edits import FirstToken, Plan, Reweight, Scale
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans


@dataclass(frozen=True)
class ZeroTuning(EditMethod):
    """Multiply the weight of the first real token by `gamma` and renormalise, in every query row.

    ψ' = γψ / (1 + (γ-1)ψ) with S = {first real token}: log γ added to that key's logit (§3 of the paper). Ratios among
    the other keys stay, so it acts as a per-row gain on what the head reads. The published code scales key column 0,
    which is a pad in a left-padded row and does nothing there; here it is the first token that is attended.

    Args:
        gamma: factor on the weight, > 0; 1 is neutral. The paper tunes it per task, mostly within 0.3 .. 4; it has no
            default there.
        heads: which query heads.
    """

    gamma: float = 1.5
    heads: Heads | str | dict[int, list[int]] = "all"

    name: ClassVar[str] = "zerotuning"
    source: ClassVar[str] = "Han et al. 2025, ZeroTuning, arXiv 2505.11739, §3"
    summary: ClassVar[str] = "scale the attention on the initial token by gamma"
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {"gamma": Search((0.25, 0.5, 0.75, 1.5, 2.0, 3.0, 4.0))}
    profile: ClassVar[Mapping[str, Mapping[str, float]]] = {"up": {"gamma": 2.0}, "down": {"gamma": 0.5}}

    def __post_init__(self) -> None:
        self._number("gamma", 0, open_low=True)
        self._parse_heads()

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.gamma == 1:
            return {}
        law = Scale(math.log(self.gamma))
        return self._everywhere(facts, lambda heads: [Reweight(heads, FirstToken(), law)])
