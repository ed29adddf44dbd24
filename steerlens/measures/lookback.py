"""Lookback ratio: how much more a head attends to a context key than to a newer one (Chuang et al., arXiv 2407.07071).

As in the released code: "context" reaches from the first token, BOS included, to the end of the span group "context";
"new" is every key behind it up to the row's own, so the rest of the prompt too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from steerlens.examples import Example
from steerlens.measures.base import Head, HeadScores, MeasureError, describe
from steerlens.measures.responses import MAX_NEW_TOKENS, Forced, forced


def ratio(context: torch.Tensor, keys: torch.Tensor, new: torch.Tensor, new_keys: torch.Tensor) -> torch.Tensor:
    """A_context / (A_context + A_new), A the mean weight of a key: mass over the number of keys.

    NaN where there are no keys on one side, 0 where no key has any weight.
    """
    one, other = context / keys, new / new_keys
    found = one / (one + other).clamp(min=torch.finfo(one.dtype).tiny)
    return torch.where((keys > 0) & (new_keys > 0), found, torch.nan)


def ratios(model: Any, batch: Forced, exclude: bool = False) -> dict[int, list[torch.Tensor]]:
    """Lookback ratios per layer and batch row, fp32 [H, R], for the R rows that produce the response.

    Args:
        model: a transformers model.
        batch: prompts with responses, and the group "context".
        exclude: leave out the first token and each row's own key.

    Returns:
        NaN in rows that see no new key.
    """
    width, most, skip = batch.ids.shape[1], batch.most, int(exclude)
    stops = [max(stop for _, stop in mine) for mine in batch.groups["context"]]
    groups: dict[str, list[list[tuple[int, int]]]] = {
        "context": [
            [(first + skip, stop)] if stop > first + skip else []
            for first, stop in zip(batch.first, stops, strict=True)
        ],
        "new": [[(stop, width)] if stop < width else [] for stop in stops],
    }
    if exclude:
        for column in range(width - most, width):
            groups[f"own {column}"] = [[(column, column + 1)]] * len(stops)
    record = batch.mass(model, groups)
    found: dict[int, list[torch.Tensor]] = {}
    for layer in record.layers:
        mass = record[layer].mass
        assert mass is not None
        columns = torch.arange(width - most, width, device=mass.device)
        new = mass[..., 1]
        if exclude:
            new = (new - mass[..., 2:].diagonal(dim1=2, dim2=3)).clamp(min=0)
        for row, (first, stop, response) in enumerate(zip(batch.first, stops, batch.responses, strict=True)):
            keys = torch.tensor(float(stop - first - skip), device=mass.device)
            values = ratio(mass[row, ..., 0], keys, new[row], (columns + 1 - stop - skip).float())
            found.setdefault(layer, []).append(values[:, -len(response) :])
    return found


def measure(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    exclude: bool = False,
    teacher_forced: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> HeadScores:
    """Score heads by their lookback ratio on the rows that produce the response, one mean per example.

    Args:
        model: a transformers model.
        tokenizer: of the model.
        examples: prompts with the group "context".
        exclude: leave out the first token and each row's own key.
        teacher_forced: rows that produce the examples' answers, not the model's own greedy ones.
        max_new_tokens: longest response of the model.
        batch_size: examples per forward.
        advance: told how many examples are done.
    """
    scores: dict[Head, list[float]] = {}
    rows = answered = 0
    for batch in forced(
        "lookback",
        model,
        tokenizer,
        examples,
        groups=("context",),
        teacher_forced=teacher_forced,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        advance=advance,
    ):
        answered += len(batch.responses)
        rows += sum(map(len, batch.responses))
        for layer, found in ratios(model, batch, exclude).items():
            for values in found:
                means = values.nanmean(-1)
                if not bool(means.isnan().any()):
                    for head, mean in enumerate(means.tolist()):
                        scores.setdefault((layer, head), []).append(mean)
    if not scores:
        raise MeasureError(
            "lookback: no row sees a key behind the context, or only its own: have the group 'context' end earlier, "
            "before the question"
        )
    mean = sum(map(sum, scores.values())) / sum(map(len, scores.values()))
    return HeadScores(
        "lookback",
        describe(model),
        scores,
        settings={"examples": len(examples), "exclude_first_and_own": exclude, "teacher_forced": teacher_forced},
        summary={"answered": answered, "response_rows": rows, "mean_ratio": round(mean, 6)},
    )
