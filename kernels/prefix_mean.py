"""Mean of V over the keys that each row sees: what a head with uniform attention gives, without attention.

    m_i = (Σ_{j seen by i} v_j) / (number of keys seen)

Seen means causal, in the window and not hidden; then the sum is that of whole tiles before the row, from a running sum
over tiles in fp64 so that a window's difference of two of them keeps its digits, and of one or two tiles near the row.
With a 4-D mask the sum runs over all keys of the row. Rows that are not cut are left alone.

Shapes: B, H, G, Tq, Tk, Dv as in `steered_prefill`; T tiles of N keys. Source: heads.md §1 (uniform ablation).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from steerlens.kernels._launch import (
    ceil_div,
    interpreted,
    or_one,
    precision,
    steps,
    widths,
)
from steerlens.kernels._tiles import CHANGING, load_rows, store_rows


@triton.jit(do_not_specialize=CHANGING)
def tile_sum_kernel(
    p_v, p_sum, p_count, p_bits, p_cut, p_heads, s_vb, s_vh, s_vn, s_lb, s_lh, s_cb, s_ch, s_cr, h, heads_per_kv, T, Tk,
    DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, LABELS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i_t, i_place, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_h = i_place
    if HEADS:
        i_h = tl.load(p_heads + i_place).to(tl.int64)
    if s_cr == 0 and tl.load(p_cut + i_b * s_cb + i_h * s_ch) != 1:
        return
    o_n = i_t * N + tl.arange(0, N)
    m_n = o_n < Tk
    if LABELS:
        b_label = tl.load(p_bits + i_b * s_lb + i_h * s_lh + o_n, mask=m_n, other=4).to(tl.int32)
        m_n = (b_label & 4) == 0
    # [N, DV]
    b_v1, b_v2 = load_rows(
        p_v + i_b * s_vb + i_h // heads_per_kv * s_vh + o_n.to(tl.int64) * s_vn, m_n, DV, V1, V2, False
    )
    o_row = (i_b * h + i_place) * T + i_t
    tl.store(p_count + o_row, tl.sum(tl.where(m_n, 1, 0), 0))
    o_one = tl.zeros([1], tl.int64)
    b_s2 = 0.0
    if V2 > 0:
        b_s2 = tl.sum(b_v2.to(tl.float32), 0)[None, :]
    store_rows(p_sum + o_row * DV + o_one, tl.sum(b_v1.to(tl.float32), 0)[None, :], b_s2, o_one == 0, DV, V1, V2)


@triton.jit
def whole_tiles(p_sum, p_count, b_stop, m_r, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, N: tl.constexpr):
    # running sums [R, DV] and counts [R] over the tiles before the one that holds column b_stop
    o_t = (b_stop // N).to(tl.int64)
    b_p1, b_p2 = load_rows(p_sum + o_t * DV, m_r, DV, V1, V2, False)
    return b_p1, b_p2, tl.load(p_count + o_t, mask=m_r, other=0)


@triton.jit
def weighted(
    b_a1, b_a2, b_w, p_v, o_n, m_n, s_vn, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, PRECISION: tl.constexpr
):
    # adds Σ_n w[r, n]·v_n
    b_v1, b_v2 = load_rows(p_v + o_n.to(tl.int64) * s_vn, m_n, DV, V1, V2, False)
    b_a1 = tl.dot(b_w.to(b_v1.dtype), b_v1, b_a1, input_precision=PRECISION)
    if V2 > 0:
        b_a2 = tl.dot(b_w.to(b_v1.dtype), b_v2, b_a2, input_precision=PRECISION)
    return b_a1, b_a2


@triton.jit(do_not_specialize=CHANGING)
def prefix_mean_kernel(
    p_v, p_o, p_sum, p_count, p_bits, p_mask, p_cut, p_heads,
    s_vb, s_vh, s_vn, s_ob, s_oh, s_or, s_lb, s_lh, s_mb, s_mh, s_mr, s_cb, s_ch, s_cr,
    h, heads_per_kv, Tq, Tk, T, offset, window,
    DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, LABELS: tl.constexpr, MASK: tl.constexpr,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i_r, i_place, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_h = i_place
    if HEADS:
        i_h = tl.load(p_heads + i_place).to(tl.int64)
    o_r = i_r * R + tl.arange(0, R)
    m_r = o_r < Tq
    m_r = m_r & (tl.load(p_cut + i_b * s_cb + i_h * s_ch + o_r * s_cr, mask=m_r, other=0) == 1)
    if tl.max(tl.where(m_r, 1, 0), 0) == 0:
        return
    p_v += i_b * s_vb + i_h // heads_per_kv * s_vh
    p_bits += i_b * s_lb + i_h * s_lh
    b_a1, b_a2 = tl.zeros([R, V1], tl.float32), 0.0
    if V2 > 0:
        b_a2 = tl.zeros([R, V2], tl.float32)
    b_count = tl.zeros([R], tl.int32)
    i_lo, i_hi = 0, T
    b_stop, b_start = tl.zeros([R], tl.int32), tl.zeros([R], tl.int32)
    if MASK == 0:
        # row r sees columns [b_start, b_stop)
        b_stop = tl.minimum(tl.maximum(o_r + offset + 1, 0), Tk)
        i_lo = tl.minimum(tl.maximum(i_r * R + offset + 1, 0), Tk) // N
        i_hi = tl.minimum(T, tl.minimum(tl.maximum(i_r * R + R + offset, 0), Tk) // N + 1)
    for i in range(i_lo, i_hi):
        o_n = i * N + tl.arange(0, N)
        m_n = o_n < Tk
        if LABELS:
            m_n = (tl.load(p_bits + o_n, mask=m_n, other=4).to(tl.int32) & 4) == 0
        if MASK == 0:
            m_seen = m_n[None, :] & (o_n[None, :] < b_stop[:, None]) & (i == b_stop // N)[:, None]
        else:
            p = p_mask + i_b * s_mb + i_h * s_mh + o_r.to(tl.int64)[:, None] * s_mr + o_n[None, :]
            m_seen = m_n[None, :] & m_r[:, None]
            if MASK == 1:
                m_seen = m_seen & (tl.load(p, mask=m_seen, other=0) != 0)
            else:
                m_seen = m_seen & (tl.load(p, mask=m_seen, other=float("-inf")).to(tl.float32) > -9e3)
        b_w = tl.where(m_seen, 1.0, 0.0)
        b_count += tl.sum(tl.where(m_seen, 1, 0), 1)
        b_a1, b_a2 = weighted(b_a1, b_a2, b_w, p_v, o_n, m_n, s_vn, DV, V1, V2, PRECISION)
    if MASK == 0:
        p_sum += (i_b * h + i_place) * (T + 1) * DV
        p_count += (i_b * h + i_place) * (T + 1)
        b_p1, b_p2, b_whole = whole_tiles(p_sum, p_count, b_stop, m_r, DV, V1, V2, N)
        b_count += b_whole
        if WINDOW:
            b_start = tl.minimum(tl.maximum(o_r + offset + 1 - window, 0), b_stop)
            i_lo = tl.minimum(tl.maximum(i_r * R + offset + 1 - window, 0), Tk) // N
            i_hi = tl.minimum(T, tl.minimum(tl.maximum(i_r * R + R + offset - window, 0), Tk) // N + 1)
            for i in range(i_lo, i_hi):
                o_n = i * N + tl.arange(0, N)
                m_n = o_n < Tk
                if LABELS:
                    m_n = (tl.load(p_bits + o_n, mask=m_n, other=4).to(tl.int32) & 4) == 0
                m_seen = m_n[None, :] & (o_n[None, :] < b_start[:, None]) & (i == b_start // N)[:, None]
                b_count -= tl.sum(tl.where(m_seen, 1, 0), 1)
                b_w = tl.where(m_seen, -1.0, 0.0)
                b_a1, b_a2 = weighted(b_a1, b_a2, b_w, p_v, o_n, m_n, s_vn, DV, V1, V2, PRECISION)
            b_b1, b_b2, b_whole = whole_tiles(p_sum, p_count, b_start, m_r, DV, V1, V2, N)
            b_count -= b_whole
            b_p1 -= b_b1
            if V2 > 0:
                b_p2 -= b_b2
        b_a1 += b_p1.to(tl.float32)
        if V2 > 0:
            b_a2 += b_p2.to(tl.float32)
    b_by = 1.0 / tl.maximum(b_count, 1).to(tl.float32)
    p_or = p_o + i_b * s_ob + i_place * s_oh + o_r.to(tl.int64) * s_or
    b_a1 = b_a1 * b_by[:, None]
    if V2 > 0:
        b_a2 = b_a2 * b_by[:, None]
    store_rows(p_or, b_a1, b_a2, m_r, DV, V1, V2)


def prefix_mean(
    out: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bits: torch.Tensor | None,
    cut: torch.Tensor,
    heads_per_kv: int,
    heads: torch.Tensor | None,
    offset: int,
    window: int,
) -> None:
    """Write the means into the rows of `out` [B, h, Tq, Dv] where `cut` [B or 1, H or 1, Tq or 1] is 1."""
    B, h, Tq, DV = out.shape
    Tk = value.shape[2]
    V1, V2 = widths(DV)
    # what fits into the 99 KiB of shared memory that the smallest GPUs have, an fp32 mask beside it
    single = value.dtype == torch.float32
    N, stages = 16 if interpreted() else 32 if single else 64, 2 if single or DV > 128 else 3
    T = ceil_div(Tk, N)
    kind = 0 if mask is None else 2 if mask.is_floating_point() else 1
    labels, cuts, like = steps(bits, 2), steps(cut, 3), value
    sums, counts = like, like
    flags = {"DV": DV, "V1": V1, "V2": V2, "LABELS": bits is not None, "HEADS": heads is not None, "N": N}
    if kind == 0:
        # Heads that are not cut leave their sums unwritten, and nobody reads them.
        total = torch.empty(B, h, T, DV, dtype=torch.float32, device=value.device)
        count = torch.empty(B, h, T, dtype=torch.int32, device=value.device)
        tile_sum_kernel[(T, h, B)](
            value, total, count, or_one(bits, like), cut, or_one(heads, like), *value.stride()[:3], *labels, *cuts,
            h, heads_per_kv, T, Tk, **flags, num_warps=4,
        )  # fmt: skip
        sums = torch.nn.functional.pad(total.cumsum(2, dtype=torch.float64), (0, 0, 1, 0))
        counts = torch.nn.functional.pad(count.cumsum(2, dtype=torch.int32), (1, 0))
    R = N
    prefix_mean_kernel[(ceil_div(Tq, R), h, B)](
        value, out, sums, counts, or_one(bits, like), or_one(mask, like), cut, or_one(heads, like),
        *value.stride()[:3], *out.stride()[:3], *labels, *steps(mask, 3), *cuts,
        h, heads_per_kv, Tq, Tk, T, offset, window,
        **flags, MASK=kind, WINDOW=window > 0, PRECISION=precision(value.dtype), R=R, num_warps=4,
        num_stages=stages,
    )  # fmt: skip
