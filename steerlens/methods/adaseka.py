"""AdaSEKA: SEKA with several projections, mixed by what the last prompt token asks for (arXiv 2603.01281)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from steerlens.edits import Plan, RouteKeys, SpanKeys
from steerlens.errors import MethodError, SpanError
from steerlens.facts import ModelFacts
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans

GROUP = "emphasis"


@dataclass(frozen=True)
class AdaSEKA(EditMethod):
    """k' = k + g·P k for the keys of emphasised tokens, with P = Σ α_m U_m U_mᵀ over experts m; α_m may be negative.

    α_m = Σ_k (q·u_mk)·σ_mk over the three leading directions of an expert, divided by the largest |α| of all experts.
    q is the last prompt token's query of the same layer before its position encoding, the mean over the query heads
    that share a key/value head; each batch row has its own. (Published code takes q from the layer's output, by
    another forward, and that of batch row 0 for all rows.) Not causal: the last prompt token decides.

    Args:
        vectors: safetensors file with `experts.<layer>` [G, M, K, D], rows σ_mk·u_mk, `shift.<layer>` [G];
            `steerlens.fitting.adaseka` learns it from one set of examples per expert.
        gain: g; 0 is neutral.
        layers: the last so many layers of those in the file; published: 10.
        min_shift: least mean distance of a head's keys after a relevant and after an irrelevant question; heads below
            it are left alone.
    """

    vectors: str
    gain: float = 1.0
    layers: int = 10
    min_shift: float = 0.2

    name: ClassVar[str] = "adaseka"
    source: ClassVar[str] = "Li et al. 2026, SEKA, arXiv 2603.01281"
    summary: ClassVar[str] = "SEKA with a mix of projections that the last prompt token chooses"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    fit: ClassVar[str] = "steerlens.fitting.adaseka(model, tokenizer, {expert: examples}).save(FILE)"
    cache_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {
        "gain": Search((0.2, 0.4, 0.8, 1.0, 1.5, 2.0), neutral=0.0, log=False),
    }

    def __post_init__(self) -> None:
        self._file("vectors")
        self._number("gain", -math.inf)
        self._count("layers")
        self._number("min_shift", 0)

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.gain == 0:
            return {}
        if spans is None or GROUP not in spans.groups:
            raise SpanError(
                f"adaseka needs the span group {GROUP!r}: pass spans= from steerlens.encode(…, emphasize=[…]) or a "
                "list of (start, stop) token ranges per row"
            )
        from steerlens import vectors

        file = self.load_vectors("experts")
        plan: dict[int, tuple[RouteKeys, ...]] = {}
        for layer in file.layers("experts")[-self.layers :]:
            file.expect(layer, facts)
            experts = file.get("experts", layer, facts, ndim=4, kv=True)
            moved = file.get("shift", layer, facts, ndim=1, kv=True).tolist()
            heads = tuple(head for head, distance in enumerate(moved) if distance >= self.min_shift)
            if not heads:
                continue
            if experts.shape[1] < 1:
                raise MethodError(f"{file.name} has no expert in layer {layer}")
            found = vectors.HeadVectors(experts.flatten(1, 2), f"{file.name}: layer {layer}")
            plan[layer] = (RouteKeys(heads, SpanKeys(GROUP), found, experts.shape[1], self.gain),)
        return plan
