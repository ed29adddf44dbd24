"""Steered attention in one call, by `steered_prefill` or `steered_decode`; a `torch.library` operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from steerlens.kernels import _configs
from steerlens.kernels._launch import (
    BOOLS,
    DTYPES,
    Again,
    ceil_div,
    check_attention,
    check_edits,
    check_launch,
    check_table,
    inner,
    power_of_two,
    precision,
    processors,
    refuse,
    steps,
    widths,
)
from steerlens.kernels.key_index import Labels
from steerlens.kernels.prefix_mean import prefix_mean
from steerlens.kernels.steered_decode import steered_decode_kernel, steered_merge_kernel
from steerlens.kernels.steered_prefill import steered_prefill_kernel

LAWS = ("none", "transfer", "reach", "spotlight", "raw")
STATS = ("lse", "lse_before", "entropy", "argmax", "mass")
UNIFORM, ZERO = 1, 2
"""Values of a cut."""
DECODE_ROWS = 64
"""Up to so many packed rows of a key/value head take the decode kernel."""
MAX_SPLITS = 64


@dataclass
class Law:
    """How mass moves between the groups of a row, o' = Σ_g ψ'_g·o_g.

    Attributes:
        kind: `transfer`: ψ'_g = Σ_s table[g, s]·ψ_s (keep: [[1, 1-β], [0, β]]; a budget between groups; a gain, whose
            columns do not sum to 1). `reach`: ψ'_1 = max(ψ_1, τ). `spotlight`: τ/(1+τ-ψ_1) where ψ_1 < τ. `raw`: the
            terms multiply weights that are not renormalised (anchor re-weighting); needs one group and no table.
        table: fp32 [B or 1, H or 1, G, G] for `transfer`; τ in [0, 1], fp32 [B or 1, H or 1], for the other two.
        rows: query rows that the law applies to, bool [B or 1, Tq]; `None` for all.
    """

    kind: str
    table: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @classmethod
    def keep(cls, fraction: torch.Tensor, rows: torch.Tensor | None = None) -> Law:
        """ψ'_1 = β·ψ_1 for β = `fraction`, fp32 [B or 1, H or 1]; the rest goes to group 0."""
        beta = fraction.float()
        table = torch.stack([torch.ones_like(beta), 1 - beta, torch.zeros_like(beta), beta], -1)
        return cls("transfer", table.unflatten(-1, (2, 2)), rows)


@dataclass
class Result:
    """What `attention` gives; what was not asked for is `None`. h: H, or the heads asked for.

    Attributes:
        output: [B, h, Tq, Dv] in the dtype of value.
        lse: log-sum-exp of the logits with terms, before the law, sinks included, in nats, fp32 [B, h, Tq].
        lse_before: the same without the terms.
        entropy: of the final weights in nats, fp32 [B, h, Tq].
        argmax: key of the largest final weight, int64 [B, h, Tq]; the lowest on a tie, -1 where a row sees no key.
        top: logit of that key with terms, in nats, fp32 [B, h, Tq].
        mass: final weight on the keys of each term, fp32 [B, h, Tq, terms].
    """

    output: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    lse_before: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    argmax: torch.Tensor | None = None
    top: torch.Tensor | None = None
    mass: torch.Tensor | None = None


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
    heads: torch.Tensor | None = None,
    stats: Sequence[str] = (),
    output: bool = True,
) -> Result:
    """Steered attention; key j is seen by row i if j <= i + offset, within the window, or where `mask` says so.

    Args:
        query: [B, H, Tq, D], bf16, fp16 or fp32.
        key: [B, G, Tk, D] with G dividing H.
        value: [B, G, Tk, Dv].
        scaling: factor on q·k, > 0; by default D^-0.5.
        offset: column of query row 0 minus column of key 0; by default Tk - Tq (bottom-right causal).
        window: a row sees its own and the `window` - 1 keys before it.
        softcap: c of c·tanh(x/c) on the logits, before terms.
        mask: bool (True = seen) or additive float [B or 1, H or 1, Tq, Tk], instead of causality and window.
        sinks: learned sink logits [H]: for each head one more key in group 0, of value zero.
        labels: groups, hidden keys and terms.
        bias: fp32 [B or 1, H or 1, Tq or 1, terms], nats added to the logits of each term's keys; -inf is a gate.
        law: how mass moves between groups; `None` leaves it.
        cut: outputs that are replaced, int8 [B or 1, H or 1, Tq or 1]: 1 by the mean of V over the keys that the row
            sees, 2 by zeros. Statistics do not know of it.
        heads: int32 [h], the query heads wanted; `None` for all.
        stats: some of `STATS`.
        output: whether attention itself is wanted.

    Raises:
        ValueError: for a shape, dtype, device, number of groups or law that the kernels do not have; it names them.
        RuntimeError: if gradients are needed; the kernels have no backward.
    """
    check_launch(query)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        raise RuntimeError("the Triton kernels have no backward: call them without gradients, or use 'sdpa'")
    bits, groups, terms = (labels.bits, labels.groups, labels.terms) if labels is not None else (None, 1, 0)
    kind, table, rows = (law.kind, law.table, law.rows) if law is not None else (None, None, None)
    # The operator is for those who trace; its dispatch costs as much as a launch.
    traced = type(query) is not torch.Tensor or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    # The layers of a forward differ in what their tensors hold, and no check asks for that: one of them is checked.
    tensors = (query, key, value, bits, bias, table, rows, mask, sinks, cut, heads)
    call = (
        *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors],
        kind, groups, terms, scaling, offset, window, softcap, *stats, output, DECODE_ROWS,
    )  # fmt: skip
    asked = None if traced else _ASKED.get(call)
    if asked is None:
        asked = _Asked.of(
            query, key, value, scaling, offset, window, softcap, mask, sinks, labels, bias, law, cut, heads,
            tuple(stats), output,
        )  # fmt: skip
        if not traced:
            if len(_ASKED) >= _MOST_ASKED:
                _ASKED.clear()
            _ASKED[call] = asked
    if asked.step is not None and not traced:
        return Result(_step(asked.step, query, key, value, bits, bias, table, rows, mask, sinks, cut))
    index = None
    if labels is not None and not asked.decoding:
        config = _configs.prefill(
            max(query.shape[3], value.shape[3]), query.dtype, groups, masked=mask is not None, labels=True,
            stats=bool(stats), output=output,
        )  # fmt: skip
        found = labels.index(config.keys)
        index = (found.before, found.tiles, found.keys)
    parts = (torch.ops.steerlens.attention if traced else _compute)(
        query, key, value, bits, *(index or (None,) * 3), bias, None if table is None else table.contiguous(), rows,
        mask, sinks, cut, None if asked.decoding else heads, asked.law, groups, terms, asked.scaling,
        float(softcap or 0), asked.offset, window or 0, asked.stats, output,
    )  # fmt: skip
    if asked.decoding and heads is not None:
        parts = [part.index_select(1, heads) for part in parts]
    results = dict(zip(_names(asked.stats, output), parts, strict=True))
    if "lse_before" in stats and not terms:
        results["lse_before"] = results["lse"]
    if "lse" not in stats:
        results.pop("lse", None)
    if "argmax" in results:
        results["argmax"] = results["argmax"].long()
    return Result(**results)


def is_decode(heads_per_kv: int, rows: int) -> bool:
    """Whether so many rows take the split-KV kernel."""
    return heads_per_kv * rows <= DECODE_ROWS


def _law(law: Law | None, groups: int, terms: int, B: int, H: int, Tq: int, device: torch.device) -> int:
    """The number of a law, checked."""
    if law is None:
        if groups > 1:
            refuse("law", None, f"a law for the {groups} groups of the labels")
        return 0
    if law.kind not in LAWS[1:]:
        refuse("kind of law", repr(law.kind), ", ".join(LAWS[1:]))
    if law.kind == "raw":
        if groups > 1 or not terms or law.table is not None or law.rows is not None:
            refuse("law 'raw' with groups, terms", (groups, terms), "one group, some terms, no table and no rows")
        return 4
    if groups < 2:
        refuse("groups of the labels", groups, f"2 to 4 for the law {law.kind!r}")
    if law.table is None:
        refuse("table of the law", None, "fp32 parameters")
    sizes = (B, H, groups, groups) if law.kind == "transfer" else (B, H)
    check_table(f"table of the law {law.kind!r}", law.table, sizes, (torch.float32,), device)
    if law.kind == "transfer" and law.table.shape[2:] != (groups, groups):
        refuse("table of the law 'transfer'", tuple(law.table.shape), f"[B or 1, H or 1, {groups}, {groups}]")
    if law.rows is not None:
        check_table("rows of the law", law.rows, (B, Tq), BOOLS, device)
    return LAWS.index(law.kind)


Optional = torch.Tensor | None


class _Constants(NamedTuple):
    """What each kernel is compiled for, and how many fields a partial result has."""

    prefill: dict[str, Any]
    decode: dict[str, Any]
    merge: dict[str, Any]
    fields: int


@lru_cache(maxsize=1024)
def _constants(
    D: int, DV: int, dtype: torch.dtype, groups: int, terms: int, law: int, kind: int, stats: int, output: bool,
    labels: bool, rows: bool, sinks: bool, cut: bool, window: bool, softcap: bool,
) -> _Constants:  # fmt: skip
    (D1, D2), (V1, V2) = widths(D), widths(DV)
    lse, before, entropy, argmax, mass = (bool(stats >> i & 1) for i in range(5))
    shared = {
        "DV": DV, "V1": V1, "V2": V2, "GROUPS": groups, "TERMS": terms, "RAW": terms > 0 and (before or law == 4),
        "ENT": entropy, "ARG": argmax, "MASSES": power_of_two(terms) if mass else 0, "OUT": output,
    }  # fmt: skip
    loops = shared | {
        "D": D, "D1": D1, "D2": D2, "LABELS": labels, "MASK": kind, "WINDOW": window, "SOFTCAP": softcap,
        "PRECISION": precision(dtype),
    }  # fmt: skip
    ends = {"LAW": law, "ROWS": rows, "SINKS": sinks, "CUT": cut, "LSE": lse or before}
    fields = {"FIELDS": 5 + shared["MASSES"]}
    early = {"EARLY": cut and stats == 0}
    return _Constants(loops | ends, loops | fields | early, shared | ends | fields, fields["FIELDS"])


class _Decode(NamedTuple):
    """What decode's two launches take beside tensors: no value in it depends on what tensors hold."""

    heads_per_kv: int
    rows: int
    total: int
    start: int
    stop: int
    scaling: float
    softcap: float
    offset: int
    window: int
    groups: int
    loop: tuple[int, ...]
    ends: tuple[int, ...]
    per_head: bool
    constants: _Constants
    decode: Again
    merge: Again

    @classmethod
    def of(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bits: Optional, bias: Optional,
        table: Optional, rows: Optional, mask: Optional, sinks: Optional, cut: Optional, law: int, groups: int,
        terms: int, scaling: float, softcap: float, offset: int, window: int, stats: int, output: bool,
    ) -> _Decode:  # fmt: skip
        (B, H, Tq, D), (G, Tk, DV) = query.shape, value.shape[1:]
        start = 0 if mask is not None or not window else max(0, offset - window + 1)
        stop = Tk if mask is not None else max(start, min(Tk, offset + Tq))
        labels, cuts = steps(bits, 2), steps(cut, 3)
        qkv = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
        loop = (*qkv, *labels, *_biases(bias), *steps(mask, 3), *cuts)
        ends = ((Tq * H * DV, DV, H * DV) if output else (0, 0, 0), steps(table, 2), steps(rows, 1), cuts)
        constants = _constants(
            D, DV, query.dtype, groups, terms, law, _mask_kind(mask), stats, output, bits is not None,
            rows is not None, sinks is not None, cut is not None, window > 0, softcap > 0,
        )  # fmt: skip
        return cls(
            H // G, max(16, power_of_two(H // G * Tq)), B * H * Tq, start, stop, scaling, softcap, offset, window,
            groups, loop, sum(ends, ()), labels[1] != 0, constants, Again(steered_decode_kernel),
            Again(steered_merge_kernel),
        )  # fmt: skip


class _Asked(NamedTuple):
    """A call, checked: what it comes to, and how decode is launched where it wants no statistics."""

    decoding: bool
    law: int
    scaling: float
    offset: int
    stats: int
    step: _Decode | None

    @classmethod
    def of(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, offset: int | None,
        window: int | None, softcap: float | None, mask: Optional, sinks: Optional, labels: Labels | None,
        bias: Optional, law: Law | None, cut: Optional, heads: Optional, stats: tuple[str, ...], output: bool,
    ) -> _Asked:  # fmt: skip
        check_attention(query, key, value)
        (B, H, Tq, D), Tk = query.shape, key.shape[2]
        scaling = D**-0.5 if scaling is None else scaling
        for stat in stats:
            if stat not in STATS:
                refuse("stat", repr(stat), ", ".join(STATS))
        bits, groups, terms = (labels.bits, labels.groups, labels.terms) if labels is not None else (None, 1, 0)
        check_edits(query, key, scaling, window, softcap, mask, bits, bias, terms, heads)
        if sinks is not None:
            check_table("sinks", sinks, (H,), DTYPES, query.device)
            if sinks.shape[0] != H:
                refuse("shape of sinks", tuple(sinks.shape), f"[{H}]")
        if bias is None and terms and "mass" not in stats:
            refuse("bias", None, f"a table for the {terms} terms of the labels")
        if cut is not None:
            check_table("cut", cut, (B, H, Tq), (torch.int8,), query.device)
        kind = _law(law, groups, terms, B, H, Tq, query.device)
        if "lse_before" in stats and groups > 1 and terms:
            refuse("stat 'lse_before' with groups", groups, "one group, or no terms")
        if not output and not stats:
            refuse("output", output, "True, unless statistics are wanted")
        offset = Tk - Tq if offset is None else offset
        decoding = is_decode(H // key.shape[1], Tq)
        computed = {"lse" if stat == "lse_before" and not terms else stat for stat in stats}
        flags = sum(1 << STATS.index(stat) for stat in computed)
        table, rows = (law.table, law.rows) if law is not None else (None, None)
        step = None
        dense = all(t is None or inner(t) is t for t in (query, key, value, bits, rows, mask))
        whole = all(t is None or t.is_contiguous() for t in (table, sinks))
        if decoding and heads is None and not stats and dense and whole:
            step = _Decode.of(
                query, key, value, bits, bias, table, rows, mask, sinks, cut, kind, groups, terms, float(scaling),
                float(softcap or 0), offset, window or 0, 0, output,
            )  # fmt: skip
        return cls(decoding, kind, float(scaling), offset, flags, step)


_ASKED: dict[tuple[Any, ...], _Asked] = {}
_MOST_ASKED = 512


def _biases(bias: Optional) -> tuple[int, ...]:
    return (*steps(bias, 3), 1 if bias is None else bias.stride(3))


def _mask_kind(mask: Optional) -> int:
    """0: none; 1: bool; 2: additive."""
    return 0 if mask is None else 1 if mask.dtype in BOOLS else 2


def _step(
    plan: _Decode, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bits: Optional, bias: Optional,
    table: Optional, rows: Optional, mask: Optional, sinks: Optional, cut: Optional,
) -> torch.Tensor:  # fmt: skip
    """Decode without statistics."""
    B, H, Tq, _ = query.shape
    out = value.new_empty(B, Tq, H, value.shape[3]).transpose(1, 2)
    rows, mask = _bytes(rows), _bytes(mask)
    _decode(plan, query, key, value, [out, *[query] * 6], bits, bias, table, rows, mask, sinks, cut, False, True)
    if cut is not None:
        prefix_mean(out, value, mask, bits, cut, plan.heads_per_kv, None, plan.offset, plan.window)
    return out


def _bytes(table: Optional) -> Any:
    """A bool table as the kernels read it."""
    return table.view(torch.uint8) if table is not None and table.dtype == torch.bool else table


def _decode(
    plan: _Decode, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, outputs: list[torch.Tensor],
    bits: Optional, bias: Optional, table: Optional, rows: Optional, mask: Optional, sinks: Optional, cut: Optional,
    argmax: bool, output: bool,
) -> None:  # fmt: skip
    """Launch decode and merge; `outputs` are those of `Result`, anything for what is not wanted."""
    (B, H, Tq, D), G, DV = query.shape, key.shape[1], value.shape[3]
    groups, total, new = plan.groups, plan.total, query.new_empty
    config = _configs.decode(max(D, DV), query.dtype, plan.rows, groups)
    length = plan.stop - plan.start
    splits = split_count(length, B * G, config.keys, processors(query.device))
    span = ceil_div(ceil_div(length, splits), config.keys) * config.keys
    part = new((splits, groups, total, plan.constants.fields), dtype=torch.float32)
    place = new((splits, groups, total), dtype=torch.int32) if argmax else query
    acc = new((splits, groups, total, DV), dtype=torch.float32) if output else query
    # a kernel is given something for what it will not read
    bits, bias, mask, cut = (query if t is None else t for t in (bits, bias, mask, cut))
    table, rows, sinks = (query if t is None else t for t in (table, rows, sinks))
    plan.decode.launch(
        (splits, G, B),
        (query, key, value, part, place, acc, bits, bias, mask, cut),
        (
            *plan.loop, H, plan.heads_per_kv, Tq, plan.stop, total, plan.start, span, plan.scaling, plan.softcap,
            plan.offset, plan.window,
        ),
        (plan.constants.decode, {"PER_HEAD": plan.per_head, "R": plan.rows, "N": config.keys}),
        config.warps, config.stages, (span, config),
    )  # fmt: skip
    plan.merge.launch(
        (total, 1, 1), (part, place, acc, *outputs, table, rows, sinks, cut), (*plan.ends, H, Tq, total, splits),
        (plan.constants.merge, {"S": power_of_two(splits)}), 4, 3, splits,
    )  # fmt: skip


def _compute(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bits: Optional, before: Optional, tiles: Optional,
    keys: Optional, bias: Optional, table: Optional, rows: Optional, mask: Optional, sinks: Optional, cut: Optional,
    heads: Optional, law: int, groups: int, terms: int, scaling: float, softcap: float, offset: int, window: int,
    stats: int, output: bool,
) -> list[torch.Tensor]:  # fmt: skip
    query, key, value = inner(query), inner(key), inner(value)
    B, H, Tq, D = query.shape
    G, Tk, DV = key.shape[1], key.shape[2], value.shape[3]
    heads_per_kv = H // G
    h = H if heads is None else heads.shape[0]
    made = _outputs(query, value, h, terms, stats, output)
    found = dict(zip(_names(stats, output), made, strict=True))
    if bias is None and terms:
        bias = torch.zeros(1, 1, 1, terms, dtype=torch.float32, device=query.device)
    mask, rows = (None if t is None else inner(_bytes(t)) for t in (mask, rows))
    kind = _mask_kind(mask)
    sinks = None if sinks is None else sinks.contiguous()
    heads = None if heads is None else heads.contiguous()
    bits = None if bits is None else inner(bits)
    # The law "raw" leaves the log-sum-exp without terms wherever the other is wanted.
    if law == 4 and "lse" in found and "lse_before" not in found:
        found["lse_before"] = torch.empty_like(found["lse"])
    outputs = [found.get(name, query) for name in ("output", "lse", "lse_before", "entropy", "top", "argmax", "mass")]
    out = found.get("output")
    os = (0, 0, 0) if out is None else out.stride()[:3]
    qkv = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    labels, biases, laws = steps(bits, 2), _biases(bias), steps(table, 2)
    masks, cuts, law_rows = steps(mask, 3), steps(cut, 3), steps(rows, 1)
    constants = _constants(
        D, DV, query.dtype, groups, terms, law, kind, stats, output, bits is not None, rows is not None,
        sinks is not None, cut is not None, window > 0, softcap > 0,
    )  # fmt: skip

    # a kernel is given something for what it will not read
    def pointers(*tensors: Optional) -> list[torch.Tensor]:
        return [query if tensor is None else tensor for tensor in tensors]

    if not (heads is None and is_decode(heads_per_kv, Tq)):
        config = _configs.prefill(
            max(D, DV), query.dtype, groups, masked=kind > 0, labels=bits is not None, stats=stats > 0, output=output
        )
        T = ceil_div(Tk, config.keys)
        # The index is laid out by rows and heads of its own; steps count (row, head) pairs.
        index = (0, 0)
        if before is not None:
            index = (before.shape[1] if before.shape[0] > 1 else 0, 1 if before.shape[1] > 1 else 0)
        steered_prefill_kernel[(ceil_div(Tq, config.rows), h, B)](
            query, key, value, *outputs,
            *pointers(bits, before, tiles, keys, bias, table, rows, mask, sinks, cut, heads),
            *qkv, *os, *labels, *index, *biases, *laws, *law_rows, *masks, *cuts,
            h, heads_per_kv, Tq, Tk, T, scaling, softcap, offset, window,
            **constants.prefill, HEADS=heads is not None, TERM_ROWS=bias is not None and bias.shape[2] > 1,
            R=config.rows, N=config.keys, GATHERED=config.gathered,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    else:
        plan = _Decode.of(
            query, key, value, bits, bias, table, rows, mask, sinks, cut, law, groups, terms, scaling, softcap, offset,
            window, stats, output,
        )  # fmt: skip
        _decode(plan, query, key, value, outputs, bits, bias, table, rows, mask, sinks, cut, "argmax" in found, output)
    if cut is not None and out is not None:
        prefix_mean(out, value, mask, bits, cut, heads_per_kv, heads, offset, window)
    return made


_attention = torch.library.custom_op("steerlens::attention", _compute, mutates_args=())


@_attention.register_fake
def _fake(
    query, key, value, bits, before, tiles, keys, bias, table, rows, mask, sinks, cut, heads, law, groups, terms,
    scaling, softcap, offset, window, stats, output,
):  # fmt: skip
    return _outputs(query, value, query.shape[1] if heads is None else heads.shape[0], terms, stats, output)


@lru_cache
def _names(stats: int, output: bool) -> tuple[str, ...]:
    """What the operator returns, in order; with `lse_before` it gives `lse` too."""
    lse, before, entropy, argmax, mass = (bool(stats >> i & 1) for i in range(5))
    wanted = {
        "output": output, "lse": lse or before, "lse_before": before, "entropy": entropy, "top": argmax,
        "argmax": argmax, "mass": mass,
    }  # fmt: skip
    return tuple(name for name, given in wanted.items() if given)


def _outputs(
    query: torch.Tensor, value: torch.Tensor, h: int, terms: int, stats: int, output: bool
) -> list[torch.Tensor]:
    B, _, Tq, _ = query.shape
    found = []
    for name in _names(stats, output):
        if name == "output":
            # One row of heads after the other, as the models want it: [B, Tq, h, Dv] in memory.
            found.append(value.new_empty(B, Tq, h, value.shape[3]).transpose(1, 2))
            continue
        dtype = torch.int32 if name == "argmax" else torch.float32
        found.append(query.new_empty((B, h, Tq, terms) if name == "mass" else (B, h, Tq), dtype=dtype))
    return found


def split_count(keys: int, programs: int, block: int, processors: int) -> int:
    """Into how many ranges `keys` are split, so that about two programs fall on each processor."""
    most = min(MAX_SPLITS, max(1, keys // (2 * block)))
    return max(1, min(most, (2 * processors + programs // 2) // programs))
