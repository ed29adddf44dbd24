"""Masks as models make them: what they say of tokens and of visibility."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from steerlens.backends.call import FEW_ROWS, unhidden
from steerlens.errors import UnsupportedError


def canonical(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A float mask of zeros and of values that hide as the bool mask it stands for; real biases stay."""
    if mask is None:
        return None
    visible = unhidden(mask)
    return mask if mask.is_floating_point() and not bool(((mask == 0) | ~visible).all()) else visible


def is_causal_padding(
    mask: torch.Tensor | None, offset: int, real: torch.Tensor | None, window: int | None = None
) -> bool:
    """Whether a mask hides later keys, pads and what lies before a sliding window, and nothing else.

    Never for a few rows, where it would not pay.

    Args:
        mask: [B or 1, H or 1, Tq, Tk].
        offset: column of query row 0 minus column of key 0.
        real: real keys, bool [B, Tk]; `None` for all.
        window: a row sees its own and the `window` - 1 keys before it; `None` for all before it.
    """
    if mask is None or mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[2] <= FEW_ROWS:
        return False
    keys = torch.arange(mask.shape[3], device=mask.device)
    for start in range(0, mask.shape[2], 256):
        rows = mask[:, 0, start : start + 256]
        ahead = torch.arange(start, start + rows.shape[1], device=mask.device)[:, None] + offset - keys
        expected = ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)
        if real is not None:
            expected = expected & real[:, None]
        if not bool((rows == expected).all()):
            return False
    return True


def from_columns(
    query: torch.Tensor, length: int, offset: int, real: torch.Tensor | None, window: int | None
) -> torch.Tensor:
    """Visibility where the native kernel is told the padding and the window instead of a mask, bool [B, 1, Tq, Tk]."""
    device = query.device
    distance = torch.arange(query.shape[2], device=device)[:, None] + offset - torch.arange(length, device=device)
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    visible = visible[None, None].expand(query.shape[0], 1, -1, -1)
    return visible if real is None else visible & real[:, None, None]


def refuse_packed(given: Mapping[str, Any], cache: Cache | None) -> None:
    """Transformers takes positions that start again, without mask and cache, for sequences packed into one row."""
    positions = given.get("position_ids")
    if not isinstance(positions, torch.Tensor) or given.get("attention_mask") is not None or cache is not None:
        return
    if positions.ndim == 2 and bool((positions.diff(dim=1) != 1).any()):
        raise UnsupportedError(
            "position_ids start again within a row, and there is no attention_mask: several sequences packed into one "
            "row. Steering counts prompts by row: give each sequence its own row, padded, with an attention_mask"
        )


def token_mask(mask: Any, columns: int) -> tuple[torch.Tensor | None, bool]:
    """Real tokens as [B, >= columns] if the mask tells, and whether visibility is causal and padding alone.

    In a 4-D mask a pad on the right that sees tokens is taken for one: `prompt_lengths` tells them apart.
    """
    if mask is None:
        return None, True
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is None:
            return None, True
    if not isinstance(mask, torch.Tensor):
        raise UnsupportedError(f"attention_mask is a {type(mask).__name__}; a 2-D or 4-D tensor is needed")
    if mask.ndim == 2:
        return mask, True
    if mask.ndim != 4:
        raise UnsupportedError(f"attention_mask has shape {tuple(mask.shape)}; allowed: [B, T] or [B, 1, Tq, Tk]")
    visible = unhidden(mask).any(1)
    # The mask of a sliding-window cache begins where its window does, and tells nothing of the columns before.
    if visible.shape[-1] < columns:
        return None, False
    real = visible.any(1)
    if visible.shape[1] == visible.shape[2] > 1:
        # Many masks let a pad see itself, lest its row be empty: a token is seen by, or sees, another.
        beside = visible & ~torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device)
        tokens = real & (beside.any(1) | beside.any(2))
        real = torch.where(tokens.any(-1, keepdim=True), tokens, real)
    return real, False
