"""Inputs and edits by name, the same for what is checked, timed and compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from steerlens.kernels.attention import UNIFORM, ZERO, Law
from steerlens.kernels.key_index import Labels

SCATTERED = 16
"""Keys of each head that `keep` and `transfer` take mass from."""
SPAN = 256


@dataclass(frozen=True)
class Shape:
    """B, H, G, Tq, Tk, D, Dv and the dtype of one call."""

    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    rows: int = 4096
    keys: int = 4096
    dim: int = 128
    value_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def flops(self) -> float:
        """Of the two products, over the keys that bottom-right causal rows see."""
        seen = self.rows * (self.keys - self.rows) + self.rows * (self.rows + 1) / 2
        return 2 * self.batch * self.heads * seen * (self.dim + self.value_dim)

    @property
    def bytes(self) -> int:
        """Of q, k, v and the output, each once."""
        kv = self.kv_heads * self.keys * (self.dim + self.value_dim)
        return self.batch * self.dtype.itemsize * (kv + self.heads * self.rows * (self.dim + self.value_dim))

    def describe(self) -> dict[str, Any]:
        """For a row of the record."""
        return {
            "batch": self.batch, "heads": self.heads, "kv_heads": self.kv_heads, "rows": self.rows, "keys": self.keys,
            "dim": self.dim, "value_dim": self.value_dim, "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip


def qkv(
    shape: Shape, device: torch.device, seed: int = 0, hollow: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value; `hollow`: heads and sequences share their memory, for compiling alone."""
    sizes = (
        (shape.batch, shape.heads, shape.rows, shape.dim),
        (shape.batch, shape.kv_heads, shape.keys, shape.dim),
        (shape.batch, shape.kv_heads, shape.keys, shape.value_dim),
    )
    if hollow:
        return tuple(torch.empty(size[2:], dtype=shape.dtype, device=device).expand(size) for size in sizes)  # type: ignore[return-value]
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(torch.randn(size, generator=generator, device=device, dtype=shape.dtype) for size in sizes)  # type: ignore[return-value]


@dataclass
class Edit:
    """Arguments of `attention`, put together feature by feature."""

    shape: Shape
    device: torch.device
    generator: torch.Generator
    group: torch.Tensor | None = None
    groups: int | None = None
    hidden: torch.Tensor | None = None
    terms: list[torch.Tensor] = field(default_factory=list)
    biases: list[torch.Tensor] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """What `attention` takes; labels without their index."""
        found = dict(self.more)
        if self.group is not None or self.hidden is not None or self.terms:
            found["labels"] = Labels.of(group=self.group, hidden=self.hidden, terms=self.terms, groups=self.groups)
        if self.biases:
            found["bias"] = torch.stack(torch.broadcast_tensors(*self.biases), -1).contiguous()
        return found

    def random(self, *size: int) -> torch.Tensor:
        """In [0, 1), fp32."""
        return torch.rand(*size, generator=self.generator, device=self.device)

    def span(self) -> torch.Tensor:
        """Up to `SPAN` keys behind the first quarter, bool [1, 1, Tk]."""
        found = torch.zeros(1, 1, self.shape.keys, dtype=torch.bool, device=self.device)
        start = self.shape.keys // 4
        found[..., start : start + min(SPAN, max(1, self.shape.keys // 4))] = True
        return found

    def scattered(self) -> torch.Tensor:
        """`SCATTERED` keys of every head's own, among them the first, bool [1, H, Tk]."""
        places = self.random(self.shape.heads, min(SCATTERED, self.shape.keys // 2)) * self.shape.keys
        found = torch.zeros(1, self.shape.heads, self.shape.keys, dtype=torch.bool, device=self.device)
        found.scatter_(2, places.long()[None], True)
        found[..., 0] = True
        return found

    def add(self, feature: str) -> None:
        """Put in a feature: the name of a method below, without its underscore."""
        getattr(self, f"_{feature}")()

    def _term(self, keys: torch.Tensor, nats: torch.Tensor) -> None:
        self.terms.append(keys)
        self.biases.append(nats)

    def _first(self) -> None:
        first = torch.zeros(1, 1, self.shape.keys, dtype=torch.bool, device=self.device)
        first[..., 0] = True
        self._term(first, self.random(1, self.shape.heads, 1) * 2 - 1)

    def _static(self) -> None:
        self._term(self.span(), self.random(1, self.shape.heads, 1) * 2 - 1)

    def _gate(self) -> None:
        self._term(self.span(), torch.full((1, 1, 1), -math.inf, device=self.device))

    def _keep(self) -> None:
        self.group = self.scattered().int()
        self.more["law"] = Law.keep(self.random(1, self.shape.heads))

    def _reach(self) -> None:
        self.group = self.span().int()
        self.more["law"] = Law("reach", self.random(1, self.shape.heads) * 0.8)

    def _spotlight(self) -> None:
        self.group = self.span().int()
        self.more["law"] = Law("spotlight", self.random(1, self.shape.heads) * 0.8)

    def _transfer(self) -> None:
        columns = torch.arange(self.shape.keys, device=self.device)
        start = self.shape.keys // 2
        late = (columns >= start).int() * (columns < start + min(SPAN, self.shape.keys // 4)).int()
        self.group = torch.where(self.scattered(), 1, torch.where(self.span(), 2, late * 3))
        self.groups = 4
        self.more["law"] = Law("transfer", self.random(1, self.shape.heads, 4, 4).softmax(2))

    def _raw(self) -> None:
        self._static()
        self.more["law"] = Law("raw")

    def _rows(self) -> None:
        half = torch.arange(self.shape.rows, device=self.device) >= self.shape.rows // 2
        self.more["law"].rows = half[None].expand(self.shape.batch, -1)

    def _padding(self) -> None:
        pads = torch.arange(self.shape.batch, device=self.device) * 5
        self.hidden = (torch.arange(self.shape.keys, device=self.device) < pads[:, None])[:, None]

    def _window(self) -> None:
        self.more["window"] = max(2, self.shape.keys // 3 - 1)

    def _softcap(self) -> None:
        self.more["softcap"] = 5.0

    def _sinks(self) -> None:
        self.more["sinks"] = self.random(self.shape.heads) * 2

    def _offset(self) -> None:
        self.more["offset"] = max(0, self.shape.keys - self.shape.rows - 3)

    def _seen(self) -> torch.Tensor:
        seen = self.random(self.shape.batch, 1, self.shape.rows, self.shape.keys) > 0.3
        seen[..., 0] = True
        return seen

    def _boolean(self) -> None:
        self.more["mask"] = self._seen()

    def _additive(self) -> None:
        self.more["mask"] = torch.where(self._seen(), self.random(1, 1, 1, self.shape.keys) - 0.5, -math.inf)

    def _cut(self) -> None:
        kinds = torch.arange(self.shape.heads, device=self.device) % 3
        self.more["cut"] = kinds.to(torch.int8)[None, :, None]

    def _cut_rows(self) -> None:
        late = torch.arange(self.shape.rows, device=self.device) >= self.shape.rows // 2
        heads = torch.arange(self.shape.heads, device=self.device) % 2
        self.more["cut"] = torch.where(late, torch.where(heads == 0, UNIFORM, ZERO)[:, None], 0).to(torch.int8)[None]

    def _uniform(self) -> None:
        even = torch.arange(self.shape.heads, device=self.device) % 2 == 0
        self.more["cut"] = (even * UNIFORM).to(torch.int8)[None, :, None]

    def _stats(self) -> None:
        mass = ("mass",) if self.terms else ()
        before = ("lse_before",) if self.group is None else ()
        self.more["stats"] = ("lse", *before, "entropy", "argmax", *mass)

    def _capture(self) -> None:
        if not self.terms:
            self._term(self.span(), torch.zeros(1, 1, 1, device=self.device))
        self.more["stats"] = ("lse", "entropy", "argmax", "mass")

    def _lse(self) -> None:
        self.more |= {"stats": ("lse",), "output": False}


def edit(shape: Shape, features: Sequence[str], device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Arguments of `attention` for features by name, applied in order."""
    made = Edit(shape, device, torch.Generator(device).manual_seed(1000 + seed))
    for feature in features:
        made.add(feature)
    return made.arguments()
