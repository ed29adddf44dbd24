"""From symbolic edits to the tensors of one attention call."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

import torch

from steerlens.backends.call import Bias, Cut, Few, KeepMass, Lowered, Sums
from steerlens.edits import Ablate, Edit, Keep, Reweight, Scale, Sinks
from steerlens.errors import UnsupportedError
from steerlens.passes import Pass, SinkState, fit
from steerlens.spans import Spans

FEW = 256
"""So many sinks of a head are gathered key by key."""


@dataclass(frozen=True)
class Placed:
    """An edit with what it was planned with.

    Attributes:
        key: names it among all edits of its layer and context, for its state.
        prompt_rows: prompt rows that `edit.batch` counts.
        same: equal for edits that lower to the same tensors; cheaper to hash than they are.
    """

    edit: Edit
    spans: Spans | None
    key: Hashable
    prompt_rows: int | None
    same: Hashable = None


def lower(placed: list[Placed], now: Pass, layer: int, heads: int, again: bool = False) -> list[Lowered]:
    """The edits of a layer, for the keys it sees in this forward; ablations last, as they win.

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
    for item in placed:
        edit = item.edit
        if isinstance(edit, Reweight) and isinstance(edit.law, Keep):
            moves.append(_keep(item, now, length, start, again))
            continue
        # Layers with the same edit share its tensors.
        key = (item.key if item.same is None else item.same, length, start, heads)
        lowered = now.memo.get(key)
        if lowered is None:
            lowered = _cut(item, now, heads) if isinstance(edit, Ablate) else _bias(item, now, length, start, heads)
            now.memo[key] = lowered
        (cuts if isinstance(edit, Ablate) else moves).append(lowered)  # type: ignore[arg-type]
    return moves + _latest(cuts)


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


def _batch(item: Placed, now: Pass) -> torch.Tensor | None:
    if item.edit.batch is None:
        return None
    assert item.prompt_rows is not None
    return now.prompt.rows_of(item.edit.batch, item.prompt_rows)


def _rows(item: Placed, now: Pass) -> torch.Tensor | None:
    rows, batch = now.rows(item.edit.phase), _batch(item, now)
    if batch is None:
        return rows
    everywhere = batch[:, None].expand(-1, now.q_len)
    return everywhere if rows is None else rows & everywhere


@lru_cache(maxsize=1024)
def _head_mask(heads: tuple[int, ...], total: int, device: torch.device, weight: float | None = None) -> torch.Tensor:
    """Bool [total], or with a weight fp32 [1, total, 1]: `weight` at `heads`."""
    with torch.inference_mode(False):  # it outlives the forward, and a later one may need gradients
        mask = torch.zeros(total, dtype=torch.bool)
        mask[list(heads)] = True
        return mask.to(device) if weight is None else (mask.float()[None, :, None] * weight).to(device)


def _keys(item: Placed, edit: Reweight, now: Pass, length: int, start: int) -> torch.Tensor:
    key = (edit.keys, edit.batch, id(item.spans), item.prompt_rows, length, start)
    if key not in now.memo:
        keys = fit(now.key_columns(edit.keys, item.spans), length, start)
        batch = _batch(item, now)
        now.memo[key] = keys if batch is None else keys & batch[:, None]
    return now.memo[key]  # type: ignore[return-value]


def _cut(item: Placed, now: Pass, heads: int) -> Cut:
    assert isinstance(item.edit, Ablate)
    mask, rows = _head_mask(item.edit.heads, heads, now.prompt.first.device)[None, :, None], _rows(item, now)
    return Cut(mask if rows is None else mask & rows[:, None], item.edit.mode == "uniform")


def _bias(item: Placed, now: Pass, length: int, start: int, heads: int) -> Bias:
    edit = item.edit
    assert isinstance(edit, Reweight) and isinstance(edit.law, Scale)
    weights = _head_mask(edit.heads, heads, now.prompt.first.device, edit.law.log_weight)
    rows = now.rows(edit.phase)
    return Bias(weights if rows is None else weights * rows[:, None], _keys(item, edit, now, length, start))


def _keep(item: Placed, now: Pass, length: int, start: int, again: bool) -> KeepMass:
    edit = item.edit
    assert isinstance(edit, Reweight) and isinstance(edit.law, Keep)
    law = edit.law
    found: list[torch.Tensor] = []

    def find(sums: Sums) -> torch.Tensor:
        if not found:
            if isinstance(edit.keys, Sinks):
                keys, batch = _sinks(item, edit.keys, now, length, start, sums, again), _batch(item, now)
                found.append(keys if batch is None else keys & batch[:, None, None])
            else:
                found.append(_keys(item, edit, now, length, start)[:, None].expand(-1, len(edit.heads), -1))
        return found[0]

    def few() -> Few | None:
        state = now.prompt.sinks.get(item.key)
        if state is None or again or edit.batch is not None or not isinstance(edit.keys, Sinks) or edit.keys.running:
            return None
        columns, meant = state.index
        # In a cache that was cropped into its prompt some of them are no keys.
        if columns.shape[-1] > FEW or state.keys.shape[-1] > start + length:
            return None
        if start:
            columns, meant = (columns - start).clamp(min=0), meant & (columns >= start)
        return Few(columns, meant, state.kept)

    return KeepMass(list(edit.heads), law.fraction, find, now.rows(edit.phase), few)


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
