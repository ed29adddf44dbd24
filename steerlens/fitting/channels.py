"""Channels of the hidden state that carry positions (arXiv 2406.02536, §3.2): candidates for `PositionalScaling`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steerlens.errors import UnsupportedError
from steerlens.measures.base import MeasureError, context

SKIP_FIT, SKIP_SMOOTH = 0.3, 0.2
"""Shares of the positions at the beginning that are left out: published, 300 and 200 of 1000."""


def positional_channels(
    model: Any,
    *,
    samples: int = 200,
    length: int = 1000,
    top: int = 10,
    seed: int = 0,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> list[tuple[int, float]]:
    """The channels whose mean over texts without meaning goes one way with the position, smoothest first.

    Texts are random token ids; published, random strings. Which of the channels helps, and with what factor and in
    which layers, a task must tell (`steerlens tune` or `eval`); published, the loss on 60-key retrieval.

    Args:
        model: a transformers model.
        samples: texts to average over.
        length: tokens of each; no more than the model has room for.
        top: how many channels at most.
        seed: of the texts.
        batch_size: texts per forward.
        advance: told how many texts are done.

    Returns:
        Channels with their roughness, lowest first.

    Raises:
        MeasureError: if no channel goes one way in enough layers, or the texts are shorter than 50 tokens.
        UnsupportedError: without SciPy.
    """
    room = context(model)
    length = length if room is None else min(length, room)
    if length < 50:
        raise MeasureError(f"positional_channels: texts of {length} tokens say nothing of positions; 50 are needed")
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (samples, length), generator=draw)
    total: torch.Tensor | None = None
    for batch in ids.split(batch_size):
        with torch.no_grad():
            states = model(batch.to(model.device), output_hidden_states=True, use_cache=False).hidden_states
        part = torch.stack([state.double().sum(0).cpu() for state in states[1:]])
        total = part if total is None else total + part
        advance(len(batch))
    assert total is not None
    found = rank((total / samples).numpy())[:top]
    if not found:
        raise MeasureError(
            "positional_channels: no channel goes one way with the position in more than a quarter of the layers"
        )
    return found


def rank(means: NDArray[np.float64]) -> list[tuple[int, float]]:
    """Channels that go one way in more than a quarter of the layers, most of them the same way, and their roughness.

    Args:
        means: hidden states after each decoder layer, [layers, positions, channels]. The first layer and the last are
            left out.
    """
    try:
        from scipy.signal import savgol_filter  # type: ignore[import-untyped]
    except ImportError as error:
        raise UnsupportedError(
            "positional_channels needs SciPy, which is not installed: pip install 'steerlens[eval]'"
        ) from error
    layers, positions, channels = means.shape
    fit, smooth = (int(share * positions) for share in (SKIP_FIT, SKIP_SMOOTH))
    where = np.linspace(-1, 1, positions - fit)
    signs, roughness = np.zeros((layers, channels)), np.full((layers, channels), np.inf)
    for layer in range(1, layers - 1):
        scaled = _scaled(means[layer])
        curve = np.polynomial.polynomial.polyval(where, np.polynomial.polynomial.polyfit(where, scaled[fit:], 3)).T
        steps = np.sign(np.diff(curve, axis=0))
        signs[layer] = np.where((steps == steps[0]).all(0), steps[0], 0)
        bends = np.diff(savgol_filter(scaled, 10, 3, axis=0)[smooth:], n=2, axis=0)
        roughness[layer] = (bends**2).sum(0)
    up, down = (signs > 0).sum(0), (signs < 0).sum(0)
    way = np.where(up >= down, 1, -1)
    roughness = np.where(signs == way, roughness, np.inf).min(0)
    kept = [channel for channel in range(channels) if max(up[channel], down[channel]) > layers / 4]
    return [(channel, float(roughness[channel])) for channel in sorted(kept, key=lambda c: (roughness[c], c))]


def _scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[positions, channels] between 0 and 1 in every channel."""
    low, high = values.min(0), values.max(0)
    return (values - low) / np.where(high > low, high - low, 1)
