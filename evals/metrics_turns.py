"""The form of a chat's answers, turn by turn, for tasks whose data hold `form`: "capitals" or "json"."""

from __future__ import annotations

from collections.abc import Callable

from steerlens.evals.doc import Doc, Output
from steerlens.evals.metrics import MetricError, degenerate, field, metric
from steerlens.evals.metrics_forms import json_valid

from steerlens.errors import nearest


def _capitals(doc: Doc, text: str) -> bool:
    return any(c.isalpha() for c in text) and text == text.upper() and not text.lstrip().startswith("{")


def _json(doc: Doc, text: str) -> bool:
    return bool(json_valid(doc, Output((text,))))


FORMS: dict[str, Callable[[Doc, str], bool]] = {"capitals": _capitals, "json": _json}


@metric("obeys", guarded=False)
def obeys(doc: Doc, output: Output) -> float:
    """Share of the turns whose text has the form asked for: capital letters, or JSON that says something.

    Whether the text answers the question does not count.
    """
    found = _obeyed(doc, output, "obeys")
    return sum(found) / len(found)


@metric("obeys_last", guarded=False)
def obeys_last(doc: Doc, output: Output) -> float:
    """1 if the last turn's text has the form asked for, as `obeys`."""
    return _obeyed(doc, output, "obeys_last")[-1]


def _obeyed(doc: Doc, output: Output, name: str) -> list[bool]:
    form = field(doc, "form", name)
    if form not in FORMS:
        raise MetricError(f"metric {name!r}: form is {form!r}; allowed: {', '.join(FORMS)}{nearest(str(form), FORMS)}")
    return [not degenerate(text) and FORMS[form](doc, text) for text in output.texts or ("",)]
