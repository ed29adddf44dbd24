"""Base of decoding methods that look at a whole prompt before they edit its attention.

Light to import: what reads prompts and runs the model is `steerlens.prompted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steerlens.methods.base import DecodingMethod

if TYPE_CHECKING:
    from steerlens.prompted import Prompts, Setting
    from steerlens.spans import Spans


@dataclass(frozen=True)
class PromptedMethod(DecodingMethod):
    """A method whose edits depend on the prompt that they are for.

    `find` looks at the prompts, with forwards of its own where it needs them; transformers' own `generate` then runs
    under its edits, which come after those of the contexts in force. Forwards of its own are unsteered, whatever else
    steers the answer. A prompt must come whole, as token ids, and no `PromptMethod` may rewrite it meanwhile.
    """

    def find(self, model: Any, prompts: Prompts) -> Setting | None:
        """The edits for these prompts; `None` leaves the model as it is."""
        raise NotImplementedError

    def generate(self, model: Any, inputs: Mapping[str, Any], spans: Spans | None, **kwargs: Any) -> Any:
        """As the model's own `generate`.

        Raises:
            SpanError: for prompts that lack what the method needs.
            UnsupportedError: for embeddings instead of ids, or a cache that holds part of the prompt.
        """
        from steerlens import prompted

        return prompted.generate(self, model, inputs, spans, kwargs)

    def score(self, model: Any, inputs: Mapping[str, Any], spans: Spans | None) -> Any:
        """Log-probabilities fp32 [B, T-1] of `inputs`' tokens; the context in force knows the `prompt_lengths`.

        Raises:
            SteeringStateError: if it does not.
        """
        from steerlens import prompted

        return prompted.score(self, model, inputs, spans)
