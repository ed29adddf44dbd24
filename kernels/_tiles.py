"""Device functions that the kernels share: loading rows, logits, edits of logits, one step of online softmax, laws.

Logits are kept in units of log2, so that the hardware's exp2 needs no factor. Names and shapes as in the kernels:
R query rows and N keys of a tile, D head dim as two blocks D1 + D2 (80 = 64 + 16, 192 = 128 + 64).
A state is (m, l, acc1, acc2, raw, ent, top, pos, mass): running maximum and sum, accumulator of V in two blocks, sum
without the terms, entropy sum Σ p·(x - m), largest logit and its key, mass per term. What is not wanted stays 0.0.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
GROUP_BITS = tl.constexpr(3)
HIDDEN = tl.constexpr(4)
FIRST_TERM = tl.constexpr(3)
NOWHERE = tl.constexpr(2147483647)
CHANGING = "Tq Tk T offset window start span splits rows_all s_b s_h s_lb s_lh s_mb s_mh s_mr".split()  # noqa: SIM905
"""Arguments that grow with every token: a kernel is not compiled anew because one is 1 or divides by 16."""


@triton.jit
def load_block(p_rows, o_d, m_row, START: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ALL: tl.constexpr):
    # [R, WIDTH]
    p = p_rows[:, None] + (START + o_d)[None, :]
    if START + WIDTH <= D:
        if ALL:
            b = tl.load(p)
        else:
            b = tl.load(p, mask=m_row[:, None], other=0.0)
    else:
        if ALL:
            b = tl.load(p, mask=(START + o_d < D)[None, :], other=0.0)
        else:
            b = tl.load(p, mask=m_row[:, None] & (START + o_d < D)[None, :], other=0.0)
    return b


@triton.jit
def load_rows(p_rows, m_row, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALL: tl.constexpr):
    # rows at the pointers p_rows [R] as [R, D1] and [R, D2]; ALL: no row is out of bounds
    b_1 = load_block(p_rows, tl.arange(0, D1), m_row, 0, D, D1, ALL)
    if D2 > 0:
        b_2 = load_block(p_rows, tl.arange(0, D2), m_row, D1, D, D2, ALL)
    else:
        b_2 = 0.0
    return b_1, b_2


@triton.jit
def store_rows(p_rows, b_1, b_2, m_row, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    o_1 = tl.arange(0, D1)
    m_1 = m_row[:, None] & (o_1 < D)[None, :]
    tl.store(p_rows[:, None] + o_1[None, :], b_1.to(p_rows.dtype.element_ty), mask=m_1)
    if D2 > 0:
        o_2 = D1 + tl.arange(0, D2)
        m_2 = m_row[:, None] & (o_2 < D)[None, :]
        tl.store(p_rows[:, None] + o_2[None, :], b_2.to(p_rows.dtype.element_ty), mask=m_2)


@triton.jit
def dots(b_q1, b_q2, b_k1, b_k2, D2: tl.constexpr, PRECISION: tl.constexpr):
    # [R, N]
    b_s = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)
    if D2 > 0:
        b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def capped(b_s, scale, softcap):
    # c·tanh(scale·s / c) in log2 units; `scale` is in nats
    b_e = tl.exp2(b_s * (2.0 * LOG2E * scale / softcap))
    return (softcap * LOG2E) * (1.0 - 2.0 / (1.0 + b_e))


@triton.jit
def term_bias(b_label, p_bias, s_bias, TERMS: tl.constexpr):
    # Σ_t bias[row, t]·1[t marks the key]; p_bias [R], or [1] for all rows, points at the first term, in nats
    b_u = 0.0
    for t in tl.static_range(TERMS):
        b_t = tl.load(p_bias + t * s_bias) * LOG2E
        b_u += tl.where(((b_label >> (FIRST_TERM + t)) & 1) != 0, b_t[:, None], 0.0)
    return b_u


@triton.jit
def seen_logits(
    b_q1, b_q2, b_k1, b_k2, b_first, b_last, o_n, m_n, p_bits, p_bias, s_bias, p_mask, scale, softcap,
    D2: tl.constexpr, LABELS: tl.constexpr, BARRED: tl.constexpr, PER_ROW: tl.constexpr, TERMS: tl.constexpr,
    MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, RAW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of any keys, with their terms, -inf where a row does not see a key.

    Returns logits; the factor that brings them to log2 units; with RAW the logits without terms, in log2 units; what is
    seen; and labels [1 or R, N].

    Args:
        o_n: keys, [N], counted from any place; m_n: which of them there are.
        b_first, b_last: the range of keys that each row sees, [R], counted alike, without a mask; b_first with WINDOW.
        p_bits, p_bias, p_mask: where that place is in the labels and in each row's mask, and each row's terms begin,
            [R]; labels differ by row if PER_ROW. Rows past the last one point where the last one does.
        BARRED: bits of a label of which none may be set.
        MASK: 0 none, 1 bool, 2 additive.
    """
    # labels first: they arrive while the product runs
    b_label = tl.zeros_like(o_n)[None, :]
    if LABELS:
        if PER_ROW:
            b_label = tl.load(p_bits[:, None] + o_n[None, :], mask=m_n[None, :], other=4).to(tl.int32)
        else:
            b_label = tl.load(p_bits + o_n, mask=m_n, other=4).to(tl.int32)[None, :]
    b_s = dots(b_q1, b_q2, b_k1, b_k2, D2, PRECISION)
    b_by = scale * LOG2E
    if SOFTCAP:
        b_s = capped(b_s, scale, softcap)
        b_by = 1.0
    if MASK == 0:
        # one comparison for each logit: keys that nobody sees lie past every row
        b_place = o_n[None, :]
        if LABELS and BARRED > 0:
            b_place = tl.where((b_label & BARRED) == 0, b_place, NOWHERE)
        m_seen = b_place <= b_last[:, None]
        if WINDOW:
            m_seen = m_seen & (b_place >= b_first[:, None])
    else:
        p = p_mask[:, None] + o_n[None, :]
        m_seen = m_n[None, :]
        if LABELS and BARRED > 0:
            m_seen = m_seen & ((b_label & BARRED) == 0)
        if MASK == 1:
            m_seen = m_seen & (tl.load(p, mask=m_seen, other=0) != 0)
        else:
            b_mask = tl.load(p, mask=m_seen, other=float("-inf")).to(tl.float32)
            # -1e4, -1e9 and the like hide a key as -inf does
            m_seen = m_seen & (b_mask > -9e3)
            b_s = b_s * b_by + b_mask * LOG2E
            b_by = 1.0
    b_before = 0.0
    if TERMS > 0:
        b_s = b_s * b_by
        b_by = 1.0
        if RAW:
            b_before = tl.where(m_seen, b_s, float("-inf"))
        b_s += term_bias(b_label, p_bias, s_bias, TERMS)
    return tl.where(m_seen, b_s, float("-inf")), b_by, b_before, m_seen, b_label


@triton.jit
def in_group(b_s, b_label, group: tl.constexpr, LABELS: tl.constexpr):
    if LABELS:
        b_s = tl.where((b_label & GROUP_BITS) == group, b_s, float("-inf"))
    return b_s


@triton.jit
def fresh(
    R: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, RAW: tl.constexpr, ENT: tl.constexpr, ARG: tl.constexpr,
    MASSES: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    b_m = tl.full([R], float("-inf"), tl.float32)
    b_l = tl.zeros([R], tl.float32)
    b_acc1, b_acc2, b_raw, b_ent, b_top, b_pos, b_mass = 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0
    if OUT:
        b_acc1 = tl.zeros([R, V1], tl.float32)
        if V2 > 0:
            b_acc2 = tl.zeros([R, V2], tl.float32)
    if RAW:
        b_raw = tl.zeros([R], tl.float32)
    if ENT:
        b_ent = tl.zeros([R], tl.float32)
    if ARG:
        b_top = tl.full([R], float("-inf"), tl.float32)
        b_pos = tl.full([R], NOWHERE, tl.int32)
    if MASSES > 0:
        b_mass = tl.zeros([R, MASSES], tl.float32)
    return b_m, b_l, b_acc1, b_acc2, b_raw, b_ent, b_top, b_pos, b_mass


@triton.jit
def accumulate(
    state, b_s, factor, b_before, b_label, i_n, o_n, b_v1, b_v2,
    SAFE: tl.constexpr, V2: tl.constexpr, RAW: tl.constexpr, ENT: tl.constexpr, ARG: tl.constexpr,
    MASSES: tl.constexpr, TERMS: tl.constexpr, MARKED: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of online softmax over the logits x = b_s·factor, [R, N].

    Args:
        b_before: with RAW the logits without the terms.
        i_n, o_n: the keys are i_n + o_n, [1, N].
        SAFE: rows may have seen no key yet.
        MARKED: keys of this tile may be in terms.
    """
    b_m, b_l, b_acc1, b_acc2, b_raw, b_ent, b_top, b_pos, b_mass = state
    b_peak = tl.max(b_s, 1)
    b_tile = b_peak * factor
    if ARG:
        b_where = i_n + tl.min(tl.where(b_s == b_peak[:, None], o_n, NOWHERE), 1)
        b_better = (b_tile > b_top) | ((b_tile == b_top) & (b_where < b_pos))
        b_better = b_better & (b_tile > float("-inf"))
        b_pos = tl.where(b_better, b_where, b_pos)
        b_top = tl.where(b_better, b_tile, b_top)
    b_new = tl.maximum(b_m, b_tile)
    if RAW:
        b_new = tl.maximum(b_new, tl.max(b_before, 1))
    if SAFE:
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    else:
        b_shift = b_new
    b_alpha = tl.exp2(b_m - b_shift)
    # [R, N]
    b_x = b_s * factor - b_shift[:, None]
    b_p = tl.exp2(b_x)
    if ENT:
        b_moved = tl.where(b_l > 0, (b_m - b_shift) * b_l, 0.0)
        b_finite = b_x
        if SAFE:
            # 0·(-inf) is 0 here, and 2^-1000 is 0
            b_finite = tl.maximum(b_x, -1000.0)
        b_ent = b_alpha * (b_ent + b_moved) + tl.sum(b_p * b_finite, 1)
    if RAW:
        b_raw = b_raw * b_alpha + tl.sum(tl.exp2(b_before - b_shift[:, None]), 1)
    if MASSES > 0:
        b_mass = b_mass * b_alpha[:, None]
        if MARKED:
            o_t = tl.arange(0, MASSES)
            for t in tl.static_range(TERMS):
                b_in = tl.sum(b_p * tl.where(((b_label >> (FIRST_TERM + t)) & 1) != 0, 1.0, 0.0), 1)
                b_mass += tl.where((o_t == t)[None, :], b_in[:, None], 0.0)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    if OUT:
        b_p = b_p.to(b_v1.dtype)
        b_acc1 = tl.dot(b_p, b_v1, b_acc1 * b_alpha[:, None], input_precision=PRECISION)
        if V2 > 0:
            b_acc2 = tl.dot(b_p, b_v2, b_acc2 * b_alpha[:, None], input_precision=PRECISION)
    return b_new, b_l, b_acc1, b_acc2, b_raw, b_ent, b_top, b_pos, b_mass


@triton.jit
def with_sink(
    state, b_sink, RAW: tl.constexpr, ENT: tl.constexpr, MASSES: tl.constexpr, V2: tl.constexpr, OUT: tl.constexpr
):
    """The state with a learned sink's logit [R] in its sum, and how much of the sum [R] is of keys."""
    b_m, b_l, b_acc1, b_acc2, b_raw, b_ent, b_top, b_pos, b_mass = state
    b_new = tl.maximum(b_m, b_sink)
    # a sink of -inf beside no keys
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_alpha = tl.exp2(b_m - b_shift)
    b_extra = tl.exp2(b_sink - b_shift)
    if ENT:
        b_ent = b_alpha * (b_ent + tl.where(b_l > 0, (b_m - b_shift) * b_l, 0.0))
    b_keys = b_l * b_alpha
    b_l = b_keys + b_extra
    if RAW:
        b_raw = b_raw * b_alpha + b_extra
    if MASSES > 0:
        b_mass = b_mass * b_alpha[:, None]
    if OUT:
        b_acc1 = b_acc1 * b_alpha[:, None]
        if V2 > 0:
            b_acc2 = b_acc2 * b_alpha[:, None]
    return (b_new, b_l, b_acc1, b_acc2, b_raw, b_ent, b_top, b_pos, b_mass), b_keys


@triton.jit
def pick(b_table, g: tl.constexpr):
    # column g of [R, 4]
    return tl.sum(tl.where((tl.arange(0, 4) == g)[None, :], b_table, 0.0), 1)


@triton.jit
def place(b_table, b_column, g: tl.constexpr):
    return tl.where((tl.arange(0, 4) == g)[None, :], b_column[:, None], b_table)


@triton.jit
def factors(b_ms, b_ls, p_law, m_applies, LAW: tl.constexpr, GROUPS: tl.constexpr):
    """What each group's accumulator is multiplied by, [R, 4], from the maxima and sums [R, 4]; and the largest maximum.

    `p_law` [R] points at the parameters of each row's head. A row whose law would give mass to a group of which it sees
    no key, or to group 1 where that has none in fp32, stays as it was.
    """
    o_g = tl.arange(0, 4)
    b_seen = b_ls > 0
    b_top = tl.max(tl.where(b_seen, b_ms, float("-inf")), 1)
    b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
    # [R, 4]
    b_w = tl.where(b_seen, tl.exp2(b_ms - b_shift[:, None]), 0.0)
    b_sum = tl.sum(b_w * b_ls, 1)
    b_inverse = tl.where(b_sum > 0, 1.0 / tl.where(b_sum > 0, b_sum, 1.0), 0.0)
    b_old = b_w * b_inverse[:, None]
    if LAW == 0:
        b_new = b_old
    else:
        b_psi = b_old * b_ls
        b_new = tl.zeros_like(b_psi)
        if LAW == 1:
            # ψ'_g = Σ_s transfer[g, s]·ψ_s
            for s in tl.static_range(GROUPS):
                b_t = tl.load(
                    p_law[:, None] + (o_g * GROUPS + s)[None, :],
                    mask=m_applies[:, None] & (o_g < GROUPS)[None, :],
                    other=0.0,
                )
                b_new += b_t * pick(b_psi, s)[:, None]
            b_ok = tl.sum(tl.where((b_new > 0) & (b_seen == 0), 1, 0), 1) == 0
        else:
            # group 1 reaches the target; the others share what is left as they did
            b_tau = tl.load(p_law, mask=m_applies, other=0.0)
            b_in = pick(b_psi, 1)
            if LAW == 2:
                b_to = tl.where(b_in < b_tau, b_tau, b_in)
            else:
                b_to = tl.where(b_in < b_tau, b_tau / (1.0 + b_tau - b_in), b_in)
            # beside a group that takes all there is in fp32, the rest keeps its proportions by its own maximum
            b_peak = tl.max(tl.where(b_seen & (o_g != 1)[None, :], b_ms, float("-inf")), 1)
            b_peak = tl.where(b_peak == float("-inf"), 0.0, b_peak)
            b_own = tl.where(b_seen & (o_g != 1)[None, :], tl.exp2(b_ms - b_peak[:, None]), 0.0) * b_ls
            b_total = tl.sum(b_own, 1)
            b_share = b_own / tl.where(b_total > 0, b_total, 1.0)[:, None]
            b_new = tl.where((o_g == 1)[None, :], b_to[:, None], (1.0 - b_to)[:, None] * b_share)
            b_ok = (b_in > 0) & (b_total > 0) & (b_in < b_tau)
        b_ok = b_ok & m_applies
        b_new = tl.where(b_ok[:, None], b_new / tl.where(b_seen, b_ls, 1.0), b_old)
    return b_new, b_sum, b_shift


@triton.jit
def entropy_of(b_f, state, b_keys):
    # -Σ a' ln a' over keys with a' = f·2^(x - m), in nats
    b_log = tl.where(b_f > 0, tl.log2(tl.where(b_f > 0, b_f, 1.0)), 0.0)
    return -LN2 * b_f * (b_log * b_keys + state[5])


@triton.jit
def finish(
    state0, state1, state2, state3, b_keys, p_law, m_applies, o_row, m_row, p_o, p_lse, p_before_lse, p_ent,
    p_top, p_pos, p_mass, b_cut,
    DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, LAW: tl.constexpr, GROUPS: tl.constexpr, RAW: tl.constexpr,
    ENT: tl.constexpr, ARG: tl.constexpr, MASSES: tl.constexpr, TERMS: tl.constexpr, OUT: tl.constexpr,
    CUT: tl.constexpr, LSE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Mix the groups by the law and write all that is wanted; o_row are rows of the statistics, [R]."""
    b_ms = place(tl.full([R, 4], float("-inf"), tl.float32), state0[0], 0)
    b_ls = place(tl.zeros([R, 4], tl.float32), state0[1], 0)
    if GROUPS > 1:
        b_ms, b_ls = place(b_ms, state1[0], 1), place(b_ls, state1[1], 1)
    if GROUPS > 2:
        b_ms, b_ls = place(b_ms, state2[0], 2), place(b_ls, state2[1], 2)
    if GROUPS > 3:
        b_ms, b_ls = place(b_ms, state3[0], 3), place(b_ls, state3[1], 3)
    if LAW == 4:
        # weights are not renormalised after the terms
        b_sum, b_shift = state0[1], state0[0]
        b_fs = place(tl.zeros([R, 4], tl.float32), tl.where(state0[4] > 0, 1.0 / state0[4], 0.0), 0)
    else:
        b_fs, b_sum, b_shift = factors(b_ms, b_ls, p_law, m_applies, LAW, GROUPS)
    b_f0 = pick(b_fs, 0)
    b_f1, b_f2, b_f3 = b_f0, b_f0, b_f0
    if GROUPS > 1:
        b_f1 = pick(b_fs, 1)
    if GROUPS > 2:
        b_f2 = pick(b_fs, 2)
    if GROUPS > 3:
        b_f3 = pick(b_fs, 3)
    if OUT:
        b_o1, b_o2 = state0[2] * b_f0[:, None], 0.0
        if V2 > 0:
            b_o2 = state0[3] * b_f0[:, None]
        if GROUPS > 1:
            b_o1 += state1[2] * b_f1[:, None]
            if V2 > 0:
                b_o2 += state1[3] * b_f1[:, None]
        if GROUPS > 2:
            b_o1 += state2[2] * b_f2[:, None]
            if V2 > 0:
                b_o2 += state2[3] * b_f2[:, None]
        if GROUPS > 3:
            b_o1 += state3[2] * b_f3[:, None]
            if V2 > 0:
                b_o2 += state3[3] * b_f3[:, None]
        if CUT:
            b_o1 = tl.where((b_cut != 0)[:, None], 0.0, b_o1)
            if V2 > 0:
                b_o2 = tl.where((b_cut != 0)[:, None], 0.0, b_o2)
        store_rows(p_o, b_o1, b_o2, m_row, DV, V1, V2)
    if LSE:
        tl.store(p_lse + o_row, (b_shift + tl.log2(b_sum)) * LN2, mask=m_row)
    if LSE and RAW:
        tl.store(p_before_lse + o_row, (state0[0] + tl.log2(state0[4])) * LN2, mask=m_row)
    if ENT:
        b_e = entropy_of(b_f0, state0, b_keys)
        if GROUPS > 1:
            b_e += entropy_of(b_f1, state1, state1[1])
        if GROUPS > 2:
            b_e += entropy_of(b_f2, state2, state2[1])
        if GROUPS > 3:
            b_e += entropy_of(b_f3, state3, state3[1])
        tl.store(p_ent + o_row, b_e, mask=m_row)
    if ARG:
        b_best = b_f0 * tl.exp2(state0[6] - tl.where(state0[0] == float("-inf"), 0.0, state0[0]))
        b_pos, b_top = state0[7], state0[6]
        if GROUPS > 1:
            b_best, b_pos, b_top = better(b_best, b_pos, b_top, b_f1, state1)
        if GROUPS > 2:
            b_best, b_pos, b_top = better(b_best, b_pos, b_top, b_f2, state2)
        if GROUPS > 3:
            b_best, b_pos, b_top = better(b_best, b_pos, b_top, b_f3, state3)
        tl.store(p_pos + o_row, tl.where(b_top > float("-inf"), b_pos, -1), mask=m_row)
        tl.store(p_top + o_row, b_top * LN2, mask=m_row)
    if MASSES > 0:
        b_mass = state0[8] * b_f0[:, None]
        if GROUPS > 1:
            b_mass += state1[8] * b_f1[:, None]
        if GROUPS > 2:
            b_mass += state2[8] * b_f2[:, None]
        if GROUPS > 3:
            b_mass += state3[8] * b_f3[:, None]
        o_t = tl.arange(0, MASSES)
        tl.store(p_mass + o_row[:, None] * TERMS + o_t[None, :], b_mass, mask=m_row[:, None] & (o_t < TERMS)[None, :])


@triton.jit
def better(b_best, b_pos, b_top, b_f, state):
    b_peak = b_f * tl.exp2(state[6] - tl.where(state[0] == float("-inf"), 0.0, state[0]))
    b_win = (b_peak > b_best) | ((b_peak == b_best) & (state[7] < b_pos))
    return tl.where(b_win, b_peak, b_best), tl.where(b_win, state[7], b_pos), tl.where(b_win, state[6], b_top)
