"""Induction and previous-token heads, on random tokens that are repeated once.

In [BOS] S S a row of the second S can only predict its next token by looking at what followed its token in the first
S: induction heads do (Olsson et al. 2022, arXiv 2209.11895), with the help of heads that look at the token before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

import steerlens
from steerlens.errors import HeadError
from steerlens.examples import ExampleError
from steerlens.measures.base import Head, HeadScores, context, describe
from steerlens.recording import MAP_LIMIT


def induction(weights: torch.Tensor, length: int) -> torch.Tensor:
    """Mean weight of row i on column i - |S| + 1, over the last |S| rows of [..., T, T]."""
    total = weights.shape[-1]
    rows = torch.arange(total - length, total, device=weights.device)
    return weights[..., rows, rows - length + 1].mean(-1)


def previous(weights: torch.Tensor, length: int) -> torch.Tensor:
    """Mean weight of row i on column i - 1, over the last 2|S| - 1 rows of [..., T, T]."""
    total = weights.shape[-1]
    rows = torch.arange(total - 2 * length + 1, total, device=weights.device)
    return weights[..., rows, rows - 1].mean(-1)


FORMULAS = {"induction": induction, "previous": previous}


def sequences(model: Any, tokenizer: Any, length: int, samples: int, seed: int) -> torch.Tensor:
    """`samples` rows [BOS] S S; S is drawn from the vocabulary without special tokens, BOS only where texts get one."""
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    size = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    vocabulary = torch.tensor([number for number in range(size) if number not in special])
    drawn = torch.randint(len(vocabulary), (samples, length), generator=torch.Generator().manual_seed(seed))
    half = vocabulary[drawn]
    bos = tokenizer.bos_token_id
    start = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return torch.cat([torch.full((samples, int(start)), bos or 0), half, half], 1)


def measure(
    model: Any,
    tokenizer: Any,
    kind: Literal["induction", "previous"] = "induction",
    *,
    length: int = 50,
    samples: int = 20,
    seed: int = 0,
    batch_size: int = 4,
    advance: Callable[[int], None] = lambda done: None,
) -> HeadScores:
    """Score heads by their mean weight on the induction or the previous column, one value per sequence.

    Rows and columns that a sliding window keeps apart have the weight 0.

    Args:
        model: a transformers decoder model.
        tokenizer: its tokenizer.
        kind: which heads.
        length: |S|, at least 2.
        samples: sequences.
        seed: of the tokens.
        batch_size: sequences per forward; fewer where the attention maps would be too large.
        advance: called with the number of finished sequences.
    """
    if kind not in FORMULAS:
        raise HeadError(f"kind {kind!r} is unknown; allowed: {', '.join(FORMULAS)}")
    ids = sequences(model, tokenizer, length, samples, seed)
    total, about = ids.shape[1], describe(model)
    limit = context(model)
    if length < 2 or (limit is not None and total > limit):
        most, room = ("", "") if limit is None else (f" to {(limit - total + 2 * length) // 2}", f" of {limit}")
        raise ExampleError(
            f"{kind} on {length} tokens, twice ({total}), in the model's room{room}: allowed are 2{most} tokens "
            "(--length)"
        )
    # Whole maps of a few layers at a time.
    layer_bytes = 4 * about["heads"] * total**2
    rows = max(1, min(batch_size, MAP_LIMIT // layer_bytes))
    depth = max(1, MAP_LIMIT // (rows * layer_bytes))
    scores: dict[Head, list[float]] = {}
    with_attention = steerlens.capture(model, stats=()).layers
    for part in ids.split(rows):
        part = part.to(model.device)
        for first in range(0, len(with_attention), depth):
            maps: dict[int, Any] = dict.fromkeys(with_attention[first : first + depth], "*")
            with (
                torch.no_grad(),
                steerlens.capture(model, stats=(), maps=maps, map_limit=max(MAP_LIMIT, rows * layer_bytes)) as record,
            ):
                model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False)
            for layer in maps:
                weights = record[layer].map
                assert weights is not None
                values = FORMULAS[kind](weights, length)
                for place, head in enumerate(record[layer].map_heads):
                    scores.setdefault((layer, head), []).extend(values[:, place].tolist())
        advance(len(part))
    return HeadScores(kind, about, scores, settings={"length": length, "samples": samples, "seed": seed})
