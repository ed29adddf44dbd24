"""Steered attention by the Triton kernels: edits become labels of keys, biases of terms and one law.

A static bias is a term. `KeepMass` is a law on the group of its keys where it comes last; where another edit follows it
is a row-dependent term like any other, its weight found from log-sum-exps inside and outside its keys. Pads are hidden
keys. Ablations are cuts. Nothing here depends on the number of rows or heads but tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any

import torch

from steerlens.backends.call import FEW_ROWS, Bias, Call, Cut, KeepMass, MoveMass, Sums
from steerlens.errors import SteerlensError, UnsupportedError

TERMS = (0, 1, 2, 3, 4, 8, 16, 28)
"""Numbers of terms that kernels are compiled for; the rest is filled up with terms of no key."""


def attention(call: Call) -> torch.Tensor:
    """Steered attention, [B, H, Tq, Dv] in the dtype of `value`.

    Raises:
        UnsupportedError: on a device or in a dtype that the kernels do not have, beyond their limits, or where
            gradients are needed.
    """
    if call.needs_grad:
        raise UnsupportedError(
            "backend 'triton' has no backward, and this call needs gradients: use 'sdpa' or 'reference', or no_grad"
        )
    return _supported(call, lambda: _attention(call))


def statistics(
    call: Call, heads: list[int], groups: torch.Tensor, counted: torch.Tensor, stats: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Statistics of the weights of `heads` after the edits, as `steerlens.capture` records them.

    Args:
        call: a call without ablations and raw laws.
        heads: query heads, h of them.
        groups: keys of the groups whose mass is wanted, bool [B, G, Tk].
        counted: which rows count for column sums, bool [B, Tq].
        stats: some of `mass`, `entropy`, `argmax`, `lse`, `column_mean`.

    Returns:
        fp32 `mass` [B, h, Tq, G], `entropy`, `argmax` (int64), `lse` [B, h, Tq]; `sums` and `observers` [B, h, Tk].
    """
    return _supported(call, lambda: _statistics(call, heads, groups, counted, stats))


def moved(call: Call, keys: torch.Tensor) -> torch.Tensor:
    """How the edits of a call without ablations change the mass on `keys`, bool [B, H, Tk]; fp32 [B, H, Tq]."""
    return _supported(call, lambda: _moved(call, keys))


def _supported(call: Call, run: Callable[[], Any]) -> Any:
    # Triton launches on the current device; a layer of a model on several has its own.
    elsewhere = call.query.is_cuda and call.query.device.index != torch.cuda.current_device()
    here = torch.cuda.device(call.query.device) if elsewhere else nullcontext()
    try:
        with here:
            return run()
    except SteerlensError:
        raise
    except ValueError as error:
        raise UnsupportedError(f"backend 'triton': {error}; or use 'auto', 'sdpa' or 'reference'") from error


@cache
def _kernels() -> Any:
    from steerlens.kernels import attention

    return attention


STEPS = 512
"""Room for so many generated keys behind labels that are kept."""
Terms = list[tuple[torch.Tensor, torch.Tensor]]
"""Weights, fp32 [B or 1, H, Tq or 1], and keys, bool [B or 1, H or 1, Tk]."""


def _attention(call: Call) -> torch.Tensor:
    kernels = _kernels()
    cuts = [edit for edit in call.edits if isinstance(edit, Cut)]
    moves = [edit for edit in call.edits if not isinstance(edit, Cut)]
    terms: Terms = []
    gains: list[torch.Tensor] = []
    law = marked = None
    for number, edit in enumerate(moves):
        if isinstance(edit, Bias):
            terms.append(_term(call, edit))
        elif isinstance(edit, MoveMass) and edit.floor is not None and number == len(moves) - 1:
            kind, raised = edit.floor
            law = kernels.Law(kind, edit.spread(raised, call.query.shape[1]), edit.rows)
            marked = _marked(call, terms, edit.keys[:, 0, None], of=edit.keys)
        elif isinstance(edit, MoveMass):
            more, gain = _as_terms(call, edit, terms)
            terms += more
            gains += [] if gain is None else [gain]
        elif number < len(moves) - 1:
            terms.append(_as_term(call, edit, terms))
        else:
            table = _keep_table(tuple(edit.heads), edit.fraction, call.query.shape[1], call.query.device)
            law = kernels.Law("transfer", table, edit.rows)
            marked = None if terms else _frozen(call, edit)
            if marked is None:
                keys = edit.find(_summer(call, edit.heads, terms))
                marked = _marked(call, terms, _spread(call, edit.heads, keys))
    marked = _marked(call, terms) if marked is None else marked
    found = kernels.attention(
        call.query, call.key, call.value, **_seen(call), sinks=call.sinks, **marked, law=law, cut=_cut(call, cuts)
    )
    output = found.output
    assert output is not None
    for gain in gains:
        for cut in cuts:
            gain = gain.masked_fill(cut.outputs, 1)
        output = (output * gain[..., None]).to(output.dtype)
    return output


def _statistics(
    call: Call, heads: list[int], groups: torch.Tensor, counted: torch.Tensor, stats: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    from steerlens.kernels.column_sums import column_sums

    terms = _all_terms(call)
    found: dict[str, torch.Tensor] = {}

    def measure(wanted: list[str], measured: tuple[torch.Tensor, ...] = ()) -> Any:
        return _measure(call, heads, terms, [keys[:, None] for keys in measured], wanted)

    names = {"lse": "lse_before", "entropy": "entropy", "argmax": "argmax", "mass": "mass"}
    wanted = [stat for stat in stats if stat in names]
    # Beyond what fits beside the terms, masses take passes of their own.
    room = max(TERMS[-1] - len(terms), 1)
    first, *rest = groups.split(room, 1)
    if wanted:
        result = measure([names[stat] for stat in wanted], first.unbind(1) if "mass" in stats else ())
        found |= {stat: getattr(result, names[stat]) for stat in wanted}
    if "mass" in stats:
        masses = [result.mass, *(measure(["mass"], some.unbind(1)).mass for some in rest)]
        here = [
            mass[..., len(terms) :][..., :n] for mass, n in zip(masses, map(len, groups[0].split(room)), strict=True)
        ]
        found["mass"] = torch.cat(here, -1)
    if "column_mean" in stats:
        found["sums"], found["observers"] = column_sums(
            call.query, call.key, _lse(call, terms, heads), **_seen(call), **_marked(call, terms), counted=counted,
            heads=_chosen(call, heads),
        )  # fmt: skip
    return found


def _moved(call: Call, keys: torch.Tensor) -> torch.Tensor:
    heads, terms = list(range(call.query.shape[1])), _all_terms(call)
    after, before = (_measure(call, heads, given, [keys], ["mass"]).mass for given in (terms, []))
    return after[..., len(terms)] - before[..., 0]


def _all_terms(call: Call) -> Terms:
    """All edits of a call without ablations as terms."""
    terms: Terms = []
    for edit in call.edits:
        assert not isinstance(edit, Cut)
        if isinstance(edit, MoveMass):
            terms += _as_terms(call, edit, terms)[0]
        else:
            terms.append((edit.weights, edit.keys[:, None]) if isinstance(edit, Bias) else _as_term(call, edit, terms))
    return terms


def _measure(call: Call, heads: list[int], terms: Terms, measured: list[torch.Tensor], wanted: list[str]) -> Any:
    """Statistics under `terms`; masses of those and then of the `measured` keys, bool [B or 1, H or 1, Tk] each."""
    nothing = torch.zeros(1, call.query.shape[1], 1, device=call.query.device)
    marked = _marked(call, terms + [(nothing, keys) for keys in measured], keep=not measured)
    return _kernels().attention(
        call.query, call.key, call.value, **_seen(call), sinks=call.sinks, **marked, heads=_chosen(call, heads),
        stats=wanted, output=False,
    )  # fmt: skip


def _chosen(call: Call, heads: list[int]) -> torch.Tensor | None:
    if heads == list(range(call.query.shape[1])):
        return None
    return torch.tensor(heads, dtype=torch.int32, device=call.query.device)


def _structured(call: Call) -> bool:
    """Whether rows see what is causal, real and in the window, so that no mask is needed."""
    return call.plain or call.mask is None or call.window is not None


def _seen(call: Call) -> dict[str, Any]:
    """What rows see, for the kernels; pads are hidden by labels."""
    return {
        "scaling": call.scaling,
        "softcap": call.softcap,
        "offset": call.offset,
        "mask": None if _structured(call) else call.mask,
        "window": call.window if _structured(call) else None,
    }


def _term(call: Call, edit: Bias) -> tuple[torch.Tensor, torch.Tensor]:
    """A static bias; of a prefill, on the keys that are fewer, so that more tiles are plain ones."""
    if not edit.most or call.sinks is not None or call.query.shape[2] <= FEW_ROWS:
        return edit.weights, edit.keys[:, None]
    key: Hashable = ("others", id(edit))
    if key not in call.memo:
        call.memo[key] = edit, (-edit.weights, edit.keys.logical_not()[:, None])
    return call.memo[key][1]  # type: ignore[index, no-any-return]


def _marked(
    call: Call,
    terms: Terms,
    group: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    keep: bool = True,
    of: torch.Tensor | None = None,
) -> dict[str, Any]:
    """`labels` and `bias` of a kernel call; with `keep`, layers that share edits and visibility share them.

    A group is shared where it is that `of` a table of keys which layers share.
    """
    pads = call.real is not None and _structured(call)
    if not (pads or terms) and group is None and hidden is None:
        return {}
    # Layers of one forward may hold different columns: a sliding cache has only the last of them.
    held = (call.key.shape[2], call.offset)
    key: Hashable = ("labels", pads, held, id(of), *((id(weights), keys.data_ptr()) for weights, keys in terms))
    alone = (group is not None and of is None) or hidden is not None
    if keep and not alone and key in call.memo:
        return call.memo[key][1]  # type: ignore[index, no-any-return]
    if pads:
        assert call.real is not None
        real = call.real.logical_not()[:, None]
        hidden = real if hidden is None else hidden | real
    found = _labels(call, terms, group, hidden)
    # A law made a term is one layer's own: kept, it would stay in memory to the end of the forward.
    biases = [edit for edit in call.edits if isinstance(edit, Bias)]
    lasting = {id(weights) for edit in biases for weights in (edit.weights, _term(call, edit)[0])}
    if keep and not alone and all(id(weights) in lasting for weights, _ in terms):
        # with the tensors, so that what the key is made of names nothing else
        call.memo[key] = ((of, *terms), found)
    return found


def _frozen(call: Call, edit: KeepMass) -> dict[str, Any] | None:
    """`_marked` of one cached step for keys that do not change from step to step: their labels are kept."""
    from steerlens.kernels.key_index import Labels

    few = edit.few() if call.query.shape[2] == 1 else None
    if few is None:
        return None
    Tk, kept = call.key.shape[2], few.kept
    # A cache that moves along numbers its keys anew, and its index is another tensor.
    if kept.get("index") is not few.index or kept["labels"].shape[2] < Tk:
        group = torch.zeros(*few.index.shape[:2], Tk + STEPS, dtype=torch.uint8, device=few.index.device)
        group.scatter_reduce_(2, few.index, few.meant.to(torch.uint8), "amax")
        kept["index"], kept["labels"] = few.index, _spread(call, edit.heads, group)
    bits = kept["labels"][..., :Tk]
    if call.real is not None and _structured(call):
        key: Hashable = ("pads", Tk, call.offset)
        if key not in call.memo:
            call.memo[key] = Labels.of(hidden=call.real.logical_not()[:, None]).bits
        pads: Any = call.memo[key]
        bits = bits | pads
    return {"labels": Labels(bits, groups=2)}


def _labels(call: Call, terms: Terms, group: torch.Tensor | None, hidden: torch.Tensor | None) -> dict[str, Any]:
    from steerlens.kernels.key_index import Labels

    count = next((n for n in TERMS if n >= len(terms)), None)
    if count is None:
        raise ValueError(f"{len(terms)} static biases meet in one layer; allowed: up to {TERMS[-1]}")
    keys = [keys for _, keys in terms]
    bias = None
    if terms:
        keys += [keys[0].new_zeros(1, 1, keys[0].shape[-1])] * (count - len(terms))
        rows = 1 if all(weights.shape[-1] == 1 for weights, _ in terms) else call.query.shape[2]
        batch = max(weights.shape[0] for weights, _ in terms)
        bias = torch.zeros(batch, call.query.shape[1], rows, count, device=call.query.device)
        for place, (weights, _) in enumerate(terms):
            bias[..., place] = weights
    return {"labels": Labels.of(group=group, hidden=hidden, terms=keys), "bias": bias}


def _lse(call: Call, terms: Terms, heads: list[int], hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Log-sum-exp of the logits of `heads` with terms, without `hidden` keys [B, H, Tk]; fp32 [B, h, Tq]."""
    found = _kernels().attention(
        call.query, call.key, call.value, **_seen(call), sinks=call.sinks, **_marked(call, terms, hidden=hidden),
        heads=_chosen(call, heads), stats=("lse",), output=False,
    )  # fmt: skip
    assert found.lse is not None
    return found.lse


def _summer(call: Call, heads: list[int], terms: Terms) -> Sums:
    @torch.no_grad()
    def sums(counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from steerlens.kernels.column_sums import column_sums

        return column_sums(
            call.query, call.key, _lse(call, terms, heads), **_seen(call), **_marked(call, terms), counted=counted,
            heads=_chosen(call, heads),
        )  # fmt: skip

    return sums


def _as_term(call: Call, edit: KeepMass, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """The law as a row-dependent bias log w = log β + log(1-ψ) - log(1-βψ), for edits that follow."""
    keys = edit.find(_summer(call, edit.heads, terms))
    spread = _spread(call, edit.heads, keys)
    inside = _lse(call, terms, edit.heads)
    outside = _lse(call, terms, edit.heads, hidden=spread)
    beta = edit.fraction
    log_rest = (outside - inside).clamp(max=0)
    log_beta, log_other = (math.log(x) if x > 0 else -math.inf for x in (beta, 1 - beta))
    # 1-βψ = (1-β) + β(1-ψ), which loses nothing as β and ψ come near 1
    change = log_rest + log_beta - torch.logaddexp(log_rest + log_beta, log_rest.new_full((), log_other))
    applies = outside > -torch.inf
    if edit.rows is not None:
        applies = applies & edit.rows[:, None]
    change = torch.where(applies, change, 0)
    weights = change.new_zeros(change.shape[0], call.query.shape[1], change.shape[2])
    return weights.index_copy(1, torch.tensor(edit.heads, device=change.device), change), spread


def _as_terms(call: Call, edit: MoveMass, terms: Terms) -> tuple[Terms, torch.Tensor | None]:
    """The law as a row-dependent bias for each group, from a pass for their masses; and the gain of a raw law."""
    groups, heads = [keys[:, None] for keys in edit.keys.unbind(1)], call.query.shape[1]
    mass = _measure(call, edit.heads, terms, groups, ["mass"]).mass[..., len(terms) :][..., : len(groups)]
    weights = edit.weigh(mass)
    table = edit.spread(weights, heads)
    found = [(table[..., number], keys) for number, keys in enumerate(groups)]
    return found, edit.gain(mass, weights, heads) if edit.raw else None


def _spread(call: Call, heads: list[int], keys: torch.Tensor) -> torch.Tensor:
    """`keys` [B, h, Tk] of some heads as a table of all, [B, H, Tk]."""
    if heads == list(range(call.query.shape[1])):
        return keys
    table = keys.new_zeros(keys.shape[0], call.query.shape[1], keys.shape[2])
    return table.index_copy(1, torch.tensor(heads, device=keys.device), keys)


@lru_cache(maxsize=256)
def _keep_table(heads: tuple[int, ...], fraction: float, total: int, device: torch.device) -> torch.Tensor:
    """ψ' = βψ on group 1 of `heads`, the identity for the others, fp32 [1, H, 2, 2]."""
    from steerlens.kernels.attention import Law

    with torch.inference_mode(False):  # it outlives the forward
        beta = torch.ones(1, total)
        beta[:, list(heads)] = fraction
        table = Law.keep(beta).table
        assert table is not None
        return table.to(device)


def _cut(call: Call, cuts: list[Cut]) -> torch.Tensor | None:
    from steerlens.kernels.attention import UNIFORM, ZERO

    if not cuts:
        return None
    key: Hashable = ("cut", *(id(cut.outputs) for cut in cuts))
    if key not in call.memo:
        total = torch.zeros((), dtype=torch.int8, device=call.query.device)
        for cut in cuts:
            total = total + cut.outputs.to(torch.int8) * (UNIFORM if cut.uniform else ZERO)
        call.memo[key] = (cuts, total)
    return call.memo[key][1]  # type: ignore[index, no-any-return]
