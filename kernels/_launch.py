"""What every launcher needs: limits, checks that name the tensor, block widths, the interpreter."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import torch
from steerlens.kernels._tiles import dots
from triton.runtime.interpreter import InterpretedFunction

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BOOLS = (torch.bool, torch.uint8)
MAX_DIM = 256
MAX_GROUPS, MAX_TERMS = 4, 28
HIDDEN, FIRST_TERM = 4, 3
"""Bits of a label; see `key_index`."""


def refuse(what: str, seen: object, allowed: str) -> NoReturn:
    """Raise a `ValueError` that names what is wrong, what was seen and what is allowed."""
    raise ValueError(f"{what} is {seen}; allowed: {allowed}")


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return isinstance(dots, InterpretedFunction)


class Again:
    """Launches of one kernel that differ in what tensors hold, and in little else.

    Triton finds the compiled kernel from the values of all arguments, which costs more than the launch itself. Here it
    is asked once for all that does not lie in tensors.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._known: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}

    def launch(
        self, grid: tuple[int, int, int], tensors: Sequence[torch.Tensor], numbers: tuple[float, ...],
        constants: Sequence[dict[str, Any]], warps: int, stages: int, key: Hashable,
    ) -> None:  # fmt: skip
        """Launch on tensors of the dtypes of the launches before, in the order of the kernel's arguments.

        Equal keys mean equal `numbers`, `constants`, `warps` and `stages`.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        # Kernels are compiled for addresses that divide by 16, or for those that do not.
        aligned = functools.reduce(operator.or_, addresses) % 16 == 0
        if aligned and key in self._known:
            compiled, rest = self._known[key]
            # The driver is asked about a tensor's address, not about a number.
            compiled[grid](*addresses, *numbers, *rest)
            return
        given = {name: value for some in constants for name, value in some.items()}
        compiled = self.kernel[grid](*tensors, *numbers, **given, num_warps=warps, num_stages=stages)
        if aligned and getattr(compiled, "function", None) is not None:
            names = self.kernel.arg_names[len(tensors) + len(numbers) :]
            self._known[key] = compiled, tuple(given[name] for name in names)


def check_device(name: str, tensor: torch.Tensor) -> None:
    """Raise unless kernels can run on this tensor's device."""
    if tensor.device.type == "cuda" or (tensor.device.type == "cpu" and interpreted()):
        return
    refuse(f"device of {name}", tensor.device, "cuda; or cpu with TRITON_INTERPRET=1 set before triton is imported")


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    """Raise unless a kernel computes rightly in this dtype here."""
    if tensor.dtype not in DTYPES:
        refuse(f"dtype of {name}", tensor.dtype, "bfloat16, float16, float32")
    if tensor.dtype == torch.bfloat16 and interpreted():
        refuse(f"dtype of {name}", tensor.dtype, "float16 or float32: Triton's interpreter computes bfloat16 wrongly")


def check_launch(query: torch.Tensor) -> None:
    """Raise unless kernels can run, and launch, where the query is."""
    check_device("query", query)
    if query.is_cuda and query.device.index != torch.cuda.current_device():
        refuse(
            "device of query",
            query.device,
            f"the current one, cuda:{torch.cuda.current_device()}: Triton launches there; use torch.cuda.device(…)",
        )


def check_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise unless query [B, H, Tq, D], key [B, G, Tk, D] and value [B, G, Tk, Dv] fit each other and the kernels."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            refuse(f"shape of {name}", tuple(tensor.shape), "[B, heads, T, head dim]")
        check_device(name, tensor)
        check_dtype(name, tensor)
        if tensor.dtype != query.dtype or tensor.device != query.device:
            refuse(
                f"{name} ({tensor.dtype} on {tensor.device})",
                "not like query",
                f"{query.dtype} on {query.device}, as query",
            )
        if not 1 <= tensor.shape[-1] <= MAX_DIM:
            refuse(f"head dim of {name}", tensor.shape[-1], f"1 to {MAX_DIM}")
    check_launch(query)
    B, H, _, D = query.shape
    if key.shape[0] != B or key.shape[3] != D or H % key.shape[1]:
        refuse("shape of key", tuple(key.shape), f"[{B}, a divisor of {H}, Tk, {D}], for query {tuple(query.shape)}")
    if value.shape[:3] != key.shape[:3]:
        refuse("shape of value", tuple(value.shape), f"{[*key.shape[:3]]} and a head dim, as key")
    if key.shape[2] < 1 or query.shape[2] < 1:
        refuse("number of rows or keys", (query.shape[2], key.shape[2]), "at least 1")


def check_edits(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    mask: torch.Tensor | None,
    bits: torch.Tensor | None,
    bias: torch.Tensor | None,
    terms: int,
    heads: torch.Tensor | None,
) -> None:
    """Raise unless what changes the logits of `query` and `key`, already checked, fits them."""
    (B, H, Tq, _), Tk, device = query.shape, key.shape[2], query.device
    if not scaling > 0 or not math.isfinite(scaling):
        refuse("scaling", scaling, "a finite number > 0")
    if window is not None and window < 1:
        refuse("window", window, "at least 1")
    if softcap is not None and not softcap > 0:
        refuse("softcap", softcap, "> 0, or None")
    if bits is not None:
        check_table("labels", bits, (B, H, Tk), (torch.uint8, torch.int32), device)
        if bits.shape[2] != Tk:
            refuse("number of labels", bits.shape[2], f"{Tk}, one for each key")
    if mask is not None:
        check_table("mask", mask, (B, H, Tq, Tk), (torch.bool, *DTYPES), device)
        if mask.shape[2:] != (Tq, Tk):
            refuse("shape of mask", tuple(mask.shape), f"[B or 1, H or 1, {Tq}, {Tk}]")
        if window is not None:
            refuse("window beside a mask", window, "None: the mask says what is seen")
    if bias is not None:
        check_table("bias", bias, (B, H, Tq, -1), (torch.float32,), device)
        if bias.shape[3] != terms:
            refuse("number of biases", bias.shape[3], f"{terms}, one for each term of the labels")
    if heads is not None:
        check_table("heads", heads, (-1,), (torch.int32, torch.int64), device)


def check_table(
    name: str, table: torch.Tensor, sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise unless a table is on this device, every axis of its size or 1, and its dtype one of these; -1: any size."""
    fits = table.ndim == len(sizes) and all(
        n in (1, size) or size == -1 for n, size in zip(table.shape, sizes, strict=False)
    )
    if not fits:
        refuse(f"shape of {name}", tuple(table.shape), f"{list(sizes)}, or 1 on an axis")
    if table.dtype not in dtypes:
        refuse(f"dtype of {name}", table.dtype, ", ".join(map(str, dtypes)))
    if table.device != device:
        refuse(f"device of {name}", table.device, f"{device}, as query")


def inner(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last axis contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def steps(table: torch.Tensor | None, axes: int) -> tuple[int, ...]:
    """Strides of a table's first axes, 0 where it is 1 wide."""
    if table is None:
        return (0,) * axes
    return tuple(0 if table.shape[i] == 1 else table.stride(i) for i in range(axes))


def ceil_div(x: int, y: int) -> int:
    """⌈x / y⌉; Triton's own costs microseconds a call."""
    return -(-x // y)


def power_of_two(n: int) -> int:
    """The least power of two from `n` on."""
    return 1 << max(n - 1, 0).bit_length()


@lru_cache
def widths(dim: int) -> tuple[int, int]:
    """Two powers of two that hold a head dim: (64, 16) for 80, (128, 64) for 192, (128, 0) for 128 and for 112."""
    whole = max(16, power_of_two(dim))
    if whole == dim or dim <= 16:
        return whole, 0
    rest = max(16, power_of_two(dim - whole // 2))
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


def precision(dtype: torch.dtype) -> str:
    """fp32 products are IEEE; 16-bit ones are exact in the tensor cores."""
    return "ieee" if dtype == torch.float32 else "tf32"


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; few under the interpreter, so that splits stay worth testing."""
    return 4 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def or_one(tensor: torch.Tensor | None, like: torch.Tensor) -> Any:
    """A pointer for an argument that a kernel will not read."""
    return like if tensor is None else tensor
