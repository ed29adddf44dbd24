"""Backends: three ways to compute the same steered attention. A named one never falls back."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from steerlens.errors import UnsupportedError, nearest

if TYPE_CHECKING:
    import torch

    from steerlens.backends.call import Call

NAMES = ("auto", "reference", "sdpa", "triton")
RECORDED = ((9, 0),)
"""Compute capabilities of the devices in `kernels/records`."""
Found = TypeVar("Found")
log = logging.getLogger("steerlens")


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


@lru_cache
def fastest(device: torch.device, dtype: torch.dtype) -> str:
    """What `auto` takes where it can: triton where a record in `kernels/records` shows it to be faster, else sdpa."""
    import torch

    if device.type != "cuda" or dtype.itemsize != 2 or find_spec("triton") is None:
        return "sdpa"
    if torch.version.hip is not None or os.environ.get("TRITON_INTERPRET") == "1":
        return "sdpa"
    if torch.cuda.get_device_capability(device) not in RECORDED or not _launches():
        return "sdpa"
    return "triton"


def _launches() -> bool:
    """Whether Triton can launch here: it builds its launcher with a C compiler, and keeps it on the disk."""
    from triton.runtime.driver import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # the compiler's, the linker's or the disk's
        log.warning("backend 'auto' takes sdpa, as Triton cannot launch its kernels here: %s", error)
        return False
    return True


def takes_kernels(name: str, query: torch.Tensor) -> bool:
    """Whether calls with such queries are for the kernels; `auto` keeps from them what needs gradients."""
    if name != "auto":
        return name == "triton"
    return fastest(query.device, query.dtype) == "triton" and not query.requires_grad


def by_kernels(name: str, call: Call, run: Callable[[], Found]) -> Found | None:
    """What `run` gives by the kernels; `None` where they are not for this call, or where `auto` may do without them."""
    if not takes_kernels(name, call.query) or (name == "auto" and call.needs_grad):
        return None
    try:
        return run()
    except UnsupportedError:
        if name == "triton":
            raise
        return None


def attention(name: str, call: Call) -> torch.Tensor:
    """Steered attention by a backend.

    `auto` takes triton in 16 bit on devices of which a record shows it to be faster, else sdpa, and the row-blocked
    reference where neither can be exact.
    """
    from steerlens.backends import fused, reference, sdpa

    if (found := by_kernels(name, call, lambda: fused.attention(call))) is not None:
        return found
    if name == "reference":
        return reference.attention(call)
    # A window without its mask is for the kernels, which could not take this call.
    if name == "auto" and (call.softcap is not None or (call.window is not None and call.mask is None)):
        return reference.attention(call, budget=sdpa.budget(call))
    return sdpa.attention(call)
