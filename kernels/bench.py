"""Check and time the kernels on a GPU in one call, and write a record: `python -m steerlens.kernels.bench`.

In this order of importance, within `--budget` seconds: all kernels compile in parallel; they are checked against the
definition; copy and matrix product rates are measured; prefill and decode are timed beside SDPA, FlexAttention and
others, a model of 8B's shape steered and unsteered; with time left, tile sizes are tuned. The record is on disk after
every row; an exception is a row; a device that is lost, or a row that does not return, starts the process anew on the
rows that are left.

Exit status: 0; 1 if a check failed or a row ended in an error; 2 for wrong usage. A missed bound is no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from steerlens.kernels.benching.record import Record, Task

RECORDS = Path(__file__).resolve().parent / "records"
CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.smoke:
        if options.output is None or RECORDS in options.output.resolve().parents:
            parser.error("--smoke is no measurement: it needs an --output outside kernels/records")
        os.environ["TRITON_INTERPRET"] = "1"
    from steerlens.kernels.benching.record import SECTIONS

    only = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := [name for name in only if name not in SECTIONS]:
        parser.error(f"--only: no section {', '.join(unknown)}; sections: {', '.join(SECTIONS)}")
    if options.compile_only:
        return _compile(options)
    import torch

    if not options.smoke and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --compile-only and --smoke do not")
    device = torch.device("cpu" if options.smoke else "cuda")
    if options.smoke:
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    path = options.output or RECORDS / f"{_slug(torch.cuda.get_device_name(device))}.json"
    return _run(options, arguments, only, device, path)


def _parser() -> argparse.ArgumentParser:
    from steerlens.kernels.benching.record import SECTIONS

    parser = argparse.ArgumentParser(prog="python -m steerlens.kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="the record; default kernels/records/<device>.json")
    parser.add_argument("--budget", type=float, default=440, help="seconds; rows that do not fit are skipped by name")
    parser.add_argument("--only", help=f"sections, by commas: {','.join(SECTIONS)}")
    parser.add_argument("--tune", action="store_true", help="tuning before the model rows, not after everything")
    parser.add_argument("--commit", help="of the code, where there is no git: HASH, or HASH-dirty")
    parser.add_argument("--jobs", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 1)), help="compilers")
    parser.add_argument("--resume", action="store_true", help="keep the record's rows, run those that are missing")
    parser.add_argument("--patience", type=float, default=120, help="seconds over its own that a row may take")
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU in Triton's interpreter: no measurement")
    parser.add_argument("--compile-only", action="store_true", help="compile all launches without a GPU; no record")
    parser.add_argument("--capability", type=int, default=90, help="of --compile-only")
    parser.add_argument("--match", default="", help="of --compile-only: part of a launch's name")
    return parser


def _compile(options: argparse.Namespace) -> int:
    from steerlens.kernels.benching import compiled, report

    rows = compiled.compile_all(options.capability, options.jobs, options.match)
    report.kernels(rows)
    found = compiled.wrong(rows)
    for line in found:
        report.progress(line)
    return int(bool(found))


def _run(options: argparse.Namespace, arguments: list[str], only: list[str], device: torch.device, path: Path) -> int:
    from steerlens.kernels.benching import report
    from steerlens.kernels.benching.record import Record, execute

    started = options.since or time.time()
    head = _head(options, only, device)
    if options.resume and path.exists():
        record = Record.resume(path)
        if (before := record.head["machine"].get("git")) != head["machine"].get("git"):
            report.progress(f"--resume: {path} is of another commit: {before}")
            return 2
        if not options.since:
            record.rows = [row for row in record.rows if not row.get("reason", "").startswith("budget")]
    else:
        record = Record(path, head)

    def announce(row: dict[str, Any]) -> None:
        report.progress(report.line(row, len(record.rows), len(plan), time.time() - started))
        if device.type == "cuda" and len({other["section"] for other in record.rows[-2:]}) == 2:
            record.head["clocks"].append({"after": row["name"]} | _clocks())

    def broken() -> bool:
        if device.type != "cuda":
            return False
        import torch

        try:
            torch.cuda.synchronize()
            return not bool(torch.ones(1, device=device).item() == 1)
        except Exception:
            return True

    plan = tasks(device, record, options, only)

    def restart(why: str) -> None:
        report.progress(f"{why}; the remaining rows run in a new process")
        again = [*(word for word in arguments if word != "--resume"), "--resume", f"--since={started}"]
        os.closerange(3, 1024)  # whatever holds the device
        os.execv(sys.executable, [sys.executable, "-m", "steerlens.kernels.bench", *again])

    @contextlib.contextmanager
    def watch(task: Task) -> Iterator[None]:
        timer = threading.Timer(options.patience + task.seconds, restart, [f"{task.name} does not return"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    if not execute(plan, record, options.budget, lambda: time.time() - started, announce, broken, watch):
        restart("the device is lost to this process")
    record.head["run_seconds"] = round(time.time() - started, 1)
    if device.type == "cuda":
        record.head["clocks"].append({"after": "all"} | _clocks())
    record.write()
    report.tables(record)
    return record.exit_status


def tasks(device: torch.device, record: Record, options: argparse.Namespace, only: list[str]) -> list[Task]:
    """The plan: rows of the sections asked for. A section that cannot even be planned is an error row."""
    from steerlens.kernels.benching.record import Task
    from steerlens.kernels.benching.timing import Timer, floors

    timer = Timer(device, seconds=0.05 if options.smoke else 0.6, most=3 if options.smoke else 60)

    def section(name: str) -> list[Task]:
        from steerlens.kernels.benching import checks, compiled, decode, model, prefill, tune

        if name == "compiled":
            return compiled.tasks(device, options.jobs, "tune" in only)
        if name == "checks":
            return checks.tasks(device, options.smoke)
        if name == "floors":
            return floors(timer, options.smoke)
        if name == "prefill":
            return prefill.tasks(timer, record, options.smoke)
        if name == "decode":
            return decode.tasks(timer, record, options.smoke)
        if name == "model":
            return model.tasks(device, options.smoke)
        return tune.tasks(timer, options.smoke, 1 if options.tune else 4)

    def failing(error: Exception) -> Any:
        def run() -> dict[str, Any]:
            raise error

        return run

    plan: list[Task] = []
    order = [name for name in only if name != "tune"]
    if "tune" in only:
        order.insert(order.index("model") if options.tune and "model" in order else len(order), "tune")
    for name in order:
        try:
            plan += section(name)
        except Exception as error:
            plan.append(Task(name, "plan", failing(error), 0))
    return plan


def _head(options: argparse.Namespace, only: list[str], device: torch.device) -> dict[str, Any]:
    import torch

    try:
        from steerlens.bench import machine

        found = machine.describe(str(device))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}", "versions": {"torch": torch.__version__}}
    if options.commit:
        found["git"] = {"commit": options.commit.removesuffix("-dirty"), "dirty": options.commit.endswith("-dirty")}
    head = {"smoke": options.smoke, "machine": found, "settings": {"budget": options.budget, "sections": only}}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": getattr(properties, "L2_cache_size", None),
            "driver": _smi("driver_version").get("driver_version"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        head["clocks"] = [{"after": "start"} | _clocks()]
    return head


def _clocks() -> dict[str, str]:
    return _smi(CLOCKS)


def _smi(fields: str) -> dict[str, str]:
    """Fields of nvidia-smi, as far as it answers."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), (part.strip() for part in text.splitlines()[0].split(",")), strict=False))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
