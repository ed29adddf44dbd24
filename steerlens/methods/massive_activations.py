"""Massive activations: set the few huge numbers of the hidden state to their mean, or to zero (arXiv 2402.17762)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from steerlens.edits import Plan, SetActivations
from steerlens.errors import MethodError
from steerlens.facts import ModelFacts
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans


@dataclass(frozen=True)
class MassiveActivations(EditMethod):
    """Set `channels` of the hidden state after `layer` to fixed values, for tokens where they are massive (§3).

    An experiment on what attention sinks need: the means of many texts leave a model as it was, zeros break it. Massive
    is a token whose largest |x_c|, c in `channels`, is above `least` and at least `ratio` times the median of its |x|.
    `steerlens.fitting.massive_activations` finds channels and means of a model.

    The published code edits the first token of the text whatever it holds, and one more, that of the largest activation
    of all. Here every massive token is edited, whatever comes after it, generated ones too.

    Args:
        layer: the first one after which the activations are massive; what later layers add to them stays.
        channels: of the hidden state. Published: 1415 and 2533 for Llama-2-7B, 2100 and 4743 for Llama-2-13B.
        first: value for each channel where the token is the first of its row, `None` for zeros. Published means for
            Llama-2-7B after its second layer: -458.55 and 767.6, for 13B -717.95 and -1223.5.
        others: value for each channel in any other token, `None` for zeros. Published for Llama-2-7B: -1502 and 2546.8.
        strength: part of the way from what is there to the values; 0 is neutral.
        least: published definition: 100.
        ratio: published definition: about 1000.
    """

    layer: int
    channels: tuple[int, ...]
    first: tuple[float, ...] | None = None
    others: tuple[float, ...] | None = None
    strength: float = 1.0
    least: float = 100.0
    ratio: float = 1000.0

    name: ClassVar[str] = "massive_activations"
    source: ClassVar[str] = "Sun et al. 2024, Massive Activations in Large Language Models, arXiv 2402.17762, §3"
    summary: ClassVar[str] = "set massive activations of the hidden state to their mean or to zero"
    fit: ClassVar[str] = "steerlens.fitting.massive_activations(model, texts)"
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {"strength": Search((0.25, 0.5, 0.75, 1.0), neutral=0.0, log=False)}

    def __post_init__(self) -> None:
        self._count("layer", 0)
        given = self.channels
        if not isinstance(given, list | tuple) or not given or not all(type(c) is int and c >= 0 for c in given):
            raise MethodError(f"{self.name}: channels={given!r} is out of range; allowed: a list of whole numbers >= 0")
        if len(set(given)) < len(given):
            raise MethodError(f"{self.name}: channels={given!r} names one twice; allowed: each once")
        object.__setattr__(self, "channels", tuple(given))
        for field in ("first", "others"):
            self._values(field)
        self._number("strength", -math.inf)
        self._number("least", 0)
        self._number("ratio", 0)

    def _values(self, field: str) -> None:
        given = getattr(self, field)
        if given is None:
            return
        numbers = isinstance(given, list | tuple) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e30 for v in given
        )
        if not numbers or len(given) != len(self.channels):
            raise MethodError(
                f"{self.name}: {field}={given!r} is out of range; allowed: a number for each of the "
                f"{len(self.channels)} channels, or none for zeros"
            )
        object.__setattr__(self, field, tuple(map(float, given)))

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.layer not in facts.attention_layers:
            raise MethodError(
                f"{self.name}: layer={self.layer} is out of range; {facts.name} has attention in layers "
                f"{', '.join(map(str, facts.attention_layers))}"
            )
        if self.strength == 0:
            return {}
        zeros = (0.0,) * len(self.channels)
        first, others = self.first or zeros, self.others or zeros
        return {self.layer: (SetActivations(self.channels, first, others, self.least, self.ratio, self.strength),)}
