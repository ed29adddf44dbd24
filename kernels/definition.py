"""The definition: what `attention`, `column_sums` and the cuts compute, with all weights written out in fp32 or fp64.

Written for reading and for tests and checks of the kernels; O(Tq·Tk) memory. Arguments and shapes as `attention`.
"""

from __future__ import annotations

import torch
from steerlens.kernels.attention import UNIFORM, Law, Result
from steerlens.kernels.key_index import Labels


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    offset: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    labels: Labels | None = None,
    bias: torch.Tensor | None = None,
    law: Law | None = None,
    cut: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Result, torch.Tensor]:
    """All results of `kernels.attention.attention` in `dtype`, and the final weights [B, H, Tq, Tk]."""
    B, H, Tq, _ = query.shape
    seen, x, terms = logits(query, key, scaling, offset, window, softcap, mask, labels, dtype)
    sink = x.new_full((B, H, Tq, 1), -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype)[None, :, None, None].expand(B, H, Tq, 1)
    before = torch.cat([x, sink], -1).logsumexp(-1)
    if bias is not None:
        for t, inside in enumerate(terms):
            x = torch.where(inside, x + bias[..., t, None].to(dtype), x)
    with_sink = torch.cat([x, sink], -1)
    lse = with_sink.logsumexp(-1)
    if law is not None and law.kind == "raw":
        weights = torch.where(before[..., None] > -torch.inf, (x - before[..., None]).exp(), 0)
    else:
        weights = _moved(with_sink, lse, labels, law)
    output = weights @ value.repeat_interleave(H // value.shape[1], 1).to(dtype)
    if cut is not None:
        mean = seen.to(dtype) / seen.sum(-1, keepdim=True).clamp(min=1)
        uniform = mean @ value.repeat_interleave(H // value.shape[1], 1).to(dtype)
        output = torch.where((cut == UNIFORM)[..., None], uniform, torch.where((cut == 0)[..., None], output, 0))
    heard = x > -torch.inf
    argmax = torch.where(heard.any(-1), weights.masked_fill(~heard, -1).argmax(-1), -1)
    top = x.gather(-1, argmax.clamp(min=0)[..., None])[..., 0]
    mass = torch.stack([(weights * t).sum(-1) for t in terms], -1) if terms else weights.new_zeros(B, H, Tq, 0)
    return Result(output, lse, before, torch.special.entr(weights).sum(-1), argmax, top, mass), weights


def logits(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float | None,
    offset: int | None,
    window: int | None,
    softcap: float | None,
    mask: torch.Tensor | None,
    labels: Labels | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """What is seen, bool [B, H, Tq, Tk]; logits before terms, -inf where not seen; where each term is."""
    B, H, Tq, D = query.shape
    Tk = key.shape[2]
    x = query.to(dtype) @ key.repeat_interleave(H // key.shape[1], 1).to(dtype).mT
    x = x * (D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    columns = torch.arange(Tk, device=query.device)
    ahead = torch.arange(Tq, device=query.device)[:, None] + (Tk - Tq if offset is None else offset) - columns
    seen = (ahead >= 0) & (ahead < (window or Tk + Tq + abs(offset or 0)))
    if mask is not None:
        seen = mask > -9e3 if mask.is_floating_point() else mask
        x = x + torch.where(seen, mask, 0).to(dtype) if mask.is_floating_point() else x
    terms = []
    if labels is not None:
        bits = labels.bits.int()[:, :, None]
        seen = seen & (bits & 4 == 0)
        terms = [bits >> (3 + t) & 1 == 1 for t in range(labels.terms)]
    seen = seen.expand(B, H, Tq, Tk)
    return seen, x.masked_fill(~seen, -torch.inf), terms


def _moved(x: torch.Tensor, lse: torch.Tensor, labels: Labels | None, law: Law | None) -> torch.Tensor:
    """Weights [B, H, Tq, Tk] after the law, from logits [B, H, Tq, Tk + 1] that end with the sink."""
    B, H, Tq, _ = x.shape
    if law is None:
        return torch.where(lse[..., None] > -torch.inf, (x - lse[..., None]).exp(), 0)[..., :-1]
    assert labels is not None and law.table is not None
    groups = torch.nn.functional.pad(labels.bits.int() & 3, (0, 1)).expand(B, H, -1)[:, :, None]
    parts = [x.masked_fill(groups != g, -torch.inf) for g in range(labels.groups)]
    sums = torch.stack([part.logsumexp(-1) for part in parts], -1)
    alive = sums > -torch.inf
    psi = torch.where(alive, (sums - lse[..., None]).exp(), 0).nan_to_num()
    if law.kind == "transfer":
        new = torch.einsum("...gs,...s->...g", law.table[:, :, None].to(x.dtype).expand(B, H, Tq, -1, -1), psi)
        applies = ~((new > 0) & ~alive).any(-1)
    else:
        tau = law.table[:, :, None].to(x.dtype).expand(B, H, Tq)
        others = sums.clone()
        others[..., 1] = -torch.inf
        rest = others.logsumexp(-1)
        to = tau if law.kind == "reach" else tau / (1 + tau - psi[..., 1])
        share = torch.where(alive & (rest > -torch.inf)[..., None], (others - rest[..., None]).exp(), 0).nan_to_num()
        new = (1 - to)[..., None] * share
        new[..., 1] = to
        applies = (psi[..., 1].float() > 0) & (rest > -torch.inf) & (psi[..., 1] < tau)
    if law.rows is not None:
        applies = applies & law.rows.bool()[:, None]
    new = torch.where(applies[..., None], new, psi)
    weights = torch.zeros_like(x)
    for g, part in enumerate(parts):
        inner = torch.where(alive[..., g, None], (part - sums[..., g, None]).exp(), 0).nan_to_num()
        weights = weights + new[..., g, None] * inner
    return weights[..., :-1]


def column_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: torch.Tensor,
    seen: torch.Tensor,
    counted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums [B, H, Tk] of `weights` [B, H, Tq, Tk] over the counted rows, and how many of those see each key."""
    rows = torch.ones(1, 1, query.shape[2], 1, dtype=torch.bool) if counted is None else counted[:, None, :, None]
    return (weights * rows).sum(2), (seen & rows).sum(2).to(weights.dtype)
