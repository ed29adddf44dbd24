"""Summaries: overlap with a reference, extraction from the source, and a user's scorer of faithfulness."""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from steerlens.evals.doc import Doc, Output
from steerlens.evals.metrics import MetricError, field, library, metric

SCORERS = "steerlens.faithfulness"


def _ready(name: str) -> Callable[..., None]:
    return lambda **_: library("rouge_score.rouge_scorer", name) and None


@metric("rouge1", needs=("answer",), ready=_ready("rouge1"))
def rouge1(doc: Doc, output: Output, *, stem: bool = True) -> float:
    """ROUGE-1 F1 against the answer, 0 to 1, by rouge_score; it knows Latin letters and digits only.

    Args:
        doc: the document.
        output: its text.
        stem: whether words are compared by their stems.
    """
    return _rouge("rouge1", doc, output, stem)


@metric("rouge2", needs=("answer",), ready=_ready("rouge2"))
def rouge2(doc: Doc, output: Output, *, stem: bool = True) -> float:
    """ROUGE-2 F1, as `rouge1`."""
    return _rouge("rouge2", doc, output, stem)


@metric("rougeL", needs=("answer",), ready=_ready("rougeL"))
def rouge_l(doc: Doc, output: Output, *, stem: bool = True) -> float:
    """ROUGE-L F1, as `rouge1`."""
    return _rouge("rougeL", doc, output, stem)


@metric("coverage")
def coverage(doc: Doc, output: Output, *, source: str = "document") -> float:
    """Share of the text's tokens that lie in fragments copied from the source (Grusky et al. 2018), 0 to 1.

    Needs no model and no reference. What is not copied need not be false.

    Args:
        doc: the document.
        output: its text.
        source: field with the text that is summarised.
    """
    tokens = _tokens(output.text)
    return sum(fragments(_tokens(str(field(doc, source, "coverage"))), tokens)) / len(tokens)


@metric("density")
def density(doc: Doc, output: Output, *, source: str = "document") -> float:
    """Mean length of the copied fragment that a token of the text lies in (Grusky et al. 2018), as `coverage`.

    Higher is more extractive, which is neither better nor worse by itself.
    """
    tokens = _tokens(output.text)
    copied = fragments(_tokens(str(field(doc, source, "density"))), tokens)
    return sum(length * length for length in copied) / len(tokens)


@metric("faithfulness", ready=lambda *, scorer, **_: _scorer(scorer) and None)
def faithfulness(doc: Doc, output: Output, *, scorer: str, source: str = "document") -> float:
    """What a scorer of yours says of the text, given its source: a number, higher for what the source supports.

    Args:
        doc: the document.
        output: its text.
        scorer: "module:function" of a function (source, text) -> float, or the name of an entry point of the group
            "steerlens.faithfulness".
        source: field with the text that is summarised.
    """
    value = _scorer(scorer)(str(field(doc, source, "faithfulness")), output.text)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MetricError(f"scorer {scorer!r} gave {value!r:.80}; it must give a finite number")
    return number


def fragments(source: Sequence[str], summary: Sequence[str]) -> list[int]:
    """Lengths of a summary's extractive fragments: greedily, the longest match in the source from each token on."""
    places: dict[str, list[int]] = {}
    for place, token in enumerate(source):
        places.setdefault(token, []).append(place)
    found, i = [], 0
    while i < len(summary):
        longest = 0
        for place in places.get(summary[i], ()):
            length = 1
            while (
                i + length < len(summary)
                and place + length < len(source)
                and summary[i + length] == source[place + length]
            ):
                length += 1
            longest = max(longest, length)
        if longest:
            found.append(longest)
        i += longest or 1
    return found


@functools.cache
def _scorer(name: str) -> Callable[[str, str], Any]:
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise MetricError(f"scorer {name!r} cannot be loaded: {error}") from error
    else:
        known = {entry.name: entry for entry in entry_points(group=SCORERS)}
        if name not in known:
            raise MetricError(
                f"unknown scorer {name!r}; give 'module:function', or an entry point of {SCORERS}: "
                f"{', '.join(known) or 'none is installed'}"
            )
        found = known[name].load()
    if not callable(found):
        raise MetricError(f"scorer {name!r} is a {type(found).__name__}; it must be a function (source, text) -> float")
    return found


def _rouge(kind: str, doc: Doc, output: Output, stem: bool) -> float:
    return _rouge_scorer(kind, stem).score(str(doc.example.answer), output.text)[kind].fmeasure


@functools.cache
def _rouge_scorer(kind: str, stem: bool) -> Any:
    return library("rouge_score.rouge_scorer", kind).RougeScorer([kind], use_stemmer=stem)


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.casefold())
