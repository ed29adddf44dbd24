"""Which tile sizes and split counts are fastest here."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from steerlens.kernels import _configs
from steerlens.kernels import attention as kernels
from steerlens.kernels._configs import Config
from steerlens.kernels.benching import decode, prefill
from steerlens.kernels.benching.inputs import Shape, edit, qkv
from steerlens.kernels.benching.record import Task, Values
from steerlens.kernels.benching.timing import Timer, median

LENGTH = 8192
CASES = ("plain", "static span", "keep", "reach", "transfer of 4 groups", "statistics", "lse only")
SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)
DECODE = (
    Config(16, 64, 4, 3),
    Config(16, 128, 4, 3),
    Config(16, 64, 4, 4),
    Config(16, 128, 8, 2),
    Config(16, 32, 4, 4),
)


def tasks(timer: Timer, smoke: bool, importance: int) -> list[Task]:
    """A row per case, with the times of all its candidates."""
    shape = prefill.shapes(smoke)[0] if smoke else Shape(rows=LENGTH, keys=LENGTH)
    few = decode.shapes(smoke)
    found = []
    for case in (case for case in prefill.CASES if case.name in CASES[: 2 if smoke else None]):
        run = functools.partial(_prefill, timer, shape, case, smoke)
        found.append(Task("tune", f"prefill {case.name}", run, importance, 1.0 if smoke else 8.0))
    for one in few:
        where = f"B={one.batch} Tk={one.keys}"
        run = functools.partial(_splits, timer, one, SPLITS[:2] if smoke else SPLITS)
        found.append(Task("tune", f"decode splits {where}", run, importance, 1.0 if smoke else 6.0))
        if not smoke:
            run = functools.partial(_decode, timer, one)
            found.append(Task("tune", f"decode tiles {where}", run, importance, 6.0))
    return found


def sizes(config: Config) -> Values:
    """A configuration without where it comes from."""
    return {name: value for name, value in asdict(config).items() if name != "chosen_on"}


def candidates(chosen: Config, among: Iterable[Config]) -> list[Config]:
    """The chosen one first, then the others."""
    key = sizes(chosen)
    return [chosen, *(config for config in among if sizes(config) != key)]


def chosen(shape: Shape, case: prefill.Case, device: torch.device) -> Config:
    """What prefill takes for a case now."""
    asked = edit(shape, case.features, device)
    labels = asked.get("labels")
    return _configs.prefill(
        max(shape.dim, shape.value_dim), shape.dtype, getattr(labels, "groups", 1), labels=labels is not None,
        stats=bool(asked.get("stats")), output=asked.get("output", True),
    )  # fmt: skip


def launch(shape: Shape, case: prefill.Case, config: Config, device: torch.device) -> None:
    """A candidate's launches on hollow inputs: for compiling."""
    with mock.patch.object(_configs, "prefill", lambda *_, **__: config):
        kernels.attention(*qkv(shape, device, hollow=True), **edit(shape, case.features, device))


def _prefill(timer: Timer, shape: Shape, case: prefill.Case, smoke: bool) -> Values:
    inputs, now = prefill.inputs(shape, timer.device), chosen(shape, case, timer.device)
    among = () if smoke else _configs.CANDIDATES
    times = []
    for config in candidates(now, among):
        arguments = edit(shape, case.features, timer.device)
        with mock.patch.object(_configs, "prefill", lambda *_, config=config, **__: config):
            times.append(sizes(config) | _timed(timer, prefill.ours(inputs, arguments, index=False)))
    return _summary(times) | shape.describe()


def _decode(timer: Timer, shape: Shape) -> Values:
    inputs, case = decode.inputs(shape, timer.device), decode.CASES[1]
    arguments = edit(shape, case.features, timer.device)
    now = _configs.decode(shape.dim, shape.dtype, 16, 1)
    times = []
    for config in candidates(now, DECODE):
        with mock.patch.object(_configs, "decode", lambda *_, config=config, **__: config):
            times.append(sizes(config) | _timed(timer, prefill.ours(inputs, arguments, index=False)))
    return _summary(times) | shape.describe()


def _splits(timer: Timer, shape: Shape, counts: Iterable[int]) -> Values:
    inputs, case = decode.inputs(shape, timer.device), decode.CASES[1]
    arguments = edit(shape, case.features, timer.device)
    times: list[Values] = []
    with mock.patch.object(kernels, "split_count", wraps=kernels.split_count) as asked:
        call = prefill.ours(inputs, arguments, index=False)
        call()
    now = kernels.split_count(*asked.call_args.args)
    for count in (now, *(count for count in counts if count != now)):
        with mock.patch.object(kernels, "split_count", lambda *_, count=count: count):
            times.append({"splits": count} | _timed(timer, call))
    return _summary(times) | shape.describe()


def _timed(timer: Timer, call: Any) -> Values:
    try:
        return timer.times({"": call})[""]
    except Exception as error:
        if timer.cuda:
            # Raises in turn if the device is lost, and ends the row.
            torch.cuda.synchronize()
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def _summary(times: list[Values]) -> Values:
    timed = [one for one in times if "ms" in one]
    if not timed:
        raise RuntimeError(f"no candidate ran: {times[0]['error']}")
    best = min(timed, key=median)
    named = {name: value for name, value in best.items() if name not in ("ms", "timed")}
    over = median(times[0]) / median(best) if "ms" in times[0] else None
    return {"fastest": named, "chosen_over_fastest": over, "candidates": times}
