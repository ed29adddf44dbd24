"""Attention summed over query rows: what each key receives, from log-sum-exps, without the weights.

    sums_j = Σ_{i counted} exp(x_ij - lse_i)          observers_j = #{i counted : i sees j}

The second streaming pass after one that gave the log-sum-exps; a mean is sums / observers. A program owns N keys of one
query head and walks the query rows that can see them; nothing is accumulated across programs, so results are
deterministic. Memory is O(B·h·Tk).

Shapes: as `steered_prefill`; h the heads wanted. bf16, fp16, fp32. Source: ACT (arXiv 2406.15765), core.md §2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from steerlens.kernels import _configs
from steerlens.kernels._launch import (
    BOOLS,
    ceil_div,
    check_attention,
    check_edits,
    check_table,
    inner,
    or_one,
    precision,
    refuse,
    steps,
    widths,
)
from steerlens.kernels._tiles import CHANGING, HIDDEN, LOG2E, capped, dots, load_rows, seen_logits
from steerlens.kernels.key_index import Labels


@triton.jit(do_not_specialize=CHANGING)
def column_sums_kernel(
    p_q, p_k, p_lse, p_counted, p_sums, p_observers, p_bits, p_bias, p_mask, p_heads,
    s_qb, s_qh, s_qr: tl.constexpr, s_kb, s_kh, s_kn, s_xb, s_xh, s_ab, s_lb, s_lh, s_ub, s_uh, s_ur, s_ut,
    s_mb, s_mh, s_mr, h, heads_per_kv, Tq, Tk, scale, softcap, offset, window,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, LABELS: tl.constexpr, TERMS: tl.constexpr,
    MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HEADS: tl.constexpr, COUNTED: tl.constexpr,
    PRECISION: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    # keys that many rows see come first
    i_n = tl.program_id(0)
    i_place = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_h = i_place
    if HEADS:
        i_h = tl.load(p_heads + i_place).to(tl.int64)
    o_n = i_n * N + tl.arange(0, N)
    m_n = o_n < Tk
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h // heads_per_kv * s_kh
    p_lse += i_b * s_xb + i_place * s_xh
    p_label = p_bits + i_b * s_lb + i_h * s_lh
    p_bias += i_b * s_ub + i_h * s_uh
    p_mask += i_b * s_mb + i_h * s_mh

    b_k1, b_k2 = load_rows(p_k + o_n.to(tl.int64) * s_kn, m_n, D, D1, D2, False)
    # blocks [i_lo, i_hi) hold all rows that see any of the keys; every row of [i_first, i_last) sees all of them
    i_lo, i_hi = 0, (Tq + R - 1) // R
    i_first, i_last = i_hi, i_hi
    if MASK == 0:
        i_lo = tl.minimum(tl.maximum(i_n * N - offset, 0) // R, i_hi)
        i_first = tl.minimum((tl.maximum(i_n * N + N - 1 - offset, 0) + R - 1) // R, i_hi)
        i_last = Tq // R
        if WINDOW:
            i_hi = tl.minimum((tl.maximum(i_n * N + N - 1 - offset + window, 0) + R - 1) // R, i_hi)
            i_last = tl.minimum(i_last, tl.maximum(i_n * N - offset + window, 0) // R)
        if LABELS:
            b_any = tl.load(p_label + o_n, mask=m_n, other=0)
            i_first = tl.where(tl.max(b_any.to(tl.int32), 0) == 0, i_first, i_hi)
        i_first = tl.minimum(i_first, i_hi)
        i_last = tl.maximum(i_last, i_first)
    b_sums = tl.zeros([N], tl.float32)
    i_seen = 0
    o_q = tl.arange(0, R)
    for i in range(i_first, i_last):
        i_t = tl.minimum(i, i_last - 1)
        i_q = (i_t * R).to(tl.int64)
        # [N, R]: sums over rows stay within a warp
        b_lse = tl.load(p_lse + i_q + o_q) * LOG2E
        if COUNTED:
            m_r = tl.load(p_counted + i_b * s_ab + i_q + o_q) != 0
            b_lse = tl.where(m_r, b_lse, float("inf"))
            i_seen += tl.sum(tl.where(m_r, 1, 0), 0)
        else:
            i_seen += R
        b_q1, b_q2 = load_rows(p_q + i_q * s_qr + o_q.to(tl.int64) * s_qr, m_n, D, D1, D2, True)
        b_s = dots(b_k1, b_k2, b_q1, b_q2, D2, PRECISION)
        b_by = scale * LOG2E
        if SOFTCAP:
            b_s = capped(b_s, scale, softcap)
            b_by = 1.0
        b_sums += tl.sum(tl.exp2(b_s * b_by - b_lse[None, :]), 1)
    # [R, N], added up over rows in the end
    b_parts = tl.zeros([R, N], tl.float32)
    b_counts = tl.zeros([R, N], tl.float32)
    for i in range(0, i_first - i_lo + i_hi - i_last):
        o_r = tl.where(i < i_first - i_lo, i_lo + i, i_last + i - i_first + i_lo) * R + o_q
        m_r = o_r < Tq
        if COUNTED:
            m_r = m_r & (tl.load(p_counted + i_b * s_ab + o_r, mask=m_r, other=0) != 0)
        b_lse = tl.load(p_lse + o_r, mask=m_r, other=float("inf")) * LOG2E
        # a row that sees nothing gives nothing
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
        b_q1, b_q2 = load_rows(p_q + o_r.to(tl.int64) * s_qr, m_r, D, D1, D2, False)
        o_last = tl.minimum(o_r, Tq - 1).to(tl.int64)
        b_s, b_by, _, m_seen, _ = seen_logits(
            b_q1, b_q2, b_k1, b_k2, o_r + offset - window + 1, tl.minimum(o_r + offset, Tk - 1), o_n, m_n, p_label,
            p_bias + o_last * s_ur, s_ut, p_mask + o_last * s_mr, scale, softcap,
            D2, LABELS, HIDDEN, False, TERMS, MASK, WINDOW, SOFTCAP, False, PRECISION,
        )  # fmt: skip
        b_counts += tl.where(m_seen & m_r[:, None], 1.0, 0.0)
        b_parts += tl.exp2(b_s * b_by - b_lse[:, None])
    b_sums += tl.sum(b_parts, 0)
    b_seen = i_seen + tl.sum(b_counts, 0)
    o_at = (i_b * h + i_place) * Tk + o_n
    tl.store(p_sums + o_at, b_sums, mask=m_n)
    tl.store(p_observers + o_at, b_seen, mask=m_n)


def column_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    scaling: float | None = None,
    offset: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    labels: Labels | None = None,
    bias: torch.Tensor | None = None,
    counted: torch.Tensor | None = None,
    heads: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and observers, each fp32 [B, h, Tk].

    Args:
        query: [B, H, Tq, D]; the other arguments as in `attention.attention`.
        key: [B, G, Tk, D].
        lse: log-sum-exp of each row with the same terms and sinks, in nats, fp32 [B, h, Tq].
        scaling: factor on q·k.
        offset: column of query row 0 minus column of key 0.
        window: sliding window.
        softcap: cap of the logits.
        mask: visibility instead of causality and window.
        labels: hidden keys and terms; groups change nothing.
        bias: of the terms.
        counted: rows that count, bool [B or 1, Tq]; `None` for all.
        heads: int32 [h], the query heads wanted; `None` for all.

    Raises:
        ValueError: for a shape, dtype or device that the kernel does not have; it names it.
    """
    check_attention(query, key, key)
    B, H, Tq, D = query.shape
    h = H if heads is None else heads.shape[0]
    if lse.shape != (B, h, Tq) or lse.dtype != torch.float32:
        refuse("lse", f"{lse.dtype} {tuple(lse.shape)}", f"float32 [{B}, {h}, {Tq}]")
    Tk = key.shape[2]
    terms = labels.terms if labels is not None and bias is not None else 0
    scaling = D**-0.5 if scaling is None else scaling
    check_edits(query, key, scaling, window, softcap, mask, labels and labels.bits, bias, terms, heads)
    if lse.device != query.device:
        refuse("device of lse", lse.device, f"{query.device}, as query")
    if counted is not None:
        check_table("counted rows", counted, (B, Tq), BOOLS, query.device)
    sums, observers = torch.ops.steerlens.column_sums(
        query, key, lse.contiguous(), None if labels is None else labels.bits, bias, mask, counted, heads, terms,
        float(scaling), float(softcap or 0), Tk - Tq if offset is None else offset,
        window or 0,
    )  # fmt: skip
    return sums, observers


Optional = torch.Tensor | None


@torch.library.custom_op("steerlens::column_sums", mutates_args=())
def _column_sums(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, bits: Optional, bias: Optional, mask: Optional,
    counted: Optional, heads: Optional, terms: int, scaling: float, softcap: float, offset: int, window: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    query, key = inner(query), inner(key)
    B, H, Tq, D = query.shape
    Tk = key.shape[2]
    h = H if heads is None else heads.shape[0]
    sums = torch.empty(B, h, Tk, dtype=torch.float32, device=query.device)
    observers = torch.empty_like(sums)
    mask = None if mask is None else inner(mask)
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    mask = mask.view(torch.uint8) if mask is not None and kind == 1 else mask
    heads = None if heads is None else heads.contiguous()
    counted = None if counted is None else inner(counted.view(torch.uint8))
    bits = None if bits is None else inner(bits)
    (D1, D2), config = widths(D), _configs.columns(D, query.dtype)
    column_sums_kernel[(ceil_div(Tk, config.keys), h, B)](
        query, key, lse, or_one(counted, lse), sums, observers, or_one(bits, lse), or_one(bias, lse),
        or_one(mask, lse), or_one(heads, lse),
        *query.stride()[:3], *key.stride()[:3], *lse.stride()[:2], *steps(counted, 1), *steps(bits, 2),
        *steps(bias, 3), 1 if bias is None else bias.stride(3), *steps(mask, 3),
        h, H // key.shape[1], Tq, Tk, scaling, softcap, offset, window,
        D=D, D1=D1, D2=D2, LABELS=bits is not None, TERMS=terms, MASK=kind, WINDOW=window > 0, SOFTCAP=softcap > 0,
        HEADS=heads is not None, COUNTED=counted is not None, PRECISION=precision(query.dtype),
        R=config.rows, N=config.keys, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return sums, observers


@_column_sums.register_fake
def _fake(query, key, lse, bits, bias, mask, counted, heads, terms, scaling, softcap, offset, window):
    shape = (query.shape[0], lse.shape[1], key.shape[2])
    return lse.new_empty(shape), lse.new_empty(shape)
