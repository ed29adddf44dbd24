"""What can go wrong, as exceptions. Each message names the object, the value seen, what is allowed and the fix.

SteerlensError
├── MethodError        unknown method or parameter, value out of range           (ValueError)
├── HeadError          head specification that cannot be read or is out of range  (ValueError)
├── SpanError          missing, ambiguous or mismatched spans                     (ValueError)
├── RecipeError        recipe file that does not fit the schema or the model      (ValueError)
├── UnsupportedError   model, cache, mask or mode that cannot be steered exactly  (RuntimeError)
└── SteeringStateError steered model used in a way that would lose or fake it     (RuntimeError)
└── NotReachedError  a steered layer was never called                         (RuntimeError)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SteerlensError(Exception):
    """Base of every error that steerlens raises on purpose."""


class MethodError(SteerlensError, ValueError):
    """Unknown method or parameter, or a value out of its range."""


class HeadError(SteerlensError, ValueError):
    """A head specification that cannot be read or names a head the model does not have."""


class SpanError(SteerlensError, ValueError):
    """A span that is missing, ambiguous, or belongs to other inputs."""


class RecipeError(SteerlensError, ValueError):
    """A recipe that does not fit the schema or the model."""


class UnsupportedError(SteerlensError, RuntimeError):
    """A model, cache, mask or mode that cannot be steered exactly."""


class SteeringStateError(SteerlensError, RuntimeError):
    """A steered model used in a way that would lose the steering or fake it."""


class NotReachedError(SteeringStateError):
    """A steered layer was never called although the model ran."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`'; did you mean …?'` for the closest known names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
