"""Contexts that watch a model's attention calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch

from steerlens import decoder
from steerlens.backends.call import Call
from steerlens.engine import Engine
from steerlens.errors import SteeringStateError
from steerlens.passes import Pass
from steerlens.spans import Spans
from steerlens.wrapping import unwrap


class Observer:
    """Watches the attention calls of `layers`; what a subclass does not override it does not look at."""

    name = "steerlens.capture"
    """What messages call it."""
    spans: Spans | None = None

    def __init__(self, model: Any) -> None:
        self.model = unwrap(model)
        self._engine = Engine.of(decoder.find(self.model))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose calls are seen."""
        return self._engine.facts.attention_layers

    def __enter__(self) -> Self:
        self._engine = Engine.of(self._engine.base)
        if self in self._engine.records:
            raise SteeringStateError("this capture is on already: open another one")
        self._engine.claim()
        self._engine.records.append(self)
        try:
            self._engine.update()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.records.remove(self)
        self._engine.update()

    def check_rows(self, batch: int, expand: int) -> None:
        """Raise if a batch of `batch` rows is not the one that is watched."""

    def expect(self, now: Pass) -> None:
        """Raise if the forward that begins cannot be watched."""

    def observe(self, layer: int, call: Call, now: Pass) -> None:
        """See what goes into an attention call, without gradients."""

    def output(self, layer: int, output: torch.Tensor, now: Pass) -> None:
        """See what an attention call gives, [B, Tq, H, Dv], with its gradient history, before the layer gets it."""


@contextlib.contextmanager
def joined(observer: Observer) -> Iterator[None]:
    """The observer watches beside the contexts in force, from whatever thread runs the forwards."""
    engine = observer._engine
    engine.records.append(observer)
    try:
        engine.update()
        yield
    finally:
        engine.records.remove(observer)
        engine.update()


@contextlib.contextmanager
def alone(observer: Observer) -> Iterator[None]:
    """Inside, the observer is the only context of its model: nothing is steered, and no other context sees or counts.

    For a method's own forwards while it is attached, from whatever thread runs them.
    """
    engine = observer._engine
    contexts, records = engine.contexts, engine.records
    counts = {layer: (site.calls, site.rows) for layer, site in engine.sites.items()}
    engine.contexts, engine.records = [], [observer]
    try:
        engine.update()
        yield
    finally:
        engine.contexts, engine.records = contexts, records
        engine.update()
        for layer, site in engine.sites.items():
            site.calls, site.rows = counts.get(layer, (0, 0))
