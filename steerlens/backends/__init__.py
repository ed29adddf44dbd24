"""Backends: three ways to compute the same steered attention. A named one never falls back."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from steerlens.errors import UnsupportedError, nearest

if TYPE_CHECKING:
    import torch

    from steerlens.backends.call import Call

NAMES = ("auto", "reference", "sdpa", "triton")


def check(name: str) -> str:
    """The backend's name, if it is one that can be used here."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(NAMES)}{nearest(name, NAMES)}")
    if name == "triton" and find_spec("triton") is None:
        raise UnsupportedError(
            "backend 'triton' needs the triton package (Linux): pip install 'steerlens[gpu]', or use 'auto', 'sdpa' or "
            "'reference'"
        )
    return name


def attention(name: str, call: Call) -> torch.Tensor:
    """Steered attention by a backend.

    `auto` takes sdpa, and the row-blocked reference where sdpa cannot be exact. It does not take triton: no record in
    `kernels/records` shows it to be faster on any device yet.
    """
    if name == "triton":
        from steerlens.backends import fused

        return fused.attention(call)
    from steerlens.backends import reference, sdpa

    if name == "reference":
        return reference.attention(call)
    if name == "auto" and call.softcap is not None:
        return reference.attention(call, budget=sdpa.budget(call))
    return sdpa.attention(call)
