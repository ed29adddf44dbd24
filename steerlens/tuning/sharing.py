"""What all candidates of an example have in common, computed once.

A steering that begins at layer l leaves the hidden states below l as they are, and one that is causal leaves the tokens
before the first row it acts on as they are. So the candidates of an example start from the unsteered states below their
first layer, and from an unsteered cache of the tokens before their first row.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from steerlens import caches, decoder
from steerlens.edits import Ablate, Around, Edit, Plan, Reweight, Sinks
from steerlens.methods.base import EditMethod
from steerlens.passes import Prompt
from steerlens.spans import Spans

logger = logging.getLogger("steerlens")

T = TypeVar("T")
SHORTEST = 8
"""A shorter prefix is not worth a cache."""


class Sharing:
    """What the candidates of one example share; of one example at a time.

    Args:
        model: a decoder model. Where its layers are not one list, or hooks sit on them, no layer is shared.
        layers: whether layers are shared at all, or prefixes alone.
    """

    def __init__(self, model: Any, *, layers: bool = True) -> None:
        self.model, self.base = model, decoder.find(model)
        self.facts, modules = decoder.read(self.base)
        self.layers = _layers(self.base, self.facts.layers, set(modules.values())) if layers else []
        self.prefixes = True
        self.learned_sinks = any(hasattr(module, "sinks") for module in modules.values())
        self._ids: tuple[int, ...] = ()
        self._outputs: list[Any] = []
        self._caches: dict[int, Any] = {}
        self._tried = False

    def begins(self, method: EditMethod, spans: Spans, prompt: int) -> tuple[int, int]:
        """The first layer and the first row that a method steers in a prompt; what is not known is 0.

        Args:
            method: the candidate.
            spans: of the one prompt row.
            prompt: its tokens.
        """
        plan = method.plan(self.facts, spans)
        if not plan:
            return 0, 0
        if not (method.causal and method.chunk_exact and self.prefixes):
            return min(plan), 0
        place = Prompt.start(prompt, None, 1, torch.device("cpu"))
        return min(plan), int(first_columns(plan, place, spans, learned_sinks=self.learned_sinks))

    @torch.no_grad()
    def try_out(self, ids: list[int]) -> None:
        """Find out whether the model gives the same from shared states, once and unsteered; else share none.

        It is asked before the first batch and on its tokens, so that a search that goes on decides as the stopped one.
        """
        if self._tried:
            return
        self._tried = True
        self._begin(ids)
        top, half = len(self.layers) - 1, len(ids) // 2
        if top > 0 and not self._same(top, 0):
            self.layers = []
        self.prefixes = half > 0 and self._same(0, half)
        if top > 0 and self.layers and self.prefixes and not self._same(top, half):
            self.prefixes = False

    def _same(self, layer: int, row: int) -> bool:
        def logits(cache: Any) -> torch.Tensor:
            ids = torch.tensor([self._ids[row if cache is not None else 0 :]] * 2, device=self.model.device)
            given = {} if cache is None else {caches.NAME: cache}
            return self.model(input_ids=ids, use_cache=cache is not None, **given).logits[:, row - len(self._ids) :]

        try:
            found = self._attempt(layer, row, 2, logits).float()
        # whatever a model's own code says to states that it did not make
        except Exception as error:
            logger.debug("no shared states: %s: %s", type(error).__name__, error)
            same = False
        else:
            plain = logits(None).float()
            allowed = max(1e-4, 16 * torch.finfo(self.model.dtype).eps) * plain.abs().max()
            same = bool((found - plain).abs().max() <= allowed)
        if not same:
            logger.warning("steered runs cannot share %s on this model", "a cache" if row else "layers")
        return same

    def _begin(self, ids: list[int]) -> None:
        if self._ids != tuple(ids):
            self._ids, self._outputs, self._caches = tuple(ids), [], {}

    def run(self, ids: list[int], first: tuple[int, int], count: int, forward: Callable[[Any], T]) -> T:
        """What `forward` gives from the states that are shared.

        Args:
            ids: tokens of the example.
            first: the first layer and row to compute.
            count: batch rows.
            forward: runs the batch, given the cache to start from or None.
        """
        self.try_out(ids)
        self._begin(ids)
        layer = first[0] if self.layers else 0
        row = first[1] if self.prefixes and first[1] >= SHORTEST else 0
        return self._attempt(layer, row, count, forward)

    def _attempt(self, layer: int, row: int, count: int, forward: Callable[[Any], T]) -> T:
        if layer and not self._outputs:
            self._outputs = self._record()
        cache = self._prefix(row, count) if row else None
        with self._stand_in(layer, row, count):
            return forward(cache)

    def _record(self) -> list[Any]:
        outputs: list[Any] = []
        hooks = [layer.register_forward_hook(lambda m, a, output: outputs.append(output)) for layer in self.layers]
        try:
            self.base(input_ids=torch.tensor([self._ids], device=self.model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if len(outputs) != len(self.layers):
            raise TypeError(f"{len(outputs)} outputs of {len(self.layers)} layers")
        return outputs

    def _prefix(self, row: int, count: int) -> Any:
        if row not in self._caches:
            ids = torch.tensor([self._ids[:row]], device=self.model.device)
            self._caches[row] = caches.find(self.base(input_ids=ids, use_cache=True))
        cache = copy.deepcopy(self._caches[row])
        cache.batch_repeat_interleave(count)
        return cache

    @contextmanager
    def _stand_in(self, layer: int, row: int, count: int) -> Iterator[None]:
        stood: list[Any] = []
        try:
            for module, output in list(zip(self.layers, self._outputs, strict=False))[:layer]:
                module.forward = _constant(output, row, count)  # type: ignore[method-assign]
                stood.append(module)
            yield
        finally:
            for module in stood:
                del module.forward


def first_columns(plan: Plan, place: Prompt, spans: Spans | None, *, learned_sinks: bool = False) -> torch.Tensor:
    """The first column of each prompt row that a causal plan changes, int64 [B].

    It is the last prompt column, which gives the first generated token, where none before it is changed.

    Args:
        plan: edits of a method that is causal and exact in chunks.
        place: the prompt rows, padded or not.
        spans: in the columns of `place`.
        learned_sinks: whether the model attends to learned sinks besides the keys.
    """
    first = place.stop - 1
    for edits in plan.values():
        for edit in edits:
            first = torch.minimum(first, _first(edit, place, spans, learned_sinks))
    return first


def _first(edit: Edit | Around, place: Prompt, spans: Spans | None, learned_sinks: bool) -> torch.Tensor:
    start, last = place.first, place.stop - 1
    if isinstance(edit, Reweight) and not isinstance(edit.keys, Sinks):
        # A row that sees keys of one side alone is not changed by a law that renormalises.
        inside = place.key_columns(edit.keys, spans)
        start = _leading(inside, last)
        if not learned_sinks:
            columns = torch.arange(place.width, device=last.device)
            prompt = (columns >= place.first[:, None]) & (columns < place.stop[:, None])
            start = torch.maximum(start, _leading(prompt & ~inside, last))
    elif not isinstance(edit, Ablate | Around):
        return start
    return torch.maximum(start, last) if edit.phase == "decode" else start


def _leading(table: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    return torch.where(table.any(1), table.long().argmax(1), otherwise)


def _constant(output: Any, row: int, count: int) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0][:, row:].expand(count, -1, -1), *output[1:])
        return output[:, row:].expand(count, -1, -1)

    return forward


def _layers(base: torch.nn.Module, count: int, attention: set[torch.nn.Module]) -> list[torch.nn.Module]:
    for module in base.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            inside = {part for layer in module for part in layer.modules()}
            if attention <= inside:
                wrapped = any("forward" in vars(layer) or hasattr(layer, "_hf_hook") for layer in module)
                return [] if wrapped else list(module)
    return []
