"""Block sizes, warps and stages by device class and head dim: a table, so that nothing is searched on first use.

An entry is named for what it was chosen on: that device's record has it as the fastest candidate. `static` entries were
chosen by compiling, without a GPU, and reading off the machine code: instructions per logit, registers, spills, shared
memory, and whether keys and values are in flight while a tile is computed (fewer than 3 stages wait for what they have
just asked for). No timing stands behind them.
`python -m steerlens.kernels.bench --tune` measures the candidates below and says which is fastest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from steerlens.kernels._launch import interpreted
from triton.runtime.driver import driver


@dataclass(frozen=True)
class Config:
    """Rows and keys of a tile, warps, pipeline stages, keys of a gathered tile, and where the choice comes from."""

    rows: int
    keys: int
    warps: int
    stages: int
    gathered: int = 64
    chosen_on: str = "static"


INTERPRETER = Config(16, 16, 1, 1, 16, "interpreter")
CANDIDATES = (
    Config(128, 128, 8, 3), Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(128, 64, 8, 4), Config(64, 128, 4, 3),
    Config(64, 64, 4, 3), Config(128, 64, 4, 3), Config(128, 32, 8, 4),
)  # fmt: skip

# (up to this head dim, up to so many groups): the first that holds is taken.
_HOPPER = {
    (64, 2): Config(128, 128, 8, 3),
    (64, 4): Config(128, 64, 8, 3, 32),
    (128, 2): Config(128, 128, 8, 3),
    (128, 3): Config(128, 64, 8, 3, 32),
    (128, 4): Config(128, 128, 8, 3, 64, "NVIDIA H100 80GB HBM3"),
    (192, 2): Config(128, 64, 8, 3, 32),
    (192, 4): Config(64, 64, 8, 3, 32),
    (256, 1): Config(128, 32, 8, 3, 32),
    (256, 2): Config(64, 64, 8, 3, 32),
    (256, 4): Config(32, 32, 8, 3, 32),
}
_OTHERS = {
    (128, 2): Config(128, 64, 8, 3, 32),
    (128, 4): Config(64, 32, 8, 3, 32),
    (256, 2): Config(64, 32, 8, 2, 32),
    (256, 4): Config(32, 32, 8, 2, 32),
}
# At head dim 128, up to two groups: what is wanted decides. With labels two programs share a processor.
_H100 = {
    "plain": Config(128, 128, 8, 3, 64, "NVIDIA H100 80GB HBM3"),
    "labels": Config(64, 64, 4, 3, 64, "NVIDIA H100 80GB HBM3"),
    "statistics": Config(128, 128, 8, 3, 64, "NVIDIA H100 80GB HBM3"),
    "no output": Config(128, 64, 8, 4, 64, "NVIDIA H100 80GB HBM3"),
}
# A tile of an additive mask is in shared memory too, as often as there are stages.
_MASKED = {(128, 4): Config(64, 32, 8, 2, 32), (256, 4): Config(32, 32, 8, 2, 32)}
# fp32: products are IEEE, and no tensor core has those.
_FP32 = {
    (128, 2): Config(32, 32, 4, 3, 32),
    (128, 4): Config(32, 32, 8, 3, 16),
    (256, 4): Config(16, 32, 4, 2, 16),
}


def hopper() -> bool:
    """Whether kernels compile for a GPU with wgmma and 227 KiB of shared memory a program; others may have 99 KiB."""
    return driver.active.get_current_target().arch == 90


def prefill(
    dim: int, dtype: torch.dtype, groups: int, *, masked: bool = False, labels: bool = False, stats: bool = False,
    output: bool = True,
) -> Config:  # fmt: skip
    """For the prefill kernel.

    Args:
        dim: the larger of D and Dv.
        dtype: of the query.
        groups: G.
        masked: whether it reads a 4-D mask.
        labels: whether keys have labels.
        stats: whether statistics are wanted.
        output: whether attention itself is.
    """
    if interpreted():
        return INTERPRETER
    table = _HOPPER if hopper() else _OTHERS
    if dtype == torch.float32 or masked:
        table = _FP32 if dtype == torch.float32 else _MASKED
    elif table is _HOPPER and dim == 128 and groups <= 2:
        return _H100["statistics" if stats and output else "no output" if stats else "labels" if labels else "plain"]
    return next(config for (most, many), config in table.items() if dim <= most and groups <= many)


def decode(dim: int, dtype: torch.dtype, rows: int, groups: int) -> Config:
    """For split-KV decode of `rows` packed rows (a power of two from 16)."""
    if interpreted():
        return Config(rows, 16, 1, 1, 16, "interpreter")
    warps = 4 if rows <= 32 else 8
    if dtype == torch.float32:
        if dim <= 128 and rows <= 32:
            return Config(rows, 32, warps, 3)
        return Config(rows, 16, warps, 1 if dim > 128 and rows > 32 else 2)
    if dim > 128:
        return Config(rows, 32, warps, 3 if rows <= 32 else 2)
    return Config(rows, 32 if groups > 2 else 64, warps, 3)


def columns(dim: int, dtype: torch.dtype) -> Config:
    """For column sums: `keys` of a program, `rows` per step."""
    if interpreted():
        return INTERPRETER
    if dtype == torch.float32:
        return Config(32, 32, 4, 3) if dim <= 128 else Config(16, 32, 4, 2)
    return Config(64, 128, 8, 3) if dim <= 128 else Config(32, 64, 4, 3)
