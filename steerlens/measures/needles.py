"""Needles in a haystack: trials over a grid of lengths and depths, the needle's place known by construction."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from steerlens.errors import nearest
from steerlens.examples import Example, ExampleError, objects, read_text
from steerlens.selectors import Chars

QUESTION = " Question: {question} Answer:"
BOOK = "\nBased on the content of the book, Question: {question}\nAnswer:"
"""The published prompt's end (Wu et al. 2024), for real texts."""
_KEYS = ("needle", "question", "answer")
_SENTENCE = re.compile(r"""[.!?]["'”’)\]]*\s+|[。！？][”’」』）]*\s*|\s*\n\s*\n\s*""")


@dataclass(frozen=True)
class Needle:
    """A text to hide, the question that it answers, and the answer where it is a part of the text."""

    text: str
    question: str
    answer: str | None = None


def read(path: Path) -> list[Needle]:
    """The needles of a JSONL file: objects with `needle`, `question` and, as needed, `answer`.

    Raises:
        ExampleError: naming the file, the line and the value.
    """
    found = []
    for where, data in objects(path):
        if not {"needle", "question"} <= data.keys():
            raise ExampleError(f"{where}: {json.dumps(data)[:60]!r} is no object with 'needle' and 'question'")
        for key, value in data.items():
            if key not in _KEYS:
                raise ExampleError(f"{where}: unknown key {key!r}; allowed: {', '.join(_KEYS)}{nearest(key, _KEYS)}")
            if not isinstance(value, str) or not value.strip():
                raise ExampleError(f"{where}: {key!r} is {value!r:.80}; it must be a text, not empty")
        found.append(Needle(data["needle"].strip(), data["question"], data.get("answer")))
    if not found:
        raise ExampleError(f"{path} holds no needle; it needs a JSON object per line with 'needle' and 'question'")
    return found


def sentences(path: Path) -> list[str]:
    """The sentences of a text file, each with the white space behind it."""
    text = read_text(path).strip()
    if not text:
        raise ExampleError(f"{path} is empty; it must hold the text to hide needles in")
    ends = [0, *(match.end() for match in _SENTENCE.finditer(text)), len(text)]
    return [text[a:b] for a, b in pairwise(ends) if a < b]


def grid(
    tokenizer: Any,
    needles: Sequence[Needle],
    haystack: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    *,
    tail: str = QUESTION,
    seed: int = 0,
) -> list[Example]:
    """A trial per length, depth and repetition: needles in turn, each in the haystack from another sentence on.

    Args:
        tokenizer: it counts the tokens.
        needles: at least one.
        haystack: sentences, each with the white space behind it; they start over where they do not suffice.
        lengths: longest prompt, in tokens of the tokenizer, question and special tokens included.
        depths: where the needle stands in the text, in percent; it moves to the end of the sentence before.
        trials: repetitions per cell.
        tail: what follows the text, with `{question}`.
        seed: of the starting sentences.

    Returns:
        Examples with the groups "gold", the needle, and "context", the text with it.
    """
    rng = random.Random(f"needles|{seed}")
    cells = [(length, depth) for _ in range(trials) for length in lengths for depth in depths]
    return [
        plant(tokenizer, needles[number % len(needles)], haystack, length, depth, tail, rng.randrange(len(haystack)))
        for number, (length, depth) in enumerate(cells)
    ]


def plant(
    tokenizer: Any, needle: Needle, haystack: Sequence[str], length: int, depth: float, tail: str, first: int = 0
) -> Example:
    """One trial of `grid`, with the haystack from sentence `first` on."""
    tail = tail.replace("{question}", needle.question)

    def build(count: int) -> tuple[str, int]:
        pieces = [haystack[(first + place) % len(haystack)] for place in range(count)]
        if pieces:
            # The file's last sentence has no white space behind it.
            pieces = [piece if piece[-1:].isspace() else piece + " " for piece in pieces]
        places = [0, *accumulate(map(len, pieces))]
        at = max(place for place in places if place <= depth / 100 * places[-1])
        text = "".join(pieces)
        return f"{text[:at]}{needle.text} {text[at:]}".rstrip(), at

    def size(count: int) -> int:
        return len(tokenizer(build(count)[0] + tail, verbose=False)["input_ids"])

    least = size(0)
    if least > length:
        raise ExampleError(
            f"a prompt of {length} tokens is too short: the needle {needle.text[:60]!r} and its question take {least}; "
            "ask for longer ones (--lengths)"
        )
    count = _most(size, length)
    context, at = build(count)
    gold = (Chars(at, at + len(needle.text)),)
    return Example(context + tail, needle.answer, groups={"gold": gold, "context": (Chars(0, len(context)),)})


def _most(size: Callable[[int], int], length: int) -> int:
    """The largest count whose size is at most `length`; sizes grow with the count."""
    low, high = 0, 1
    while size(high) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= length else (low, middle)
    return low
