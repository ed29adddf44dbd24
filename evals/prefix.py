"""What a steered run takes over from the unsteered run of the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steerlens.evals.batch import Batch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steerlens.methods.base import EditMethod, Method
from steerlens.tuning.sharing import SHORTEST, Sharing, first_columns


class Prefix:
    """The unsteered keys and values of a batch, up to where a steering begins to act.

    A steering whose methods are causal and exact in chunks leaves every column before the first one that it changes as
    it is. Where the cache holds each layer's keys in full, a steered run starts from those columns.

    Args:
        model: a decoder model.

    Attributes:
        saved: prompt tokens that steered runs took over instead of computing them.
    """

    def __init__(self, model: Any) -> None:
        self.sharing = Sharing(model, layers=False)
        self.saved = 0
        self._layers: list[tuple[Any, Any]] = []
        chosen = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
        self._possible = chosen is None and not self.sharing.facts.keys_of

    def columns(self, methods: Sequence[Method], batch: Batch) -> int:
        """How many columns a steering of this batch leaves as they are, in all rows; 0 where that is not known.

        Methods that do nothing share nothing: they are run to see that they do nothing.
        """
        exact = all(isinstance(m, EditMethod) and m.causal and m.chunk_exact for m in methods)
        if not methods or not exact or not self._possible:
            return 0
        plans = [m.plan(self.sharing.facts, batch.spans) for m in methods if isinstance(m, EditMethod)]
        if not any(plans):
            return 0
        self.sharing.try_out(batch.rows[0].ids)
        if not self.sharing.prefixes:
            return 0
        sinks = self.sharing.learned_sinks
        first = min(int(first_columns(p, batch.place, batch.spans, learned_sinks=sinks).min()) for p in plans)
        return first if first >= SHORTEST else 0

    def keep(self, cache: Any) -> None:
        """Keep the cache of the unsteered run, if it holds every layer in full."""
        layers = cache.layers if type(cache) is DynamicCache and not cache.offloading else []
        # a window, a quantised or a recurrent state is another kind of layer
        full = [layer for layer in layers if type(layer) is DynamicLayer and layer.is_initialized]
        self._layers = [(layer.keys, layer.values) for layer in full] if len(full) == len(layers) else []

    def drop(self) -> None:
        """Forget what was kept."""
        self._layers = []

    def start(self, columns: int, batch: Batch, indices: Sequence[int]) -> Any:
        """A cache of the first columns; None where nothing was kept.

        Args:
            columns: as `columns` gives.
            batch: what is run from it.
            indices: its rows in the unsteered run.
        """
        if not columns or not self._layers:
            return None
        cache = DynamicCache()
        every = list(indices) == list(range(len(self._layers[0][0])))
        for number, (keys, values) in enumerate(self._layers):
            rows = slice(None) if every else list(indices)
            # the cache copies what it is given
            cache.update(keys[rows, :, :columns], values[rows, :, :columns], number)
        self.saved += int(batch.inputs["attention_mask"][:, :columns].sum())
        return cache
