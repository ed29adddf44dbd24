"""Steered attention on PyTorch's fused kernels, in O(T) memory.

A static bias Σ_g u[h,i,g]·1[j∈g] is a low-rank term on the logits: u/scale rides along as extra channels of the query,
the indicator of g as extra channels of the key. u sits on the query, so heads of one key/value group may differ. A few
query rows (decode) take an additive [B, H, Tq, Tk] term instead, since channels would copy the cache.

ψ' = βψ (`KeepMass`) is a mix of two attentions: o' = β·o + (1-β)·o_N, with o_N the attention outside the set. Row by
row this needs no ψ, and nothing cancels as ψ → 1.

Weights that depend on masses (`MoveMass`) take the log-sum-exp of the few keys of a group beside that of all keys, and
mix the two outputs: o' = (o + Σ_g (w_g-1)·ψ_g·o_g) / (1 + Σ_g (w_g-1)·ψ_g). Where that would cancel, where the keys are
many or gradients are needed, masses come out of indicators in place of V, and the weights become biases.

Column sums come from the same kernel, transposed: Σ_i exp(x_ij - LSE_i) is the exponential of the log-sum-exp that
key j gets as a *query* over the query rows as *keys*, with -LSE_i as a bias; reversing both orders keeps it causal.

A learned sink is one more key in front: a zero key whose logit is a bias, and a value of zero.

Shapes as in `call`; W: head dim with channels, a multiple of 8 (other widths leave the fused path).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from steerlens.backends import reference
from steerlens.backends.call import FEW_ROWS, Bias, Call, Cut, Few, KeepMass, MoveMass, Sums
from steerlens.backends.channels import Term, split, widen, with_terms
from steerlens.edits import HIDE
from steerlens.errors import UnsupportedError

_WIDENED = 2.25
"""What copies of queries, keys, values and outputs with channels may take, in queries, keys and values of a call."""
_MOST = {torch.float64: 0.9, torch.float32: 0.9, torch.bfloat16: 0.5, torch.float16: 0.5}
"""ψ up to which o_N by subtraction keeps the digits of its dtype."""


@dataclass
class Inputs:
    """Some query heads of a call as a rectangle: `query` [B, g·m, Tq, D] over `key`/`value` [B, g, Tk, D].

    `sinks` are logits of learned sinks, fp32 [B or 1, g·m, Tq or 1]; `sink_value` is their value, on every channel.
    `heads` are the call's query heads that these are, for masks that differ by head; `None` for all of them.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sinks: torch.Tensor | None = None
    sink_value: float = 0.0
    heads: list[int] | None = None

    def mask(self, call: Call) -> torch.Tensor | None:
        """The call's mask for these heads."""
        if call.mask is None or call.mask.shape[1] == 1 or self.heads is None:
            return call.mask
        return call.mask[:, self.heads]


def attention(call: Call) -> torch.Tensor:
    """Steered attention, [B, H, Tq, Dv] in the dtype of `value`.

    Raises:
        UnsupportedError: if the logits are soft-capped; the cap sits between the logits and the bias.
    """
    if call.softcap is not None:
        raise UnsupportedError(
            f"backend 'sdpa' cannot steer soft-capped logits (softcap={call.softcap}); use 'auto' or 'reference'"
        )
    cuts = [edit for edit in call.edits if isinstance(edit, Cut)]
    moves = [edit for edit in call.edits if not isinstance(edit, Cut)]
    terms: list[Term] = []
    query = call.query
    static = all(isinstance(edit, Bias) for edit in moves)
    sinks = None if call.sinks is None else call.sinks.float()[None, :, None]
    if static:
        # A zero query attends to all visible keys alike: the mean of V, whatever the mask.
        for cut in cuts:
            if cut.uniform and not _biased(call):
                query = query.masked_fill(cut.outputs[..., None], 0)
                sinks = None if sinks is None else torch.where(cut.outputs, HIDE, sinks)
    whole = Inputs(query, call.key, call.value, sinks)
    output: torch.Tensor | None = None
    gains: list[torch.Tensor] = []
    for number, edit in enumerate(moves):
        if isinstance(edit, Bias):
            weights = edit.weights
            for cut in cuts if static else ():
                weights = weights * ~cut.outputs
            terms.append(Term(weights, edit.keys[:, None], None if static and cuts else edit))
        elif isinstance(edit, MoveMass):
            mass = None
            if _has_lse(call) and number == len(moves) - 1:
                output, mass = _move(call, whole, terms, edit)
            if output is None:
                more, gain = _move_as_terms(call, whole, terms, edit, mass)
                terms += more
                gains += [] if gain is None else [gain]
        elif number == len(moves) - 1 and all(isinstance(m, Bias) for m in moves[:number]):
            output = _keep(call, whole, terms, edit)
        else:
            terms += _keep_as_bias(call, whole, terms, edit)
    if output is None:
        output = fused(call, whole, terms)
    for gain in gains:
        output = (output * gain[..., None]).to(output.dtype)
    for cut in cuts:
        if not cut.uniform:
            output = output * ~cut.outputs[..., None]
        elif not static or _biased(call):
            output = torch.where(cut.outputs[..., None], _uniform(call), output)
    return output


def fused(call: Call, inputs: Inputs, terms: list[Term]) -> torch.Tensor:
    """Attention under static terms, [B, h, Tq, Dv], differentiable."""
    return _run(call, inputs, terms, want_lse=False)[0]


def _run(
    call: Call, inputs: Inputs, terms: list[Term], want_lse: bool, divide: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if inputs.sinks is not None:
        return _run_with_sinks(call, inputs, inputs.sinks, terms, want_lse)
    if divide and (size := _heads_at_once(call, inputs, terms)) < inputs.query.shape[1]:
        return _run_in_portions(call, inputs, terms, want_lse, size)
    query, key, value = inputs.query, inputs.key, inputs.value
    width = value.shape[-1]
    mask, causal = inputs.mask(call), call.mask is None and query.shape[2] > 1
    if causal and (call.offset != 0 or query.shape[2] > key.shape[2]):
        mask, causal = call.visible(slice(None)), False
    if call.plain and call.offset == 0 and query.shape[2] == key.shape[2] > 1:
        mask, causal = None, True
        if call.real is not None:
            # Below all that terms leave of a key: a row may see nothing but hidden ones.
            hide = torch.full((1, 1, 1), HIDE, device=query.device).expand(1, query.shape[1], 1)
            for term in terms:
                hide = hide + term.weights.detach().clamp(max=0)
            terms = [*terms, Term(hide, ~call.real[:, None])]
    # An additive term in 16 bit would be a coarse one; only the CPU kernel takes it in fp32 beside 16-bit queries.
    exact = query.device.type == "cpu" or query.dtype.itemsize >= 4
    if terms and query.shape[2] <= FEW_ROWS and exact:
        mask, causal, terms = _additive(call, inputs, terms, mask, causal), False, []
    if terms or query.shape[-1] != width:
        query, key = with_terms(query, key, terms, call.scaling, width)
        value = F.pad(value, (0, query.shape[-1] - width))
    groups = query.shape[1] // key.shape[1]
    packed = groups > 1 and query.shape[2] == 1
    if packed:
        # One query row per head: the heads of a group become rows, so that their keys are read once.
        query = query.reshape(query.shape[0], key.shape[1], groups, -1)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], key.shape[1], groups, -1)
    lse = None
    if want_lse:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=_float(mask, query), scale=call.scaling
        )
        if mask is not None:
            output.masked_fill_(_blind(lse, query.dtype)[..., None], 0)  # as the native kernel does with a bool mask
        lse = lse.reshape(lse.shape[0], -1, 1) if packed else lse
    else:
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=call.scaling,
            enable_gqa=groups > 1 and not packed,
        )
    if packed:
        output = output.reshape(output.shape[0], -1, 1, output.shape[-1])
    return output if output.shape[-1] == width else output[..., :width], lse


def _heads_at_once(call: Call, inputs: Inputs, terms: list[Term]) -> int:
    """So many query heads that copies widened by many terms stay near `_WIDENED` times the queries, keys and values.

    They are heads of one key/value group, or all heads of some groups.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    H, Tq, D = query.shape[1:]
    if not terms or Tq <= FEW_ROWS or call.needs_grad:
        return H
    used = len(terms) * len(split(terms[0].weights[:0], query.dtype))
    width, groups = max(D + used, value.shape[-1]), H // key.shape[1]
    own = H * Tq * D + key.shape[1] * key.shape[2] * (D + value.shape[-1])
    found = H
    for size in range(H, 0, -1):
        if H % size == 0 and (size % groups == 0 or groups % size == 0):
            found, output = size, 0 if size == H else H * Tq * value.shape[-1]
            if 2 * width * (size * Tq + -(-size // groups) * key.shape[2]) + output <= _WIDENED * own:
                break
    return found


def _run_in_portions(
    call: Call, inputs: Inputs, terms: list[Term], want_lse: bool, size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`_run` for `size` query heads at a time."""
    query, key, value = inputs.query, inputs.key, inputs.value
    H, groups = query.shape[1], query.shape[1] // key.shape[1]
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if want_lse else None
    for first in range(0, H, size):
        some, kv = slice(first, first + size), slice(first // groups, -(-(first + size) // groups))
        heads = (list(range(H)) if inputs.heads is None else inputs.heads)[some]
        part = Inputs(query[:, some], key[:, kv], value[:, kv], heads=heads)
        own = [Term(t.weights[:, some], t.keys if t.keys.shape[1] == 1 else t.keys[:, kv]) for t in terms]
        output[:, some], found = _run(call, part, own, want_lse, divide=False)
        if lse is not None and found is not None:
            lse[:, some] = found
    return output, lse


def _run_with_sinks(
    call: Call, inputs: Inputs, sinks: torch.Tensor, terms: list[Term], want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`_run` with a key for the learned sinks in front, and a row for it where that keeps the kernel causal."""
    Tq, Tk = inputs.query.shape[2], inputs.key.shape[2]
    front = int(call.plain and call.offset == 0 and Tq == Tk > 1)
    mask = None
    if not front and (Tq > 1 or call.mask is not None):
        mask = inputs.mask(call)
        mask = call.visible(slice(None)) if mask is None else mask
        mask = F.pad(mask, (1, 0), value=mask.dtype == torch.bool)
    query = F.pad(inputs.query, (0, 0, front, 0))
    key = F.pad(inputs.key, (0, 0, 1, 0))
    value = F.pad(inputs.value, (0, 0, 1, 0), value=inputs.sink_value)
    real = None if call.real is None else F.pad(call.real, (1, 0), value=True)
    longer = Call(query, key, value, mask, call.scaling, None, call.offset, real, bool(front))
    sink = torch.zeros(1, 1, Tk + 1, dtype=torch.bool, device=key.device)
    sink[..., 0] = True
    terms = [Term(_in_front(t.weights, front), F.pad(t.keys, (1, 0))) for t in terms]
    terms.append(Term(_in_front(sinks, front), sink))
    output, lse = _run(longer, Inputs(query, key, value, heads=inputs.heads), terms, want_lse)
    return output[:, :, front:], None if lse is None else lse[:, :, front:]


def _in_front(weights: torch.Tensor, rows: int) -> torch.Tensor:
    return weights if weights.shape[-1] == 1 else F.pad(weights, (rows, 0))


def _additive(call: Call, inputs: Inputs, terms: list[Term], mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """The terms and the mask as one additive term, [B or 1, h, Tq, Tk]; made once for layers that share all of it."""
    H, Tq = inputs.query.shape[1:3]
    key = ("additive", id(mask), *(id(t.source) for t in terms))
    shared = all(t.source is not None for t in terms)
    given = mask
    if shared and key in call.memo:
        return call.memo[key][1]  # type: ignore[index, no-any-return]
    dtype = torch.promote_types(inputs.query.dtype, torch.float32)
    total: torch.Tensor | None = None
    for term in terms:
        part = term.weights.to(dtype)[..., None] * _indicator(call, term, H, dtype)[:, :, None]
        total = part if total is None else total + part
    assert total is not None
    if causal:
        mask = call.visible(slice(None))
    if mask is not None and mask.dtype == torch.bool:
        total = torch.where(mask, total, torch.finfo(dtype).min)
    elif mask is not None:
        total = total + mask
    total = total.expand(-1, -1, Tq, -1)
    if shared:
        call.memo[key] = given, total  # the mask too, so that its id names nothing else
    return total


def _indicator(call: Call, term: Term, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """1 on the term's keys, [B or 1, 1 or H, Tk]."""
    if term.source is None:
        keys = term.keys.to(dtype)
        return keys.repeat_interleave(heads // keys.shape[1], 1) if keys.shape[1] > 1 else keys
    key = ("indicator", id(term.source.keys), dtype)
    if key not in call.memo:
        call.memo[key] = term.keys.to(dtype)
    return call.memo[key]  # type: ignore[return-value]


def _float(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    # In place: at long contexts every T×T tensor beside the one that the native kernel makes too is one too many.
    hidden = torch.full(mask.shape, torch.finfo(query.dtype).min / 2, dtype=query.dtype, device=mask.device)
    return hidden.masked_fill_(mask, 0)


def _blind(lse: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows that see no key, by their log-sum-exp under a mask that `_float` made."""
    return lse < torch.finfo(dtype).min / 4


def _biased(call: Call) -> bool:
    """Whether the caller's own mask carries real biases, which a zero query would still feel."""
    return call.mask is not None and call.mask.dtype != torch.bool


def _uniform(call: Call) -> torch.Tensor:
    mask = None if call.mask is None else call.visible(slice(None))
    blank = Call(call.query, call.key, call.value, mask, call.scaling, None, call.offset, call.real, call.plain)
    return fused(blank, Inputs(torch.zeros_like(call.query), call.key, call.value), [])


class Selection:
    """Query heads of one edit as a rectangle over their key/value heads, so that no key is copied per query head.

    Attributes:
        index: int64 [g·m]; the query head at each place (short groups repeat one).
        place: where each of the edit's heads stands in `index`.
    """

    def __init__(self, call: Call, heads: list[int]) -> None:
        groups = call.groups
        members: dict[int, list[int]] = {}
        for head in heads:
            members.setdefault(head // groups, []).append(head)
        self.kv = sorted(members)
        self.width = max(map(len, members.values()))
        self.index = [h for kv in self.kv for h in (members[kv] * self.width)[: self.width]]
        self.heads = heads
        self.place = [self.index.index(h) for h in heads]
        self.whole = self.index == list(range(call.query.shape[1]))
        self.all_kv = self.kv == list(range(call.key.shape[1]))

    def inputs(self, whole: Inputs) -> Inputs:
        """The rectangle's query, key and value."""
        query = whole.query if self.whole else whole.query[:, self.index]
        sinks = whole.sinks if self.whole or whole.sinks is None else whole.sinks[:, self.index]
        heads = None if self.whole else self.index
        if self.all_kv:
            return Inputs(query, whole.key, whole.value, sinks, heads=heads)
        return Inputs(query, whole.key[:, self.kv], whole.value[:, self.kv], sinks, heads=heads)

    def terms(self, terms: list[Term]) -> list[Term]:
        """Terms of the whole call, for the rectangle."""
        return [
            Term(t.weights[:, self.index], t.keys if t.keys.shape[1] == 1 or self.all_kv else t.keys[:, self.kv])
            for t in terms
        ]

    def spread(self, keys: torch.Tensor) -> torch.Tensor:
        """`keys` [B, h, Tk] of the edit's heads at their places in the rectangle, [B, g, m, Tk]."""
        at = {head: i for i, head in enumerate(self.heads)}
        return keys[:, [at[h] for h in self.index]].unflatten(1, (len(self.kv), self.width))

    def outside(self, keys: torch.Tensor) -> list[Term]:
        """Terms that hide `keys` [B, h, Tk], each from its own head of the rectangle."""
        table = self.spread(keys)
        own = torch.eye(self.width, device=keys.device).repeat(1, len(self.kv))
        return [Term(HIDE * own[m][None, :, None], table[:, :, m]) for m in range(self.width)]


def _keep(call: Call, whole: Inputs, terms: list[Term], edit: KeepMass) -> torch.Tensor:
    """Mix o' = β·o + (1-β)·o_N for the edit's heads, o for the others."""
    output, lse = _run(call, whole, terms, want_lse=_has_lse(call))
    plain = call.query.shape[2] == 1 and not terms and not _biased(call)
    if plain and lse is not None and (few := edit.few()) is not None:
        if few.index.shape[-1] == 0:
            return output
        if (less := _less_few(call, edit, output, lse, few)) is not None:
            return less
    chosen = Selection(call, edit.heads)
    keys = edit.find(_summer(call, whole, terms, chosen, lse))
    if not bool(keys.any()):
        return output
    applies = call.sees_beside(keys, edit.heads)
    if edit.rows is not None:
        applies = applies & edit.rows[:, None]
    old = output if chosen.whole else output[:, edit.heads]
    outside = fused(call, chosen.inputs(whole), [*chosen.terms(terms), *chosen.outside(keys)])
    outside = outside if chosen.whole else outside[:, chosen.place]
    new = torch.where(applies[..., None], edit.fraction * old + (1 - edit.fraction) * outside, old).to(old.dtype)
    return new if chosen.whole else output.index_copy(1, torch.tensor(edit.heads, device=new.device), new)


def _less_few(call: Call, edit: KeepMass, output: torch.Tensor, lse: torch.Tensor, few: Few) -> torch.Tensor | None:
    """One decode row: o_N = (o - Σ_S a·v) / (1-ψ) from the few keys of S, or `None` where that would cancel."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    kept = few.kept
    if not kept:
        rows = torch.arange(few.index.shape[0], device=output.device)[:, None, None]
        heads = torch.tensor(edit.heads, device=output.device)
        kv = (heads // call.groups)[None, :, None]
        kept["key"] = (call.key[rows, kv, few.index].to(dtype) * call.scaling).mT.contiguous()
        value = call.value[rows, kv, few.index].to(dtype)
        # A channel of ones gives ψ beside Σ_S a·v; filling is 0 in both.
        kept["value"] = F.pad(value, (0, 1), value=1.0) * few.meant[..., None]
        kept["heads"], kept["meant"] = heads, few.meant
    heads = kept["heads"]
    everything = len(heads) == output.shape[1]
    query, old, lse = (t if everything else t.index_select(1, heads) for t in (call.query, output, lse))
    a = torch.matmul(query.to(dtype), kept["key"]).sub_(lse[..., None]).exp_()
    meant = few.meant
    if call.mask is not None:
        visible = call.visible(slice(None))[:, :, 0]
        visible = visible if visible.shape[1] == 1 else visible.index_select(1, heads)
        meant = meant & visible.expand(*meant.shape[:2], -1).gather(2, few.index)
    if meant is not kept["meant"]:
        a.mul_(meant[:, :, None])
    moved, mass = torch.matmul(a, kept["value"]).split([output.shape[-1], 1], -1)
    if mass.max().item() > _MOST[output.dtype]:
        return None
    share = (1 - edit.fraction) / (1 - mass)
    new = torch.addcmul(old * (edit.fraction + share), share, moved, value=-1)
    if edit.rows is not None:
        new = torch.where(edit.rows[:, None, :, None], new, old)
    new = new.to(output.dtype)
    return new if everything else output.index_copy_(1, heads, new)


def _keep_as_bias(call: Call, whole: Inputs, terms: list[Term], edit: KeepMass) -> list[Term]:
    """The law as a row-dependent bias log w = log β + log(1-ψ) - log(1-βψ), for laws that others follow."""
    chosen = Selection(call, edit.heads)
    lse = _run(call, whole, terms, want_lse=True)[1] if _has_lse(call) else None
    keys = edit.find(_summer(call, whole, terms, chosen, lse))
    inputs, B, Tk = chosen.inputs(whole), keys.shape[0], keys.shape[2]
    at = {head: i for i, head in enumerate(edit.heads)}
    if lse is not None:
        # From log-sum-exps: no 1-ψ is too small for its logarithm.
        outside = _run(call, inputs, [*chosen.terms(terms), *chosen.outside(keys)], want_lse=True)[1]
        assert outside is not None
        log_rest = (outside[:, chosen.place] - lse[:, edit.heads]).clamp(max=0)
    else:
        log_rest = _log_rest(call, inputs, chosen, chosen.terms(terms), keys)
    beta = edit.fraction
    change = log_rest - (1 - beta + beta * log_rest.exp()).log() + (math.log(beta) if beta > 0 else HIDE)
    change = torch.where(call.sees_beside(keys, edit.heads), change.clamp(min=HIDE), 0)
    if edit.rows is not None:
        change = change * edit.rows[:, None]
    H, G, groups = call.query.shape[1], call.key.shape[1], call.groups
    found = []
    for member in range(groups):
        heads = [h for h in edit.heads if h % groups == member]
        if heads:
            own = [at[h] for h in heads]
            weights, on = change.new_zeros(B, H, change.shape[-1]), keys.new_zeros(B, G, Tk)
            weights[:, heads] = change[:, own]
            on[:, [h // groups for h in heads]] = keys[:, own]
            found.append(Term(weights, on))
    return found


def _move(
    call: Call, whole: Inputs, terms: list[Term], edit: MoveMass
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The output, from that of all keys and those of the groups' keys alone, and the masses.

    The output is `None` where it would cancel; both are where the keys of the groups are too many.
    """
    groups = _gathered(call, edit)
    if groups is None:
        return None, None
    chosen = Selection(call, edit.heads)
    inputs, inner = chosen.inputs(whole), chosen.terms(terms)
    output, lse = _run(call, whole, terms, want_lse=True)
    assert lse is not None
    parts, shares = [], []
    for keys in groups:
        part, own = keys.attend(call, inputs, inner)
        if not chosen.whole:
            part, own = part[:, chosen.place], own[:, chosen.place]
        parts.append(part)
        shares.append(torch.where(_blind(own, output.dtype), -torch.inf, own - lse[:, edit.heads]))
    mass = torch.stack(shares, -1).exp().clamp(max=1)
    change = mass * edit.weigh(mass).expm1()
    total = torch.ones_like(change[..., 0]) if edit.raw else 1 + change.sum(-1)
    if total.min().item() < 1 - _MOST[output.dtype]:
        return None, mass
    dtype = torch.promote_types(output.dtype, torch.float32)
    size = max(1, budget(call) // max(output[:, :, 0].numel(), 1))
    for start in range(0, output.shape[2], size):
        rows = slice(start, start + size)
        new = output[:, edit.heads, rows].to(dtype)
        for group, part in enumerate(parts):
            new = new + change[:, :, rows, group, None] * part[:, :, rows]
        output[:, edit.heads, rows] = (new / total[:, :, rows, None]).to(output.dtype)
    return output, mass


def _move_as_terms(
    call: Call, whole: Inputs, terms: list[Term], edit: MoveMass, mass: torch.Tensor | None
) -> tuple[list[Term], torch.Tensor | None]:
    """The law as a row-dependent bias for each group, differentiable; and the gain [B, H, Tq] of a raw law."""
    heads = call.query.shape[1]
    if mass is None:
        chosen = Selection(call, edit.heads)
        inputs, inner = chosen.inputs(whole), chosen.terms(terms)
        groups = _gathered(call, edit) if _has_lse(call) else None
        if groups is not None:
            lse = _run(call, inputs, inner, want_lse=True)[1]
            assert lse is not None
            own = torch.stack([keys.attend(call, inputs, inner)[1] for keys in groups], -1)
            mass = torch.where(_blind(own, call.query.dtype), 0, (own - lse[..., None]).exp().clamp(max=1))
        else:
            indicator = edit.keys.mT[:, None].to(inputs.value.dtype).expand(-1, inputs.key.shape[1], -1, -1)
            mass = fused(call, Inputs(inputs.query, inputs.key, indicator, inputs.sinks, 0.0, inputs.heads), inner)
        mass = mass if chosen.whole else mass[:, chosen.place]
        mass = mass.to(torch.promote_types(mass.dtype, torch.float32))
    weights = edit.weigh(mass)
    table = edit.spread(weights, heads)
    found = [Term(table[..., group], keys[:, None]) for group, keys in enumerate(edit.keys.unbind(1))]
    return found, edit.gain(mass, weights, heads) if edit.raw else None


@dataclass
class Gathered:
    """A few keys of a call.

    Attributes:
        index: places on the key axis, int64 [B, n], or a range of them that all batch rows have.
        seen: which rows see which of them, bool, or the caller's additive mask there, [B or 1, H or 1, Tq, n]; `None`
            where the keys are a range, and rows see those that are not behind them.
    """

    index: torch.Tensor | slice
    seen: torch.Tensor | None

    def attend(self, call: Call, inputs: Inputs, terms: list[Term]) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to these keys alone, [B, h, Tq, Dv], and its log-sum-exp, fp32 [B, h, Tq]; no learned sinks."""
        own = Inputs(inputs.query, self.of(inputs.key), self.of(inputs.value), heads=inputs.heads)
        terms = [Term(t.weights, self.of(t.keys[..., None])[..., 0]) for t in terms]
        if self.seen is not None:
            few = Call(own.query, own.key, own.value, self.seen, call.scaling, None, 0, None, False)
            output, lse = _run(few, own, terms, want_lse=True)
            assert lse is not None
            return output, lse
        assert isinstance(self.index, slice)
        # No row before the range sees any of it, and rows behind it see all: no mask, and a causal square between them.
        first, last = (
            min(max(column - call.offset, 0), own.query.shape[2]) for column in (self.index.start, self.index.stop)
        )
        output = own.query.new_empty(*own.query.shape[:3], own.value.shape[3])
        output[:, :, :first] = 0
        lse = torch.full(own.query.shape[:3], -torch.inf, dtype=torch.float32, device=output.device)
        for rows, causal in ((slice(first, last), True), (slice(last, None), False)):
            query = own.query[:, :, rows]
            if query.shape[2]:
                here = [Term(t.weights if t.weights.shape[-1] == 1 else t.weights[..., rows], t.keys) for t in terms]
                output[:, :, rows], lse[:, :, rows] = _unmasked(query, own.key, own.value, here, call.scaling, causal)
        return output, lse

    def of(self, table: torch.Tensor) -> torch.Tensor:
        """These keys of a table [B or 1, g, Tk, d]."""
        if isinstance(self.index, slice):
            return table[:, :, self.index]
        index = self.index[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])
        return table.expand(len(self.index), -1, -1, -1).gather(2, index)


def _unmasked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: list[Term], scaling: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to all keys, or causally to as many as there are rows, and its log-sum-exp."""
    width = value.shape[-1]
    if terms or query.shape[-1] != width:
        query, key = with_terms(query, key, terms, scaling, width)
        value = F.pad(value, (0, query.shape[-1] - width))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=None, scale=scaling
    )
    return output[..., :width], lse


def _gathered(call: Call, edit: MoveMass) -> list[Gathered] | None:
    """The keys of each group by themselves; `None` where a pass over all keys is as good.

    A prefill holds one output more for each group, and who sees what of it: with one group of few keys that is within
    a layer's own q, k and v.
    """
    key = ("gathered", id(edit.keys), id(call.mask), call.offset, call.query.shape[2])
    if key not in call.memo:
        call.memo[key] = edit.keys, call.mask, _gather(call, edit.keys)  # so that their ids name nothing else
    return call.memo[key][2]  # type: ignore[index, no-any-return]


def _gather(call: Call, keys: torch.Tensor) -> list[Gathered] | None:
    _, H, Tq, D = call.query.shape
    counts = keys.sum(-1).amax(0).tolist()
    few = len(counts) == 1 and counts[0] * 4 <= keys.shape[-1]
    if Tq > FEW_ROWS and not few:
        return None
    found = [_gather_group(call, group, max(count, 1)) for group, count in zip(keys.unbind(1), counts, strict=True)]
    within = Tq <= FEW_ROWS or found[0].seen is None or counts[0] * 4 <= H * D
    return found if within else None


def _gather_group(call: Call, keys: torch.Tensor, count: int) -> Gathered:
    index = keys.long().topk(count, dim=-1).indices.sort(-1).values
    meant = keys.gather(1, index)
    if call.real is not None:
        meant = meant & call.real.expand(len(keys), -1).gather(1, index)
    start, stop = int(index[0, 0]), int(index[0, 0]) + count
    together = bool((index == torch.arange(start, start + count, device=index.device)).all())
    where = slice(start, stop) if together else index
    if together and call.plain and (call.offset <= start or call.offset >= stop) and bool(meant.all()):
        return Gathered(where, None)
    shown = meant[:, None, None]
    if call.mask is None:
        rows = torch.arange(call.query.shape[2], device=keys.device) + call.offset
        ahead = rows[:, None] - index[:, None, None]
        seen = shown & (ahead >= 0)
        return Gathered(where, seen if call.window is None else seen & (ahead < call.window))
    mask = call.mask.expand(len(keys), -1, -1, -1)
    there = mask.gather(3, index[:, None, None].expand(-1, *mask.shape[1:3], -1))
    if there.is_floating_point():
        return Gathered(where, there.masked_fill(~shown, torch.finfo(there.dtype).min / 2))
    return Gathered(where, there & shown)


def _log_rest(call: Call, inputs: Inputs, chosen: Selection, terms: list[Term], keys: torch.Tensor) -> torch.Tensor:
    """log(1-ψ) of the edit's heads for S = `keys` [B, h, Tk], differentiable, [B, h, Tq]."""
    # 1-ψ as an output channel of V: summed outside the set, so it keeps its digits as ψ → 1.
    indicator = (~chosen.spread(keys)).transpose(-1, -2).to(inputs.value.dtype)
    masses = fused(call, Inputs(inputs.query, inputs.key, indicator, inputs.sinks, 1.0, inputs.heads), terms)
    rest = masses.unflatten(1, (len(chosen.kv), chosen.width)).diagonal(dim1=2, dim2=4).transpose(-1, -2).flatten(1, 2)
    rest = rest[:, chosen.place].to(torch.promote_types(rest.dtype, torch.float32))
    dtype = torch.finfo(masses.dtype)
    return rest.clamp(min=max(dtype.tiny * dtype.eps, torch.finfo(rest.dtype).tiny), max=1).log()


def _has_lse(call: Call) -> bool:
    return call.query.device.type == "cpu" and not call.needs_grad


def _summer(call: Call, whole: Inputs, terms: list[Term], chosen: Selection, lse: torch.Tensor | None) -> Sums:
    """Column sums of the edit's heads under `terms`: fused and transposed where visibility allows, else in blocks."""
    square = call.offset == 0 and call.query.shape[2] == call.key.shape[2]
    mask = None if call.plain else call.mask
    shared = call.plain or (mask is not None and mask.dtype == torch.bool and mask.shape[1] == 1)
    if lse is None or not shared or not square or call.query.shape[2] <= FEW_ROWS:
        return reference.summer(call, _biases(call, terms), chosen.heads, budget=budget(call))

    def sums(counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = chosen.inputs(whole)
        query, key = inputs.query, inputs.key
        if terms:
            query, key = with_terms(query, key, chosen.terms(terms), call.scaling)
        B, _, T, _ = query.shape
        # A row that sees no key, a pad, counts nowhere.
        share = torch.where(counted[:, None] & ~_blind(lse, query.dtype), -lse, HIDE)[:, chosen.index] / call.scaling
        pieces = split(share, query.dtype, pieces=3)
        query = widen(query, pieces).unflatten(1, (len(chosen.kv), chosen.width))
        key = widen(key, [torch.ones((), dtype=key.dtype, device=key.device)] * len(pieces))
        if mask is None:
            query, key = query.flip(3), key.flip(2)
        seen = None if mask is None else _float(mask.mT, query)
        found = []
        for member in range(chosen.width):
            rows = query[:, :, member]
            total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                key, rows, rows, 0.0, seen is None, attn_mask=seen, scale=call.scaling
            )[1]
            found.append(total.exp() if seen is not None else total.exp().flip(-1))
        return torch.stack(found, 2).reshape(B, -1, T)[:, chosen.place], _observers(counted, mask)

    return sums


def _observers(counted: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """How many of the counted rows see each key, fp32 [B, 1, Tk]; without a mask, those from the key's own row on."""
    if mask is None:
        return counted.flip(1).cumsum(1).flip(1).float()[:, None]
    found = torch.zeros(len(counted), 1, mask.shape[-1], device=mask.device)
    for start in range(0, mask.shape[2], FEW_ROWS):
        rows = slice(start, start + FEW_ROWS)
        found += (mask[:, :, rows] & counted[:, None, rows, None]).sum(2)
    return found


def _biases(call: Call, terms: list[Term]) -> list[reference.Resolved]:
    found: list[reference.Resolved] = []
    for term in terms:
        if term.keys.shape[1] == 1:
            found.append(Bias(term.weights, term.keys[:, 0]))
            continue
        for kv in range(term.keys.shape[1]):
            own = torch.arange(call.query.shape[1], device=term.weights.device) // call.groups == kv
            found.append(Bias(term.weights * own[None, :, None], term.keys[:, kv]))
    return found


def budget(call: Call) -> int:
    """Weights held at once, so that memory stays within a layer's own q, k and v."""
    return max(call.query.numel() // 4, 1 << 16)
