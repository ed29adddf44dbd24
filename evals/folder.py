"""The folder of a job: who may write into it, what is done, and rows that survive any end of a process.

job.json, plan.json           what is run; the same for every worker
work/worker-0-of-4.jsonl      samples of one worker as they come: a line each, and a line {"end": …} per batch
work/worker-0-of-4.lock       held while that worker runs
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from steerlens.evals.job import Job, JobError
from steerlens.evals.plan import Plan

from steerlens import files

_WORKER = re.compile(r"worker-(\d+)-of-(\d+)\.jsonl\Z")
_END = b'{"end": '
_WAY_OUT = "remove this file, and --resume runs its batches again"
_NO_RESULT = ("fingerprint", "output", "name", "published")
"""Keys of a job that no sample depends on."""


class FolderError(JobError):
    """A folder of another job or another worker, or one with a broken file."""


@dataclass(frozen=True)
class Worker:
    """One process of a job: it runs every `count`-th batch from `index` on.

    Attributes:
        local: its number on this machine, which chooses its GPU; None where it is alone.
    """

    index: int = 0
    count: int = 1
    local: int | None = None

    @classmethod
    def of(cls, shard: str | None, environment: Mapping[str, str]) -> Worker:
        """The worker that `--shard i/n` and the launcher's environment make this process.

        Args:
            shard: "i/n" with i from 0 to n-1; None for all.
            environment: with RANK, WORLD_SIZE and LOCAL_RANK under `accelerate launch` and torchrun.

        Raises:
            JobError: for another text.
        """
        index, shards = 0, 1
        if shard is not None:
            found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
            index, shards = (int(found[1]), int(found[2])) if found else (0, 0)
            if index >= shards:
                last = f"; {shard.split('/')[1]} shards are 0/{shards} to {shards - 1}/{shards}" if shards else ""
                raise JobError(f"--shard {shard!r} is not i/n with i from 0 to n-1{last}")
        rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
        local = int(environment["LOCAL_RANK"]) if "LOCAL_RANK" in environment else None
        return cls(index * world + rank, shards * world, local)

    @property
    def name(self) -> str:
        return f"worker-{self.index}-of-{self.count}"


@dataclass(frozen=True)
class End:
    """The end of a batch in a worker's file.

    Attributes:
        batch: its id.
        rows: samples before it that belong to it.
        errors: samples among them that failed.
        seconds: it took.
        extra: what else belongs to it, such as results of lm-eval.
        path, start, stop: where its rows lie, in bytes.
    """

    batch: int
    rows: int
    errors: int
    seconds: float
    extra: Mapping[str, Any]
    path: Path
    start: int
    stop: int


class Folder:
    """A job's folder, entered by one worker: `with Folder(path).enter(…) as folder`.

    Attributes:
        plan: the frozen plan.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / "work"
        self.plan: Plan
        self._lock: FileLock | None = None
        self._handle: int | None = None
        self._file: Path | None = None

    # --- entering ----------------------------------------------------------------------------------------------------

    def check(self, job: Job, worker: Worker, resume: bool) -> None:
        """Raise `FolderError` if this job may not go on here; reads only."""
        if self.path.exists() and not self.path.is_dir():
            raise FolderError(f"--output {self.path} is a file; name a folder")
        if not self.planned:
            # a process that was killed before it wrote job.json may have left these
            own = (self.work.name, "plan.json")
            inside = [p.name for p in self.path.iterdir() if p.name not in own] if self.path.is_dir() else []
            inside = [name for name in inside if not name.startswith(".")]
            if inside:
                raise FolderError(
                    f"--output {self.path} holds {', '.join(sorted(inside)[:3])} and no job.json, so it is "
                    "no folder of a job; name another"
                )
            parent = next(p for p in (self.path, *self.path.absolute().parents) if p.is_dir())
            if not os.access(parent, os.W_OK):
                raise FolderError(f"--output {self.path}: nothing can be written in {parent}; give another folder")
            return
        self._compare(job)
        if resume:
            return
        existing = [_worker_of(path) for path in self._files()]
        if worker.index in [index for index, _ in existing] or any(count != worker.count for _, count in existing):
            raise FolderError(
                f"--output {self.path} exists and is of this job; go on with it by --resume, or name another folder"
            )

    @property
    def planned(self) -> bool:
        """Whether a job has been begun here."""
        return (self.path / "job.json").exists()

    def _compare(self, job: Job) -> None:
        wanted, found = json.loads(json.dumps(job.compared())), _read_json(self.path / "job.json")
        keys = [*wanted, *(key for key in found if key not in wanted)]
        changed = [key for key in keys if key not in _NO_RESULT and wanted.get(key) != found.get(key)]
        if changed:
            detail = "; ".join(_difference(key, found.get(key), wanted.get(key)) for key in changed)
            raise FolderError(f"--output {self.path} belongs to another job: {detail}; name another folder")

    def read_plan(self) -> Plan:
        """The plan that lies there."""
        path = self.path / "plan.json"
        try:
            return Plan.from_dict(_read_json(path))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, FolderError):
                raise
            raise FolderError(f"{path} is no plan of a job ({error!r}); name another --output") from None

    @contextlib.contextmanager
    def enter(self, job: Job, make: Callable[[], Plan], worker: Worker, *, resume: bool) -> Iterator[Self]:
        """Go to work here as `worker`, alone under this name.

        Args:
            job: what is run.
            make: makes the plan where there is none yet; called before anything is written.
            worker: who this is.
            resume: go on with what is there.

        Raises:
            FolderError: if the folder is of another job, exists and `resume` is not set, or is at work with this
                worker or another number of workers. Nothing is written then.
        """
        self.check(job, worker, resume)
        plan = self.read_plan() if self.planned else make()
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            with FileLock(self.work / "folder.lock"):
                # another worker may have been first
                self.check(job, worker, resume)
                if not self.planned:
                    files.write(self.path / "plan.json", _json(plan.to_dict()))
                    files.write(self.path / "job.json", _json({**job.compared(), "fingerprint": job.fingerprint}))
                self.plan = self.read_plan()
                self._claim(worker)
        except OSError as error:
            raise FolderError(f"--output {self.path} cannot be written: {error.strerror or error}") from error
        try:
            yield self
        finally:
            self._leave()

    def _claim(self, worker: Worker) -> None:
        for lock in self.work.glob("worker-*-of-*.lock"):
            index, count = _worker_of(lock.with_suffix(".jsonl"))
            if count == worker.count and index != worker.index:
                continue
            try:
                with FileLock(lock, timeout=0):
                    pass
            except Timeout:
                who = f"worker {index} of {count} runs in {self.path} ({self._owner(lock)})"
                if count != worker.count:
                    raise FolderError(f"{who}; {worker.count} workers cannot join it: wait for it or stop it") from None
                raise FolderError(f"{who}; there can be only one: stop it, or give this one another --shard") from None
        self._lock = FileLock(self.work / f"{worker.name}.lock", timeout=0)
        self._lock.acquire()
        files.write(self.work / f"{worker.name}.owner", f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file = self.work / f"{worker.name}.jsonl"
        self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        ends = list(_ends(self._file))
        kept = ends[-1].stop if ends else 0
        if kept < os.fstat(self._handle).st_size:
            # rows of a batch that a killed run did not finish: it is run again whole
            os.ftruncate(self._handle, kept)

    def _owner(self, lock: Path) -> str:
        try:
            return lock.with_suffix(".owner").read_text().strip()
        except OSError:
            return "another process"

    def _leave(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        if self._lock is not None:
            Path(self._lock.lock_file).with_suffix(".owner").unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    # --- rows --------------------------------------------------------------------------------------------------------

    def append(
        self, batch: int, rows: Sequence[Mapping[str, Any]], seconds: float, extra: Mapping[str, Any] | None = None
    ) -> None:
        """See a finished batch onto the disk, all of it or nothing."""
        assert self._handle is not None
        errors = len({sample(row) for row in rows if "error" in row})
        end = {"end": batch, "rows": len(rows), "errors": errors, "seconds": seconds, "extra": dict(extra or {})}
        data = memoryview("".join(f"{json.dumps(row)}\n" for row in (*rows, end)).encode())
        before = os.fstat(self._handle).st_size
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except BaseException:
            os.ftruncate(self._handle, before)
            raise
        os.fsync(self._handle)

    def done(self) -> dict[int, End]:
        """The finished batches of all workers, by id."""
        found: dict[int, End] = {}
        for path in self._files():
            for end in _ends(path):
                found.setdefault(end.batch, end)
        return found

    def rows(self, end: End) -> Iterator[tuple[int, dict[str, Any]]]:
        """The samples of a finished batch, each behind the byte at which it begins in its file."""
        with end.path.open("rb") as stream:
            stream.seek(end.start)
            for _ in range(end.rows):
                at = stream.tell()
                yield at, json.loads(stream.readline())

    def _files(self) -> list[Path]:
        return sorted(path for path in self.work.glob("worker-*-of-*.jsonl") if _WORKER.search(path.name))


def sample(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What names a sample; lm-eval gives it a row per filter."""
    return row["model"], row["steering"], row["task"], row["seed"], row["doc_id"]


def _ends(path: Path) -> Iterator[End]:
    """The batches in a worker's file that are complete; what follows the last one is not looked at."""
    start = position = rows = 0
    broken = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            position += len(line)
            if not line.endswith(b"\n"):
                return
            if not line.startswith(_END):
                rows += 1
                broken = broken or (0 if line.startswith(b"{") and line.endswith(b"}\n") else number)
                continue
            try:
                data = json.loads(line)
                end = End(
                    data["end"], data["rows"], data["errors"], data["seconds"], data["extra"], path, start, position
                )
            except (ValueError, KeyError, TypeError):
                raise FolderError(f"{path}:{number} is no end of a batch; {_WAY_OUT}") from None
            if broken or end.rows != rows:
                what = f"line {broken} is no sample" if broken else f"{end.rows} samples were written, {rows} are there"
                raise FolderError(f"{path}: batch {end.batch} is damaged: {what}; {_WAY_OUT}")
            yield end
            start, rows = position, 0


def _worker_of(path: Path) -> tuple[int, int]:
    found = _WORKER.search(path.name)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read ({error}); name another --output") from None
    if not isinstance(data, dict):
        raise FolderError(f"{path} holds no JSON object; name another --output")
    return data


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"


def _difference(key: str, was: Any, now: Any) -> str:
    """Where two values of a key differ, as near as that can be said."""
    while True:
        if isinstance(was, dict) and isinstance(now, dict):
            inside: list[Any] = [k for k in (*was, *now) if was.get(k) != now.get(k)]
        elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
            inside = [i for i, (a, b) in enumerate(zip(was, now, strict=True)) if a != b]
        else:
            return f"{key} was {was!r:.80}, is {now!r:.80}"
        place = inside[0]
        key += f"[{place}]" if isinstance(place, int) else f".{place}"
        was = was[place] if isinstance(was, list) else was.get(place)
        now = now[place] if isinstance(now, list) else now.get(place)
