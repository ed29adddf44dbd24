"""NL-ITI: ITI with heads ranked by a small perceptron, on means over answer tokens (arXiv 2403.18680)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steerlens.methods.iti import HeadShift


@dataclass(frozen=True)
class NLITI(HeadShift):
    """ITI's shift o' = o + α·σ·θ; θ, σ and the ranking of heads come from `steerlens.fitting.nl_iti`.

    θ is always the difference of means, of activations averaged over the last answer tokens; what is not linear is the
    ranking alone. Rows from the last prompt token on are shifted, in scoring as in generation.

    Args:
        vectors: safetensors file with `mean.<layer>` [H, D], `mean_deviation.<layer>` [H], `score.<layer>` [H].
        alpha: strength in standard deviations; 0 is neutral. Default of the published code: 15.
        top: how many heads, the best by the file's scores (published code: 48), where `heads` does not say which.
        rows: `decode`, the last prompt row and all later ones; `all`, the prompt too.
        ddof: of σ; 0 or 1.
        heads: which query heads.
    """

    name: ClassVar[str] = "nl_iti"
    source: ClassVar[str] = "Hoscilowicz et al. 2024, NL-ITI, arXiv 2403.18680"
    summary: ClassVar[str] = "ITI with heads ranked by a perceptron, on means over answer tokens"
    fit: ClassVar[str] = "steerlens.fitting.nl_iti(model, tokenizer, examples).save(FILE)"
