"""Peak memory of a call, and the bound that steering keeps to (invariant 5.7 of the design)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def peak(function: Callable[[], Result], device: str | torch.device = "cpu") -> tuple[Result, int | None]:
    """A call's result and the most bytes it held at once, over what was held before.

    On the CPU every allocation is counted by the profiler; on CUDA the allocator's own peak is read; elsewhere
    the bytes are `None`.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        return result, torch.cuda.max_memory_allocated(device) - before
    if kind != "cpu":
        return function(), None
    # torch's profiler writes a line to stderr at each start and stop, which no other level silences.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return result, most


def bound(config: Any, batch: int, rows: int, keys: int, itemsize: int) -> int:
    """Twice the bytes of one layer's q (of `rows` tokens), k and v (of `keys`)."""
    heads = config.num_attention_heads
    grouped = getattr(config, "num_key_value_heads", None) or heads
    # Latent attention has wider queries and keys than values; its `head_dim` is the rotated part alone.
    width = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    value = getattr(config, "v_head_dim", None) or width
    return 2 * batch * itemsize * (rows * heads * width + keys * grouped * (width + value))
