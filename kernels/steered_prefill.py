"""Steered attention over many query rows: online softmax with edited logits, and laws on the mass of groups of keys.

    x_ij = cap(scaling · q_i·k_j) + Σ_t bias[h, i, t]·1[j in term t]          o_i = Σ_g ψ'_ig · o_g(i)

o_g(i) is attention renormalised inside group g; static edits have one group and ψ' = 1. See README.md for the laws.

A program owns R rows of one query head. It walks the keys of group 0 by tiles of N in two loops: tiles that every row
sees whole and that hold no label run as plain attention does; tiles at the edge of causality, of the window or of the
tensors, and tiles with labels, run the second loop, with masks and terms. Keys of further groups follow one by one, in
dense tiles gathered through the index, each group with a maximum, a sum and an accumulator of its own. The law mixes
them in the end. Tiles out of sight are not visited.

Shapes: B rows of the batch, H query heads, G key/value heads, Tq query rows, Tk keys, D and Dv head dims.
bf16, fp16, fp32 (IEEE products). After FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl
from steerlens.kernels._tiles import (
    CHANGING,
    GROUP_BITS,
    HIDDEN,
    LOG2E,
    NOWHERE,
    accumulate,
    capped,
    dots,
    finish,
    fresh,
    load_rows,
    seen_logits,
    store_rows,
    with_sink,
)


@triton.jit
def edited_tile(
    state, rows, p_kn, p_vn, given, i_n, o_n, m_n,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    LABELS: tl.constexpr, BARRED: tl.constexpr, TERMS: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, RAW: tl.constexpr, ENT: tl.constexpr, ARG: tl.constexpr, MASSES: tl.constexpr,
    OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # any keys i_n + o_n [N], which lie at p_kn and p_vn [N], with all masks and terms
    b_q1, b_q2, b_first, b_last, p_bits, p_bias, p_mask = rows
    scale, softcap, s_bias = given
    b_k1, b_k2 = load_rows(p_kn, m_n, D, D1, D2, False)
    b_s, b_by, b_before, _, b_label = seen_logits(
        b_q1, b_q2, b_k1, b_k2, b_first - i_n, b_last - i_n, o_n, m_n, p_bits + i_n, p_bias, s_bias, p_mask + i_n,
        scale, softcap,
        D2, LABELS, BARRED, False, TERMS, MASK, WINDOW, SOFTCAP, RAW, PRECISION,
    )  # fmt: skip
    b_v1, b_v2 = 0.0, 0.0
    if OUT:
        b_v1, b_v2 = load_rows(p_vn, m_n, DV, V1, V2, False)
    return accumulate(
        state, b_s, b_by, b_before, b_label, i_n, o_n[None, :], b_v1, b_v2,
        True, V2, RAW, ENT, ARG, MASSES, TERMS, LABELS, OUT, PRECISION,
    )  # fmt: skip


@triton.jit
def gathered(
    rows, kv, given, p_keys, p_before, i_lo, i_hi, T, Tk, group: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    TERMS: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ENT: tl.constexpr, ARG: tl.constexpr, MASSES: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    # the keys of one further group between tiles i_lo and i_hi; the index has left out those that are hidden
    state = fresh(R, V1, V2, False, ENT, ARG, MASSES, OUT)
    p_k, s_kn, p_v, s_vn = kv
    i_from, i_to = tl.load(p_before + (1 + group) * (T + 1) + i_lo), tl.load(p_before + (1 + group) * (T + 1) + i_hi)
    p_keys += (group - 1) * Tk
    o_i = i_from + tl.arange(0, N)
    o_next = tl.load(p_keys + o_i, mask=o_i < i_to, other=NOWHERE)
    for _ in range(i_from, i_to, N):
        # loaded a step ahead, as are the numbers of tiles
        o_n = o_next
        m_n = o_n < NOWHERE
        o_i += N
        o_next = tl.load(p_keys + o_i, mask=o_i < i_to, other=NOWHERE)
        o_64 = o_n.to(tl.int64)
        state = edited_tile(
            state, rows, p_k + o_64 * s_kn, p_v + o_64 * s_vn, given, 0, o_n, m_n, D, D1, D2, DV, V1, V2,
            TERMS > 0, 0, TERMS, MASK, WINDOW, SOFTCAP, False, ENT, ARG, MASSES, OUT, PRECISION,
        )  # fmt: skip
    return state


@triton.jit(do_not_specialize=CHANGING)
def steered_prefill_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_before_lse, p_ent, p_top, p_pos, p_mass,
    p_bits, p_before, p_tiles, p_keys, p_bias, p_law, p_rows, p_mask, p_sinks, p_cut, p_heads,
    s_qb, s_qh, s_qr, s_kb, s_kh, s_kn: tl.constexpr, s_vb, s_vh, s_vn: tl.constexpr, s_ob, s_oh, s_or,
    s_lb, s_lh, s_ib, s_ih, s_ub, s_uh, s_ur, s_ut, s_wb, s_wh, s_ab, s_mb, s_mh, s_mr, s_cb, s_ch, s_cr,
    H, heads_per_kv, Tq, Tk, T, scale, softcap, offset, window,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    LABELS: tl.constexpr, GROUPS: tl.constexpr, TERMS: tl.constexpr, TERM_ROWS: tl.constexpr, LAW: tl.constexpr,
    ROWS: tl.constexpr,
    MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, CUT: tl.constexpr,
    HEADS: tl.constexpr, LSE: tl.constexpr, RAW: tl.constexpr, ENT: tl.constexpr, ARG: tl.constexpr,
    MASSES: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    GATHERED: tl.constexpr,
):  # fmt: skip
    # rows that see most come first: short ones fill the gaps at the end
    i_r = tl.num_programs(0) - 1 - tl.program_id(0)
    i_place = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_h = i_place
    if HEADS:
        i_h = tl.load(p_heads + i_place).to(tl.int64)
    i_kv = i_h // heads_per_kv
    o_r = i_r * R + tl.arange(0, R)
    m_r = o_r < Tq
    p_or = p_o + i_b * s_ob + i_place * s_oh + o_r.to(tl.int64) * s_or

    b_cut = tl.zeros([R], tl.int8)
    if CUT:
        b_cut = tl.load(p_cut + i_b * s_cb + i_h * s_ch + o_r * s_cr, mask=m_r, other=1)
        # nothing of these rows is wanted
        if (LSE or ENT or ARG or MASSES > 0) == 0 and tl.min(b_cut.to(tl.int32), 0) > 0:
            b_zero1, b_zero2 = tl.zeros([R, V1], tl.float32), 0.0
            if V2 > 0:
                b_zero2 = tl.zeros([R, V2], tl.float32)
            store_rows(p_or, b_zero1, b_zero2, m_r, DV, V1, V2)
            return

    b_q1, b_q2 = load_rows(p_q + i_b * s_qb + i_h * s_qh + o_r.to(tl.int64) * s_qr, m_r, D, D1, D2, False)
    p_k += i_b * s_kb + i_kv * s_kh
    p_v += i_b * s_vb + i_kv * s_vh
    o_last = tl.minimum(o_r, Tq - 1).to(tl.int64)
    p_mask_r = p_mask + i_b * s_mb + i_h * s_mh + o_last * s_mr
    p_bias_r = p_bias + i_b * s_ub + i_h * s_uh
    if TERM_ROWS:
        p_bias_r += o_last * s_ur
    else:
        p_bias_r += tl.zeros([1], tl.int64)
    # columns that each row sees
    b_last = tl.minimum(o_r + offset, Tk - 1)
    b_first = o_r + offset - window + 1
    rows = (b_q1, b_q2, b_first, b_last, p_bits + i_b * s_lb + i_h * s_lh, p_bias_r, p_mask_r)
    kv = (p_k, s_kn, p_v, s_vn)
    given = (scale, softcap, s_ut)
    i_index = i_b * s_ib + i_h * s_ih
    p_before += i_index * (1 + GROUPS) * (T + 1)
    p_tiles += i_index * 2 * T
    p_keys += i_index * (GROUPS - 1) * Tk

    # tiles [i_lo, i_hi) hold all that any row sees; every row sees all of [i_first, i_last)
    if MASK == 0:
        i_top = i_r * R + offset
        i_end = tl.minimum(i_r * R + R, Tq) - 1 + offset
        i_hi = tl.minimum(T, tl.maximum(i_end + N, 0) // N)
        i_last = tl.minimum(tl.minimum(Tk, tl.maximum(i_top + 1, 0)) // N, i_hi)
        i_lo, i_first = 0, 0
        if WINDOW:
            i_lo = tl.minimum(tl.maximum(i_top - window + 1, 0) // N, i_hi)
            i_first = tl.minimum((tl.maximum(i_end - window + 1, 0) + N - 1) // N, i_hi)
            i_last = tl.maximum(i_last, i_first)
    else:
        i_lo, i_first, i_last, i_hi = 0, T, T, T

    state0 = fresh(R, V1, V2, RAW, ENT, ARG, MASSES, OUT)
    i_from, i_to = i_first, i_last
    i_next = 0
    if LABELS:
        i_from, i_to = tl.load(p_before + i_first), tl.load(p_before + i_last)
        i_next = tl.load(p_tiles + i_from, mask=i_from < i_to, other=0)
    o_n = tl.arange(0, N)
    o_kn, o_vn = o_n.to(tl.int64) * s_kn, o_n.to(tl.int64) * s_vn
    for i in range(i_from, i_to):
        if LABELS:
            # a number loaded a step ahead, so that the pipeline of keys and values need not wait for it
            i_t = i_next
            i_next = tl.load(p_tiles + tl.minimum(i + 1, i_to - 1))
        else:
            # the minimum changes nothing, but what grows with i alone the compiler would carry, pointer by pointer
            i_t = tl.minimum(i, i_to - 1)
        # whole, unlabelled and seen by every row: plain attention
        i_n = (i_t * N).to(tl.int64)
        b_k1, b_k2 = load_rows(p_k + i_n * s_kn + o_kn, m_r, D, D1, D2, True)
        b_s = dots(b_q1, b_q2, b_k1, b_k2, D2, PRECISION)
        b_by = scale * LOG2E
        if SOFTCAP:
            b_s = capped(b_s, scale, softcap)
            b_by = 1.0
        b_before = 0.0
        if RAW:
            b_before = b_s * b_by
        b_v1, b_v2 = 0.0, 0.0
        if OUT:
            b_v1, b_v2 = load_rows(p_v + i_n * s_vn + o_vn, m_r, DV, V1, V2, True)
        state0 = accumulate(
            state0, b_s, b_by, b_before, 0, i_t * N, o_n[None, :], b_v1, b_v2,
            False, V2, RAW, ENT, ARG, MASSES, TERMS, False, OUT, PRECISION,
        )  # fmt: skip

    i_left = i_first - i_lo
    i_edited, i_skip = 0, 0
    if LABELS:
        i_skip = tl.load(p_before + T + 1 + i_first)
        i_edited = tl.load(p_before + T + 1 + i_last) - i_skip
    for i in range(0, i_left + i_edited + i_hi - i_last):
        i_t = tl.where(i < i_left, i_lo + i, i_last + i - i_left - i_edited)
        if LABELS:
            m_inner = (i >= i_left) & (i < i_left + i_edited)
            i_t = tl.where(m_inner, tl.load(p_tiles + T + i_skip + i - i_left, mask=m_inner, other=0), i_t)
        i_n = (i_t * N).to(tl.int64)
        state0 = edited_tile(
            state0, rows, p_k + i_n * s_kn + o_kn, p_v + i_n * s_vn + o_vn, given, i_t * N, o_n, o_n < Tk - i_t * N,
            D, D1, D2, DV, V1, V2, LABELS, HIDDEN + GROUP_BITS, TERMS, MASK, WINDOW, SOFTCAP,
            RAW, ENT, ARG, MASSES, OUT, PRECISION,
        )  # fmt: skip

    state1, state2, state3 = state0, state0, state0
    if GROUPS > 1:
        state1 = gathered(
            rows, kv, given, p_keys, p_before, i_lo, i_hi, T, Tk, 1, D, D1, D2, DV, V1, V2, TERMS, MASK, WINDOW,
            SOFTCAP, ENT, ARG, MASSES, OUT, PRECISION, R, GATHERED,
        )  # fmt: skip
    if GROUPS > 2:
        state2 = gathered(
            rows, kv, given, p_keys, p_before, i_lo, i_hi, T, Tk, 2, D, D1, D2, DV, V1, V2, TERMS, MASK, WINDOW,
            SOFTCAP, ENT, ARG, MASSES, OUT, PRECISION, R, GATHERED,
        )  # fmt: skip
    if GROUPS > 3:
        state3 = gathered(
            rows, kv, given, p_keys, p_before, i_lo, i_hi, T, Tk, 3, D, D1, D2, DV, V1, V2, TERMS, MASK, WINDOW,
            SOFTCAP, ENT, ARG, MASSES, OUT, PRECISION, R, GATHERED,
        )  # fmt: skip

    b_keys = state0[1]
    if SINKS:
        b_sink = tl.zeros([R], tl.float32) + tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        state0, b_keys = with_sink(state0, b_sink, RAW, ENT, MASSES, V2, OUT)
    m_applies = m_r
    if ROWS:
        m_applies = m_r & (tl.load(p_rows + i_b * s_ab + o_r, mask=m_r, other=0) != 0)
    p_law_r = p_law + i_b * s_wb + i_h * s_wh + tl.zeros([R], tl.int32)
    o_row = (i_b * H + i_place) * Tq + o_r
    finish(
        state0, state1, state2, state3, b_keys, p_law_r, m_applies, o_row, m_r, p_or, p_lse, p_before_lse, p_ent,
        p_top, p_pos, p_mass, b_cut,
        DV, V1, V2, LAW, GROUPS, RAW, ENT, ARG, MASSES, TERMS, OUT, CUT, LSE, R,
    )  # fmt: skip
