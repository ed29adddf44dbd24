"""What a record says of where its numbers come from."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from steerlens import __version__

PACKAGES = ("torch", "transformers", "triton", "pastalib")


def describe(device: str) -> dict[str, Any]:
    """Date, device, versions and commit of this run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {
            "type": torch.device(device).type,
            "name": _device_name(device),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
        },
        "threads": torch.get_num_threads(),
        "load": load(),
        "versions": {"steerlens": __version__, "python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "git": _git(),
    }


def version(package: str) -> str | None:
    """Installed version of a package, or `None`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def free_memory(device: str) -> int | None:
    """Bytes that can still be taken, or `None` where that is not known."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _cpu()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def load() -> list[float] | None:
    """Load averages over 1, 5 and 15 minutes: who else uses the machine."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _git() -> dict[str, Any]:
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # A wheel may be installed inside somebody else's repository; only a checkout of ours counts.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
