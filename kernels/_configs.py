"""Block sizes, warps and stages by device class and head dim: a table, so that nothing is searched on first use.

An entry is named for what it was chosen on. `static` entries were chosen by compiling for sm_90 and reading registers,
spills and shared memory off the result, without a GPU: no timing stands behind them. `python -m steerlens.kernels.bench
--tune` measures the candidates below and says which is fastest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from steerlens.kernels._launch import interpreted


@dataclass(frozen=True)
class Config:
    """Rows and keys of a tile, warps, pipeline stages, and where the choice comes from."""

    rows: int
    keys: int
    warps: int
    stages: int
    gathered: int = 64
    chosen_on: str = "static"


INTERPRETER = Config(16, 16, 1, 1, 16, "interpreter")
CANDIDATES = (
    Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(128, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 128, 4, 2),
    Config(128, 32, 4, 4),
)  # fmt: skip


def prefill(dim: int, dtype: torch.dtype, groups: int) -> Config:
    """For the prefill kernels; `dim` is the larger of D and Dv."""
    if interpreted():
        return INTERPRETER
    if dtype == torch.float32:
        return Config(32, 32, 4, 2) if dim <= 128 else Config(16, 32, 4, 2)
    if groups > 2:
        return Config(64, 64, 8, 2) if dim <= 128 else Config(64, 32, 8, 2)
    if dim > 128:
        return Config(128, 64, 8, 2) if groups == 1 else Config(64, 32, 8, 2)
    return Config(128, 64, 8, 3)


def decode(dim: int, dtype: torch.dtype, rows: int, groups: int) -> Config:
    """For split-KV decode of `rows` packed rows (a power of two from 16)."""
    if interpreted():
        return Config(rows, 16, 1, 1, 16, "interpreter")
    if dtype == torch.float32 or dim > 128 or groups > 2:
        return Config(rows, 32, 4, 2)
    return Config(rows, 64, 4, 3)


def columns(dim: int, dtype: torch.dtype) -> Config:
    """For column sums: `keys` of a program, `rows` per step."""
    if interpreted():
        return INTERPRETER
    if dtype == torch.float32 or dim > 128:
        return Config(32, 64, 4, 2)
    return Config(64, 128, 8, 3)
