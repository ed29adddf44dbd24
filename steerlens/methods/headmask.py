"""Head ablation: the test of retrieval heads (arXiv 2404.15574), the masked branch of DeCoRe (arXiv 2410.18860)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from steerlens.edits import Ablate, Plan
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod
from steerlens.spans import Spans


@dataclass(frozen=True)
class HeadMask(EditMethod):
    """Take heads out: their output no longer depends on what they attend to.

    "Masking" means two things in the literature. `uniform` (Wu et al. §4, DeCoRe §3): the head attends to all visible
    keys alike, so its output is their mean value vector. `zero` (Michel et al., MAPS): its output is zero.

    Args:
        heads: which query heads; there is no default.
        mode: `uniform` or `zero`.
        phase: `all` query rows; `decode`, the rows that produce generated tokens (the last prompt row and later ones;
            what the published retrieval-head and DeCoRe generation loops mask); `prefill`, the rows before them.
    """

    heads: Heads | str | dict[int, list[int]]
    mode: Literal["uniform", "zero"] = "uniform"
    phase: Literal["all", "prefill", "decode"] = "all"

    name: ClassVar[str] = "headmask"
    source: ClassVar[str] = (
        "Wu et al. 2024, Retrieval Head, arXiv 2404.15574, §4; Gema et al. 2024, DeCoRe, arXiv 2410.18860, §3"
    )
    summary: ClassVar[str] = "take heads out: mean of V over the visible keys, or zero"
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._choice("mode", ("uniform", "zero"))
        self._choice("phase", ("all", "prefill", "decode"))
        self._parse_heads()

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        return self._everywhere(facts, lambda heads: [Ablate(heads, self.mode, self.phase)])
