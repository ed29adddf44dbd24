"""Blocks of tokens that do not see each other: their positions, and what they need of a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from steerlens.errors import UnsupportedError
from steerlens.facts import ModelFacts
from steerlens.spans import Range
from steerlens.wrapping import unwrap


def aligned(firsts: Sequence[int], blocks: Sequence[Sequence[Range]], width: int) -> torch.Tensor:
    """Position ids [B, `width`] that count up to the first block, let all blocks end together, and go on behind them.

    Args:
        firsts: column of each row's first token; columns before it are pads, of position 0.
        blocks: per row adjacent column ranges, at least one.
        width: columns.
    """
    found = torch.zeros(len(blocks), width, dtype=torch.long)
    for row, (first, ranges) in enumerate(zip(firsts, blocks, strict=True)):
        start, stop = ranges[0][0], ranges[-1][1]
        end = start - first + max(b - a for a, b in ranges)
        found[row, first:start] = torch.arange(start - first)
        for a, b in ranges:
            found[row, a:b] = torch.arange(end - (b - a), end)
        found[row, stop:] = end + torch.arange(width - stop)
    return found


def check(method: str, model: Any, facts: ModelFacts) -> None:
    """Raise `UnsupportedError` for a model that tokens pass between blocks in, or whose positions are its own."""
    if "position_ids" not in inspect.signature(unwrap(model).forward).parameters:
        raise UnsupportedError(f"{method} gives blocks positions of their own, which {facts.name} does not take")
    others = sorted(set(range(facts.layers)) - set(facts.attention_layers))
    if others:
        raise UnsupportedError(
            f"{method} keeps blocks of tokens apart by attention, and layers {others} of {facts.name} mix tokens "
            "without it (linear attention, a state space): use a model of attention layers alone"
        )
