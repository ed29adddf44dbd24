"""One attention call with its edits, lowered to tensors: what every backend is given.

Shapes: B batch rows, H query heads, G key/value heads, Tq query rows, Tk keys, D head dim; h heads of one edit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch


@dataclass
class Bias:
    """Adds `weights[b, h, i]` (nats) to the logits of `keys`.

    Attributes:
        weights: fp32 [B or 1, H, Tq or 1].
        keys: bool [B, Tk].
        most: `keys` are most of all keys, and `weights` are small: where nothing but keys takes part, adding the
            negative of `weights` to the others gives the same, and may cost less.
    """

    weights: torch.Tensor
    keys: torch.Tensor
    most: bool = False


@dataclass
class Few:
    """Keys one by one.

    Attributes:
        index: places on the key axis, int64 [B, h, n].
        meant: which of them count, bool [B, h, n]; the rest is filling.
        kept: the backend's own, as long as these keys stay what they are.
    """

    index: torch.Tensor
    meant: torch.Tensor
    kept: dict[str, torch.Tensor]


@dataclass
class KeepMass:
    """ψ' = `fraction`·ψ on the keys that `find` returns, for the query heads `heads`.

    Attributes:
        find: bool [B, h, Tk] from this call; may ask the backend for attention sums (see `Sums`).
        rows: query rows it applies to, bool [B, Tq]; `None` for all.
        few: the found keys one by one, where they are few and known before the call; else `None`.
    """

    heads: list[int]
    fraction: float
    find: Callable[[Sums], torch.Tensor]
    rows: torch.Tensor | None
    few: Callable[[], Few | None] = lambda: None


@dataclass
class MoveMass:
    """Multiplies the weights of groups of keys by what depends on the masses they hold, for the query heads `heads`.

    Attributes:
        keys: of each group, disjoint, bool [B, n, Tk].
        weigh: nats for each group, fp32 [B, h, Tq, n], from their masses, fp32 [B, h, Tq, n].
        raw: the weights are not renormalised.
        floor: of a law for one group that the kernels know, its kind and τ, fp32 [B or 1, h], 0 where it leaves a head;
            see `MassLaw.floor`.
        rows: query rows that it applies to, bool [B, Tq]; `None` for all.
    """

    heads: list[int]
    keys: torch.Tensor
    weigh: Callable[[torch.Tensor], torch.Tensor]
    raw: bool = False
    floor: tuple[str, torch.Tensor] | None = None
    rows: torch.Tensor | None = None

    def gain(self, mass: torch.Tensor, weights: torch.Tensor, heads: int) -> torch.Tensor:
        """What rows sum to after a raw law, 1 + Σ(m_g - 1)·ψ_g, as a table of all heads, fp32 [B, H, Tq]."""
        return self.spread((mass * weights.expm1()).sum(-1), heads) + 1

    def spread(self, values: torch.Tensor, heads: int) -> torch.Tensor:
        """`values` [B, h, ...] of the edit's heads as a table of all, [B, H, ...], 0 elsewhere."""
        if self.heads == list(range(heads)):
            return values
        table = values.new_zeros(values.shape[0], heads, *values.shape[2:])
        return table.index_copy(1, torch.tensor(self.heads, device=values.device), values)


@dataclass
class Cut:
    """Replaces head outputs by the mean of V over the visible keys (`uniform`) or by zeros.

    Attributes:
        outputs: which, bool [B or 1, H, Tq or 1].
    """

    outputs: torch.Tensor
    uniform: bool


def unhidden(mask: torch.Tensor) -> torch.Tensor:
    """Where a bool, 0/1 or additive mask shows a key; -1e4, -1e9 and the like hide it as -inf does."""
    return mask > -9e3 if mask.is_floating_point() else mask.bool()


FEW_ROWS = 16
"""Up to so many query rows a backend takes the simplest way."""
Lowered = Bias | KeepMass | MoveMass | Cut
Sums = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Given the query rows to count, bool [B, Tq]: the attention of each of the edit's heads summed over them, fp32
[B, h, Tk], as it stands before the edit; and how many of them see each key, fp32 [B, 1 or h, Tk]."""


@dataclass
class Call:
    """An attention call.

    Attributes:
        query: [B, H, Tq, D]; key: [B, G, Tk, D]; value: [B, G, Tk, Dv].
        mask: native mask as bool (True = visible) or additive float, [B or 1, H or 1, Tq, Tk]; `None` is causal, and
            where more than one row is all there is, `real`.
        scaling: factor on q·k.
        softcap: c of c·tanh(x/c) on the logits, or `None`.
        offset: column of query row 0 minus column of key 0.
        real: real keys, bool [B, Tk]; `None` for all.
        plain: visible means causal and real, nothing else.
        edits: in order; cuts last.
        sinks: learned sink logits [H], each a key outside every set with a value of zero; `None` for none.
        memo: what calls of one forward share; a `Bias` or `Cut` that two of them have is the same object.
        first: the model's number of query head 0, other than 0 under tensor parallelism alone.
        window: a row sees its own and the `window` - 1 keys before it; given where that, causality and `real` are all
            there is, and `mask` is `None` or says the same.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None
    offset: int
    real: torch.Tensor | None
    plain: bool
    edits: list[Lowered] = field(default_factory=list)
    sinks: torch.Tensor | None = None
    memo: dict[Hashable, object] = field(default_factory=dict)
    first: int = 0
    window: int | None = None

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @cached_property
    def needs_grad(self) -> bool:
        """Whether autograd will want to go through this call."""
        tensors = (self.query, self.key, self.value, self.sinks, self.mask)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def visible(self, rows: slice) -> torch.Tensor:
        """Which keys these query rows see, bool [B or 1, H or 1, r, Tk]."""
        if self.mask is None:
            return self._causal(rows)
        return unhidden(self.mask[:, :, rows])

    def additive(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """The mask as a term on the logits, -inf where not visible."""
        if self.mask is not None and self.mask.dtype != torch.bool:
            mask = self.mask[:, :, rows].to(dtype)
            return mask.masked_fill(~self.visible(rows), -torch.inf)
        visible = self.visible(rows)
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -torch.inf)

    def _causal(self, rows: slice) -> torch.Tensor:
        device = self.query.device
        queries = torch.arange(*rows.indices(self.query.shape[2]), device=device) + self.offset
        ahead = (queries[:, None] - torch.arange(self.key.shape[2], device=device))[None, None]
        visible = ahead >= 0 if self.window is None else (ahead >= 0) & (ahead < self.window)
        return visible if self.real is None else visible & self.real[:, None, None]

    def sees_beside(self, keys: torch.Tensor, heads: list[int]) -> torch.Tensor:
        """Whether the rows of `heads` see a key outside `keys` [B, h, Tk], bool [B, h, Tq]; a learned sink is one."""
        if self.sinks is not None:
            return keys.new_ones(*keys.shape[:2], self.query.shape[2])
        keys = ~keys
        if self.plain or (self.mask is None and self.window is None):
            keys = keys if self.real is None else keys & self.real[:, None]
            upto = keys.long().cummax(-1).values.bool()
            rows = torch.arange(self.query.shape[2], device=keys.device) + self.offset
            return upto[..., rows.clamp(max=keys.shape[-1] - 1)]
        found = []
        for i in range(0, self.query.shape[2], 64):
            visible = self.visible(slice(i, i + 64))
            visible = visible if visible.shape[1] == 1 else visible[:, heads]
            found.append((visible.float() @ keys[..., None].float()).squeeze(-1) > 0)
        return torch.cat(found, -1)
