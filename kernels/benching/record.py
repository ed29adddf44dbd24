"""Rows, the record that keeps them on disk from the first row on, and the plan that runs them within a time budget."""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
SECTIONS = ("compiled", "checks", "floors", "prefill", "decode", "model", "tune")
Values = dict[str, Any]


class Failed(Exception):
    """A check that ran and found a wrong result, with what it measured."""

    def __init__(self, reason: str, **values: Any) -> None:
        super().__init__(reason)
        self.values = values


class NotRunnable(Exception):
    """Why a row cannot run here: no CUDA, no room."""


@dataclass(frozen=True)
class Task:
    """One row to come.

    Attributes:
        section: among `SECTIONS`.
        name: of the row, unique in its section.
        run: gives the row's values; raises `Failed` or `NotRunnable`, or anything else, which is an error.
        importance: 0 runs first; what runs last is what a spent budget skips.
        seconds: about how long it takes; it starts only if so much is left.
    """

    section: str
    name: str
    run: Callable[[], Values]
    importance: int = 1
    seconds: float = 3.0


@dataclass
class Record:
    """What is written to `path`; every change of it goes to disk at once, in one move.

    Attributes:
        head: where the numbers come from: device, versions, commit, settings.
        rows: each with `section`, `name`, `status` (ok, failed, error, skipped), `seconds`, `reason` unless ok, and
            the values that were measured.
        running: section and name of the row that runs now.
        complete: whether the plan came to its end.
    """

    path: Path
    head: Values
    rows: list[Values] = field(default_factory=list)
    running: list[str] | None = None
    complete: bool = False

    @classmethod
    def resume(cls, path: Path) -> Record:
        """The record at a path; a row that was running when it ended is an error of its own."""
        found = json.loads(path.read_text(encoding="utf-8"))
        rows, running = found.pop("rows"), found.pop("running", None)
        for name in ("schema", "complete", "green", "exit_status"):
            found.pop(name, None)
        record = cls(path, found, rows)
        if running:
            record.add(*running, status="error", seconds=None, reason="the process ended while this row ran")
        return record

    def add(self, section: str, name: str, *, status: str, **values: Any) -> Values:
        """Append a row and write."""
        row = plain({"section": section, "name": name, "status": status} | values)
        self.rows.append(row)
        self.running = None
        self.write()
        return row

    def done(self, task: Task) -> bool:
        """Whether the row of a task is there."""
        return any((row["section"], row["name"]) == (task.section, task.name) for row in self.rows)

    def of(self, section: str) -> list[Values]:
        """The rows of a section."""
        return [row for row in self.rows if row["section"] == section]

    def gate(self, kernel: str) -> str:
        """`green` if every check of a kernel passed, `red` if one did not, `unchecked` without any."""
        seen = [
            row["status"] for row in self.of("checks") if row.get("kernel") == kernel and row["status"] != "skipped"
        ]
        if not seen:
            return "unchecked"
        return "green" if all(status == "ok" for status in seen) else "red"

    def rate(self, name: str) -> float | None:
        """A measured ceiling, per second."""
        return next(
            (row["per_second"] for row in self.of("floors") if row["name"] == name and "per_second" in row), None
        )

    @property
    def exit_status(self) -> int:
        """1 if a check failed or a row ended in an error."""
        return int(any(row["status"] in ("failed", "error") for row in self.rows))

    def write(self) -> None:
        """Put the record in place of what `path` has."""
        found = {"schema": SCHEMA} | self.head | {
            "complete": self.complete,
            "green": bool(self.of("checks")) and all(row["status"] in ("ok", "skipped") for row in self.of("checks")),
            "exit_status": self.exit_status,
            "running": self.running,
            "rows": self.rows,
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(_text(plain(found)), encoding="utf-8")
        beside.replace(self.path)


def execute(
    tasks: Iterable[Task],
    record: Record,
    budget: float,
    elapsed: Callable[[], float],
    announce: Callable[[Values], None],
    broken: Callable[[], bool] = lambda: False,
    watch: Callable[[Task], AbstractContextManager[object]] = lambda task: nullcontext(),
) -> bool:
    """Run what is not in the record yet, the most important first.

    Args:
        tasks: the plan; among equals, its order holds.
        record: takes the rows.
        budget: seconds; a row that would end later is skipped by name.
        elapsed: seconds so far.
        announce: is given each row.
        broken: asked after an error, whether the device is lost to this process.
        watch: is around each row.

    Returns:
        Whether the plan came to its end; not if the device was lost.
    """
    for task in sorted(tasks, key=lambda task: task.importance):
        if record.done(task):
            continue
        start = elapsed()
        if start + task.seconds > budget:
            why = f"budget: {start:.0f} of {budget:.0f} s are spent and the row takes about {task.seconds:.0f} s"
            announce(record.add(task.section, task.name, status="skipped", reason=why))
            continue
        record.running = [task.section, task.name]
        record.write()
        with watch(task):
            values, lost = _guarded(task), False
        if values["status"] == "error":
            lost = broken()
        values["seconds"] = round(elapsed() - start, 2)
        announce(record.add(task.section, task.name, **values))
        if lost:
            return False
    record.complete = True
    record.write()
    return True


def _guarded(task: Task) -> Values:
    try:
        return {"status": "ok"} | task.run()
    except NotRunnable as why:
        return {"status": "skipped", "reason": str(why)}
    except Failed as why:
        return {"status": "failed", "reason": str(why)} | why.values
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}"
        return {"status": "error", "reason": reason[:2000], "at": f"{Path(place.filename).name}:{place.lineno}"}


def plain(value: Any) -> Any:
    """JSON types; floats to six digits, and by name where they are not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _text(found: Values) -> str:
    """JSON with a line for each row."""
    rows = found.pop("rows")
    head = json.dumps(found, indent=1, allow_nan=False).removesuffix("\n}")
    return head + ',\n "rows": [\n  ' + ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows) + "\n ]\n}\n"
