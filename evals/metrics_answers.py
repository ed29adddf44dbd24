"""Generated text against the right answer."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from steerlens.evals.doc import Doc, Output
from steerlens.evals.metrics import MetricError, degenerate, field, library, metric
from steerlens.evals.world import tasks as world

from steerlens.errors import nearest

UNNAMED = 999
"""Index of a text that begins with no label."""


def _ready(name: str) -> Callable[..., None]:
    return lambda **_: library("sklearn.metrics", name) and None


def _pairs(cells: Sequence[float]) -> tuple[list[int], list[int]]:
    gold, given = zip(*(divmod(int(cell), 1000) for cell in cells), strict=True)
    return list(gold), list(given)


def _macro_f1(cells: Sequence[float]) -> float:
    if not len(cells):
        return math.nan
    gold, given = _pairs(cells)
    labels = sorted({*gold, *given} - {UNNAMED})
    score = library("sklearn.metrics", "macro_f1").f1_score
    return float(score(gold, given, labels=labels, average="macro", zero_division=0))


def _mcc(cells: Sequence[float]) -> float:
    return float(library("sklearn.metrics", "mcc").matthews_corrcoef(*_pairs(cells))) if len(cells) else math.nan


@metric("exact", needs=("answer",))
def exact(doc: Doc, output: Output) -> float:
    """1 if the text is the answer, surrounding white space aside."""
    return output.text.strip() == str(doc.example.answer).strip()


@metric("follows", needs=("answer",))
def follows(doc: Doc, output: Output) -> float:
    """1 if the text is the answer; surrounding white space and one final period aside."""
    return world.follows(output.text, str(doc.example.answer))


@metric("contains", needs=("answer",))
def contains(doc: Doc, output: Output, *, answers: str | None = None, words: bool = False) -> float:
    """1 if the text holds an answer, both normalised as SQuAD does: "best subspan EM".

    Args:
        doc: the document.
        output: its text.
        answers: field with all right answers, instead of the document's one.
        words: only where it begins and ends with a word.
    """
    return _contains(output.text, _right(doc, answers, "contains"), words)


@metric("em", needs=("answer",))
def em(doc: Doc, output: Output, *, answers: str | None = None) -> float:
    """1 if the text is an answer, both normalised as SQuAD does; `answers` as in `contains`."""
    text = normalize(output.text)
    return any(text == normalize(answer) for answer in _right(doc, answers, "em"))


@metric("f1", needs=("answer",))
def f1(doc: Doc, output: Output, *, answers: str | None = None) -> float:
    """SQuAD's F1 of words, the best over the answers; `answers` as in `contains`."""
    return max(_f1(output.text, answer) for answer in _right(doc, answers, "f1"))


@metric("alternative", needs=("alternatives",), higher_is_better=False)
def alternative(doc: Doc, output: Output, *, by: str = "follows") -> float:
    """1 if the text gives an alternative, a wrong answer that the prompt or the model's memory supports.

    Args:
        doc: the document.
        output: its text.
        by: how they are compared: "follows", "em" or "contains", as the metrics of these names.
    """
    wrong, text = doc.example.alternatives, output.text
    if by == "follows":
        return any(world.follows(text, answer) for answer in wrong)
    if by == "em":
        return any(normalize(text) == normalize(answer) for answer in wrong)
    if by == "contains":
        return _contains(text, wrong, False)
    raise MetricError(f"metric 'alternative': by is {by!r}; allowed: follows, em, contains")


@metric("label", needs=("answer",))
def label(doc: Doc, output: Output, *, labels: Sequence[str]) -> float:
    """1 if the label that the text begins with is the answer; the longest where several fit."""
    return _gold(doc, labels, "label") == _label(output.text, labels)


@metric("macro_f1", needs=("answer",), aggregate=_macro_f1, paired=False, guarded=False, ready=_ready("macro_f1"))
def macro_f1(doc: Doc, output: Output, *, labels: Sequence[str]) -> float:
    """Mean F1 of the labels given or right, by scikit-learn; labels as in `label`.

    A document's value is its place in the confusion matrix: 1000 times the right label's index plus the given one's.
    """
    return _cell(doc, output, labels, "macro_f1")


@metric("mcc", needs=("answer",), aggregate=_mcc, paired=False, guarded=False, ready=_ready("mcc"))
def mcc(doc: Doc, output: Output, *, labels: Sequence[str]) -> float:
    """Matthews correlation coefficient by scikit-learn; no label counts as one more. Values as in `macro_f1`."""
    return _cell(doc, output, labels, "mcc")


def normalize(text: str) -> str:
    """As SQuAD's evaluation does: lower case, without punctuation, articles and extra white space."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _contains(text: str, answers: Sequence[str], words: bool) -> bool:
    held = normalize(text)
    sought = [answer for answer in map(normalize, answers) if answer]
    return any(re.search(rf"\b{re.escape(a)}\b", held) if words else a in held for a in sought)


def _f1(text: str, answer: str) -> float:
    given, right = normalize(text).split(), normalize(answer).split()
    if not given or not right:
        return given == right
    common = (Counter(given) & Counter(right)).total()
    return 2 * common / (len(given) + len(right))


def _right(doc: Doc, answers: str | None, name: str) -> list[str]:
    if answers is None:
        return [str(doc.example.answer)]
    found = field(doc, answers, name)
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list) or not found:
        raise MetricError(f"metric {name!r}: field {answers!r} is {found!r:.80}; it must be a list of answers")
    return [str(answer) for answer in found]


def _label(text: str, labels: Sequence[str]) -> str | None:
    if degenerate(text):
        return None
    begins = re.sub(r"^[\W_]+", "", text).casefold()
    fits = [label for label in labels if re.match(rf"{re.escape(label.casefold())}(?!\w)", begins)]
    return max(fits, key=len, default=None)


def _cell(doc: Doc, output: Output, labels: Sequence[str], name: str) -> float:
    gold, given = _gold(doc, labels, name), _label(output.text, labels)
    return 1000 * labels.index(gold) + (UNNAMED if given is None else labels.index(given))


def _gold(doc: Doc, labels: Sequence[str], name: str) -> str:
    gold = str(doc.example.answer).strip()
    if gold not in labels:
        raise MetricError(
            f"metric {name!r}: the answer {gold!r} of task {doc.task!r} is none of the labels {', '.join(labels)}"
            f"{nearest(gold, labels)}"
        )
    return gold
