"""The form of a text: JSON, rewritten pronouns, fluency."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from steerlens.evals.doc import Doc, Output
from steerlens.evals.metrics import degenerate, field, metric
from steerlens.evals.metrics_answers import normalize

GENDERED = frozenset(("she", "he", "her", "him", "hers", "his", "herself", "himself"))


@metric("json_valid", guarded=False)
def json_valid(doc: Doc, output: Output, *, keys: Sequence[str] = (), whole: bool = True) -> float:
    """1 if the text is a JSON object that says something.

    An empty object, a repeated key, NaN, or a value that is empty or degenerate gives 0. A code fence around the object
    is allowed.

    Args:
        doc: the document.
        output: its text.
        keys: names that must be there, each with a value.
        whole: whether nothing may follow the object. If not, the first object alone is judged: a base model that has
            given it goes on, often with the same again.
    """
    found = _object(output.text, whole)
    return found is not None and all(key in found for key in keys)


@metric("json_value", needs=("answer",), guarded=False)
def json_value(
    doc: Doc, output: Output, *, key: str | None = None, keys: Sequence[str] = (), whole: bool = True
) -> float:
    """1 if the text is such a JSON object whose value holds the answer, both normalised as SQuAD does.

    Args:
        doc: the document.
        output: its text.
        key: whose value; any key's unless given.
        keys: as in `json_valid`.
        whole: as in `json_valid`.
    """
    found = _object(output.text, whole)
    if found is None or any(name not in found for name in keys):
        return 0.0
    values = list(found.values()) if key is None else [found[key]] if key in found else []
    answer = normalize(str(doc.example.answer))
    return bool(answer) and any(
        answer in normalize(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for value in values
    )


@metric("pronoun_change")
def pronoun_change(
    doc: Doc, output: Output, *, source: str = "source", kept: float = 0.5, fluency: float = 3.0
) -> float:
    """1 if the text is the source rewritten without "she", "he", "her", "him", "hers", "his", "herself", "himself".

    PASTA's published metric asks for no more than that these words are absent, so that an empty text passes; here the
    text must also be fluent and keep words of the source.

    Args:
        doc: the document.
        output: its text.
        source: field with the text to be rewritten.
        kept: least share of the source's other words that the text must hold.
        fluency: least n-gram entropy in bits, as PASTA's; 0.8 of the source's where that is less.
    """
    original, words = str(field(doc, source, "pronoun_change")), Counter(_words(output.text))
    if words.keys() & GENDERED:
        return 0.0
    wanted = Counter(word for word in _words(original) if word not in GENDERED)
    if wanted and (wanted & words).total() < kept * wanted.total():
        return 0.0
    return entropy(output.text) >= min(fluency, 0.8 * entropy(original))


@metric("fluency")
def fluency(doc: Doc, output: Output) -> float:
    """N-gram entropy of the text in bits: a third of the bigrams' plus two thirds of the trigrams', as ROME's."""
    return entropy(output.text)


def entropy(text: str) -> float:
    """N-gram entropy as in `fluency`, of words and punctuation marks; 0 for fewer than three."""
    tokens = re.findall(r"\w+|[^\w\s]", text.casefold())
    return _ngrams(tokens, 2) / 3 + 2 * _ngrams(tokens, 3) / 3


def _ngrams(tokens: Sequence[str], n: int) -> float:
    counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if len(counts) > 1 else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _object(text: str, whole: bool) -> dict[str, Any] | None:
    bare = text.strip()
    if fenced := re.match(r"```(?:json)?\s*\n(.*?)\n?```", bare, re.DOTALL | re.IGNORECASE):
        if whole and fenced.end() < len(bare):
            return None
        bare = fenced.group(1).strip()
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
    try:
        found, end = decoder.raw_decode(bare)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not found or (whole and end < len(bare)):
        return None
    said = all(key.strip() and not _empty(value) for key, value in found.items())
    return found if said else None


def _empty(value: Any) -> bool:
    if isinstance(value, str):
        return degenerate(value)
    if isinstance(value, dict):
        return not value or all(_empty(v) for v in value.values())
    return value is None or value == [] or (isinstance(value, list) and all(_empty(v) for v in value))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a repeated key")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
