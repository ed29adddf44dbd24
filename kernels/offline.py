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
from dataclasses import dataclass, field
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
        code: the machine code.
    """

    name: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    matrix: int
    code: bytes = field(repr=False)

    def loops(self) -> list[Loop]:
        """The innermost loops that multiply matrices, in the order of the machine code."""
        return _loops(_dump(self.code, "--dump-sass"))


@dataclass
class Loop:
    """One loop: instructions, matrix instructions and accesses to spilled registers per iteration."""

    instructions: int
    matrix: int
    spills: int


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
    code, meta = kernel.asm["cubin"], kernel.metadata
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", _dump(code, "--dump-resource-usage"))}
    matrix = len(re.findall(r"wgmma\.mma_async|mma\.sync", kernel.asm["ptx"]))
    return Compiled(meta.name, meta.num_warps, meta.num_stages, usage["REG"], usage["STACK"], meta.shared, matrix, code)


def _dump(code: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [_TOOLS / "cuobjdump", what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _loops(sass: str) -> list[Loop]:
    listing = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    spans: list[tuple[int, int]] = []
    for at, text in listing:
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < at:
            spans.append((int(back[1], 16), at))
    found = []
    for start, stop in spans:
        if any(start <= a and b <= stop for a, b in spans if (a, b) != (start, stop)):
            continue
        body = [text for at, text in listing if start <= at <= stop]
        matrix = sum("HGMMA" in text or "HMMA" in text for text in body)
        if matrix:
            found.append(Loop(len(body), matrix, sum("LDL" in text or "STL" in text for text in body)))
    return found
