"""Lookback Lens: of several continuations take the one that looks back at the context (arXiv 2407.07071)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from steerlens.errors import UnsupportedError
from steerlens.methods.base import DecodingMethod

if TYPE_CHECKING:
    from steerlens.spans import Spans

GROUP = "context"


@dataclass(frozen=True)
class LookbackLens(DecodingMethod):
    """Sample continuations chunk by chunk and keep the one that a detector finds most likely factual (§4 of the paper).

    The detector sees where attention goes. A head's lookback ratio is A_context / (A_context + A_new), A the mean
    weight of a key: context reaches from the first token to the end of the span group "context", new is all behind it,
    up to the row's own key. A chunk's features are the means over the rows that produce its tokens, in all heads; the
    detector is a logistic regression on them, P = σ(w·v + b), fitted by `steerlens.fitting.lookback_lens`. Of equal
    candidates the first is kept. A candidate ends at an end-of-text token, maybe early; where it is kept the answer
    ends.

    Candidates are rows of one batch behind one prefill. Each is a sample of the model's distribution, which logits
    processors and, with `do_sample=True`, the caller's temperature and the like shape; published sampling flags have no
    effect. The network itself is not changed: no text has another probability, so that `score` is refused.

    Args:
        vectors: safetensors file with the detector: `weight.<layer>` [H] and `bias` [1].
        chunk: tokens of a chunk. Published: 8 (the default of its command line is 5).
        candidates: continuations of a chunk to choose from; 1 is neutral: the caller's own decoding. Published: 8.
        seed: of the samples; every row draws as it would alone.
    """

    vectors: str
    chunk: int = 8
    candidates: int = 8
    seed: int = 0

    name: ClassVar[str] = "lookback_lens"
    source: ClassVar[str] = "Chuang et al. 2024, Lookback Lens, arXiv 2407.07071, §4"
    summary: ClassVar[str] = "sample continuations, keep those whose attention goes back to the context"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    scores: ClassVar[bool] = False
    fit: ClassVar[str] = "steerlens.fitting.lookback_lens(model, tokenizer, examples).save(FILE)"

    def __post_init__(self) -> None:
        self._file("vectors")
        for field in ("chunk", "candidates"):
            self._count(field)
        self._count("seed", 0)

    def generate(self, model: Any, inputs: Mapping[str, Any], spans: Spans | None, **kwargs: Any) -> Any:
        """As the model's own `generate`: ids, or with `return_dict_in_generate` an output with `sequences` alone.

        Raises:
            MethodError: if the detector is of another model. SpanError: for a row whose context is the whole prompt.
            UnsupportedError: for a mode or cache that does not go with candidates.
        """
        if self.candidates == 1:
            return model.generate(**inputs, **kwargs)
        from steerlens import choosing

        return choosing.generate(self, model, inputs, spans, kwargs)

    def score(self, model: Any, inputs: Mapping[str, Any], spans: Spans | None) -> Any:
        """Refused: which of some samples is kept gives a text no probability."""
        raise UnsupportedError(
            "lookback_lens chooses among sampled continuations and gives no text a probability of its own: use it on "
            "tasks that generate, or score the unsteered model"
        )
