"""Compile the kernels for a GPU that is not there, and read what the compiler made of them.

`compiled(capability)` makes every launch of a Triton kernel a compilation for that NVIDIA architecture; nothing runs,
and outputs stay unwritten. Registers, spills and shared memory are read off the machine code; time cannot be.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Compiled:
    """A kernel as compiled.

    Attributes:
        registers: per thread; spilled: bytes of stack per thread; shared: bytes of shared memory per program.
        matrix: matrix instructions in the machine code's source (wgmma, or mma before sm_90).
    """

    name: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    matrix: int


class _Absent:
    """A driver that knows its target and has no device."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: one device for each architecture
        return int(self.target.arch)

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextmanager
def compiled(capability: int = 90) -> Iterator[list[Compiled]]:
    """Compile instead of launching; the list fills with every kernel launched inside.

    Raises:
        RuntimeError: if Triton interprets its kernels: TRITON_INTERPRET must not be set.
    """
    from steerlens.kernels import _launch

    if _launch.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set, so there is nothing to compile: unset it before importing triton")
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append(_read(kernel))
        return kernel

    # Whichever driver is active is put back, and none is looked for.
    before, driver._active = driver._active, _Absent(capability)
    try:
        with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(_launch, "check_device"):
            yield found
    finally:
        driver._active = before


def _read(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = kernel.asm["ptx"]
    matrix = len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx))
    meta = kernel.metadata
    return Compiled(meta.name, meta.num_warps, meta.num_stages, usage["REG"], usage["STACK"], meta.shared, matrix)
