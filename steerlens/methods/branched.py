"""Base of decoding methods that run the same tokens several times, each under its own conditions, and mix the logits.

Light to import: what runs the branches is `steerlens.branching`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steerlens.errors import MethodError
from steerlens.methods.base import DecodingMethod, EditMethod

if TYPE_CHECKING:
    from torch import Tensor

    from steerlens.spans import Spans


@dataclass(frozen=True)
class Branch:
    """One condition under which the tokens are run.

    Attributes:
        methods: edits on top of the contexts in force, in order of composition.
        hidden: a span group that no other token attends to.
        theta: the RoPE base times this.
        model: another model with the same vocabulary; `None` is the steered one.
    """

    methods: tuple[EditMethod, ...] = ()
    hidden: str | None = None
    theta: float = 1.0
    model: Any = None


NEUTRAL = (Branch(),)
"""The branches of a method that changes nothing."""


@dataclass(frozen=True)
class BranchedMethod(DecodingMethod):
    """A decoding method made of branches of one text and a rule that mixes their logits.

    transformers' own loop generates, and sees the mixed logits as if the model had given them: processors, sampling,
    stopping criteria, streamers and `return_dict_in_generate` are its own. Branches of the steered model are rows of
    one batch, next to each other (so `steerlens.capture` records them), and read the prompt once where no branch
    changes what is cached of it. Beams, assisted decoding and `custom_generate` are refused; the unconditional branch
    of `guidance_scale` stays native and alone.
    """

    def branches(self, model: Any) -> tuple[Branch, ...]:
        """The conditions, at least one of them the steered model's; `NEUTRAL` where nothing is changed."""
        raise NotImplementedError

    def mix(self, logits: Tensor) -> Tensor:
        """What the branches' logits, fp32 [branches, …, V], come to: [..., V]. Not asked of a neutral method."""
        raise NotImplementedError

    def generate(self, model: Any, inputs: Mapping[str, Any], spans: Spans | None, **kwargs: Any) -> Any:
        """As the model's own `generate`. Returned caches, attentions and hidden states are the first branch's.

        Raises:
            UnsupportedError: for a mode that does not go with several branches.
        """
        from steerlens import branching

        return branching.generate(self, model, inputs, spans, kwargs)

    def score(self, model: Any, inputs: Mapping[str, Any], spans: Spans | None) -> Any:
        """Log-probabilities fp32 [B, T-1] of `inputs`' tokens under the mixed and renormalised distribution.

        Where a branch tells prompt from generated tokens, the context in force must know the prompts'
        `prompt_lengths`.

        Raises:
            SteeringStateError: if it does not.
        """
        from steerlens import branching

        return branching.score(self, model, inputs, spans)

    def _flag(self, *fields: str) -> None:
        for field in fields:
            if not isinstance(getattr(self, field), bool):
                raise MethodError(f"{self.name}: {field}={getattr(self, field)!r}; allowed: true, false")
