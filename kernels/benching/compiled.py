"""Every launch of the bench, compiled without a GPU, in parallel: registers, spills, shared memory; a warm cache."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import asdict
from unittest import mock

import torch
from steerlens.kernels import _configs, offline
from steerlens.kernels import attention as kernels
from steerlens.kernels.benching import checks, decode, prefill, tune
from steerlens.kernels.benching.inputs import Shape
from steerlens.kernels.benching.record import Failed, NotRunnable, Task, Values

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a program may take on sm_90."""
PROCESSORS = 132
SMALL = ("count_kernel", "fill_kernel")
CPU = torch.device("cpu")


def launches() -> dict[str, Callable[[], None]]:
    """By name: what the checks, the timed rows and the tuning launch; what mostly compiles to the same comes last."""
    found: dict[str, Callable[[], None]] = {}
    first, *others = prefill.shapes(smoke=False)
    small, *caches = decode.shapes(smoke=False)
    _prefill(found, first)
    _decode(found, small)
    for check in checks.grid(smoke=False):
        found[f"check {check.name}"] = functools.partial(checks.launch, check, CPU)
    shape = Shape(rows=tune.LENGTH, keys=tune.LENGTH)
    for case in prefill.CASES:
        for config in _configs.CANDIDATES if case.name in tune.CASES else ():
            sizes = " ".join(f"{name}={value}" for name, value in tune.sizes(config).items())
            found[f"tune {case.name} {sizes}"] = functools.partial(tune.launch, shape, case, config, CPU)
    for shape in caches:
        _decode(found, shape)
    for shape in others:
        _prefill(found, shape)
    return found


def _prefill(found: dict[str, Callable[[], None]], shape: Shape) -> None:
    for case in prefill.CASES:
        if not case.index:
            found[f"prefill {case.name} T={shape.rows}"] = functools.partial(prefill.launch, shape, case, CPU)
    found[f"column sums T={shape.rows}"] = functools.partial(prefill.launch_column_sums, shape, CPU)


def _decode(found: dict[str, Callable[[], None]], shape: Shape) -> None:
    for case in decode.CASES:
        name = f"decode {case.name} B={shape.batch} Tk={shape.keys}"
        found[name] = functools.partial(decode.launch, shape, case, CPU)


def compile_one(name: str, capability: int) -> list[Values]:
    """The kernels of one launch; an error is told, not raised."""
    try:
        with offline.compiled(capability) as found, mock.patch.object(kernels, "processors", lambda _: PROCESSORS):
            launches()[name]()
    except Exception as error:
        return [{"launch": name, "error": f"{type(error).__name__}: {str(error)[:500]}"}]
    rows = [{"launch": name} | asdict(kernel) for kernel in found if kernel.name not in SMALL]
    return [{key: value for key, value in row.items() if key != "code"} for row in rows]


def compile_all(capability: int, jobs: int, only: str = "") -> list[Values]:
    """All launches whose names hold `only`, in as many processes."""
    return compile_names([name for name in launches() if only in name], capability, jobs)


def compile_names(names: list[str], capability: int, jobs: int) -> list[Values]:
    """These launches, in as many processes."""
    one = functools.partial(compile_one, capability=capability)
    if jobs == 1:
        return [row for name in names for row in one(name)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, initializer=_blind) as pool:
        return [row for rows in pool.map(one, names) for row in rows]


def _blind() -> None:
    """A compiling process needs no device and must not hold one's memory."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


def wrong(rows: list[Values]) -> list[str]:
    """What did not compile or does not fit; a tuning candidate may."""
    found = [f"{row['launch']}: {row['error']}" for row in rows if "error" in row]
    big = [row for row in rows if row.get("shared", 0) > SHARED_LIMIT and not row["launch"].startswith("tune ")]
    return found + [f"{row['launch']}: {row['shared']} bytes of shared memory, at most {SHARED_LIMIT}" for row in big]


def _timed(rows: list[Values]) -> list[Values]:
    """The kernels of timed rows, each once for all lengths that compile to the same."""
    found: dict[tuple, Values] = {}
    for row in rows:
        if "error" not in row and not row["launch"].startswith(("check ", "tune ")):
            name = row["launch"].split(" T=")[0].split(" B=")[0]
            found.setdefault((name, *list(row.values())[1:]), row | {"launch": name})
    return list(found.values())


def tasks(device: torch.device, jobs: int, tuned: bool = True) -> list[Task]:
    """One row with all kernels, those of tuning if `tuned`; it fills the cache that the others compile into."""

    def run() -> Values:
        if device.type != "cuda":
            raise NotRunnable("interpreted: nothing to compile")
        major, minor = torch.cuda.get_device_capability(device)
        names = [name for name in launches() if tuned or not name.startswith("tune ")]
        rows = compile_names(names, 10 * major + minor, jobs)
        values = {"capability": 10 * major + minor, "jobs": jobs, "launches": len(rows), "kernels": _timed(rows)}
        if found := wrong(rows):
            raise Failed("; ".join(found)[:2000], **values)
        return values

    return [Task("compiled", "kernels", run, 0, 20.0)]
