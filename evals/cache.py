"""Outcomes that any job may use again, in a SQLite file that several processes share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerlens.evals.doc import Doc, Outcome, Output, Steering
from steerlens.evals.job import JobError, ModelEntry

NAME = "outcomes.sqlite"
_WAIT = 120


class Cache:
    """Outcomes without errors, by everything that they depend on.

    Args:
        folder: where the file lies; made if missing.
        common: what all outcomes here depend on: model, dtype, backend, versions; plain JSON types.

    Raises:
        JobError: if the file cannot be used.
    """

    def __init__(self, folder: Path, common: Mapping[str, Any]) -> None:
        self._common = dict(common)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(folder / NAME, timeout=_WAIT, isolation_level=None)
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS outcomes (key TEXT PRIMARY KEY, outcome TEXT) WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error) as error:
            raise JobError(f"--cache {folder}: {NAME} cannot be used there: {error}") from None

    def key(self, task: Any, doc: Doc, steering: Steering, seed: int) -> str:
        """What an outcome is kept under."""
        parts = {
            **self._common,
            "task": task.fingerprint,
            "generation": [task.output, task.max_new_tokens, list(task.stop), task.chat],
            "steering": steering.fingerprint,
            "seed": seed,
            "doc": doc.doc_hash,
            "prompt": doc.prompt_hash,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def get(self, keys: Sequence[str]) -> dict[str, Outcome]:
        """The outcomes that are there, by key."""
        found = {}
        for key in keys:
            row = self._connection.execute("SELECT outcome FROM outcomes WHERE key = ?", (key,)).fetchone()
            if row is not None:
                found[key] = _outcome(json.loads(row[0]))
        return found

    def put(self, outcomes: Mapping[str, Outcome]) -> None:
        """Keep those without an error, in one transaction."""
        rows = [(key, _text(outcome)) for key, outcome in outcomes.items() if outcome.output is not None]
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.executemany("INSERT OR IGNORE INTO outcomes VALUES (?, ?)", rows)
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def _text(outcome: Outcome) -> str:
    assert outcome.output is not None
    return json.dumps(dataclasses.asdict(outcome.output))


def _outcome(data: Mapping[str, Any]) -> Outcome:
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Outcome(Output(**lists))


def identity(entry: ModelEntry, model: Any) -> dict[str, Any]:
    """What tells a model from every other: its commit on the Hub, or a digest of its local files."""
    folder = Path(entry.target)
    commit = getattr(model.config, "_commit_hash", None)
    if folder.is_dir():
        commit = _digest(folder)
    return {"model": entry.target, "revision": commit or entry.revision, "args": entry.args, "dtype": str(model.dtype)}


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        with path.open("rb") as stream:
            found.update(f"{path.relative_to(folder)}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()
