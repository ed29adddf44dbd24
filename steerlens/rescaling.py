"""Attention modules whose rows are of two kinds: prompt rows as they are, decode rows with a channel scaled."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from steerlens import around, caches
from steerlens.edits import Reweight, ScaleChannel, Sinks
from steerlens.errors import MethodError, UnsupportedError
from steerlens.passes import Pass

if TYPE_CHECKING:
    from steerlens.engine import Site


class Rescaled:
    """The `ScaleChannel` edits of one routed layer.

    A forward that holds prompt rows runs the module twice, without a cache as it is and then scaled with the cache,
    and takes each row from its own run. One of decode rows alone runs scaled.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._placed: list[around.Placed] = []
        self._hooks: list[RemovableHandle] = []
        self._own: Any = None
        self._on = False

    def place(self, placed: list[around.Placed]) -> None:
        """Carry out those of the edits that scale a channel, and no others from now on."""
        wanted = [p for p in placed if isinstance(p.edit, ScaleChannel)]
        module: Any = self._site.module
        if self._placed and not wanted:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            module.__dict__.pop("forward", None)
            if self._own is not None:
                module.__dict__["forward"] = self._own
        elif wanted and not self._placed:
            projections = self._projections()
            self._hooks = [p.register_forward_pre_hook(self._scale, with_kwargs=True) for p in projections]
            self._own = module.__dict__.get("forward")
            module.__dict__["forward"] = functools.wraps(module.forward)(
                functools.partial(self._forward, module.forward)
            )
        self._placed = wanted

    def _projections(self) -> list[torch.nn.Module]:
        site, facts = self._site, self._site.engine.facts
        layer, module = site.layer, site.module
        query, key, value = (getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj"))
        where = f"layer {layer} of {facts.name} ({facts.family})"
        if layer in facts.keys_of or not all(isinstance(p, torch.nn.Module) for p in (query, key, value)):
            raise UnsupportedError(
                f"{where} does not make queries, keys and values by modules q_proj, k_proj and v_proj of its own, so "
                "that their input cannot be scaled for the first two alone: steer another model"
            )
        wide, narrow = (getattr(p, "out_features", None) for p in (query, key))
        if wide is not None and narrow is not None and wide * facts.kv_heads[layer] != narrow * facts.heads[layer]:
            raise UnsupportedError(f"{where}: q_proj gives more than queries (a gate), which must not be scaled")
        return [query, key]  # type: ignore[list-item]

    # --- one forward -------------------------------------------------------------------------------------------------

    def _forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        site, engine = self._site, self._site.engine
        now = engine.current
        if now is None or (engine.scope is not None and engine.scope.native):
            return original(*args, **kwargs)
        self._check(now)
        if now.rows("decode") is None or bool(now.rows("decode").all()):  # type: ignore[union-attr]
            return self._scaled(original, args, kwargs)
        counts = site.calls, site.rows
        positional, named = _without_cache(original, args, kwargs)
        plain = original(*positional, **named)
        site.calls, site.rows = counts
        hidden = plain[0] if isinstance(plain, tuple) else plain
        here = now.on(hidden.device)
        here.memo.pop(("called", site.layer), None)
        scaled = self._scaled(original, args, kwargs)
        rows = here.rows("decode")
        assert rows is not None
        if not isinstance(scaled, tuple):
            return torch.where(rows[..., None], scaled, hidden)
        return (torch.where(rows[..., None], scaled[0], hidden), *scaled[1:])

    def _check(self, now: Pass) -> None:
        """Refuse a forward that cannot be exact, and write down that its keys are scaled."""
        site, engine = self._site, self._site.engine
        where = f"{engine.describe()}: layer {site.layer}"
        note = ("scaled", site.layer, tuple(p.edit for p in self._placed))
        rows = now.rows("decode")
        if now.q_offset and note not in now.prompt.notes:
            raise UnsupportedError(
                f"{where} attends to scaled keys, and the cache holds others, of a forward before this steering or of "
                "another prompt: give the whole text without it"
            )
        if now.q_offset and rows is not None and not bool(rows.all()):
            raise UnsupportedError(
                f"{where}: prompt rows attend to unscaled keys, and the cache holds scaled ones: read a prompt in one "
                "forward, without prefill_chunk_size"
            )
        now.prompt.notes.add(note)
        if rows is None or bool(rows.all()):
            return
        if engine.observers or engine._asked_for_weights:
            raise UnsupportedError(
                f"{where} reads a prompt twice, once for each kind of row, of which no statistic shows both: leave out "
                "capture, report='mass' and output_attentions=True"
            )
        if any(isinstance(p.edit, Reweight) and isinstance(p.edit.keys, Sinks) for p in site.placed):
            raise UnsupportedError(f"{where} reads a prompt twice, so that sinks cannot be found in it")

    def _scaled(self, original: Any, args: Any, kwargs: Any) -> Any:
        self._on = True
        try:
            return original(*args, **kwargs)
        finally:
            self._on = False

    def _scale(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self._site.engine.current
        if not self._on or now is None:
            return None
        x, *rest = args
        now = now.on(x.device)
        positions = torch.arange(now.q_offset, now.q_offset + x.shape[1], device=x.device) - now.prompt.first[:, None]
        for item in self._placed:
            edit = item.edit
            assert isinstance(edit, ScaleChannel)
            if edit.channel >= x.shape[-1]:
                raise MethodError(
                    f"channel {edit.channel} is out of range; the input of layer {self._site.layer}'s attention has "
                    f"channels 0..{x.shape[-1] - 1}"
                )
            chosen = positions >= edit.start
            if (where := around.rows_of(item, now)) is not None:
                chosen = chosen & where
            scale = torch.ones_like(x[:, :, :1]).masked_fill(chosen[..., None], edit.factor)
            channel = slice(edit.channel, edit.channel + 1)
            x = torch.cat([x[..., : edit.channel], x[..., channel] * scale, x[..., edit.channel + 1 :]], -1)
        return (x, *rest), kwargs


def _without_cache(original: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module's forward with no cache among them."""
    bound = inspect.signature(original).bind(*args, **kwargs)
    variable = {n for n, p in bound.signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD}
    for name, value in list(bound.arguments.items()):
        if name in (caches.NAME, caches.OLD):
            bound.arguments[name] = None
        elif name in variable:
            bound.arguments[name] = {k: None if k in (caches.NAME, caches.OLD) else v for k, v in value.items()}
    return bound.args, bound.kwargs
