"""Edits before and after an attention call, which no backend knows: vectors on queries and on outputs.

Shapes as in `steerlens.passes`; D head dim of what is edited.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from steerlens.edits import AddOutput, Around, ShiftQuery
from steerlens.errors import MethodError, UnsupportedError
from steerlens.passes import Pass
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
