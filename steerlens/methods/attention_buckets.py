"""Attention Buckets: an ensemble over bases of the rotary embedding (arXiv 2312.04455)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from steerlens.errors import MethodError
from steerlens.methods.branched import NEUTRAL, Branch, BranchedMethod

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED = 10000.0
"""The RoPE base that the published ones are meant for."""


@dataclass(frozen=True)
class AttentionBuckets(BranchedMethod):
    """Run the text under several RoPE bases, whose attention dips at different distances, and merge the logits.

    Merged logits are Σ_n w_n L_n with w = softmax over n of max_v L_n[v]: raw logits, not probabilities, as the
    published code merges them. Every base costs a row of the batch and of the cache.

    Args:
        bases: RoPE bases; at least one, each > 1. The default is the published list for tool use; for
            retrieval-augmented questions it is 10000, 13000, …, 28000 in steps of 3000.
        relative: the model's base is multiplied by base / 10000, so that models of another base and scaled RoPE
            (llama3, yarn) get the same ratios, which the paper did not try; `False` puts the bases in as they are.
    """

    bases: tuple[float, ...] = (10000.0, 17500.0, 18000.0, 19000.0, 20000.0, 25000.0)
    relative: bool = True

    name: ClassVar[str] = "attention_buckets"
    source: ClassVar[str] = "Chen et al. 2023, Fortify the Shortest Stave in Attention, arXiv 2312.04455, §3"
    summary: ClassVar[str] = "merge the logits of several bases of the rotary embedding"
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given: Any = self.bases
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise MethodError(f"{self.name}: bases={given!r:.80} is no list of numbers; for example [10000, 18000]")
        for base in given:
            if isinstance(base, bool) or not isinstance(base, int | float) or not 1 < base < 1e300:
                raise MethodError(f"{self.name}: bases: {base!r:.80} is out of range; allowed: numbers > 1")
        object.__setattr__(self, "bases", tuple(float(base) for base in given))
        self._flag("relative")

    def to_dict(self) -> dict[str, Any]:
        """As of every method."""
        return super().to_dict() | {"bases": list(self.bases)}

    def branches(self, model: Any) -> tuple[Branch, ...]:
        """One per base."""
        own = PUBLISHED if self.relative else _theta(model)
        if set(self.bases) == {own}:
            return NEUTRAL
        return tuple(Branch(theta=base / own) for base in self.bases)

    def mix(self, logits: Tensor) -> Tensor:
        """The merged logits."""
        weights = logits.amax(-1, keepdim=True).softmax(0)
        return (weights * logits).sum(0)


def _theta(model: Any) -> float:
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if "rope_theta" not in parameters:
        raise MethodError(
            f"attention_buckets: relative=False needs a model with one RoPE base, and {type(model).__name__} has "
            "none in its config, or one per kind of layer: leave relative on"
        )
    return float(parameters["rope_theta"])
