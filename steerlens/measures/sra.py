"""Strategy-relevant attention: how much each token of an instruction is attended to (arXiv 2402.10453).

The mass of the first token, a sink, is taken out and the rest renormalised. The aggregate averages heads before that,
a head's own score cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from steerlens.examples import Example
from steerlens.measures.base import Head, HeadScores, MeasureError, describe
from steerlens.measures.responses import MAX_NEW_TOKENS, forced, ranges, tokens


def per_head(span: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """Mean over rows of span mass / (1 - mass of the first token) / tokens of the span, [..., R] -> [...]."""
    return (span / (1 - first).clamp(min=torch.finfo(span.dtype).eps)).mean(-1) / count


def aggregate(span: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """SRA of a response, from masses averaged over heads, [L, R] -> []: mean over layers and rows."""
    return per_head(span, first, count).mean()


def measure(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    teacher_forced: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> HeadScores:
    """Score heads by their attention per token of the group "emphasis", one value per example.

    The summary has Log-SRA (all tokens of the span), the released code's (its last token dropped; null for spans of
    one token), the paper's formula (first token kept), the mass, and the mass over what equal weights would give.

    Args:
        model: a transformers model.
        tokenizer: of the model.
        examples: prompts with the group "emphasis".
        teacher_forced: rows that produce the examples' answers, not the model's own greedy ones.
        max_new_tokens: longest response of the model.
        batch_size: examples per forward.
        advance: told how many examples are done.
    """
    scores: dict[Head, list[float]] = {}
    parts: dict[str, list[float]] = {name: [] for name in ("sra", "published", "paper", "mass", "uninformed")}
    for batch in forced(
        "sra",
        model,
        tokenizer,
        examples,
        groups=("emphasis",),
        teacher_forced=teacher_forced,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        advance=advance,
    ):
        # Without a BOS the first token may be one of the span, and counts as the sink all the same.
        spans = [tokens(mine) - {at} for mine, at in zip(batch.groups["emphasis"], batch.first, strict=True)]
        if not all(spans):
            raise MeasureError("sra: a span is the first token alone, which counts as a sink: name a longer text")
        record = batch.mass(
            model,
            {
                "span": [ranges(span) for span in spans],
                "shorter": [ranges(span - {max(span)}) for span in spans],
                "first": [((at, at + 1),) for at in batch.first],
            },
        )
        width = batch.ids.shape[1]
        for row, (span, response) in enumerate(zip(spans, batch.responses, strict=True)):
            # [L, R] per group; layers may have different numbers of heads and devices
            layers = []
            for layer in record.layers:
                mass = record[layer].mass
                assert mass is not None
                mine = mass[row, :, -len(response) :].cpu()
                for head, value in enumerate(per_head(mine[..., 0], mine[..., 2], len(span)).tolist()):
                    scores.setdefault((layer, head), []).append(value)
                layers.append(mine.mean(0))
            inside, shorter, first = torch.stack(layers).unbind(-1)
            visible = torch.arange(width - len(response), width) + 1 - batch.first[row]
            parts["sra"].append(float(aggregate(inside, first, len(span))))
            if len(span) > 1:
                parts["published"].append(float(aggregate(shorter, first, len(span) - 1)))
            parts["paper"].append(float(inside.mean() / len(span)))
            parts["mass"].append(float(inside.mean()))
            parts["uninformed"].append(float((inside * visible / len(span)).mean()))
    means = {name: sum(values) / len(values) if values else None for name, values in parts.items()}
    return HeadScores(
        "sra",
        describe(model),
        scores,
        settings={"examples": len(examples), "teacher_forced": teacher_forced},
        summary={
            "answered": len(parts["sra"]),
            "log_sra": _log(means["sra"]),
            "log_sra_published_code": _log(means["published"]),
            "log_sra_paper_formula": _log(means["paper"]),
            "mass": _rounded(means["mass"]),
            "mass_over_uninformed": _rounded(means["uninformed"]),
        },
    )


def _log(value: float | None) -> float | None:
    return round(math.log(value), 6) if value else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
