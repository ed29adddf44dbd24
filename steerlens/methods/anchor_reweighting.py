"""Anchor re-weighting: fitted factors on the attention to label words of demonstrations (arXiv 2305.14160)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steerlens.edits import MassLaw, Plan, Redistribute, SpanKeys
from steerlens.errors import MethodError, SpanError
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod
from steerlens.spans import Spans, require

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "emphasis"
KIND = "beta"


@dataclass(frozen=True, eq=False)
class Shares(MassLaw):
    """The weights of group i times exp(beta[h, i]), renormalised; `beta` fp32 [h, n]. Equal to itself alone."""

    beta: Tensor

    def log_weights(self, mass: Tensor, row: Tensor, real: Tensor) -> Tensor:
        return self.beta.to(mass.device)[None, :, None].expand_as(mass)

    def select(self, places: tuple[int, ...]) -> Shares:
        return type(self)(self.beta[list(places)])


@dataclass(frozen=True, eq=False)
class Gains(Shares):
    """`Shares`, not renormalised."""

    raw: ClassVar[bool] = True


def edits(heads: tuple[int, ...], beta: Tensor, renormalise: bool) -> tuple[Redistribute, ...]:
    """The edits of a layer: `beta` [h, n] on the n sections of the emphasis, in the decode rows."""
    law = (Shares if renormalise else Gains)(beta)
    return (Redistribute(heads, tuple(SpanKeys(GROUP, i) for i in range(beta.shape[1])), law, "decode"),)


@dataclass(frozen=True)
class AnchorReweighting(EditMethod):
    """a'_i = exp(β_i)·a_i on the anchors, the label words of demonstrations, without renormalising (§4.1).

    Only the last prompt row and the rows of generated tokens. Each layer, head and anchor has its own β, fitted by
    `steerlens.fitting.anchor_reweighting` on examples of the task. Each emphasised range is an anchor, in the order of
    the selectors: give one text per label, in the order of the fit.

    Without renormalising a row sums to 1 + Σ(e^β - 1)·ψ, which scales the head's output. That is the published method;
    with `renormalise` the weights alone move. The published code orders anchors by label, one demonstration each.

    Args:
        vectors: safetensors file with a tensor `"beta.<layer>"` [H, anchors] for each layer that is steered.
        renormalise: let each row sum to 1.
        heads: which of the file's query heads.
    """

    vectors: str
    renormalise: bool = False
    heads: Heads | str | dict[int, list[int]] = "all"

    name: ClassVar[str] = "anchor_reweighting"
    source: ClassVar[str] = "Wang et al. 2023, Label Words are Anchors, arXiv 2305.14160, §4.1"
    summary: ClassVar[str] = "fitted factors on the attention to label words of demonstrations"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    fit: ClassVar[str] = "steerlens.fitting.anchor_reweighting(model, tokenizer, examples).save(FILE)"
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._file("vectors")
        if not isinstance(self.renormalise, bool):
            raise MethodError(f"{self.name}: renormalise={self.renormalise!r} is unknown; allowed: true, false")
        self._parse_heads()

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        file = self.load_vectors(KIND)
        layers, chosen = file.layers(KIND), self.heads.resolve(facts)  # type: ignore[union-attr]
        if max(layers) >= facts.layers:
            raise MethodError(
                f"{self.name}: {file.name} holds {KIND!r} of layers {layers}; needed are '{KIND}.<layer>' of layers "
                f"0..{facts.layers - 1} of {facts.name}"
            )
        rows = require(self.name, spans, GROUP).groups[GROUP]
        plan: dict[int, tuple[Redistribute, ...]] = {}
        for layer in layers:
            beta = file.get(KIND, layer, facts)
            for row, sections in enumerate(rows):
                if len(sections) not in (0, beta.shape[1]):
                    raise SpanError(
                        f"{self.name}: row {row} has {len(sections)} emphasised ranges, and layer {layer} of "
                        f"{file.name} has factors for {beta.shape[1]} anchors: emphasise one text per label, in the "
                        "order of the fit"
                    )
            heads = tuple(head for head in chosen.get(layer, ()) if bool(beta[head].any()))
            if heads:
                plan[layer] = edits(heads, beta[list(heads)], self.renormalise)
        return plan
