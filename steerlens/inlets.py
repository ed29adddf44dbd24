"""Where an attention module makes its keys, before any position encoding: edits of the keys themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.hooks import RemovableHandle

from steerlens import around
from steerlens.edits import ProjectKeys, RouteKeys
from steerlens.errors import MethodError, UnsupportedError
from steerlens.passes import Pass, fit

if TYPE_CHECKING:
    from steerlens.engine import Engine
    from steerlens.facts import ModelFacts

Layout = Literal["flat", "tokens", "heads"]
"""[B, T, G·D], [B, T, G, D] or [B, G, T, D]."""
INLETS: dict[str, tuple[str, Layout]] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "mixtral",
            "qwen2",
            "gemma",
            "gemma2",
            "granite",
            "smollm3",
            "gpt_oss",
            "starcoder2",
            "llama4_text",
            "opt",
            "cohere2",
        ),
        ("k_proj", "flat"),
    ),
    **dict.fromkeys(("qwen3", "qwen3_moe", "qwen3_next"), ("k_norm", "tokens")),
    "gemma3_text": ("k_norm", "heads"),
    "olmo2": ("k_norm", "flat"),
}
"""The module whose output the keys are, by `model_type`; tests compare each with the keys that attention is given."""


def find(module: Any, facts: ModelFacts) -> tuple[torch.nn.Module, Layout]:
    """The module that gives an attention module's keys, and how it lays them out.

    Raises:
        UnsupportedError: for a family whose keys are made elsewhere, or are not known.
    """
    name, layout = INLETS.get(facts.family, ("", "flat"))
    found = getattr(module, name, None) if name else None
    if not isinstance(found, torch.nn.Module):
        raise UnsupportedError(
            f"model family {facts.family!r}: where its keys are before the position encoding is not known, so they "
            f"cannot be edited; known: {', '.join(sorted(INLETS))}"
        )
    return found, layout


def by_head(output: torch.Tensor, layout: Layout, groups: int) -> torch.Tensor:
    """Keys as [B, T, G, D], a view."""
    if layout == "heads":
        return output.transpose(1, 2)
    return output.unflatten(-1, (groups, -1)) if layout == "flat" else output


def as_laid_out(keys: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Keys [B, T, G, D] as the module gave them."""
    if layout == "heads":
        return keys.transpose(1, 2)
    return keys.flatten(-2) if layout == "flat" else keys


def watch(module: Any, facts: ModelFacts, layer: int, see: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Have `see` given a layer's keys [B, T, G, D] of every forward, before any position encoding."""
    inlet, layout = find(module, facts)
    groups = facts.kv_heads[layer]
    return inlet.register_forward_hook(lambda m, args, output: see(by_head(output, layout, groups)))


class Inlet:
    """The keys of one routed layer, as its edits change them."""

    def __init__(self, engine: Engine, layer: int, module: Any) -> None:
        self._engine, self._layer, self._module = engine, layer, module
        self._placed: list[around.Placed] = []
        self._layout: Layout = "flat"
        self._hooks: list[RemovableHandle] = []
        self._seen: Pass | None = None
        self._query: torch.Tensor | None = None

    def place(self, placed: list[around.Placed]) -> None:
        """Carry out those of the edits that are of keys, and no others from now on."""
        self._placed = [p for p in placed if isinstance(p.edit, ProjectKeys | RouteKeys)]
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen, self._query = [], None, None
        if not self._placed:
            return
        facts = self._engine.facts
        if self._layer in facts.keys_of:
            raise UnsupportedError(
                f"layer {self._layer} of {facts.name} attends to the keys of layer {facts.keys_of[self._layer]}: it "
                "has none of its own to edit; leave it out"
            )
        inlet, self._layout = find(self._module, facts)
        self._hooks.append(inlet.register_forward_hook(self._edit))
        if any(isinstance(p.edit, RouteKeys) for p in self._placed):
            name = INLETS[facts.family][0].replace("k_", "q_")
            self._hooks.append(getattr(self._module, name).register_forward_hook(self._keep))

    def check(self, now: Pass | None) -> None:
        """Raise `UnsupportedError` if the keys of this forward did not come by."""
        if self._placed and self._seen is not now:
            raise UnsupportedError(
                f"layer {self._layer} of {self._engine.facts.name} made its keys without the module that gives them in "
                "this family, so that they were not edited"
            )

    def _edit(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        engine = self._engine
        if engine.current is None or (engine.scope is not None and engine.scope.native):
            return None
        self._seen = engine.current
        now = engine.current.on(output.device)
        if now.q_offset >= now.prompt.width:
            return None
        groups = engine.facts.kv_heads[self._layer]
        keys = by_head(output, self._layout, groups)
        for item in self._placed:
            edit = item.edit
            assert isinstance(edit, ProjectKeys | RouteKeys)
            table = edit.vectors.table(edit.heads, keys.device)
            if table.shape[-1] != keys.shape[-1] or table.shape[0] != keys.shape[2]:
                raise MethodError(
                    f"{edit.vectors.source} has matrices {list(table.shape)}; the keys of layer {self._layer} of "
                    f"{engine.facts.name} are {keys.shape[2]} heads of {keys.shape[-1]} here: it was fitted on another "
                    "model, or the heads are spread over processes"
                )
            chosen = fit(now.prompt.key_columns(edit.keys, item.spans), now.q_len, now.q_offset)
            if (where := around.rows_of(item, now)) is not None:
                chosen = chosen & where
            if isinstance(edit, RouteKeys):
                moved = self._routed(edit, table, keys.float(), now) * edit.scale
            else:
                moved = torch.einsum("gij,btgj->btgi", table, keys.float()) * edit.scale
            keys = torch.where(chosen[..., None, None], (keys + moved).to(keys.dtype), keys)
        return as_laid_out(keys, self._layout)

    def _keep(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        """Keep the queries of this forward, which come before its keys."""
        if self._engine.current is not None:
            self._query = by_head(output, self._layout, self._engine.facts.heads[self._layer])

    def _routed(self, edit: RouteKeys, table: torch.Tensor, keys: torch.Tensor, now: Pass) -> torch.Tensor:
        """Σ α_m U_m U_mᵀ k, [B, T, G, D]."""
        query, self._query = self._query, None
        facts = self._engine.facts
        if query is None or query.shape[:2] != keys.shape[:2]:
            raise UnsupportedError(
                f"layer {self._layer} of {facts.name} made its keys before its queries, which decide on them"
            )
        if not now.whole_prompt:
            raise UnsupportedError(
                f"adaseka edits keys by the query of the last prompt token, but this forward holds columns "
                f"{now.q_offset}..{now.columns} of a prompt of {now.prompt.width}: prefill the prompt in one forward "
                "(no prefill_chunk_size, no reused prefix)"
            )
        groups = keys.shape[2]
        last = query[torch.arange(len(query), device=query.device), now.prompt.stop - 1].float()
        last = last.unflatten(1, (groups, -1)).mean(2)
        scaled = table.unflatten(1, (edit.experts, -1))
        alpha = torch.einsum("bgd,gmkd->bgm", last, scaled[:, :, : edit.leading])
        most = alpha.abs().amax(-1, keepdim=True)
        alpha = torch.where(most > 0, alpha / most.clamp(min=torch.finfo(alpha.dtype).tiny), alpha)
        norm = scaled.norm(dim=-1, keepdim=True)
        basis = torch.where(norm > 0, scaled / norm.clamp(min=torch.finfo(norm.dtype).tiny), scaled)
        inside = torch.einsum("gmkd,btgd->btgmk", basis, keys)
        return torch.einsum("bgm,btgmk,gmkd->btgd", alpha, inside, basis)
