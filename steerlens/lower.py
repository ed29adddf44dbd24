"""From symbolic edits to the tensors of one attention call."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from steerlens.backends.call import Bias, Cut, Few, KeepMass, Lowered, MoveMass, Sums
from steerlens.edits import (
    HIDE,
    Ablate,
    Edit,
    Keep,
    Keys,
    MassLaw,
    Outliers,
    OutsideSpan,
    Phase,
    PromptKeys,
    Redistribute,
    Reweight,
    Scale,
    Sinks,
    SpanKeys,
)
from steerlens.errors import UnsupportedError
from steerlens.passes import Pass, SinkState, fit
from steerlens.spans import Spans

FEW = 256
"""So many sinks of a head are gathered key by key."""
SMALL = 32.0
"""Nats that leave a logit its digits."""


@dataclass(frozen=True)
class Placed:
    """An edit with what it was planned with.

    Attributes:
        key: names it among all edits of its layer and context, for its state.
        prompt_rows: prompt rows that `edit.batch` counts.
        same: equal for edits that lower to the same tensors; cheaper to hash than they are.
        context: names the context, in and out of which its edits come together.
    """

    edit: Edit
    spans: Spans | None
    key: Hashable
    prompt_rows: int | None
    same: Hashable = None
    context: Hashable = None


def lower(placed: list[Placed], now: Pass, layer: int, heads: int, again: bool = False) -> list[Lowered]:
    """The edits of a layer, for the keys it sees in this forward; ablations last, as they win.

    Edits that batch rows or heads have of the same kind (see `PerRow`) become one.

    Args:
        placed: in order of composition.
        now: the forward.
        layer: layer index; `now.keys[layer]` says which columns its keys hold.
        heads: H.
        again: whether this layer attends another time in this forward, to other values by the same weights.
    """
    length, start = now.keys[layer]
    moves: list[Lowered] = []
    cuts: list[Lowered] = []
    for items in [placed] if len(placed) == 1 else _alike(placed):
        edit = items[0].edit
        if isinstance(edit, Reweight) and isinstance(edit.law, Keep):
            moves.append(_keep(items, now, length, start, heads, again))
            continue
        if isinstance(edit, Redistribute) and any(isinstance(group, Outliers) for group in edit.groups):
            moves.append(_move(items, now, layer, heads))
            continue
        # Layers with the same edit share its tensors.
        key = (*[item.key if item.same is None else item.same for item in items], length, start, heads)
        lowered = now.memo.get(key)
        if lowered is None:
            if isinstance(edit, Redistribute):
                lowered = _move(items, now, layer, heads)
            elif isinstance(edit, Ablate):
                lowered = _cut(items, now, heads)
            else:
                lowered = _bias(items, now, length, start, heads)
            now.memo[key] = lowered
        (cuts if isinstance(edit, Ablate) else moves).append(lowered)  # type: ignore[arg-type]
    return moves + _latest(cuts)


def _alike(placed: list[Placed]) -> list[list[Placed]]:
    """Edits in order; together those that one tensor can hold, as they differ by heads, batch rows or a bias's weight.

    Biases commute up to the next law that depends on the row; ablations of one mode up to the next of the other.
    """
    found: list[list[Placed]] = []
    biases: dict[Hashable, list[Placed]] = {}
    cuts: list[Placed] = []
    kept: Hashable = None
    for item in placed:
        edit, kind = item.edit, _kind(item)
        if isinstance(edit, Ablate):
            if not cuts or _kind(cuts[-1]) != kind:
                found.append(cuts := [])
            cuts.append(item)
        elif isinstance(edit, Reweight) and isinstance(edit.law, Scale):
            if (group := biases.get(kind)) is None:
                found.append(group := biases.setdefault(kind, []))
            group.append(item)
        elif kept == kind and _kind(found[-1][0]) == kind and _apart([*found[-1], item]):
            found[-1].append(item)
        else:
            kept, biases = kind, {}
            found.append([item])
    return found


def _kind(item: Placed) -> Hashable:
    edit = item.edit
    if isinstance(edit, Ablate):
        return edit.mode, edit.phase, item.prompt_rows
    if isinstance(edit, Redistribute):
        alike = type(edit.law).select is MassLaw.select and not edit.law.pooled
        heads = None if alike else edit.heads
        return edit.groups, edit.law, heads, edit.phase, edit.queries, id(item.spans), item.prompt_rows
    law, context = None, None
    if not isinstance(edit.law, Scale):
        # what is found in a prompt outlives the forward, and contexts come and go one by one
        law, context = edit.law, item.context
    return edit.keys, law, edit.phase, edit.queries, id(item.spans), item.prompt_rows, context


def _apart(items: list[Placed]) -> bool:
    """Whether no batch row has two of these edits."""
    rows = [row for item in items for row in item.edit.batch or (-1,)]
    return -1 not in rows and len(set(rows)) == len(rows)


def _latest(cuts: list[Lowered]) -> list[Lowered]:
    """Ablations that do not overlap: the later one wins."""
    if len(cuts) < 2:
        return cuts
    found: list[Lowered] = []
    taken: torch.Tensor | None = None
    for cut in reversed(cuts):
        assert isinstance(cut, Cut)
        where = cut.outputs
        if taken is not None:
            cut = Cut(where & ~taken, cut.uniform)
        taken = where if taken is None else taken | where
        found.append(cut)
    return found


def _table(items: list[Placed], now: Pass, heads: int) -> torch.Tensor:
    """What edits add up to per batch row and head, fp32 [B or 1, H]: a bias's nats, 1 for other edits."""
    rows = None if all(item.edit.batch is None for item in items) else items[0].prompt_rows
    entries = tuple((item.edit.batch, item.edit.heads, _weight(item.edit)) for item in items)
    found = _tensor(entries, rows or 1, heads, now.prompt.first.device)
    return found if rows is None else now.prompt.expand(found)


def _weight(edit: Edit) -> float:
    return edit.law.log_weight if isinstance(edit, Reweight) and isinstance(edit.law, Scale) else 1.0


@lru_cache(maxsize=1024)
def _tensor(entries: tuple[Any, ...], rows: int, heads: int, device: torch.device) -> torch.Tensor:
    table = [[0.0] * heads for _ in range(rows)]
    for batch, chosen, weight in entries:
        for row in range(rows) if batch is None else batch:
            for head in chosen:
                table[row][head] += weight
    with torch.inference_mode(False):  # it outlives the forward, and a later one may need gradients
        return torch.tensor(table).to(device)


def _keys(item: Placed, keys: Keys, now: Pass, length: int, start: int) -> torch.Tensor:
    key = (keys, id(item.spans), length, start)
    if key not in now.memo:
        now.memo[key] = fit(now.key_columns(keys, item.spans), length, start)
    return now.memo[key]  # type: ignore[return-value]


def _rows(item: Placed, phase: Phase, queries: Keys | None, now: Pass) -> torch.Tensor | None:
    """Query rows of a phase that are the tokens `queries`, bool [B, Tq]; `None` for all."""
    rows = now.rows(phase)
    if queries is None:
        return rows
    if isinstance(queries, OutsideSpan):
        chosen = ~now.key_columns(SpanKeys(queries.group, queries.section), item.spans)
    else:
        chosen = now.key_columns(queries, item.spans)
    chosen = chosen[:, now.q_offset : now.columns]
    return chosen if rows is None else rows & chosen


def _cut(items: list[Placed], now: Pass, heads: int) -> Cut:
    edit = items[0].edit
    assert isinstance(edit, Ablate)
    mask, rows = _table(items, now, heads).bool()[..., None], now.rows(edit.phase)
    return Cut(mask if rows is None else mask & rows[:, None], edit.mode == "uniform")


def _bias(items: list[Placed], now: Pass, length: int, start: int, heads: int) -> Bias:
    edit = items[0].edit
    assert isinstance(edit, Reweight)
    weights, rows = _table(items, now, heads)[..., None], _rows(items[0], edit.phase, edit.queries, now)
    most = isinstance(edit.keys, OutsideSpan) and sum(abs(_weight(item.edit)) for item in items) < SMALL
    keys = _keys(items[0], edit.keys, now, length, start)
    return Bias(weights if rows is None else weights * rows[:, None], keys, most)


def _move(items: list[Placed], now: Pass, layer: int, heads: int) -> MoveMass:
    item, edit, prompt = items[0], items[0].edit, now.prompt
    assert isinstance(edit, Redistribute)
    groups, law = _groups(item, now, layer), edit.law
    if law.pooled and not now.whole_prompt and (now.q_offset < prompt.width or now.q_len > 1):
        raise UnsupportedError(
            f"{law} depends on all rows of the prompt, but this forward holds columns "
            f"{now.q_offset}..{now.columns} with a prompt of {prompt.width}: prefill it in one forward (no "
            "prefill_chunk_size, no reused prefix, no assisted decoding), or choose a law for single rows"
        )
    # As a law with something for each head has them; those that merge do not, and backends want theirs in order.
    used = list(edit.heads) if len(items) == 1 else sorted({head for one in items for head in one.edit.heads})
    own = _table(items, now, heads)[:, used, None] > 0
    floor = law.floor() if len(edit.groups) == 1 else None
    raised = None if floor is None else (floor[0], own[..., 0] * floor[1])
    if (rows := _rows(item, edit.phase, edit.queries, now)) is not None:
        own = own & rows[:, None]
    origin = prompt.expand(torch.arange(item.prompt_rows or prompt.started))
    real = now.real_rows()

    def weigh(mass: torch.Tensor) -> torch.Tensor:
        tokens = mass.new_ones(mass.shape[0], mass.shape[2], dtype=torch.bool) if real is None else real
        # What a law gives where nothing is seen may be inf or NaN, and would reach its gradient.
        some = mass > 0
        found = law.log_weights(torch.where(some, mass, 0), origin, tokens)
        return torch.where(own[..., None] & some, found.clamp(min=HIDE), 0)

    return MoveMass(used, groups, weigh, law.raw, raised, rows)


def _groups(item: Placed, now: Pass, layer: int) -> torch.Tensor:
    """The disjoint keys of an edit's groups, bool [B, n, Tk]."""
    assert isinstance(item.edit, Redistribute)
    (length, start), groups = now.keys[layer], item.edit.groups
    of = layer if any(isinstance(each, Outliers) for each in groups) else None
    key = (groups, id(item.spans), length, start, of)
    if key not in now.memo:
        found = [
            _outliers(item, each, now, layer) if isinstance(each, Outliers) else _keys(item, each, now, length, start)
            for each in groups
        ]
        keys = torch.stack(found, 1)
        now.memo[key] = keys & (keys.long().cumsum(1) == 1)
    return now.memo[key]  # type: ignore[return-value]


def _outliers(item: Placed, keys: Outliers, now: Pass, layer: int) -> torch.Tensor:
    peaks, known = now.prompt.peaks.get((layer, keys.channels)), min(now.columns, now.prompt.width)
    if peaks is None or peaks.shape[1] < known:
        raise UnsupportedError(
            f"tokens with massive activations are found as layer {layer} reads the prompt, but the cache holds prompt "
            "columns that it read before this steering, or in another prompt: give the whole text without that cache"
        )
    among = now.key_columns(PromptKeys() if keys.group is None else SpanKeys(keys.group), item.spans)
    # a layer on a device of its own reads what the one before it left on another
    found = fit(peaks > keys.threshold, now.columns).to(among.device)
    return fit(among & found, *now.keys[layer])


def _keep(items: list[Placed], now: Pass, length: int, start: int, heads: int, again: bool) -> KeepMass:
    item, edit = items[0], items[0].edit
    assert isinstance(edit, Reweight) and isinstance(edit.law, Keep)
    law, keys = edit.law, edit.keys
    used = sorted({head for one in items for head in one.edit.heads})
    own = None if edit.batch is None else _table(items, now, heads)[:, used].bool()
    found: list[torch.Tensor] = []

    def find(sums: Sums) -> torch.Tensor:
        if not found:
            if isinstance(keys, Sinks):
                columns = _sinks(item, keys, now, length, start, sums, again)
            else:
                columns = _keys(item, edit.keys, now, length, start)[:, None].expand(-1, len(used), -1)
            found.append(columns if own is None else columns & own[..., None])
        return found[0]

    def few() -> Few | None:
        state = now.prompt.sinks.get(item.key)
        if state is None or again or own is not None or not isinstance(keys, Sinks) or keys.running:
            return None
        columns, meant = state.index
        # In a cache that was cropped into its prompt some of them are no keys.
        if columns.shape[-1] > FEW or state.keys.shape[-1] > start + length:
            return None
        if start:
            columns, meant = (columns - start).clamp(min=0), meant & (columns >= start)
        return Few(columns, meant, state.kept)

    return KeepMass(used, law.fraction, find, _rows(item, edit.phase, edit.queries, now), few)


def _sinks(item: Placed, rule: Sinks, now: Pass, length: int, start: int, sums: Sums, again: bool) -> torch.Tensor:
    prompt = now.prompt
    state = prompt.sinks.get(item.key)
    if state is None:
        if not now.whole_prompt:
            raise UnsupportedError(
                f"act finds its sinks in the attention of the whole prompt, but this forward holds columns "
                f"{now.q_offset}..{now.columns} of a prompt of {prompt.width}: prefill the prompt in one forward under "
                "the steering (no prefill_chunk_size, no reused prefix)"
            )
        counted = now.rows("prompt")
        assert counted is not None
        if (real := now.real_rows()) is not None:
            counted = counted & real
        total, observers = (fit(part, now.columns) for part in sums(counted))
        state = SinkState(total.new_zeros(0, dtype=torch.bool), total, observers)
        state.keys = _select(rule, state, now)[..., : prompt.width]
        prompt.sinks[item.key] = state
    if rule.running and prompt.beams:
        raise UnsupportedError(
            "act with decode='running' keeps sums per row, which beams reorder: use num_beams=1 or decode='frozen'"
        )
    if rule.running and now.columns > prompt.width and not again:
        if now.q_len > 1:
            raise UnsupportedError(
                f"act with decode='running' renews its sinks with every generated row; this forward holds {now.q_len} "
                "rows: it needs the cache (use_cache=True) and no assisted decoding, or decode='frozen'"
            )
        one = torch.ones(prompt.batch, 1, dtype=torch.bool, device=prompt.first.device)
        row, seen = (torch.nn.functional.pad(part, (start, 0)) for part in sums(one))
        state.sums = fit(state.sums, now.columns) + row
        state.counts = fit(state.counts, now.columns) + seen
        state.keys = _select(rule, state, now)
    return fit(state.keys, length, start)


def _select(rule: Sinks, state: SinkState, now: Pass) -> torch.Tensor:
    """Columns whose mean exceeds the threshold, less the spared one, bool [B, h, C]."""
    prompt, columns = now.prompt, state.sums.shape[-1]
    where = torch.arange(columns, device=state.sums.device)
    mean = state.sums / state.counts.clamp(min=1)
    threshold = torch.full((prompt.batch, 1, 1), rule.threshold, device=mean.device)
    if rule.relative:
        threshold = threshold / prompt.tokens[:, None, None]
    real = where >= prompt.first[:, None] if now.real is None else fit(now.real, columns)
    found = (mean > threshold) & real[:, None]
    if rule.spare == "first_token":
        return found & (where != prompt.first[:, None])[:, None]
    return found & (found.long().cumsum(-1) > 1)
