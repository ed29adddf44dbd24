"""Tensor parallelism: which of the model's query heads a process holds, and the edits of just those.

The projections are sharded by output columns, so that rank r of n holds the contiguous query heads r·H/n … (r+1)·H/n
and the key/value heads that belong to them. That is read off the sharded weights, never assumed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from steerlens.edits import Redistribute
from steerlens.errors import UnsupportedError
from steerlens.lower import Placed


def first_head(module: Any, where: str, heads: int, kv_heads: int, query: torch.Tensor, key: torch.Tensor) -> int:
    """The model's number of this process's first query head.

    Args:
        module: the attention module.
        where: names the layer in messages.
        heads: query heads of the whole layer.
        kv_heads: key/value heads of the whole layer.
        query: [B, H, Tq, D] with the H heads that are here.
        key: [B, G, Tk, D] with the G heads that are here.

    Raises:
        UnsupportedError: if the sharding is not by whole heads in order, or cannot be read.
    """
    here, groups = query.shape[1], key.shape[1]
    what = f"{where} runs {here} query heads over {groups} key heads here, the config says {heads} over {kv_heads}"
    sizes = {"q_proj": here * query.shape[-1], "k_proj": groups * key.shape[-1]}
    found = {_place(getattr(module, name, None), rows) for name, rows in sizes.items()}
    place = found.pop()
    if place is None or found:
        raise UnsupportedError(
            f"{what}, and which of them these are cannot be told: only tensor parallelism with column-sharded q_proj "
            "and k_proj (plan 'colwise') can be steered"
        )
    rank, size = place
    if here * size != heads or groups * size != kv_heads:
        raise UnsupportedError(
            f"{what}: {size} tensor-parallel processes do not split both evenly; use a number that divides {kv_heads}"
        )
    return rank * here


def local(placed: list[Placed], first: int, count: int) -> list[Placed]:
    """The edits, for query heads `first .. first + count` renumbered from 0; without those that name none of them.

    Raises:
        UnsupportedError: for a law under which heads of several processes depend on each other.
    """
    found = []
    for item in placed:
        edit = item.edit
        places = tuple(i for i, head in enumerate(edit.heads) if first <= head < first + count)
        if isinstance(edit, Redistribute):
            if edit.law.across_heads:
                raise UnsupportedError(
                    f"{edit.law} needs the attention of all heads of a layer, and tensor parallelism splits them over "
                    "processes: choose a law for single heads, or load the model without tensor parallelism"
                )
            edit = replace(edit, law=edit.law.select(places))
        if places:
            same = None if item.same is None else (item.same, first, count)
            heads = tuple(item.edit.heads[place] - first for place in places)
            found.append(replace(item, edit=replace(edit, heads=heads), same=same))
    return found


def _place(linear: Any, rows: int) -> tuple[int, int] | None:
    """(rank, ranks) of a linear layer whose `rows` output rows here are one of as many equal, ordered slices."""
    linear = getattr(linear, "base_layer", linear)  # LoRA
    weight: Any = getattr(linear, "weight", None)
    mesh: Any
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        sharded = [dim for dim, placement in enumerate(weight.placements) if not placement.is_replicate()]
        if len(sharded) != 1 or weight.placements[sharded[0]] != Shard(0) or len(weight.to_local()) != rows:
            return None
        return mesh.get_local_rank(sharded[0]), mesh.size(sharded[0])
    # transformers before it stored sharded weights as DTensors.
    mesh = getattr(linear, "_hf_device_mesh", None)
    if mesh is None or getattr(linear, "_hf_tp_plan", None) != "colwise" or weight is None or len(weight) != rows:
        return None
    return mesh.get_local_rank(), mesh.size()
