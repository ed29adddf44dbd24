"""Positional hidden-state scaling: damp the channel that carries positions, for the answer (arXiv 2406.02536)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from steerlens.edits import Plan, ScaleChannel
from steerlens.errors import MethodError
from steerlens.facts import ModelFacts
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans


@dataclass(frozen=True)
class PositionalScaling(EditMethod):
    """Scale one channel of the hidden state that queries and keys are made of, for the rows that produce the answer.

    x' = x but x'_c = f·x_c. The last prompt row and all later ones attend softmax(q(x')·K(x')) V(x); the prompt rows
    before them attend as ever. Scaled keys are what the cache holds. So the layers read a prompt twice, and a prompt
    must come in one forward on an empty cache. With f = -1 the channel's product with itself stays, only those with
    other channels change sign. `steerlens.fitting.positional_channels` looks for channels.

    The published SDPA path turns all of several such rows by the last one's position; here every row has its own.

    Args:
        channel: of the hidden state. Published: 2393 for Llama-2-7B (f = -1) and Vicuna-7B, 213 for Mistral-7B-v0.2,
            1081 for Qwen1.5-7B, 1665 for Gemma-7B, f = 0.
        factor: f; 1 is neutral.
        first_layer, last_layer: layers that are steered, both included. Published: 10 and 25 of 32.
        skip_first: so many tokens of each row are never scaled. Published: 0, which scales the first one too.
    """

    channel: int
    factor: float = 0.0
    first_layer: int = 10
    last_layer: int = 25
    skip_first: int = 0

    name: ClassVar[str] = "positional_scaling"
    source: ClassVar[str] = "Yu et al. 2024, Mitigate Position Bias via Scaling a Single Dimension, arXiv 2406.02536"
    summary: ClassVar[str] = "scale the channel that carries positions, for the rows that answer"
    fit: ClassVar[str] = "steerlens.fitting.positional_channels(model)"
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {"factor": Search((-1.0, -0.5, 0.0, 0.5), log=False)}

    def __post_init__(self) -> None:
        self._number("factor", -math.inf)
        for field in ("channel", "first_layer", "last_layer", "skip_first"):
            self._count(field, 0)
        if self.last_layer < self.first_layer:
            raise MethodError(f"{self.name}: last_layer={self.last_layer} lies before first_layer={self.first_layer}")

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.last_layer >= facts.layers:
            raise MethodError(
                f"{self.name}: last_layer={self.last_layer} is out of range; {facts.name} has layers "
                f"0..{facts.layers - 1}"
            )
        if self.factor == 1:
            return {}
        edit = ScaleChannel(self.channel, self.factor, self.skip_first)
        wanted = range(self.first_layer, self.last_layer + 1)
        return {layer: (edit,) for layer in facts.attention_layers if layer in wanted}
