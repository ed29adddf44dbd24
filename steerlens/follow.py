"""State that moves with a cache: when a cache reorders, repeats, selects or copies its rows, so does its prompt."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from steerlens.passes import Prompt

MOVES = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")
Prompts = MutableMapping[Cache, tuple[object, Prompt]]


class Move:
    """Stands in for a method of one cache that moves its rows. Only this instance is touched, until `release`."""

    def __init__(self, prompts: Prompts, cache: Cache, name: str) -> None:
        self.prompts, self.cache, self.name = prompts, weakref.ref(cache), name

    def __call__(self, rows: Any) -> Any:
        """Move the cache's rows, then the prompt's."""
        cache = self.cache()
        assert cache is not None
        result = getattr(type(cache), self.name)(cache, rows)
        if (found := self.prompts.get(cache)) is not None:
            prompt = found[1]
            index = torch.arange(prompt.batch).repeat_interleave(rows) if self.name == MOVES[1] else rows
            self.prompts[cache] = (found[0], prompt.select(torch.as_tensor(index, device=prompt.first.device)))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        source = self.cache()
        copied = memo.get(id(source))
        if source is None or copied is None:
            raise TypeError(f"{self.name} of a cache under steering cannot be copied without its cache")
        if (found := self.prompts.get(source)) is not None and copied not in self.prompts:
            prompt = found[1]
            self.prompts[copied] = (found[0], prompt.select(torch.arange(prompt.batch, device=prompt.first.device)))
        return Move(self.prompts, copied, self.name)


def follow(prompts: Prompts, cache: Cache, entry: tuple[object, Prompt]) -> None:
    """Bind a prompt to a cache, and have it follow the cache's rows."""
    prompts[cache] = entry
    for name in MOVES:
        if name not in cache.__dict__ and hasattr(type(cache), name):
            cache.__dict__[name] = Move(prompts, cache, name)


def release(prompts: Prompts) -> None:
    """Give every cache its own methods back, and forget the prompts."""
    for cache in list(prompts):
        for name in MOVES:
            cache.__dict__.pop(name, None)
    prompts.clear()
