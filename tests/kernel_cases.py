"""Inputs of the kernels' tests, and the comparison of a call with the definition; interpreted without a GPU."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from steerlens.kernels import attention as home
from steerlens.kernels import definition
from steerlens.kernels.attention import STATS, Result, attention, is_decode
from steerlens.kernels.column_sums import column_sums
from steerlens.kernels.key_index import Labels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
GARBAGE = 10**8


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is asked for uninitialised holds NaN, or an integer that is no index."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bool or tensor.dtype.itemsize == 1:
            return tensor.fill_(1)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else GARBAGE)

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            make = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, lambda *a, _make=make, **k: fill(_make(*a, **k))))
        yield


@contextmanager
def on_path(path: str | None) -> Iterator[None]:
    """Send any number of rows to `prefill`, to `decode` in one range of keys, or in three (`split`)."""
    rows = {None: home.DECODE_ROWS, "prefill": 0}.get(path, 1 << 20)
    splits = {"decode": lambda *_: 1, "split": lambda *_: 3}.get(path, home.split_count)
    with mock.patch.object(home, "DECODE_ROWS", rows), mock.patch.object(home, "split_count", splits):
        assert path is None or is_decode(1, 1) == (path != "prefill")
        yield


@dataclass
class Make:
    """Random inputs of one shape, from one seed."""

    B: int = 1
    H: int = 2
    G: int = 1
    Tq: int = 19
    Tk: int = 45
    D: int = 16
    Dv: int | None = None
    dtype: torch.dtype = torch.float32
    seed: int | str = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.Dv = self.Dv or self.D
        seed = zlib.crc32(self.seed.encode()) if isinstance(self.seed, str) else self.seed
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator).to(DEVICE)

    def uniform(self, *size: int) -> torch.Tensor:
        return torch.rand(*size, generator=self.generator).to(DEVICE)

    def chance(self, p: float, *size: int) -> torch.Tensor:
        return self.uniform(*size) < p

    def integers(self, end: int, *size: int) -> torch.Tensor:
        return torch.randint(end, size, generator=self.generator).to(DEVICE)

    def between(self, start: int, end: int) -> torch.Tensor:
        """Which keys lie in [start, end), bool [1, 1, Tk]."""
        columns = torch.arange(self.Tk, device=DEVICE)
        return ((columns >= start) & (columns < end))[None, None]

    def padding(self) -> torch.Tensor:
        """The first keys of every second row of the batch, bool [B, 1, Tk]."""
        width = torch.arange(1, self.B + 1, device=DEVICE) % 2 * min(7, self.Tk - 1)
        return torch.arange(self.Tk, device=DEVICE) < width[:, None, None]

    def qkv(self) -> tuple[torch.Tensor, ...]:
        """Query, key and value as models have them, [B, T, heads, D] in memory, in the middle of NaNs."""

        def one(heads: int, length: int, dim: int) -> torch.Tensor:
            around = torch.full((self.B, length + 3, heads, dim + 5), torch.nan, dtype=self.dtype, device=DEVICE)
            inside = around[:, :length, :, :dim]
            inside.copy_(self.normal(self.B, length, heads, dim))
            return inside.transpose(1, 2)

        return one(self.H, self.Tq, self.D), one(self.G, self.Tk, self.D), one(self.G, self.Tk, self.Dv)


def stats_of(keywords: dict) -> tuple[str, ...]:
    """All statistics that such a call can give."""
    labels = keywords.get("labels")
    refused = {"lse_before"} if labels is not None and labels.groups > 1 and labels.terms else set()
    return tuple(s for s in STATS if s not in refused and (s != "mass" or (labels is not None and labels.terms)))


def check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    path: str | None = None,
    stats: tuple[str, ...] = (),
    heads: torch.Tensor | None = None,
    output: bool = True,
    **keywords,
) -> Result:
    """The kernels' result, after comparing all of it with the definition in fp64."""
    with on_path(path), poisoned():
        got = attention(query, key, value, stats=stats, heads=heads, output=output, **keywords)
    want, weights = definition.attention(query, key, value, **keywords)
    budget = allowed(query, key, value, want.output, weights, keywords)
    if heads is not None:
        want = Result(**{name: part[:, heads.long()] for name, part in vars(want).items()})
        weights = weights[:, heads.long()]
    wanted = {*stats, *(["top"] if "argmax" in stats else []), *(["output"] if output else [])}
    for name, part in vars(got).items():
        assert (part is not None) == (name in wanted), name
    if output:
        assert got.output.dtype == value.dtype and got.output.shape == want.output.shape
        close("output", got.output, want.output, budget)
    for name in ("lse", "lse_before", "entropy", "mass"):
        if name in stats:
            close(name, getattr(got, name), getattr(want, name))
    if "argmax" in stats:
        check_argmax(got, want, weights)
    return got


def close(name: str, got: torch.Tensor, want: torch.Tensor, budget: float | None = None) -> None:
    """No NaN, infinities in the same places, and elsewhere within `budget`: by default fp32's 1e-5 of the largest."""
    got, finite = got.double(), want.isfinite()
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, not {tuple(want.shape)}"
    assert not got.isnan().any(), f"{name} has NaN"
    assert torch.equal(got[~finite], want.double()[~finite]), f"{name} has infinities elsewhere"
    if finite.any():
        budget = 1e-5 * max(1.0, want[finite].abs().max().item()) if budget is None else budget
        error = (got - want)[finite].abs().max().item()
        assert error <= budget, f"{name} is off by {error:.2e}, allowed: {budget:.2e}"


def check_argmax(got: Result, want: Result, weights: torch.Tensor) -> None:
    """Where no key has a weight -1; elsewhere a largest weight, and its logit where the largest is not nearly a tie."""
    nothing = want.argmax < 0
    assert torch.equal(got.argmax < 0, nothing)
    assert torch.equal(got.top.isneginf(), want.top.isneginf())
    best = weights.amax(-1)
    found = weights.gather(-1, got.argmax.clamp(min=0)[..., None])[..., 0]
    assert torch.where(nothing, True, found >= best * (1 - 1e-4)).all(), "argmax is not a largest weight"
    two = torch.nn.functional.pad(weights, (0, 1)).topk(2, -1).values
    clear = ~nothing & (two[..., 1] < two[..., 0] * (1 - 1e-4))
    assert torch.equal(got.argmax[clear], want.argmax[clear]), "argmax"
    if clear.any():
        close("top", got.top[clear], want.top[clear])


def allowed(query, key, value, want, weights, keywords) -> float:
    """DESIGN §5.2: 1e-5 of the largest in fp32; in 16 bit twice the error of torch in that dtype and one rounding."""
    largest = want.abs().max().item()
    if query.dtype == torch.float32:
        return 1e-5 * largest
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    if {"law", "sinks", "softcap", "cut"} & set(keywords):
        plain, want = weights.to(query.dtype) @ value, weights @ value.double()
    else:
        names = ("scaling", "offset", "window", "softcap", "mask", "labels")
        _, x, terms = definition.logits(query, key, *map(keywords.get, names), torch.float64)
        mask = keywords.get("mask")
        bias = x.new_zeros(x.shape) if mask is None or mask.dtype == torch.bool else mask.to(x.dtype)
        for t, inside in enumerate(terms if keywords.get("bias") is not None else ()):
            bias = torch.where(inside, bias + keywords["bias"][..., t, None], bias)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        bias = bias.masked_fill(x.isneginf(), -torch.inf).to(query.dtype)
        plain = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=keywords.get("scaling")
        ).nan_to_num()
    return 2 * (plain.double() - want).abs().max().item() + torch.finfo(query.dtype).eps * largest


def check_columns(query, key, value, *, counted=None, heads=None, **keywords) -> None:
    """Column sums from the lse of a call, after comparing them with the definition in fp64."""
    got = attention(query, key, value, stats=("lse",), output=False, heads=heads, **keywords)
    sinks = keywords.pop("sinks", None)
    with poisoned():
        sums, observers = column_sums(query, key, got.lse, counted=counted, heads=heads, **keywords)
    _, weights = definition.attention(query, key, value, sinks=sinks, **keywords)
    names = ("scaling", "offset", "window", "softcap", "mask", "labels")
    seen, _, _ = definition.logits(query, key, *map(keywords.get, names), torch.float64)
    want = definition.column_sums(query, key, weights, seen, counted)
    if heads is not None:
        want = [part[:, heads.long()] for part in want]
    close("sums", sums, want[0])
    assert torch.equal(observers.double(), want[1])


__all__ = [
    "DEVICE",
    "DTYPES",
    "GARBAGE",
    "Labels",
    "Make",
    "check",
    "check_columns",
    "close",
    "on_path",
    "poisoned",
    "stats_of",
]
