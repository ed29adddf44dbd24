"""Attention sinks: how much attention the first token, or another one, receives from the rows that see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import steerlens
from steerlens.examples import Example
from steerlens.measures.base import Head, HeadScores, batches, describe, require


def measure(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> HeadScores:
    """Score heads by the mean attention that the first real token receives, one value per example."""
    import torch

    require("sinks", examples)
    scores: dict[Head, list[float]] = {}
    for rows, inputs, _ in batches(model, tokenizer, examples, batch_size):
        with torch.no_grad(), steerlens.capture(model, stats=("column_mean",)) as record:
            model(**inputs)
        first = inputs["attention_mask"].argmax(-1)
        for layer in record.layers:
            means = record[layer].column_mean
            assert means is not None
            at_first = means[torch.arange(len(rows)), :, first.to(means.device)].cpu()
            for place, head in enumerate(record[layer].heads):
                scores.setdefault((layer, head), []).extend(at_first[:, place].tolist())
        advance(len(rows))
    return HeadScores("sinks", describe(model), scores, settings={"examples": len(examples)})
