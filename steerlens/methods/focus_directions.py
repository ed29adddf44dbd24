"""Focus Directions: shift the queries of contextual heads towards what is relevant (arXiv 2503.23306)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from steerlens.edits import Plan, ShiftQuery
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans


@dataclass(frozen=True)
class FocusDirections(EditMethod):
    """q' = q + α·d per head, after the position encoding, in every query row of prefill and decoding.

    The directions d are fitted (`steerlens.fitting.focus_directions`) to raise the attention on gold spans; no span is
    needed where they are used. The paper also adds a direction to the keys, the same to each: it moves every logit of a
    row alike, so the weights stay as they are, and it is left out. What remains is the bias α·d·k_j/√D on key j.

    Args:
        vectors: safetensors file with `query.<layer>` [H, D], and `score.<layer>` [H], the heads' contextual scores.
        alpha: strength; 0 is neutral, below 0 turns away. Published: 0.2 to apply, 0.3 to evaluate.
        top: how many heads, the best by the file's scores (published: 20), where `heads` does not say which.
        heads: which query heads.
    """

    vectors: str
    alpha: float = 0.2
    top: int = 20
    heads: Heads | str | dict[int, list[int]] | None = None

    name: ClassVar[str] = "focus_directions"
    source: ClassVar[str] = "Zhu et al. 2025, Focus Directions, arXiv 2503.23306"
    summary: ClassVar[str] = "shift the queries of contextual heads along fitted directions"
    fit: ClassVar[str] = "steerlens.fitting.focus_directions(model, tokenizer, examples).save(FILE)"
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {
        "alpha": Search((-0.2, -0.1, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0), neutral=0.0, log=False)
    }

    def __post_init__(self) -> None:
        self._number("alpha", -math.inf)
        self._file("vectors")
        self._count("top")
        if self.heads is not None:
            self._parse_heads()

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.alpha == 0 or (isinstance(self.heads, Heads) and self.heads.empty):
            return {}
        file = self.load_vectors("query")
        chosen = file.choose(self.heads, self.top, facts)  # type: ignore[arg-type]
        return {
            layer: (ShiftQuery(tuple(heads), file.vectors("query", layer, facts), self.alpha),)
            for layer, heads in chosen.items()
        }
