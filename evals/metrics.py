"""Metrics: what a document's output is worth, by name.

    exact follows contains em f1 alternative label      generated text against the right answer
    acc acc_norm logprob mc2                            log-likelihoods of choices
    json_valid json_value pronoun_change fluency        form of the text
    ifeval_strict ifeval_loose constraints drift …      instructions whose following can be verified
    obeys obeys_last                                    form of each turn of a chat
    rouge1 rouge2 rougeL coverage density faithfulness  summaries
    macro_f1 mcc                                        of all documents together

A text that says nothing, or one thing over and over, is worth 0 whatever it is measured by: see `degenerate`. Only JSON
that need not be the whole text is judged by its first object.
Packages add metrics through the entry-point group "steerlens.metrics".
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Literal

import numpy as np
from steerlens.evals.doc import Doc, Output

from steerlens.errors import SteerlensError, nearest

BUILT_IN = ("answers", "choices", "forms", "instructions", "summaries", "turns")
REPEATS = 4
"""Times in a row from which something said again is a loop."""
LOOP = 12
"""Characters below which nothing is a loop."""


class MetricError(SteerlensError, ValueError):
    """An unknown metric or argument, a document without what a metric needs, or a library that is not there."""

    exit_code = 2


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


@dataclass(frozen=True)
class Metric:
    """A number for a document's output.

    Attributes:
        name: as task files write it.
        function: of a document, its output and keyword-only arguments.
        output: the kind of task it is for.
        higher_is_better: direction.
        needs: fields of a document that must be there: "answer", "alternatives", "choices".
        aggregate: makes one number of all documents' values.
        paired: whether differences of single documents' values mean something; False where a value is a code that
            only `aggregate` reads.
        guarded: whether a degenerate last text that is not the answer gives 0 without asking `function`.
        ready: called with the arguments before a run; raises `MetricError` for what is not installed.
    """

    name: str
    function: Callable[..., float]
    output: Literal["generate", "choices"] = "generate"
    higher_is_better: bool = True
    needs: tuple[str, ...] = ()
    aggregate: Callable[[Sequence[float]], float] = mean
    paired: bool = True
    guarded: bool = True
    ready: Callable[..., None] | None = None

    def __call__(self, doc: Doc, output: Output, **arguments: Any) -> float:
        """The output's value.

        Raises:
            MetricError: for a document that lacks what is needed.
        """
        there = {"answer": doc.example.answer, "alternatives": doc.example.alternatives, "choices": doc.choices}
        for name in self.needs:
            if not there[name]:
                raise MetricError(f"metric {self.name!r} needs {name!r}, which document {_place(doc)} does not have")
        if self.output == "choices" and (doc.target is None or len(output.logprobs) != len(doc.choices)):
            raise MetricError(
                f"metric {self.name!r} compares choices: document {_place(doc)} needs a target and a log-likelihood "
                f"for each of its {len(doc.choices)} choices, not target {doc.target} and {len(output.logprobs)}"
            )
        if self.output == "generate" and self.guarded:
            said = output.text.strip()
            if degenerate(said) and (not said or said != doc.example.answer):
                return 0.0
        return float(self.function(doc, output, **arguments))

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raises `MetricError` for arguments that it does not take, or lacks."""
        known = {p.name: p for p in inspect.signature(self.function).parameters.values() if p.kind == p.KEYWORD_ONLY}
        for name in arguments:
            if name not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise MetricError(f"metric {self.name!r} has no argument {name!r}; {takes}{nearest(name, known)}")
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in arguments:
                raise MetricError(f"metric {self.name!r} needs the argument {name!r}")

    def prepare(self, arguments: Mapping[str, Any]) -> None:
        """Raises `MetricError`, before anything is computed, for a library or data that is not installed."""
        self.check(arguments)
        if self.ready is not None:
            self.ready(**arguments)


_REGISTRY: dict[str, Metric] = {}


def register(metric: Metric) -> Metric:
    """Adds a metric under its name.

    Raises:
        MetricError: if the name is taken.
    """
    if metric.name in _REGISTRY:
        raise MetricError(f"a metric named {metric.name!r} is registered already; give yours another name")
    _REGISTRY[metric.name] = metric
    return metric


def metric(name: str, **properties: Any) -> Callable[[Callable[..., float]], Metric]:
    """Registers the decorated function; properties as in `Metric`."""
    return lambda function: register(Metric(name, function, **properties))


def get(name: str) -> Metric:
    """The metric of that name.

    Raises:
        MetricError: with the nearest names.
    """
    _load()
    if name not in _REGISTRY:
        raise MetricError(f"unknown metric {name!r}; known: {', '.join(names())}{nearest(name, _REGISTRY)}")
    return _REGISTRY[name]


def names() -> list[str]:
    """All metrics, plug-ins included, in alphabetical order."""
    _load()
    return sorted(_REGISTRY)


@functools.cache
def _load() -> None:
    for module in BUILT_IN:
        import_module(f"steerlens.evals.metrics_{module}")
    for entry in entry_points(group="steerlens.metrics"):
        found = entry.load()
        if not isinstance(found, Metric):
            raise MetricError(
                f"entry point {entry.name!r} of steerlens.metrics ({entry.value}) is a {type(found).__name__}; it must "
                f"be a steerlens.evals.metrics.Metric"
            )
        if _REGISTRY.get(found.name) is not found:  # the decorator `metric` has registered it already
            register(found)


def library(name: str, metric: str) -> ModuleType:
    """A module of the `eval` extra.

    Raises:
        MetricError: if it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MetricError(
            f"metric {metric!r} needs {error.name}, which is not installed: pip install 'steerlens[eval]'"
        ) from None


def field(doc: Doc, name: str, metric: str) -> Any:
    """What a document's data hold under `name`.

    Raises:
        MetricError: naming the metric and the fields there are.
    """
    if name not in doc.data:
        raise MetricError(
            f"metric {metric!r} needs the field {name!r}, which document {_place(doc)} does not have; it has "
            f"{', '.join(doc.data) or 'none'}{nearest(name, doc.data)}"
        )
    return doc.data[name]


def degenerate(text: str) -> bool:
    """Whether a text holds no letter or digit, or is for more than half one thing said four times or more in a row.

    Case and white space do not count, punctuation may; what takes fewer than 12 characters is no loop.
    """
    bare = re.sub(r"\s+", "", text.casefold())
    letters = re.sub(r"[\W_]+", "", bare)
    return not letters or _loops(letters) or _loops(bare)


def _loops(text: str) -> bool:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    least = max(LOOP, len(codes) // 2 + 1)
    for period in _periods(text):
        breaks = np.flatnonzero(codes[period:] != codes[:-period])
        runs = np.diff(np.concatenate(([-1], breaks, [len(codes) - period]))) - 1
        longest = int(runs.argmax())
        if runs[longest] + period >= max(least, REPEATS * period):
            start = 0 if longest == 0 else int(breaks[longest - 1]) + 1
            return any(character.isalnum() for character in text[start : start + period])
    return False


def _periods(text: str) -> list[int]:
    # What is looped over more than half of a text has its first three quarters over the eighth that begins at a
    # quarter, or over the one that begins at the half: there, what is one period on is the same.
    size, found = len(text), set()
    for at in (size // 4, size - size // 2):
        sample = text[at : at + max(1, size // 8)]
        there = text.find(sample, at + 1)
        while 0 <= there <= at + size // REPEATS:
            found.add(there - at)
            there = text.find(sample, there + 1)
    return sorted(found)


def _place(doc: Doc) -> str:
    return f"{doc.doc_id} of task {doc.task!r}"
