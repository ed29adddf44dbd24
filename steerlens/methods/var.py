"""VAR, visual attention redistribution: from sinks to what an image shows (arXiv 2503.03321)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steerlens.edits import HIDE, MassLaw, Outliers, OutsideSpan, Plan, Redistribute, SpanKeys
from steerlens.errors import MethodError
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.base import EditMethod, Search
from steerlens.spans import Spans, require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FromSinks(MassLaw):
    """A share of what sinks hold, for the visual tokens that are none, in rows that look at the image.

    Groups: visual sinks, other visual tokens, other sinks; ψv, ψn, ψs their masses. Where ψv > 0, ψv + ψn is at least
    `least` and ψn / (ψv + ψn) at least `share`, sinks keep 1 - `moved` of their weights and the rest goes to the other
    visual tokens in proportion to theirs.
    """

    moved: float
    share: float
    least: float

    def log_weights(self, mass: Tensor, row: Tensor, real: Tensor) -> Tensor:
        import torch

        sinks, shown, others = mass.unbind(-1)
        looks = sinks + shown
        applies = (sinks > 0) & (shown > 0) & (looks >= self.least) & (shown >= self.share * looks)
        budget = self.moved * (sinks + others)
        more = (budget / shown.masked_fill(~applies, 1)).log1p()
        less = more.new_full(more.shape, math.log1p(-self.moved) if self.moved < 1 else HIDE)
        return torch.stack([less, more, less], -1).where(applies[..., None], 0)


@dataclass(frozen=True)
class VAR(EditMethod):
    """In heads that look at the image, move attention from sinks to the image's tokens that are none (§5 of the paper).

    A token is a sink of a layer if its hidden state x there has max_c |x_c| / rms(x) > τ, c in `channels`: in the
    prompt, for good. Of a row and head with mass ψv on the image's sinks and ψn on its other tokens, where
    ψv + ψn >= `least` and ψn / (ψv + ψn) >= `share`, all sinks, of image and text, lose the share `moved` of their
    weight, and the image's other tokens gain it in proportion to theirs. Rows: all outside the image that see a sink of
    it, prompt and generated. Most of what is moved comes from the first token in many heads.

    The paper's p is the share that is moved, as here; p of the published code is the share that is kept, so that its
    0.6 is `moved=0.4`. Its `rho` bounds the sinks' share, 1 - `share`; both are 0.5 in its configuration. It adds 1e-6
    per image token to ψn, which is left out, and reads its option to leave out the last layer nowhere.

    Args:
        channels: of the hidden state, those that are massive on the first token; `steerlens.capture(model,
            stats="massive")` finds them. Published: 1415 and 2533 for Llama-2-7B and what is tuned from it, 2100 and
            4743 for Llama-2-13B.
        threshold: τ. Published: 20.
        moved: p; 0 is neutral.
        share: ρ, least share of the tokens that are no sinks in the attention on the image. Paper: 0.8 for general
            questions, 0.5 against hallucination, 0.9 for tasks on details.
        least: least attention on the image. Published: 0.2.
        first_layer: layers before it are left alone. Published: 2.
        last_layer: the last that is steered, `None` for the model's last. The paper ends before that one, its code with
            it.
        heads: which query heads.
        group: span group of the image's tokens. Any span will do: a text's sinks are found as an image's are.
    """

    channels: tuple[int, ...]
    threshold: float = 20.0
    moved: float = 0.6
    share: float = 0.5
    least: float = 0.2
    first_layer: int = 2
    last_layer: int | None = None
    heads: Heads | str | dict[int, list[int]] = "all"
    group: str = "image"

    name: ClassVar[str] = "var"
    source: ClassVar[str] = "Kang et al. 2025, See What You Are Told: Visual Attention Sink, arXiv 2503.03321, §5"
    summary: ClassVar[str] = "move attention from sinks to the tokens of an image that are none"
    needs: ClassVar[tuple[str, ...]] = ("image",)
    fit: ClassVar[str] = 'steerlens.capture(model, stats="massive")'
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {
        "moved": Search((0.2, 0.4, 0.6, 0.8), neutral=0.0, log=False),
        "share": Search((0.5, 0.8, 0.9), neutral=None, log=False),
    }

    def __post_init__(self) -> None:
        given = self.channels
        if not isinstance(given, list | tuple) or not given or not all(type(c) is int and c >= 0 for c in given):
            raise MethodError(f"var: channels={given!r} is out of range; allowed: a list of whole numbers >= 0")
        object.__setattr__(self, "channels", tuple(sorted(set(given))))
        self._number("threshold", 0)
        for field in ("moved", "share", "least"):
            self._number(field, 0, 1)
        self._count("first_layer", 0)
        if self.last_layer is not None:
            self._count("last_layer", self.first_layer)
        if not isinstance(self.group, str) or not self.group:
            raise MethodError(f"var: group={self.group!r} is out of range; allowed: the name of a span group")
        object.__setattr__(self, "needs", (self.group,))
        self._parse_heads()

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        if self.last_layer is not None and self.last_layer >= facts.layers:
            raise MethodError(
                f"var: last_layer={self.last_layer} is out of range; {facts.name} has layers 0..{facts.layers - 1}"
            )
        if self.moved == 0:
            return {}
        require(self.name, spans, self.group)
        groups = (
            Outliers(self.channels, self.threshold, self.group),
            SpanKeys(self.group),
            Outliers(self.channels, self.threshold),
        )
        law = FromSinks(self.moved, self.share, self.least)
        found = self._everywhere(facts, lambda h: [Redistribute(h, groups, law, queries=OutsideSpan(self.group))])
        last = facts.layers - 1 if self.last_layer is None else self.last_layer
        return {layer: edits for layer, edits in found.items() if self.first_layer <= layer <= last}
