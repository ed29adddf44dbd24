"""ACT, Attention Calibration Technique: take mass off sinks that are not the first token (arXiv 2406.15765)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from steerlens.edits import Keep, Plan, Reweight, Sinks
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans


@dataclass(frozen=True)
class ACT(EditMethod):
    """Keep only the fraction `beta` of the attention on detected sinks; the rest goes to the other keys in proportion.

    Sinks of a head: keys whose mean weight over the prompt rows that see them exceeds the threshold, without the
    spared one. ψ' = βψ with S = sinks (§4 of the paper). Not causal: later prompt rows decide what a sink is.

    Args:
        beta: kept fraction, in [0, 1]; 1 is neutral.
        threshold: attention probability (`absolute`, the published code's 0.1), or a multiple of 1/N over N real
            prompt keys (`relative`; the paper's value is 5). > 0.
        threshold_mode: `absolute` or `relative`; the two agree at N = 50 for 0.1 and 5.
        spare: `first_token`, as the paper intends, or `first_sink`, the first sink found, as the published code does.
        decode: rows of generated tokens use the prompt's sinks (`frozen`), column means that go on with each row
            (`running`), or are left alone (`off`). Published decoding is broken (rows sum to 1.5) and not reproduced.
        heads: which query heads; the paper filters them on held-out data.
    """

    beta: float = 0.4
    threshold: float = 0.1
    threshold_mode: Literal["absolute", "relative"] = "absolute"
    spare: Literal["first_token", "first_sink"] = "first_token"
    decode: Literal["frozen", "running", "off"] = "frozen"
    heads: Heads | str | dict[int, list[int]] = "all"

    name: ClassVar[str] = "act"
    source: ClassVar[str] = "Yu et al. 2024, Unveiling and Harnessing Hidden Attention Sinks, arXiv 2406.15765, §4"
    summary: ClassVar[str] = "keep only a fraction beta of the attention on sinks other than the first token"
    cache_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {
        "beta": Search((0.0, 0.2, 0.4, 0.6, 0.8), log=False),
        "threshold": Search((0.05, 0.1, 0.15, 0.2), neutral=None),
    }

    def __post_init__(self) -> None:
        self._number("beta", 0, 1)
        self._number("threshold", 0, open_low=True)
        self._choice("threshold_mode", ("absolute", "relative"))
        self._choice("spare", ("first_token", "first_sink"))
        self._choice("decode", ("frozen", "running", "off"))
        self._parse_heads()

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.beta == 1:
            return {}
        sinks = Sinks(self.threshold, self.threshold_mode == "relative", self.spare, self.decode == "running")
        phase: Literal["prompt", "all"] = "prompt" if self.decode == "off" else "all"
        return self._everywhere(facts, lambda heads: [Reweight(heads, sinks, Keep(self.beta), phase)])
