"""Steered attention of few query rows over many keys (flash-decoding): the laws of `steered_prefill`, keys in splits.

The query heads of one key/value head and their rows are packed into R rows, so that keys and values are read once. Each
program takes a range of keys and leaves, for every row and group, maximum, sum and accumulator; the merge combines the
ranges group by group and applies the law to the whole.

Shapes: as `steered_prefill`; S splits. bf16, fp16, fp32. After flash-decoding (PyTorch blog, 2023-10).
"""

from __future__ import annotations

import triton
import triton.language as tl
from steerlens.kernels._tiles import (
    CHANGING,
    HIDDEN,
    LOG2E,
    NOWHERE,
    accumulate,
    finish,
    fresh,
    in_group,
    load_rows,
    seen_logits,
    store_rows,
    with_sink,
)


@triton.jit
def leave(
    state, p_part, p_place, p_acc, i_split, rows_all, o_row, m_r, group: tl.constexpr,
    V1: tl.constexpr, V2: tl.constexpr, DV: tl.constexpr, FIELDS: tl.constexpr, RAW: tl.constexpr, ENT: tl.constexpr,
    ARG: tl.constexpr, MASSES: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    # partial results lie as [S, GROUPS, rows, ..]
    o_at = (i_split * GROUPS + group) * rows_all + o_row
    p = p_part + o_at * FIELDS
    tl.store(p, state[0], mask=m_r)
    tl.store(p + 1, state[1], mask=m_r)
    if RAW:
        tl.store(p + 2, state[4], mask=m_r)
    if ENT:
        tl.store(p + 3, state[5], mask=m_r)
    if ARG:
        tl.store(p + 4, state[6], mask=m_r)
        tl.store(p_place + o_at, state[7], mask=m_r)
    if MASSES > 0:
        tl.store(p[:, None] + 5 + tl.arange(0, MASSES)[None, :], state[8], mask=m_r[:, None])
    if OUT:
        store_rows(p_acc + o_at * DV, state[2], state[3], m_r, DV, V1, V2)


@triton.jit(do_not_specialize=CHANGING)
def steered_decode_kernel(
    p_q, p_k, p_v, p_part, p_place, p_acc, p_bits, p_bias, p_mask, p_cut,
    s_qb, s_qh, s_qr, s_kb, s_kh, s_kn: tl.constexpr, s_vb, s_vh, s_vn: tl.constexpr, s_lb, s_lh,
    s_ub, s_uh, s_ur, s_ut, s_mb, s_mh, s_mr, s_cb, s_ch, s_cr,
    H, heads_per_kv, Tq, Tk, rows_all, start, span, scale, softcap, offset, window,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    LABELS: tl.constexpr, PER_HEAD: tl.constexpr, GROUPS: tl.constexpr, TERMS: tl.constexpr, MASK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, EARLY: tl.constexpr, RAW: tl.constexpr, ENT: tl.constexpr,
    ARG: tl.constexpr, MASSES: tl.constexpr, OUT: tl.constexpr, FIELDS: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i_split = tl.program_id(0).to(tl.int64)
    i_kv = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    m_r = tl.arange(0, R) < heads_per_kv * Tq
    # rows past the last are computed as the last, and not written
    o_p = tl.minimum(tl.arange(0, R), heads_per_kv * Tq - 1)
    o_h, o_r = i_kv * heads_per_kv + o_p // Tq, o_p % Tq
    o_row = (i_b * H + o_h) * Tq + o_r

    i_from = start + i_split.to(tl.int32) * span
    i_to = tl.minimum(i_from + span, Tk)
    if EARLY:
        # all of these rows are cut, and nothing else of them is wanted
        b_cut = tl.load(p_cut + i_b * s_cb + o_h * s_ch + o_r * s_cr, mask=m_r, other=1).to(tl.int32)
        i_to = tl.where(tl.min(b_cut, 0) > 0, i_from, i_to)

    b_q1, b_q2 = load_rows(p_q + i_b * s_qb + o_h * s_qh + o_r * s_qr, m_r, D, D1, D2, False)
    p_k += i_b * s_kb + i_kv * s_kh
    p_v += i_b * s_vb + i_kv * s_vh
    if PER_HEAD:
        p_label = p_bits + i_b * s_lb + o_h * s_lh
    else:
        p_label = p_bits + i_b * s_lb
    p_bias_r = p_bias + i_b * s_ub + o_h * s_uh + o_r * s_ur
    p_mask_r = p_mask + i_b * s_mb + o_h * s_mh + o_r * s_mr

    # columns that each row sees
    b_last = tl.minimum(o_r + offset, i_to - 1)
    b_first = o_r + offset - window + 1
    o_n = tl.arange(0, N)
    o_kn, o_vn = o_n * s_kn, o_n * s_vn
    state0 = fresh(R, V1, V2, RAW, ENT, ARG, MASSES, OUT)
    state1, state2, state3 = state0, state0, state0
    for i in range(i_from, i_to, N):
        m_n = o_n < i_to - i
        b_k1, b_k2 = load_rows(p_k + tl.cast(i, tl.int64) * s_kn + o_kn, m_n, D, D1, D2, False)
        b_s, b_by, b_before, _, b_label = seen_logits(
            b_q1, b_q2, b_k1, b_k2, b_first - i, b_last - i, o_n, m_n, p_label + i, p_bias_r, s_ut, p_mask_r + i,
            scale, softcap,
            D2, LABELS, HIDDEN, PER_HEAD, TERMS, MASK, WINDOW, SOFTCAP, RAW, PRECISION,
        )  # fmt: skip
        b_v1, b_v2 = 0.0, 0.0
        if OUT:
            b_v1, b_v2 = load_rows(p_v + tl.cast(i, tl.int64) * s_vn + o_vn, m_n, DV, V1, V2, False)
        state0 = accumulate(
            state0, in_group(b_s, b_label, 0, LABELS), b_by, b_before, b_label, i, o_n[None, :], b_v1, b_v2,
            True, V2, RAW, ENT, ARG, MASSES, TERMS, LABELS, OUT, PRECISION,
        )  # fmt: skip
        if GROUPS > 1:
            state1 = accumulate(
                state1, in_group(b_s, b_label, 1, LABELS), b_by, b_before, b_label, i, o_n[None, :], b_v1, b_v2,
                True, V2, RAW, ENT, ARG, MASSES, TERMS, LABELS, OUT, PRECISION,
            )  # fmt: skip
        if GROUPS > 2:
            state2 = accumulate(
                state2, in_group(b_s, b_label, 2, LABELS), b_by, b_before, b_label, i, o_n[None, :], b_v1, b_v2,
                True, V2, RAW, ENT, ARG, MASSES, TERMS, LABELS, OUT, PRECISION,
            )  # fmt: skip
        if GROUPS > 3:
            state3 = accumulate(
                state3, in_group(b_s, b_label, 3, LABELS), b_by, b_before, b_label, i, o_n[None, :], b_v1, b_v2,
                True, V2, RAW, ENT, ARG, MASSES, TERMS, LABELS, OUT, PRECISION,
            )  # fmt: skip
    leave(
        state0, p_part, p_place, p_acc, i_split, rows_all, o_row, m_r, 0,
        V1, V2, DV, FIELDS, RAW, ENT, ARG, MASSES, OUT, GROUPS,
    )  # fmt: skip
    if GROUPS > 1:
        leave(
            state1, p_part, p_place, p_acc, i_split, rows_all, o_row, m_r, 1,
            V1, V2, DV, FIELDS, RAW, ENT, ARG, MASSES, OUT, GROUPS,
        )  # fmt: skip
    if GROUPS > 2:
        leave(
            state2, p_part, p_place, p_acc, i_split, rows_all, o_row, m_r, 2,
            V1, V2, DV, FIELDS, RAW, ENT, ARG, MASSES, OUT, GROUPS,
        )  # fmt: skip
    if GROUPS > 3:
        leave(
            state3, p_part, p_place, p_acc, i_split, rows_all, o_row, m_r, 3,
            V1, V2, DV, FIELDS, RAW, ENT, ARG, MASSES, OUT, GROUPS,
        )  # fmt: skip


@triton.jit
def merged(
    p_part, p_place, p_acc, i_row, rows_all, splits, group: tl.constexpr,
    DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, FIELDS: tl.constexpr, RAW: tl.constexpr, ENT: tl.constexpr,
    ARG: tl.constexpr, MASSES: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # one row's state of one group, over all splits
    o_s = tl.arange(0, S)
    m_s = o_s < splits
    o_at = (o_s.to(tl.int64) * GROUPS + group) * rows_all + i_row
    p = p_part + o_at * FIELDS
    # [S]
    b_ms = tl.load(p, mask=m_s, other=float("-inf"))
    b_ls = tl.load(p + 1, mask=m_s, other=0.0)
    b_m = tl.max(b_ms, 0)
    b_shift = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_w = tl.exp2(b_ms - b_shift)
    b_one = tl.zeros([1], tl.float32)
    b_acc1, b_acc2, b_raw, b_ent, b_top, b_pos, b_mass = 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0
    if RAW:
        b_raw = b_one + tl.sum(b_w * tl.load(p + 2, mask=m_s, other=0.0), 0)
    if ENT:
        b_part = tl.load(p + 3, mask=m_s, other=0.0) + tl.where(b_ls > 0, (b_ms - b_shift) * b_ls, 0.0)
        b_ent = b_one + tl.sum(b_w * b_part, 0)
    if ARG:
        b_tops = tl.load(p + 4, mask=m_s, other=float("-inf"))
        b_best = tl.max(b_tops, 0)
        b_places = tl.load(p_place + o_at, mask=m_s, other=NOWHERE)
        b_top = b_one + b_best
        b_pos = tl.zeros([1], tl.int32) + tl.min(tl.where(b_tops == b_best, b_places, NOWHERE), 0)
    if MASSES > 0:
        b_part = tl.load(p[:, None] + 5 + tl.arange(0, MASSES)[None, :], mask=m_s[:, None], other=0.0)
        b_mass = tl.sum(b_w[:, None] * b_part, 0)[None, :]
    if OUT:
        b_a1, b_a2 = load_rows(p_acc + o_at * DV, m_s, DV, V1, V2, False)
        b_acc1 = tl.sum(b_w[:, None] * b_a1, 0)[None, :]
        if V2 > 0:
            b_acc2 = tl.sum(b_w[:, None] * b_a2, 0)[None, :]
    return b_one + b_m, b_one + tl.sum(b_w * b_ls, 0), b_acc1, b_acc2, b_raw, b_ent, b_top, b_pos, b_mass


@triton.jit(do_not_specialize=CHANGING)
def steered_merge_kernel(
    p_part, p_place, p_acc, p_o, p_lse, p_before_lse, p_ent, p_top, p_pos, p_mass, p_law, p_rows, p_sinks, p_cut,
    s_ob, s_oh, s_or, s_wb, s_wh, s_ab, s_cb, s_ch, s_cr, H, Tq, rows_all, splits,
    DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, GROUPS: tl.constexpr, TERMS: tl.constexpr,
    LAW: tl.constexpr, ROWS: tl.constexpr, SINKS: tl.constexpr, CUT: tl.constexpr, LSE: tl.constexpr,
    RAW: tl.constexpr, ENT: tl.constexpr, ARG: tl.constexpr, MASSES: tl.constexpr, OUT: tl.constexpr,
    FIELDS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_r, i_h, i_b = i_row % Tq, (i_row // Tq) % H, i_row // Tq // H
    state0 = merged(
        p_part, p_place, p_acc, i_row, rows_all, splits, 0,
        DV, V1, V2, FIELDS, RAW, ENT, ARG, MASSES, OUT, GROUPS, S,
    )  # fmt: skip
    state1, state2, state3 = state0, state0, state0
    if GROUPS > 1:
        state1 = merged(
            p_part, p_place, p_acc, i_row, rows_all, splits, 1,
            DV, V1, V2, FIELDS, RAW, ENT, ARG, MASSES, OUT, GROUPS, S,
        )  # fmt: skip
    if GROUPS > 2:
        state2 = merged(
            p_part, p_place, p_acc, i_row, rows_all, splits, 2,
            DV, V1, V2, FIELDS, RAW, ENT, ARG, MASSES, OUT, GROUPS, S,
        )  # fmt: skip
    if GROUPS > 3:
        state3 = merged(
            p_part, p_place, p_acc, i_row, rows_all, splits, 3,
            DV, V1, V2, FIELDS, RAW, ENT, ARG, MASSES, OUT, GROUPS, S,
        )  # fmt: skip
    b_keys = state0[1]
    if SINKS:
        b_sink = tl.zeros([1], tl.float32) + tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        state0, b_keys = with_sink(state0, b_sink, RAW, ENT, MASSES, V2, OUT)
    o_one = tl.zeros([1], tl.int64)
    m_one = o_one == 0
    b_cut = tl.zeros([1], tl.int8)
    if CUT:
        b_cut = tl.load(p_cut + i_b * s_cb + i_h * s_ch + i_r * s_cr + o_one)
    m_applies = m_one
    if ROWS:
        m_applies = tl.load(p_rows + i_b * s_ab + i_r + o_one) != 0
    p_law_r = p_law + i_b * s_wb + i_h * s_wh + o_one
    p_or = p_o + i_b * s_ob + i_h * s_oh + i_r * s_or + o_one
    finish(
        state0, state1, state2, state3, b_keys, p_law_r, m_applies, i_row + o_one, m_one, p_or, p_lse, p_before_lse,
        p_ent, p_top, p_pos, p_mass, b_cut,
        DV, V1, V2, LAW, GROUPS, RAW, ENT, ARG, MASSES, TERMS, OUT, CUT, LSE, 1,
    )  # fmt: skip
