"""Labels of keys, and where keys with a label lie: what lets a kernel treat unmarked tiles as plain attention.

A label holds, bit by bit: the group of the key (0..3), whether nothing may see it (padding, a gate), and the terms that
it is in. Groups exclude each other: row-dependent laws move mass between them. Terms overlap freely, each adds a bias,
and masses are measured of them.

    label = group + 4·hidden + 8·(term 0) + 16·(term 1) + …        uint8 up to 5 terms, int32 up to 28

`index` sorts the keys once for all rows that attend to them: tiles of keys that are plain (group 0, visible, in no
term), tiles that hold other keys of group 0, and the keys of each further group one by one, so that every group is
walked densely however its keys are scattered. Two launches and a cumulative sum over tiles; no synchronisation.

B' and H' are B and H, or 1 where rows or heads share their keys. T = ceil(Tk / N) tiles of N keys, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from steerlens.kernels._launch import (
    FIRST_TERM,
    HIDDEN,
    MAX_GROUPS,
    MAX_TERMS,
    ceil_div,
    refuse,
)
from steerlens.kernels._tiles import CHANGING


@dataclass
class Labels:
    """Labels of keys, and their indices by tile size.

    Attributes:
        bits: uint8 or int32 [B', H', Tk].
        groups: G, 1 to 4.
        terms: number of terms.
    """

    bits: torch.Tensor
    groups: int = 1
    terms: int = 0
    known: dict[int, Index] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        *,
        group: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        terms: list[torch.Tensor] | tuple[torch.Tensor, ...] = (),
        groups: int | None = None,
    ) -> Labels:
        """Labels from tables that broadcast to [B', H', Tk].

        Args:
            group: group of each key, integer; `None` for 0 everywhere.
            hidden: keys that no row sees, bool.
            terms: per term the keys in it, bool.
            groups: G; by default 2 where `group` is given, else 1.

        Raises:
            ValueError: for too many groups or terms, or a table of other than three axes.
        """
        tables = [t for t in (group, hidden, *terms) if t is not None]
        if not tables:
            raise ValueError("labels need a group table, a table of hidden keys or a term")
        for table in tables:
            if table.ndim != 3:
                refuse("a label table", tuple(table.shape), "[B or 1, H or 1, Tk]")
        groups = groups if groups is not None else 2 if group is not None else 1
        if not 1 <= groups <= MAX_GROUPS:
            refuse("groups", groups, f"1 to {MAX_GROUPS}; more groups: measure masses, then one biased pass")
        if len(terms) > MAX_TERMS:
            refuse("number of terms", len(terms), f"up to {MAX_TERMS}")
        dtype = torch.uint8 if len(terms) <= 5 else torch.int32
        shape = torch.broadcast_shapes(*(t.shape for t in tables))
        bits = torch.zeros(shape, dtype=dtype, device=tables[0].device)
        if group is not None:
            bits += group.to(dtype)
        if hidden is not None:
            bits += hidden.to(dtype) * HIDDEN
        for place, term in enumerate(terms):
            bits += term.to(dtype) * (1 << (FIRST_TERM + place))
        return cls(bits, groups, len(terms))

    def index(self, block: int) -> Index:
        """The index for tiles of `block` keys, made once."""
        if block not in self.known:
            self.known[block] = index(self.bits, self.groups, block)
        return self.known[block]


@dataclass
class Index:
    """Where keys lie, by tiles of N keys.

    Attributes:
        before: int32 [B', H', 1 + G, T + 1]: in the tiles before each, how many are plain; how many hold other keys of
            group 0; and how many keys each further group has.
        tiles: int32 [B', H', 2, T]: the plain tiles, then the others with keys of group 0, ascending.
        keys: int32 [B', H', G - 1, Tk]: the keys of the further groups, ascending; [.., 1, 1] without any.
    """

    before: torch.Tensor
    tiles: torch.Tensor
    keys: torch.Tensor


@triton.jit(do_not_specialize=CHANGING)
def count_kernel(p_bits, p_count, s_b, s_h, H, T, Tk, GROUPS: tl.constexpr, N: tl.constexpr):
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_t * N + tl.arange(0, N)
    m_n = o_n < Tk
    # [N]
    b_label = tl.load(p_bits + i_b * s_b + i_h.to(tl.int64) * s_h + o_n, mask=m_n, other=4).to(tl.int32)
    b_seen = (b_label & 4) == 0
    b_group = b_label & 3
    p = p_count + (i_b * H + i_h) * (1 + GROUPS) * T + i_t
    i_plain = tl.min(tl.where(b_label == 0, 1, 0), 0)
    i_some = tl.max(tl.where(b_seen & (b_group == 0), 1, 0), 0)
    tl.store(p, i_plain)
    tl.store(p + T, i_some - i_plain)
    for g in tl.static_range(1, GROUPS):
        tl.store(p + (1 + g) * T, tl.sum(tl.where(b_seen & (b_group == g), 1, 0), 0))


@triton.jit(do_not_specialize=CHANGING)
def fill_kernel(p_bits, p_before, p_tiles, p_keys, s_b, s_h, H, T, Tk, GROUPS: tl.constexpr, N: tl.constexpr):
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_row = i_b * H + i_h
    p = p_before + i_row * (1 + GROUPS) * (T + 1) + i_t
    for kind in tl.static_range(2):
        i_at = tl.load(p + kind * (T + 1))
        if tl.load(p + kind * (T + 1) + 1) > i_at:
            tl.store(p_tiles + (i_row * 2 + kind) * T + i_at, i_t)
    if GROUPS > 1:
        o_n = i_t * N + tl.arange(0, N)
        b_label = tl.load(p_bits + i_b * s_b + i_h.to(tl.int64) * s_h + o_n, mask=o_n < Tk, other=4).to(tl.int32)
        for g in tl.static_range(1, GROUPS):
            m_in = ((b_label & 4) == 0) & ((b_label & 3) == g)
            b_at = tl.load(p + (1 + g) * (T + 1)) + tl.cumsum(tl.where(m_in, 1, 0), 0) - 1
            tl.store(p_keys + (i_row * (GROUPS - 1) + g - 1) * Tk + b_at, o_n, mask=m_in)


def index(bits: torch.Tensor, groups: int, block: int) -> Index:
    """The index of `bits` [B', H', Tk] for tiles of `block` keys."""
    return Index(*torch.ops.steerlens.key_index(bits, groups, block))


@torch.library.custom_op("steerlens::key_index", mutates_args=())
def _key_index(bits: torch.Tensor, groups: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, H, Tk = bits.shape
    T = ceil_div(Tk, block)
    bits = bits if bits.stride(2) == 1 else bits.contiguous()
    count = torch.empty(B, H, 1 + groups, T, dtype=torch.int32, device=bits.device)
    strides = (bits.stride(0), bits.stride(1))
    count_kernel[(T, H, B)](bits, count, *strides, H, T, Tk, groups, block, num_warps=1)
    before = torch.nn.functional.pad(count.cumsum(-1, dtype=torch.int32), (1, 0))
    tiles, keys = _lists(bits, groups, T)
    fill_kernel[(T, H, B)](bits, before, tiles, keys, *strides, H, T, Tk, groups, block, num_warps=1)
    return before, tiles, keys


@_key_index.register_fake
def _fake(bits: torch.Tensor, groups: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, H, Tk = bits.shape
    T = (Tk + block - 1) // block
    return bits.new_empty((B, H, 1 + groups, T + 1), dtype=torch.int32), *_lists(bits, groups, T)


def _lists(bits: torch.Tensor, groups: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, Tk = bits.shape
    tiles = torch.empty(B, H, 2, T, dtype=torch.int32, device=bits.device)
    keys = torch.empty((B, H, groups - 1, Tk) if groups > 1 else (1, 1, 1, 1), dtype=torch.int32, device=bits.device)
    return tiles, keys
