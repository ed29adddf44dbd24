"""Every score that was computed, on the disk: what a stopped search goes on from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from steerlens.errors import SteerlensError
from steerlens.tuning.scoring import Score

Key = tuple[str, str, int]
"""Candidate as JSON, split, index of the example."""


class JournalError(SteerlensError, ValueError):
    """A journal that exists already, is broken, or belongs to another search."""

    exit_code = 2


class Journal:
    """Append-only scores, a line per batch.

    Args:
        path: a JSONL file; the first line holds the settings.
        settings: everything that shapes the scores, as plain JSON types.
        resume: go on with a file that the same settings made.

    Raises:
        JournalError: naming the file, and the setting that differs.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self._known: dict[Key, Score] = {}
        self._names: dict[str, int] = {}
        self._file: BinaryIO | None = None
        self._settings = json.loads(json.dumps(settings))
        self._goes_on = path.exists()
        if self._goes_on and not resume:
            raise JournalError(f"{path} exists: go on with that search by --resume, or name another --output")
        if self._goes_on:
            self._read()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: Key) -> Score | None:
        """The score of an earlier run."""
        return self._known.get(key)

    def add(self, scores: Sequence[tuple[Key, Score]]) -> None:
        """Append a batch and see it onto the disk."""
        if self._file is None:
            self._file = self.path.open("ab" if self._goes_on else "xb")
            if not self._goes_on:
                self._write({"settings": self._settings})
        rows, new = [], {}
        for (candidate, split, index), score in scores:
            if candidate not in self._names:
                self._names[candidate] = len(self._names)
                new[self._names[candidate]] = json.loads(candidate)
            values = [None if math.isnan(v) else v for v in (score.hit, score.logprob, score.entropy)]
            rows.append([self._names[candidate], split, index, *values])
        self._write(({"candidates": new} if new else {}) | {"scores": rows})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> None:
        content = self.path.read_bytes()
        # what follows the last line end is a line that a killed run did not finish
        whole = content[: content.rfind(b"\n") + 1]
        candidates: dict[int, str] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                data = json.loads(line)
                if number == 1:
                    self._compare(data["settings"])
                    continue
                candidates |= {int(i): name(c) for i, c in data.get("candidates", {}).items()}
                for index, split, example, *values in data["scores"]:
                    score = Score(*(math.nan if v is None else float(v) for v in values))
                    self._known[candidates[index], split, example] = score
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if isinstance(error, JournalError):
                    raise
                raise JournalError(f"{self.path}:{number} is no line of a search ({error}); start anew") from None
        if not whole:
            self._goes_on = False
            self.path.unlink()
            return
        self._names = {c: i for i, c in candidates.items()}
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def _compare(self, before: Any) -> None:
        keys = [*self._settings, *(key for key in before if key not in self._settings)]
        changed = [key for key in keys if before.get(key) != self._settings.get(key)]
        if changed:
            detail = "; ".join(f"{k} was {before.get(k)!r:.80}, is {self._settings.get(k)!r:.80}" for k in changed)
            raise JournalError(f"--resume: {self.path} is of a search with other settings: {detail}")


def name(description: Mapping[str, Any] | None) -> str:
    """A candidate's description as text, the same for equal ones."""
    return json.dumps(json.loads(json.dumps(description)), sort_keys=True)
