"""Contextual heads: attention to what holds the answer, while the answer is given (Zhu et al., arXiv 2503.23306)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from steerlens.examples import Example
from steerlens.measures.base import Head, HeadScores, describe
from steerlens.measures.responses import MAX_NEW_TOKENS, forced


def score(mass: torch.Tensor) -> torch.Tensor:
    """Mean span mass over response rows, [..., R] -> [...]."""
    return mass.mean(-1)


def context_dependency(mass: torch.Tensor) -> torch.Tensor:
    """Context-dependency score (arXiv 2411.02688) of a layer: largest over heads, mean over rows, [H, R] -> []."""
    return mass.amax(0).mean()


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
    """Score heads by the attention mass on the group "gold" in the rows that produce the response, one per example.

    The summary has the context-dependency score of each layer, of the same mass.

    Args:
        model: a transformers model.
        tokenizer: of the model.
        examples: prompts with the group "gold".
        teacher_forced: rows that produce the examples' answers, not the model's own greedy ones.
        max_new_tokens: longest response of the model.
        batch_size: examples per forward.
        advance: told how many examples are done.
    """
    scores: dict[Head, list[float]] = {}
    dependency: dict[int, list[float]] = {}
    answered = 0
    for batch in forced(
        "contextual",
        model,
        tokenizer,
        examples,
        groups=("gold",),
        teacher_forced=teacher_forced,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        advance=advance,
    ):
        answered += len(batch.responses)
        record = batch.mass(model, batch.groups)
        for layer in record.layers:
            mass = record[layer].mass
            assert mass is not None
            for row, response in enumerate(batch.responses):
                mine = mass[row, :, -len(response) :, 0]
                dependency.setdefault(layer, []).append(float(context_dependency(mine)))
                for head, value in enumerate(score(mine).tolist()):
                    scores.setdefault((layer, head), []).append(value)
    return HeadScores(
        "contextual",
        describe(model),
        scores,
        settings={"examples": len(examples), "teacher_forced": teacher_forced},
        summary={
            "answered": answered,
            "context_dependency_by_layer": {n: round(sum(d) / len(d), 6) for n, d in sorted(dependency.items())},
        },
    )
