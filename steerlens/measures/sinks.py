"""Attention sinks: keys that receive much attention from every row that sees them.

The sink metric is Gu et al. 2024 (arXiv 2410.10781), hidden sinks are those that ACT looks for (arXiv 2406.15765),
massive activations of the hidden state, which come with sinks, are Sun et al. 2024 (arXiv 2402.17762).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import steerlens
from steerlens.examples import Example
from steerlens.measures.base import Head, HeadScores, batches, describe, forward, require
from steerlens.methods import ACT


def first_and_hidden(means: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The sink metric of the first token, and the share of the other tokens that are sinks.

    Args:
        means: mean weight of each key over the rows that see it, NaN for pads, [B, H, T].
        threshold: a mean above it, not at it, makes a sink.

    Returns:
        Two [B, H].
    """
    real = ~means.isnan()
    first = real.long().argmax(-1, keepdim=True)
    hidden = (means > threshold).scatter(-1, first, False).sum(-1)
    return means.gather(-1, first)[..., 0], hidden / (real.sum(-1) - 1).clamp(min=1)


def percent(metrics: Sequence[float], epsilon: float) -> float:
    """Sink^ε: how many of the metrics, over samples, layers and heads, are above ε, in percent."""
    return 100 * sum(metric > epsilon for metric in metrics) / len(metrics)


def measure(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    tokens: int = 64,
    epsilon: float = 0.3,
    threshold: float = ACT.threshold,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> HeadScores:
    """Score heads by the sink metric of the first real token, one value per example.

    The metric is the mean weight over the rows that see the token, its own included. `other["hidden"]` is the share of
    the other tokens whose mean weight is above ACT's threshold; the last tokens are seen by few rows, so that one of
    them easily is. The summary has Sink^ε and the channels of massive activations.

    Args:
        model: a transformers decoder model.
        tokenizer: its tokenizer; one that adds BOS makes that the first token.
        examples: their first `tokens` tokens are read.
        tokens: the metric depends on it: the first row gives 1/T to it.
        epsilon: of Sink^ε in the summary.
        threshold: of hidden sinks.
        batch_size: prompts per forward.
        advance: called with the number of finished prompts.
    """
    require("sinks", examples)
    scores: dict[Head, list[float]] = {}
    hidden: dict[Head, list[float]] = {}
    massive: dict[int, list[tuple[int, bool, float]]] = {}
    read = []
    for rows, inputs, _ in batches(model, tokenizer, examples, batch_size, most=tokens):
        cut = first_tokens(inputs, tokens)
        read += cut["attention_mask"].sum(-1).tolist()
        first = (cut["attention_mask"] == 0).sum(-1).tolist()
        with torch.no_grad(), steerlens.capture(model, stats=("column_mean", "massive")) as record:
            forward(model, cut["input_ids"], cut["attention_mask"])
        for layer in record.layers:
            means, activations = record[layer].column_mean, record[layer].massive
            assert means is not None and activations is not None
            for found in activations.find():
                massive.setdefault(found.channel, []).append((layer, found.column == first[found.row], found.value))
            for kept, values in zip((scores, hidden), first_and_hidden(means, threshold), strict=True):
                for place, head in enumerate(record[layer].heads):
                    kept.setdefault((layer, head), []).extend(values[:, place].tolist())
        advance(len(rows))
    metrics = [value for values in scores.values() for value in values]
    return HeadScores(
        "sinks",
        describe(model),
        scores,
        {"hidden": hidden},
        {"tokens": tokens, "epsilon": epsilon, "threshold": threshold},
        {
            "prompts": len(examples),
            "tokens": [min(read), max(read)],
            "sink_percent": round(percent(metrics, epsilon), 4),
            "massive_activations": channels(massive),
        },
    )


def channels(massive: Mapping[int, Sequence[tuple[int, bool, float]]]) -> list[dict[str, Any]]:
    """Per channel with massive activations: the largest in each layer, signed, and how many are on first tokens.

    Args:
        massive: per channel each activation's layer, whether it is on a first token, and its value.
    """
    rows = []
    for channel, found in massive.items():
        largest: dict[str, float] = {}
        for layer, _, value in sorted(found, key=lambda each: (each[0], abs(each[2]))):
            largest[str(layer)] = round(value, 2)
        share = sum(on_first for _, on_first, _ in found) / len(found)
        rows.append({"channel": channel, "largest_per_layer": largest, "on_first_token": round(share, 4)})
    return sorted(rows, key=lambda row: -max(map(abs, row["largest_per_layer"].values())))


def first_tokens(inputs: Any, count: int) -> dict[str, torch.Tensor]:
    """The first `count` real tokens of each row, left-padded."""
    mask = inputs["attention_mask"].bool()
    place = mask.cumsum(-1)
    kept = mask & (place <= count)
    width = int(kept.sum(-1).max())
    # A stable sort by "kept" moves what is kept to the right, in its order.
    order = kept.long().argsort(dim=-1, stable=True)[:, -width:]
    return {"input_ids": inputs["input_ids"].gather(-1, order), "attention_mask": kept.long().gather(-1, order)}
