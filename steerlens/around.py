"""Edits before and after an attention call, which no backend knows: of queries, of outputs, of single logits.

Shapes as in `steerlens.passes`; D head dim of what is edited.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from steerlens import backends
from steerlens.backends import reference, sdpa
from steerlens.backends.call import Call, Lowered
from steerlens.edits import HIDE, AddOutput, Around, DropLowest, KeepTop, LiftLogits, ShiftQuery
from steerlens.errors import MethodError, UnsupportedError
from steerlens.passes import Pass, fit
from steerlens.spans import Spans

if TYPE_CHECKING:
    from steerlens.facts import ModelFacts

_OUTLETS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@dataclass(frozen=True)
class Placed:
    """An edit with what it was planned with: the spans, and the prompt rows that `edit.batch` counts."""

    edit: Around
    spans: Spans | None
    prompt_rows: int | None


def shift(query: torch.Tensor, placed: list[Placed], now: Pass, first: int, where: str) -> torch.Tensor:
    """The queries [B, H, Tq, D] as the edits leave them, in their dtype.

    Args:
        query: of the heads `first`, `first` + 1, … of the layer.
        placed: the layer's edits.
        now: the forward.
        first: the model's number of query head 0.
        where: names the layer.
    """
    found = [p for p in placed if isinstance(p.edit, ShiftQuery)]
    return _plus(query, found, now, first, f"the queries of {where}") if found else query


def add(output: torch.Tensor, placed: list[Placed], now: Pass, first: int, outlet: Outlet) -> torch.Tensor:
    """The outputs [B, Tq, H, D] as the edits leave them, in their dtype; `outlet` sees that they arrive."""
    found = [p for p in placed if isinstance(p.edit, AddOutput)]
    if not found:
        return output
    added = _plus(output.transpose(1, 2), found, now, first, f"the heads' outputs of {outlet.where}")
    output = added.transpose(1, 2).contiguous()
    outlet.expect(output)
    return output


def attention(
    backend: str, call: Call, placed: list[Placed], now: Pass, layer: int, lowered: Callable[[Pass], list[Lowered]]
) -> torch.Tensor:
    """Attention by a backend, [B, H, Tq, Dv], with single logits of decode rows lifted or dropped as edits say.

    Which and by how much depends on q·k, so no bias of a set of keys is it. The rows it is for, few in generation, are
    attended again with it in their mask.

    Args:
        backend: its name.
        call: the call with its lowered edits.
        placed: edits around the call.
        now: the forward.
        layer: layer index.
        lowered: the layer's other edits for some of the rows.
    """
    lifts = [p for p in placed if one_by_one(p)]
    if not lifts:
        return backends.attention(backend, call)
    rows = call.query.shape[2]
    first = max(now.columns - rows, _first_row(lifts, now)) - (now.columns - rows)
    parts = [backends.attention(backend, call)[:, :, :first]] if first else []
    for item in lifts:
        if isinstance(item.edit, KeepTop) and item.edit.pool == "rows":
            _choose(call, item, now, layer)
    size = max(1, sdpa.budget(call) // (call.query.shape[0] * call.query.shape[1] * call.key.shape[2]))
    for start in range(first, rows, size):
        block = slice(start, min(start + size, rows))
        part = replace(now, q_offset=now.columns - rows + start, q_len=block.stop - start, memo={})
        # what edits renew with every forward they renew once
        edits = call.edits if part.q_len == rows else lowered(part)
        parts.append(backends.attention(backend, _lifted(call, block, lifts, part, layer, edits)))
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def one_by_one(item: Placed) -> bool:
    """Whether an edit changes logits key by key."""
    return isinstance(item.edit, LiftLogits | DropLowest | KeepTop)


def _first_row(lifts: list[Placed], now: Pass) -> int:
    """The first column whose row any of the edits is for."""
    if now.q_offset >= now.prompt.width:
        return now.q_offset
    first = int(now.prompt.stop.min()) - 1
    for item in lifts:
        edit = item.edit
        if isinstance(edit, KeepTop):
            rows = now.prompt.key_columns(edit.rows, item.spans).any(0)
            first = min(first, int(rows.long().argmax()) if bool(rows.any()) else first)
        elif edit.phase != "decode":
            return 0
    return first


def _lifted(call: Call, rows: slice, lifts: list[Placed], now: Pass, layer: int, edits: list[Lowered]) -> Call:
    """The call of some rows, its mask an additive one that changes their logits; [B, H, r, Tk] of memory."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    shape = (*call.query.shape[:2], now.q_len, call.key.shape[2])
    additive = call.additive(rows, dtype).expand(shape)
    lift = torch.zeros(shape, dtype=dtype, device=call.query.device)
    for item in sorted(lifts, key=lambda item: isinstance(item.edit, DropLowest | KeepTop)):
        edit = item.edit
        if isinstance(edit, KeepTop):
            lift = lift + _unkept(call, rows, item, now, layer)
            continue
        assert isinstance(edit, LiftLogits | DropLowest)
        heads = [h - call.first for h in edit.heads if call.first <= h < call.first + shape[1]]
        if not heads:
            continue
        keys = fit(now.prompt.key_columns(edit.keys, item.spans), *now.keys[layer])[:, None, None]
        if (where := rows_of(item, now)) is not None:
            keys = keys & where[:, None, :, None]
        x = reference.logits(call, rows, heads)
        seen, x = keys & (x > -torch.inf), x + lift[:, heads]
        change = edit.fraction * x.where(seen, 0).abs() if isinstance(edit, LiftLogits) else _lowest(x, seen, edit)
        lift = lift.index_add(1, torch.tensor(heads, device=lift.device), change)
    # a row of pads that sees no key must not come out NaN
    mask = torch.where(additive == -torch.inf, torch.finfo(call.query.dtype).min, additive + lift)
    if call.query.device.type != "cpu":
        mask = mask.to(call.query.dtype)  # what fused kernels take beside such queries
    offset = call.offset + rows.start
    return replace(
        call, query=call.query[:, :, rows], mask=mask, offset=offset, plain=False, window=None, edits=edits, memo={}
    )


def _lowest(x: torch.Tensor, seen: torch.Tensor, edit: DropLowest) -> torch.Tensor:
    """`HIDE` for the lowest of the seen logits [B, h, r, Tk], 0 elsewhere."""
    # in whole numbers: 0.42 · 150 is less than 63 in floats
    count = seen.sum(-1, keepdim=True) * round(edit.fraction * 10**6) // 10**6
    rank = x.detach().masked_fill(~seen, torch.inf).argsort(dim=-1, stable=True).argsort(-1)
    return torch.where(seen & (rank < count), HIDE, 0.0).to(x.dtype)


def _unkept(call: Call, rows: slice, item: Placed, now: Pass, layer: int) -> torch.Tensor:
    """`HIDE` for the keys of the groups that do not stay, [B, H, r, Tk], 0 elsewhere."""
    edit = item.edit
    assert isinstance(edit, KeepTop)
    keys, heads = _group_keys(edit, item, now, layer), _heads(edit, call)
    if edit.pool == "rows":
        stays = now.prompt.choices[_choice(item, layer)].to(keys.device)
        stays = (stays if now.prompt.origin is None else stays[now.prompt.origin])[:, None, None]
    else:
        scores = _scores(call, rows, heads, keys, edit.top)
        stays = _best(scores.sum(1, keepdim=True) if edit.pool == "heads" else scores, keys, edit.keep)
    dropped = ((~stays).float() @ keys[:, None].float()) > 0
    where = _steered_rows(edit, item, now)
    dropped = (dropped & where[:, None, :, None]).expand(-1, len(heads), -1, -1)
    lift = torch.zeros(*call.query.shape[:2], now.q_len, keys.shape[-1], device=keys.device)
    return lift.index_add(1, torch.tensor(heads, device=keys.device), HIDE * dropped.float())


def _choose(call: Call, item: Placed, now: Pass, layer: int) -> None:
    """Choose the groups that stay by all the prompt's rows, once for each prompt."""
    edit, prompt, key = item.edit, now.prompt, _choice(item, layer)
    assert isinstance(edit, KeepTop)
    if key in prompt.choices:
        return
    chosen = prompt.key_columns(edit.rows, item.spans)
    if now.q_offset > int(chosen.any(0).long().argmax()) or now.columns < prompt.width:
        raise UnsupportedError(
            f"groups of keys are chosen by the attention of all rows of {edit.rows.group!r}, but this forward holds "
            f"columns {now.q_offset}..{now.columns} of a prompt of {prompt.width}: prefill the whole prompt in one "
            "forward (no prefill_chunk_size), or choose row by row"
        )
    keys, heads = _group_keys(edit, item, now, layer), _heads(edit, call)
    rows, start = call.query.shape[2], now.columns - call.query.shape[2]
    chosen = fit(chosen, rows, start)
    total = torch.zeros(*keys.shape[:2], device=keys.device)
    for block in reference.blocks(call, sdpa.budget(call)):
        counted = chosen[:, block]
        if bool(counted.any()):
            total = total + (_scores(call, block, heads, keys, edit.top) * counted[:, None, :, None]).sum((1, 2))
    prompt.choices[key] = _best(total, keys, edit.keep)


def _choice(item: Placed, layer: int) -> Hashable:
    return layer, item.edit, id(item.spans)


def _steered_rows(edit: KeepTop, item: Placed, now: Pass) -> torch.Tensor:
    """Query rows that the edit is for, bool [B, r]."""
    found = now.key_columns(edit.rows, item.spans)[:, now.q_offset : now.columns]
    late = now.rows("decode")
    found = torch.ones_like(found) if late is None else found | late
    own = rows_of(item, now)
    return found if own is None else found & own


def _group_keys(edit: KeepTop, item: Placed, now: Pass, layer: int) -> torch.Tensor:
    """Keys of each group, bool [B, n, Tk]."""
    place = now.keys[layer]
    return torch.stack([fit(now.prompt.key_columns(group, item.spans), *place) for group in edit.groups], 1)


def _heads(edit: KeepTop, call: Call) -> list[int]:
    heads = [h - call.first for h in edit.heads if call.first <= h < call.first + call.query.shape[1]]
    if edit.pool != "none" and len(heads) < len(edit.heads):
        raise UnsupportedError(
            "groups of keys are chosen by all heads of a layer, and this process holds some of them: load the model "
            "without tensor parallelism, or choose head by head"
        )
    return heads


def _scores(call: Call, rows: slice, heads: list[int], keys: torch.Tensor, top: int) -> torch.Tensor:
    """The sum of the `top` largest weights of each group before all edits, fp32 [B, h, r, n]."""
    with torch.no_grad():
        a = reference.weights(call, [], rows, heads)
        count = min(top, a.shape[-1])
        parts = [a.where(group[:, None, None], 0).topk(count, -1).values.sum(-1) for group in keys.unbind(1)]
    return torch.stack(parts, -1).float()


def _best(scores: torch.Tensor, keys: torch.Tensor, keep: int) -> torch.Tensor:
    """Which groups have the `keep` highest scores, bool as `scores`, [B, ..., n]; a group without keys is none."""
    empty = ~keys.any(-1)
    empty = empty.view(len(keys), *[1] * (scores.ndim - 2), -1)
    order = scores.masked_fill(empty, -1).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(-1) < keep


def _plus(values: torch.Tensor, placed: list[Placed], now: Pass, first: int, what: str) -> torch.Tensor:
    """`values` [B, H, Tq, D] and the vectors of some edits."""
    heads, width = values.shape[1], values.shape[-1]
    total: torch.Tensor | None = None
    for item in placed:
        edit = item.edit
        assert isinstance(edit, ShiftQuery | AddOutput)
        table = edit.vectors.table(edit.heads, values.device)
        if table.shape[-1] != width:
            raise MethodError(
                f"{edit.vectors.source} has vectors of {table.shape[-1]} numbers; {what} have {width}: it was fitted "
                "on another model"
            )
        part = edit.scale * table[None, first : first + heads, None]
        if (where := rows_of(item, now)) is not None:
            part = part * where[:, None, :, None]
        total = part if total is None else total + part
    assert total is not None
    return (values + total).to(values.dtype)


def rows_of(item: Placed, now: Pass) -> torch.Tensor | None:
    """The query rows that an edit is for, bool [B or 1, Tq or 1]; `None` for all."""
    edit, rows = item.edit, now.rows(item.edit.phase)
    if edit.batch is None:
        return rows
    own = now.prompt.expand(_members(edit.batch, item.prompt_rows or 1, now.prompt.first.device))[:, None]
    return own if rows is None else own & rows


@lru_cache(maxsize=256)
def _members(batch: tuple[int, ...], rows: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # it outlives the forward, and a later one may need gradients
        return torch.tensor([row in batch for row in range(rows)]).to(device)


class Outlet:
    """The output projection of an attention module: sees that it is given what the attention call gave.

    In some families a gate or a norm lies between the two, so that adding to the output would be something else.
    """

    def __init__(self, module: Any, layer: int, facts: ModelFacts) -> None:
        self.where = f"layer {layer} of {facts.name}"
        self._module, self._facts = module, facts
        self._seen = False
        self._hook: RemovableHandle | None = None

    def expect(self, output: torch.Tensor) -> None:
        """Have the projection's next input compared with `output`, once."""
        if self._seen:
            return
        self.release()
        place, version = _local(output).untyped_storage().data_ptr(), _version(output)

        def check(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self.release()
            given = _local(args[0])
            if given.untyped_storage().data_ptr() != place or _version(given) != version:
                raise UnsupportedError(
                    f"model family {self._facts.family!r}: something lies between the heads of {self.where} and their "
                    f"output projection (a gate or a norm), so nothing can be added to a head's output: steer a model "
                    "of another family, or with another method"
                )
            self._seen = True

        self._hook = self._find().register_forward_pre_hook(check)

    def release(self) -> None:
        """Take the hook off."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _find(self) -> torch.nn.Module:
        from steerlens.projections import FORMS

        form = FORMS.get(self._facts.family)
        names = _OUTLETS if form is None else (form.output,)
        found = [getattr(self._module, name) for name in names if hasattr(self._module, name)]
        if len(found) != 1:
            raise UnsupportedError(
                f"model family {self._facts.family!r}: the output projection of {self.where} is none of "
                f"{', '.join(names)}, so whether a vector added to a head's output arrives there cannot be told"
            )
        projection: torch.nn.Module = found[0]
        return projection


def _local(tensor: Any) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)  # type: ignore[no-any-return]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
