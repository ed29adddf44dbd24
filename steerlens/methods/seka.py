"""SEKA, spectral editing key amplification: emphasise tokens by editing their keys (arXiv 2603.01281)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from steerlens.edits import Plan, ProjectKeys, SpanKeys
from steerlens.errors import SpanError
from steerlens.facts import ModelFacts
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans

GROUP = "emphasis"


@dataclass(frozen=True)
class SEKA(EditMethod):
    """k' = k + (g⁺P⁺k + g⁻P⁻k)/2 for the keys of emphasised tokens, before the position encoding.

    P⁺ projects onto what keys gain when a relevant question stands before them, P⁻ onto what an irrelevant one does not
    move; `steerlens.fitting.seka` learns both. All query heads of a key/value head move together. Keys are edited as
    the prompt comes in and stay so in the cache. With `negative=None` it is k + g⁺P⁺k: published code has the factor ½
    only where it is given a negative projection, even one with gain 0, and so does this.

    Args:
        vectors: safetensors file with `positive.<layer>` and `negative.<layer>` [G, D, D], `shift.<layer>` and
            `shift_frobenius.<layer>` [G].
        positive: gain g⁺ of P⁺; published default 0.8, up to 1.56 per data set.
        negative: gain g⁻ of P⁻; published default 0.2. `None` leaves P⁻ out.
        layers: the last so many layers of those in the file; published: 10.
        min_shift: least distance of a head's keys after a relevant and after an irrelevant question; heads below it
            are left alone. Published examples: 0.2, of a grid up to 0.6.
        distance: `mean`, the mean over tokens of the distance, as in the paper; `frobenius`, ‖H⁺ - H⁻‖ / n, as in the
            published code, which shrinks with the number of tokens n.
    """

    vectors: str
    positive: float = 0.8
    negative: float | None = 0.2
    layers: int = 10
    min_shift: float = 0.2
    distance: Literal["mean", "frobenius"] = "mean"

    name: ClassVar[str] = "seka"
    source: ClassVar[str] = "Li et al. 2026, SEKA, arXiv 2603.01281"
    summary: ClassVar[str] = "emphasise spans: project their keys towards what relevance adds to keys"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    fit: ClassVar[str] = "steerlens.fitting.seka(model, tokenizer, examples).save(FILE)"
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {
        "positive": Search((0.2, 0.4, 0.8, 1.0, 1.5, 2.0), neutral=0.0, log=False),
        "negative": Search((0.1, 0.2, 0.4, 0.8), neutral=0.0, log=False),
    }

    def __post_init__(self) -> None:
        self._file("vectors")
        self._number("positive", -math.inf)
        if self.negative is not None:
            self._number("negative", -math.inf)
        self._count("layers")
        self._number("min_shift", 0)
        self._choice("distance", ("mean", "frobenius"))

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.positive == 0 and not self.negative:
            return {}
        if spans is None or GROUP not in spans.groups:
            raise SpanError(
                f"seka needs the span group {GROUP!r}: pass spans= from steerlens.encode(…, emphasize=[…]) or a list "
                "of (start, stop) token ranges per row"
            )
        from steerlens import vectors

        file = self.load_vectors("positive")
        kind = "shift" if self.distance == "mean" else "shift_frobenius"
        plan: dict[int, tuple[ProjectKeys, ...]] = {}
        for layer in file.layers("positive")[-self.layers :]:
            file.expect(layer, facts)
            moved = file.get(kind, layer, facts, ndim=1, kv=True).tolist()
            heads = tuple(head for head, distance in enumerate(moved) if distance >= self.min_shift)
            if not heads:
                continue
            edits = [("positive", self.positive if self.negative is None else self.positive / 2)]
            edits += [("negative", self.negative / 2)] if self.negative is not None else []
            matrix = sum(file.get(name, layer, facts, ndim=3, kv=True) * gain for name, gain in edits)
            found = vectors.HeadVectors(matrix, f"{file.name}: layer {layer}")  # type: ignore[arg-type]
            plan[layer] = (ProjectKeys(heads, SpanKeys(GROUP), found),)
        return plan
