"""The definition: attention weights written out in fp32, edited one after the other, applied to V.

Edits act on the logarithms of the weights: a weight too small for fp32 is still a share of what lies outside a set.
Query rows are taken in blocks, so memory is O(block·Tk) and the result is the same; with one block it is the textbook.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from steerlens.backends.call import Bias, Call, Cut, KeepMass, Lowered, MoveMass, Sums


def attention(call: Call, budget: int | None = None) -> torch.Tensor:
    """Steered attention, [B, H, Tq, Dv] in the dtype of `value`.

    Args:
        call: the call and its edits.
        budget: how many weights may be held at once; `None` for 16M.
    """
    edits = resolve(call, budget)
    outputs = []
    for rows in blocks(call, budget):
        found = weights(call, edits, rows)
        outputs.append(_times_value(found, call))
    return torch.cat(outputs, 2).to(call.value.dtype)


def weights(call: Call, edits: list[Resolved], rows: slice, heads: list[int] | None = None) -> torch.Tensor:
    """Attention weights of a block of query rows after `edits`, fp32 (fp64 for fp64 inputs) [B, h, r, Tk].

    With learned sinks a row sums to 1 less what its head's sink takes; after a raw law, to its gain.

    Args:
        call: the call.
        edits: resolved edits (see `resolve`).
        rows: the block.
        heads: the query heads wanted; `None` for all H.
    """
    return weights_and_lse(call, edits, rows, heads)[0]


def weights_and_lse(
    call: Call, edits: list[Resolved], rows: slice, heads: list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weights`, and the log-sum-exp of the logits before any edit, learned sinks included, in nats, [B, h, r]."""
    everything = list(range(call.query.shape[1]))
    wanted = everything if heads is None else heads
    x = _with_sinks(logits(call, rows, wanted), call, wanted)
    top = x.amax(-1, keepdim=True)
    seen = top > -torch.inf  # a pad sees no key
    x = torch.where(seen, x, 0).log_softmax(-1)
    lse = torch.where(seen, top - x.amax(-1, keepdim=True), -torch.inf)[..., 0]
    more = 0 if call.sinks is None else 1
    for edit in edits:
        if isinstance(edit, Bias):
            x = _scale(x, edit, rows, wanted, more)
        elif isinstance(edit, Kept):
            x = _keep(x, edit, rows, wanted, more)
    a = x.exp() * seen
    for edit in edits:
        if isinstance(edit, Gain):
            a = a * edit.factor[:, wanted, rows, None]
    for edit in edits:
        if isinstance(edit, Cut):
            visible = F.pad(call.visible(rows), (0, more)).to(a.dtype)
            visible = visible if visible.shape[1] == 1 else visible[:, wanted]
            flat = visible / visible.sum(-1, keepdim=True).clamp(min=1)
            where = edit.outputs[:, wanted]
            where = where if where.shape[-1] == 1 else where[..., rows]
            a = torch.where(where[..., None], flat if edit.uniform else torch.zeros_like(flat), a)
    return a[..., : a.shape[-1] - more], lse


def _with_sinks(x: torch.Tensor, call: Call, heads: list[int]) -> torch.Tensor:
    if call.sinks is None:
        return x
    return torch.cat([x, call.sinks.to(x.dtype)[heads][None, :, None, None].expand(*x.shape[:3], 1)], -1)


def logits(call: Call, rows: slice, heads: list[int]) -> torch.Tensor:
    """Scaled, capped and masked logits of some heads, fp32 or fp64 [B, h, r, Tk]; -inf where not visible."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query = call.query[:, :, rows].to(dtype)
    groups = call.groups
    if heads == list(range(query.shape[1])):
        B, H, r, D = query.shape
        grouped = query.reshape(B, H // groups, groups * r, D)
        x = (grouped @ call.key.to(dtype).transpose(-1, -2)).reshape(B, H, r, -1)
    else:
        x = query[:, heads] @ call.key[:, [h // groups for h in heads]].to(dtype).transpose(-1, -2)
    x = x * call.scaling
    if call.softcap is not None:
        x = call.softcap * torch.tanh(x / call.softcap)
    mask = call.additive(rows, dtype)
    return x + (mask if mask.shape[1] == 1 else mask[:, heads])


class Kept:
    """A `KeepMass` whose keys are known, bool [B, h, Tk]."""

    def __init__(self, edit: KeepMass, keys: torch.Tensor) -> None:
        self.edit, self.keys = edit, keys


class Gain:
    """A factor on the weights of a row, fp32 [B, H, Tq]."""

    def __init__(self, factor: torch.Tensor) -> None:
        self.factor = factor


Resolved = Lowered | Kept | Gain


def resolve(call: Call, budget: int | None = None, edits: list[Lowered] | None = None) -> list[Resolved]:
    """The edits with what they find in the weights that the edits before them leave.

    A `KeepMass` has its keys, a `MoveMass` becomes a bias for each of its groups.
    """
    resolved: list[Resolved] = []
    for edit in call.edits if edits is None else edits:
        if isinstance(edit, KeepMass):
            resolved.append(Kept(edit, edit.find(summer(call, list(resolved), edit.heads, budget))))
        elif isinstance(edit, MoveMass):
            mass = masses(call, resolved, edit, budget)
            weights, heads = edit.weigh(mass), call.query.shape[1]
            table = edit.spread(weights, heads)
            resolved += [Bias(table[..., g], edit.keys[:, g]) for g in range(table.shape[-1])]
            if edit.raw:
                resolved.append(Gain(edit.gain(mass, weights, heads)))
        else:
            resolved.append(edit)
    return resolved


def masses(call: Call, edits: list[Resolved], edit: MoveMass, budget: int | None = None) -> torch.Tensor:
    """What the groups of `edit` hold after `edits`, fp32 [B, h, Tq, n]; a raw law's gain left out."""
    edits = [other for other in edits if not isinstance(other, Gain)]
    keys = edit.keys.mT[:, None]
    found = []
    for rows in blocks(call, budget, len(edit.heads)):
        a = weights(call, edits, rows, edit.heads)
        found.append(a @ keys.to(a.dtype))
    return torch.cat(found, 2)


def summer(call: Call, edits: list[Resolved], heads: list[int], budget: int | None = None) -> Sums:
    """Sums attention over chosen query rows, block by block."""

    @torch.no_grad()
    def sums(counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total: torch.Tensor | float = 0.0
        observers: torch.Tensor | int = 0
        for rows in blocks(call, budget, len(heads)):
            chosen = counted[:, None, rows, None]
            total = total + (weights(call, edits, rows, heads) * chosen).sum(2)
            visible = call.visible(rows)
            observers = observers + ((visible if visible.shape[1] == 1 else visible[:, heads]) & chosen).sum(2)
        assert isinstance(total, torch.Tensor) and isinstance(observers, torch.Tensor)
        return total, observers.float()

    return sums


def blocks(call: Call, budget: int | None = None, heads: int | None = None) -> list[slice]:
    """Blocks of query rows whose weights stay within `budget` elements."""
    per_row = call.query.shape[0] * (heads or call.query.shape[1]) * call.key.shape[2]
    size = max(1, (budget or 1 << 24) // max(per_row, 1))
    return [slice(i, min(i + size, call.query.shape[2])) for i in range(0, call.query.shape[2], size)]


def near(call: Call, edits: list[Resolved], rows: slice) -> tuple[Call, list[Resolved], int]:
    """The call and its edits with no keys but those that a block of rows may see, and the place of the first of them.

    Under a mask of the user's, all keys are kept.
    """
    if not (call.plain or call.mask is None or call.window is not None):
        return call, edits, 0
    last = min(call.offset + rows.stop, call.key.shape[2])
    first = 0 if call.window is None else min(max(call.offset + rows.start - call.window + 1, 0), last - 1)
    keys = slice(first, last)
    mask, real = (None if table is None else table[..., keys] for table in (call.mask, call.real))
    key, value = call.key[:, :, keys], call.value[:, :, keys]
    kept: list[Resolved] = []
    for edit in edits:
        if isinstance(edit, Bias):
            edit = Bias(edit.weights, edit.keys[:, keys])
        elif isinstance(edit, Kept):
            edit = Kept(edit.edit, edit.keys[..., keys])
        kept.append(edit)
    return replace(call, key=key, value=value, mask=mask, real=real, offset=call.offset - first), kept, first


def _scale(x: torch.Tensor, edit: Bias, rows: slice, heads: list[int], more: int) -> torch.Tensor:
    u = edit.weights[:, heads].to(x.dtype)
    u = (u if u.shape[-1] == 1 else u[..., rows])[..., None]
    keys = F.pad(edit.keys, (0, more))[:, None, None]
    return torch.where(u == 0, x, (x + u * keys).log_softmax(-1))


def _keep(x: torch.Tensor, kept: Kept, rows: slice, heads: list[int], more: int) -> torch.Tensor:
    edit = kept.edit
    place = {head: i for i, head in enumerate(edit.heads)}
    chosen = [i for i, head in enumerate(heads) if head in place]
    if not chosen:
        return x
    inside = F.pad(kept.keys[:, [place[heads[i]] for i in chosen]], (0, more))[:, :, None]
    old = x[:, chosen]
    applies = ((old > -torch.inf) & ~inside).any(-1, keepdim=True)
    if edit.rows is not None:
        applies = applies & edit.rows[:, None, rows, None]
    outside = old.masked_fill(inside & applies, -torch.inf).logsumexp(-1, keepdim=True)
    mass = (old.exp() * inside).sum(-1, keepdim=True)
    less = math.log(edit.fraction) if edit.fraction > 0 else -torch.inf
    rest = (1 - edit.fraction * mass.clamp(max=1)).log() - outside
    new = torch.where(applies, torch.where(inside, old + less, old + rest), old)
    return x.index_copy(1, torch.tensor(chosen, device=x.device), new)


def _times_value(a: torch.Tensor, call: Call) -> torch.Tensor:
    B, H, r, Tk = a.shape
    value = call.value.to(a.dtype)
    return (a.reshape(B, value.shape[1], -1, Tk) @ value).reshape(B, H, r, -1)
