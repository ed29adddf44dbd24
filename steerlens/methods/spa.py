"""SPA, Selective Prompt Anchoring (arXiv 2408.09121)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from steerlens.methods.base import Search
from steerlens.methods.branched import NEUTRAL, Branch, BranchedMethod

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_SHIFT, LARGEST_LOGIT = 100.0, 1000.0


@dataclass(frozen=True)
class SPA(BranchedMethod):
    """Push the logits away from what they would be if the emphasised text, the anchor, were not there.

    l' = l + (omega - 1)(l - l0), where l0 is the branch in which no other token attends to the anchor; positions stay.
    Other methods of the context steer both branches.
    The published code rewrites the anchor to the text MASKTOKEN, so that positions move, and hides it during the first
    forward alone: later tokens see MASKTOKEN.

    Args:
        omega: anchoring strength; 1 is neutral, below it the anchor counts for less, 0 gives l0.
        modulate: shift each token by its probability under l over the largest one, where |omega| > 1, as published:
            tokens that are implausible with the anchor stay so.
    """

    omega: float = 1.5
    modulate: bool = True

    name: ClassVar[str] = "spa"
    source: ClassVar[str] = "Tian and Zhang 2025, Selective Prompt Anchoring for Code Generation, arXiv 2408.09121, §4"
    summary: ClassVar[str] = "contrast the prompt with itself without the emphasised text"
    needs: ClassVar[tuple[str, ...]] = ("emphasis",)
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {"omega": Search((1.1, 1.25, 1.5, 2.0, 3.0, 5.0))}

    def __post_init__(self) -> None:
        self._number("omega", -1000, 1000)
        self._flag("modulate")

    def branches(self, model: Any) -> tuple[Branch, ...]:
        """The prompt, and the prompt without its anchor."""
        return NEUTRAL if self.omega == 1 else (Branch(), Branch(hidden="emphasis"))

    def mix(self, logits: Tensor) -> Tensor:
        """Shifted logits; shifts within ±100 and the result within ±1000, as published."""
        given, without = logits
        shift = (self.omega - 1) * (given - without)
        if self.modulate and abs(self.omega) > 1:
            shift = shift * (given - given.amax(-1, keepdim=True)).exp()
        shifted = given + shift.clamp(-LARGEST_SHIFT, LARGEST_SHIFT)
        return shifted.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
