"""Sample errors in lm-eval, which knows none: responses that do not exist and say why."""

from __future__ import annotations

import dataclasses
import math
from contextvars import ContextVar
from typing import Any


class Failed:
    """A response that does not exist, and why; holds the place of one in lm-eval."""

    reason: str

    def __getnewargs__(self) -> tuple[str]:
        return (self.reason,)


class FailedScore(Failed, tuple):  # type: ignore[type-arg]
    """In place of a log-likelihood and whether it is greedy."""

    def __new__(cls, reason: str) -> FailedScore:
        failed = super().__new__(cls, (math.nan, False))
        failed.reason = reason
        return failed


class FailedText(Failed, str):
    """In place of a generated text."""

    def __new__(cls, reason: str) -> FailedText:
        failed = super().__new__(cls, "")
        failed.reason = reason
        return failed


class FailedSum(Failed, float):
    """In place of the log-likelihood of a whole text."""

    def __new__(cls, reason: str) -> FailedSum:
        failed = super().__new__(cls, math.nan)
        failed.reason = reason
        return failed


@dataclasses.dataclass
class Recording:
    """A run in which bad samples are recorded; without one, the first of them ends the run.

    Attributes:
        lm: the model of the run, once it is made.
    """

    lm: Any = None


recording: ContextVar[Recording | None] = ContextVar("recording", default=None)
