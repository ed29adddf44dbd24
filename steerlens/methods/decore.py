"""DeCoRe, Decoding by Contrasting Retrieval Heads (arXiv 2410.18860)."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from steerlens.errors import MethodError
from steerlens.heads import Heads, draw_others
from steerlens.methods.base import Search
from steerlens.methods.branched import NEUTRAL, Branch, BranchedMethod
from steerlens.methods.headmask import HeadMask

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DeCoRe(BranchedMethod):
    """Contrast the model with itself without its retrieval heads: what those heads know counts for more.

    Next-token scores are (1+a) log p - a log p', where p' is the model whose `heads` attend to all keys alike
    (`HeadMask`, `uniform`). As published, generation is greedy, heads are masked from the last prompt token on, and
    nothing keeps a token that p finds implausible from winning (`apc_beta` does).

    Args:
        heads: query heads to mask: those of the masked branch's model. Published lists hold retrieval heads.
        mode: a is `alpha` (`static`, "vanilla" in the code); the entropy H(p) in nats at each step (`entropy`); or
            H(p') - H(p), which may be negative (`entropy_gain`, in the code alone).
        alpha: of `static`; -1 or more. 0 is neutral.
        cap: upper bound of a; `None` for none, as published.
        scale: divide entropies by the logarithm of the vocabulary's size, before `cap`.
        phase: `decode` masks the last prompt token and what is generated, as the published generation does; `all`
            masks the prompt too, as the published log-likelihoods do.
        apc_beta: tokens with p < apc_beta · max p get no probability, in [0, 1); 0 is off, as published.
        amateur: "lite": the masked branch is this smaller model with the same vocabulary, a loaded one, or an alias,
            path or Hub id. Then `heads` are its heads, and it is not steered otherwise.
        control: a seed: mask as many random heads instead, none of them in `heads`.
    """

    heads: Heads | str | dict[int, list[int]]
    mode: Literal["static", "entropy", "entropy_gain"] = "entropy"
    alpha: float = 0.5
    cap: float | None = None
    scale: bool = False
    phase: Literal["decode", "all"] = "decode"
    apc_beta: float = 0.0
    amateur: Any = None
    control: int | None = None

    name: ClassVar[str] = "decore"
    source: ClassVar[str] = "Gema et al. 2024, DeCoRe: Decoding by Contrasting Retrieval Heads, arXiv 2410.18860, §3"
    summary: ClassVar[str] = "contrast the model with itself without its retrieval heads"
    causal: ClassVar[bool] = True
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True
    search: ClassVar[Mapping[str, Search]] = {"alpha": Search((0.25, 0.5, 1.0, 2.0, 4.0), neutral=0.0)}

    def __post_init__(self) -> None:
        self._parse_heads()
        self._choice("mode", ("static", "entropy", "entropy_gain"))
        self._choice("phase", ("decode", "all"))
        self._number("alpha", -1)
        if self.cap is not None:
            self._number("cap", 0, open_low=True)
        self._number("apc_beta", 0, 1)
        if self.apc_beta == 1:
            raise MethodError("decore: apc_beta=1 leaves no token; allowed: a number >= 0 and < 1")
        self._flag("scale")
        if self.mode != "static":
            object.__setattr__(self, "search", {})  # no strength of its own
        if self.control is not None and (isinstance(self.control, bool) or not isinstance(self.control, int)):
            raise MethodError(f"decore: control={self.control!r}; allowed: a whole number, the seed of the draw")
        if self.amateur is not None and not isinstance(self.amateur, str) and not hasattr(self.amateur, "config"):
            raise MethodError(f"decore: amateur={self.amateur!r:.80}; allowed: a loaded model, or its path or Hub id")

    def to_dict(self) -> dict[str, Any]:
        """As of every method; a loaded `amateur` by the path or Hub id that it was loaded from."""
        found = super().to_dict()
        if found["amateur"] is not None and not isinstance(found["amateur"], str):
            found["amateur"] = found["amateur"].config._name_or_path or None
        return found

    def branches(self, model: Any) -> tuple[Branch, ...]:
        """The model as it is, and the one with masked heads."""
        if (self.mode == "static" and self.alpha == 0 and not self.apc_beta) or (
            self.amateur is None and self.heads.empty  # type: ignore[union-attr]
        ):
            return NEUTRAL
        other = (
            _load(self.amateur, str(model.dtype), str(model.device)) if isinstance(self.amateur, str) else self.amateur
        )
        heads = self._drawn(model if other is None else other)
        masked = () if heads.empty else (HeadMask(heads, "uniform", self.phase),)
        return (Branch(), Branch(masked, model=other))

    def _drawn(self, model: Any) -> Heads:
        assert isinstance(self.heads, Heads)
        if self.control is None:
            return self.heads
        from steerlens import decoder
        from steerlens.wrapping import unwrap

        facts = decoder.read(decoder.find(unwrap(model)))[0]
        drawn = draw_others(self.heads, facts, 1, random.Random(self.control))
        if not drawn:
            raise MethodError(f"decore: control: {facts.name} has fewer other heads than the {self.heads} to stand for")
        return drawn[0]

    def mix(self, logits: Tensor) -> Tensor:
        """(1+a) log p - a log p', unnormalised."""
        base, masked = logits.log_softmax(-1)
        weight: Any = self.alpha
        if self.mode != "static":
            weight = entropy(base) if self.mode == "entropy" else entropy(masked) - entropy(base)
            if self.scale:
                weight = weight / math.log(base.shape[-1])
            if self.cap is not None:
                weight = weight.clamp(max=self.cap)
            weight = weight[..., None]
        elif self.cap is not None:
            weight = min(weight, self.cap)
        mixed = (1 + weight) * base - weight * masked
        if self.apc_beta:
            mixed = mixed.masked_fill(base < base.amax(-1, keepdim=True) + math.log(self.apc_beta), -math.inf)
        return mixed


def entropy(logprobs: Tensor) -> Tensor:
    """In nats, over the last axis, with the published 1e-12 inside the logarithm."""
    p = logprobs.exp()
    return -(p * (p + 1e-12).log()).sum(-1)


@functools.lru_cache(maxsize=1)
def _load(name: str, dtype: str, device: str) -> Any:
    from steerlens import models

    dtype = dtype.removeprefix("torch.")
    return models.load(name, device=device, dtype=dtype if dtype in models.DTYPES else "auto")[0]
