"""The plausibility gate of Directer, around any method (arXiv 2603.06745)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from steerlens.errors import MethodError
from steerlens.methods.base import EditMethod, Method, PerRow, Search
from steerlens.methods.branched import NEUTRAL, Branch, BranchedMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PlausibilityGate(BranchedMethod):
    """Steer a token only if the unsteered model finds it plausible.

    At each step, where p is the unsteered distribution over the tokens so far, the steered logits count if
    p(their most likely token) > threshold · max p; else the unsteered ones do. Steered and unsteered states each have
    their cache: a token that was not accepted is the next one of both.
    Directer itself steers from the unsteered cache at each step, and tries half of its layers before it gives up.

    Args:
        methods: what is gated, in order of composition: methods or their descriptions, as `{"method": "pasta",
            "alpha": 0.01}`; attention edits, and at most one decoding method of several branches.
        threshold: in [0, 1]; 1 leaves the unsteered model, 0 gates nothing.
    """

    methods: tuple[Method, ...]
    threshold: float = 0.5

    name: ClassVar[str] = "plausibility_gate"
    source: ClassVar[str] = "Directer, ICLR 2026, arXiv 2603.06745"
    summary: ClassVar[str] = "steer a token only if the unsteered model finds it plausible; around any method"
    search: ClassVar[Mapping[str, Search]] = {"threshold": Search((0.1, 0.3, 0.5, 0.7, 0.9), neutral=None, log=False)}

    def __post_init__(self) -> None:
        from steerlens.methods import from_dict

        self._number("threshold", 0, 1)
        given: Any = self.methods
        if isinstance(given, Method | Mapping):
            given = [given]
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise MethodError(
                f"{self.name}: methods={given!r:.80} is no list of methods; for example "
                "[{method: pasta, alpha: 0.01}]"
            )
        methods = tuple(m if isinstance(m, Method) else from_dict(m) for m in given)
        wrong = [m for m in methods if not isinstance(m, EditMethod | BranchedMethod) or isinstance(m, PerRow)]
        if wrong:
            raise MethodError(
                f"{self.name} cannot gate {wrong[0].name}, which is no method that steers the same prompt and all its "
                "rows: put it beside the gate instead of into it"
            )
        if sum(isinstance(m, BranchedMethod) for m in methods) > 1:
            raise MethodError(f"{self.name}: two decoding methods cannot own one generate; gate one of them")
        object.__setattr__(self, "methods", methods)
        object.__setattr__(self, "needs", tuple(dict.fromkeys(group for m in methods for group in m.needs)))
        for declared in ("causal", "cache_exact", "chunk_exact"):
            object.__setattr__(self, declared, all(getattr(m, declared) for m in methods))

    def to_dict(self) -> dict[str, Any]:
        """As of every method; the gated ones as lists of theirs."""
        return super().to_dict() | {"methods": [m.to_dict() for m in self.methods]}

    def branches(self, model: Any) -> tuple[Branch, ...]:
        """The unsteered model, and the gated methods' branches."""
        edits = tuple(m for m in self.methods if isinstance(m, EditMethod))
        inner = self._inner
        found = NEUTRAL if inner is None else inner.branches(model)
        steered = tuple(replace(b, methods=edits + b.methods) if b.model is None else b for b in found)
        return NEUTRAL if steered == NEUTRAL or self.threshold == 1 else (Branch(), *steered)

    @property
    def _inner(self) -> BranchedMethod | None:
        return next((m for m in self.methods if isinstance(m, BranchedMethod)), None)

    def mix(self, logits: Tensor) -> Tensor:
        """Steered logits where they are plausible, unsteered ones elsewhere."""
        raw, steered = logits[0], logits[1]
        if len(logits) > 2 and (inner := self._inner) is not None:
            steered = inner.mix(logits[1:])
        chosen = raw.gather(-1, steered.argmax(-1, keepdim=True))
        # p(token) > threshold · max p, without the normaliser that both have
        accepted = (chosen - raw.amax(-1, keepdim=True)).exp() > self.threshold
        return steered.where(accepted, raw)
