"""PASTA, post-hoc attention steering: emphasise spans of the prompt (arXiv 2311.02262)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from steerlens.edits import Keys, OutsideSpan, Plan, PromptKeys, Reweight, Scale, SpanKeys
from steerlens.errors import SpanError
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans

GROUP = "emphasis"


@dataclass(frozen=True)
class PASTA(EditMethod):
    """Scale the weights of every prompt token outside the emphasised spans by `alpha` and renormalise (§3, eq. 2).

    Three key groups: emphasised (1), other prompt tokens (α), generated tokens (1). Every query row, prefill and
    decode. The first token is not spared, as in the paper.

    Args:
        alpha: factor on the other prompt tokens, > 0; 1 is neutral. Paper: 0.01 on 50-100 profiled heads.
        scale: `exclude` scales what lies outside by α; `include` scales what lies outside by 1/α (the published
            option: with α > 1 it emphasises); `generation` scales the whole prompt by α, favouring generated tokens.
        sections: with several spans, `union` treats them as one set; `published` applies the rule once for each span,
            as the released code does (k disjoint spans: α^(k-1) inside them, α^k outside).
        heads: which query heads.
    """

    alpha: float = 0.01
    scale: Literal["exclude", "include", "generation"] = "exclude"
    sections: Literal["union", "published"] = "union"
    heads: Heads | str | dict[int, list[int]] = "all"

    name: ClassVar[str] = "pasta"
    source: ClassVar[str] = "Zhang et al. 2023, PASTA, arXiv 2311.02262, §3"
    summary: ClassVar[str] = "emphasise spans: scale the rest of the prompt by alpha"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {"alpha": Search((0.5, 0.2, 0.1, 0.03, 0.01, 0.003))}

    def __post_init__(self) -> None:
        self._number("alpha", 0, open_low=True)
        self._choice("scale", ("exclude", "include", "generation"))
        self._choice("sections", ("union", "published"))
        self._parse_heads()

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.alpha == 1:
            return {}
        if spans is None or GROUP not in spans.groups:
            raise SpanError(
                f"pasta needs the span group {GROUP!r}: pass spans= from steerlens.encode(…, emphasize=[…]) or a list "
                "of (start, stop) token ranges per row"
            )
        terms = self._terms(spans.most_sections(GROUP))
        return self._everywhere(facts, lambda heads: [Reweight(heads, keys, Scale(weight)) for keys, weight in terms])

    def _terms(self, sections: int) -> list[tuple[Keys, float]]:
        weight = math.log(self.alpha)
        union = self.sections == "union"
        each = range(min(sections, 1) if union else sections)
        which = [None if union else section for section in each]
        if self.scale == "exclude":
            return [(OutsideSpan(GROUP, section), weight) for section in which]
        if self.scale == "generation":
            return [(PromptKeys(GROUP, section + 1), weight) for section in each]
        if union:
            return [(OutsideSpan(GROUP, section), -weight) for section in which]
        inside: list[tuple[Keys, float]] = [(SpanKeys(GROUP, section), weight) for section in which]
        return [*inside, (PromptKeys(GROUP, 1), -weight)]
