"""Blocks of tokens that see each other by choice: masks, positions, and what they need of a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch

from steerlens.edits import HIDE, Edit, Reweight, Scale, SpanKeys
from steerlens.errors import UnsupportedError
from steerlens.facts import ModelFacts
from steerlens.spans import Range
from steerlens.wrapping import unwrap


def graph(
    lengths: Sequence[int],
    edges: Iterable[tuple[int, int]],
    *,
    prefix: int = 0,
    query: int = 0,
    width: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The 4-D mask and the position ids of a text of blocks that see their sources alone (Graph-KV, arXiv 2506.07334).

        mask, positions = graph([len(a), len(b), len(c)], [(0, 1)], query=len(q), dtype=model.dtype)
        with steerlens.steer(model, method, spans):
            model(ids, attention_mask=mask, position_ids=positions)

    A token sees the prefix, what precedes it in its own block, and all of the blocks that edges lead from to its own;
    what those see it does not see itself. The query sees everything before it. A block begins in the position behind
    the source that reaches furthest, or behind the prefix; the query behind the block that reaches furthest. Rows of a
    batch are put together by `torch.cat`, each padded to one `width`. A `generate` takes no such mask: prefill by a
    forward, go on with its cache, a mask [B, T] and positions of one's own.

    Args:
        lengths: tokens of each block, as they stand between the prefix and the query.
        edges: (source, target) pairs of blocks; a source stands before its target. Graph-KV has every block of a first
            round for a source and a copy of each for a target.
        prefix: tokens in front that all blocks see; in Graph-KV none.
        query: tokens behind all blocks.
        width: columns, the first of them pads, which see themselves alone; `None`: no pads.
        dtype: of an additive mask, as eager attention needs it; `None` gives a bool mask, True where a key is seen.
        device: of the tensors.

    Returns:
        The mask [1, 1, width, width], and the position ids int64 [1, width], 0 for pads.

    Raises:
        ValueError: for lengths below 1, a source that is no earlier block, or a `width` that is too small.
    """
    if min([*lengths, 1]) < 1 or min(prefix, query) < 0:
        raise ValueError(
            f"lengths={list(lengths)}, prefix={prefix}, query={query}; blocks have tokens, no length is < 0"
        )
    tokens = prefix + sum(lengths) + query
    width = tokens if width is None else width
    if not 0 < tokens <= width:
        raise ValueError(f"width={width} does not hold the {tokens} tokens of prefix, blocks and query")
    pads = width - tokens
    starts = list(accumulate(lengths, initial=pads + prefix))
    visible = torch.zeros(width, width, dtype=torch.bool)
    visible[:, pads : pads + prefix] = True
    visible[starts[-1] :, pads:] = True
    ends = [prefix] * len(lengths)
    for a, b in pairwise(starts):
        visible[a:b, a:b] = True
    sources: dict[int, list[int]] = {}
    for source, target in edges:
        if not 0 <= source < target < len(lengths):
            raise ValueError(
                f"edge ({source}, {target}): a source stands before its target, and blocks are 0..{len(lengths) - 1}"
            )
        visible[starts[target] : starts[target + 1], starts[source] : starts[source + 1]] = True
        sources.setdefault(target, []).append(source)
    positions = torch.zeros(1, width, dtype=torch.long)
    positions[0, pads : pads + prefix] = torch.arange(prefix)
    for block, length in enumerate(lengths):
        begin = max([prefix, *(ends[source] for source in sources.get(block, ()))])
        ends[block] = begin + length
        positions[0, starts[block] : starts[block + 1]] = torch.arange(begin, ends[block])
    begin = max([prefix, *ends])
    positions[0, starts[-1] :] = torch.arange(begin, begin + query)
    visible &= torch.ones_like(visible).tril()
    visible[:pads] = torch.eye(width, dtype=torch.bool)[:pads]
    mask = (
        visible
        if dtype is None
        else torch.zeros(width, width, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    )
    return mask[None, None].to(device), positions.to(device)


def adjacent(ranges: Sequence[Range]) -> list[Range]:
    """Ranges with what stands between each and the next one."""
    firsts = [a for a, _ in ranges]
    return list(zip(firsts, [*firsts[1:], ranges[-1][1]], strict=True))


def aligned(
    firsts: Sequence[int], blocks: Sequence[Sequence[Range]], width: int, by: Literal["start", "end"] = "end"
) -> torch.Tensor:
    """Position ids [B, `width`] that count up to the first block, align all blocks, and go on behind the longest.

    Args:
        firsts: column of each row's first token; columns before it are pads, of position 0.
        blocks: per row adjacent column ranges, at least one.
        width: columns.
        by: whether blocks start or end together.
    """
    found = torch.zeros(len(blocks), width, dtype=torch.long)
    for row, (first, ranges) in enumerate(zip(firsts, blocks, strict=True)):
        start, stop = ranges[0][0], ranges[-1][1]
        end = start - first + max(b - a for a, b in ranges)
        found[row, first:start] = torch.arange(start - first)
        for a, b in ranges:
            begin = end - (b - a) if by == "end" else start - first
            found[row, a:b] = torch.arange(begin, begin + b - a)
        found[row, stop:] = end + torch.arange(width - stop)
    return found


def apart(heads: tuple[int, ...], group: str, most: int) -> list[Edit]:
    """Edits that keep at most `most` blocks, sections of a span group, from seeing each other (see `groups`)."""
    return [
        Reweight(heads, SpanKeys(f"before {group}", k - 1), Scale(HIDE), queries=SpanKeys(group, k))
        for k in range(1, most)
    ]


def groups(group: str, blocks: Sequence[Sequence[Range]]) -> dict[str, Sequence[Sequence[Range]]]:
    """The span groups that `apart` names, for adjacent blocks."""
    return {group: list(blocks), f"before {group}": [[(row[0][0], a) for a, _ in row[1:]] for row in blocks]}


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
