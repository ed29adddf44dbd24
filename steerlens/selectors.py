"""Selectors: what `steerlens.encode` looks for in a prompt, resolved to the tokens that carry it.

Everything is found in the *final* text of a row (tags removed, chat template rendered), in characters; a
token belongs to a range when its half-open characters overlap it. Tokens without characters (BOS, pads)
belong to nothing.
"""

from __future__ import annotations

import difflib
import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from steerlens.errors import SpanError, nearest
from steerlens.spans import Range

Occurrence = Literal["all", "first", "last", "only"] | int


@dataclass(frozen=True)
class Substring:
    """A text, as it stands in the prompt; occurrences do not overlap.

    Attributes:
        text: what to find, case-sensitive; in a chat only inside the messages' contents.
        occurrence: "all", "first", "last", "only" (several are an error) or an index from 0, negative from
            the end; None takes `encode`'s.
    """

    text: str
    occurrence: Occurrence | None = None


@dataclass(frozen=True)
class Regex:
    """A regular expression: its group "span", else its group 1, else the match; empty matches do not count.

    Attributes:
        pattern: `^` and `$` are the ends of the prompt, in a chat of each message's content.
        occurrence: as in `Substring`.
    """

    pattern: str | re.Pattern[str]
    occurrence: Occurrence | None = None


@dataclass(frozen=True)
class Role:
    """The contents of a chat's messages of one role, without the white space around them; each one section.

    Attributes:
        name: "system", "user", "assistant", …
        index: which of that role's messages, from 0, negative from the end; None takes all.
    """

    name: str
    index: int | None = None


@dataclass(frozen=True)
class Chars:
    """Characters `[start:stop]`, a Python slice of the final text: prompt without tags, or rendered chat."""

    start: int | None
    stop: int | None = None


@dataclass(frozen=True)
class Tokens:
    """Tokens `[start:stop]`, a Python slice of the row without its padding; a BOS token counts."""

    start: int | None
    stop: int | None = None


@dataclass(frozen=True)
class Tag:
    """What `<name>…</name>` enclosed; `encode(tags=…)` makes these."""

    name: str


Selector = str | re.Pattern[str] | Substring | Regex | Role | Chars | Tokens | Tag


@dataclass(frozen=True)
class Text:
    """The final text of one row.

    Attributes:
        text: what the tokenizer reads.
        contents: `(role, start, stop)` of what the user wrote, in characters of `text`, by position; the role
            of a plain prompt is "".
        tagged: `{tag: character ranges of text}`.
        chat: whether a chat template rendered it.
    """

    text: str
    contents: Sequence[tuple[str, int, int]]
    tagged: Mapping[str, Sequence[Range]] = field(default_factory=dict)
    chat: bool = False


class Missing(SpanError):
    """A selector that found nothing; `on_missing` decides what becomes of it."""


def resolve(selector: Any, text: Text, offsets: Sequence[Range], occurrence: Occurrence) -> list[Range]:
    """The token ranges of one selector in one row, in order of occurrence.

    Args:
        selector: a `Selector`.
        text: the row.
        offsets: characters `[start, stop)` of each token of the unpadded row.
        occurrence: for selectors that name none.

    Raises:
        Missing: nothing there, or nothing that a token carries.
        SpanError: not a selector, or `occurrence="only"` with several.
    """
    if isinstance(selector, Tokens):
        start, stop, _ = slice(selector.start, selector.stop).indices(len(offsets))
        if start >= stop:
            raise Missing(f"{selector} is empty: the row has {len(offsets)} tokens")
        return [(start, stop)]
    found = _characters(selector, text, occurrence)
    carriers: dict[int, list[int]] = {}
    for token, (start, stop) in enumerate(offsets):
        for character in range(start, stop):
            carriers.setdefault(character, []).append(token)
    covered = [[token for c in range(start, stop) for token in carriers.get(c, ())] for start, stop in found]
    if not any(covered):
        start, stop = found[0]
        raise Missing(f"{selector!r} is at characters {start} to {stop}, but no token carries it")
    return [(min(tokens), max(tokens) + 1) for tokens in covered if tokens]


def strip_tags(text: str, names: Sequence[str]) -> tuple[str, dict[str, list[Range]]]:
    """The text without its `<name>` and `</name>`, and the characters each pair enclosed, by position."""
    ranges: dict[str, list[Range]] = {name: [] for name in names}
    if not names:
        return text, ranges
    opened: dict[str, list[int]] = {name: [] for name in names}
    clean, cursor = "", 0
    for match in re.finditer(f"<(/?)({'|'.join(map(re.escape, names))})>", text):
        clean += text[cursor : match.start()]
        cursor, name = match.end(), match[2]
        if not match[1]:
            opened[name].append(len(clean))
        elif opened[name]:
            ranges[name].append((opened[name].pop(), len(clean)))
        else:
            raise SpanError(f"</{name}> at character {match.start()} closes nothing: put <{name}> before it")
    clean += text[cursor:]
    for name, starts in opened.items():
        if starts:
            after = clean[starts[-1] :][:40]
            raise SpanError(f"<{name}> is never closed: put a </{name}> after what it is for, in {after!r}")
    return clean, {name: sorted(found) for name, found in ranges.items()}


def _characters(selector: Any, text: Text, occurrence: Occurrence) -> list[Range]:
    """Character ranges of `text.text`, at least one."""
    match selector:
        case Chars(first, last):
            start, stop, _ = slice(first, last).indices(len(text.text))
            if start >= stop:
                raise Missing(f"{selector} is empty: the text has {len(text.text)} characters")
            return [(start, stop)]
        case Tag(name):
            if not (tagged := list(text.tagged.get(name, ()))):
                raise Missing(f"no <{name}>…</{name}> reached the text {_beginning(text)}")
            return tagged
        case Role():
            return _role(selector, text)
        case str() | Substring():
            needle = selector if isinstance(selector, str) else selector.text
            if not needle:
                raise SpanError("an empty text is no selector: give the words to emphasise")
            pattern, shown = re.compile(re.escape(needle)), repr(needle)
        case re.Pattern() | Regex():
            raw = selector.pattern if isinstance(selector, Regex) else selector
            try:
                pattern = re.compile(raw)
                pattern.search("")
            except (re.error, TypeError) as error:
                raise SpanError(f"{raw!r} is not a regular expression for text: {error}") from error
            needle, shown = "", f"the expression {pattern.pattern!r}"
        case _:
            raise SpanError(
                f"{selector!r} is not a selector; allowed: a str, a re.Pattern, or Substring, Regex, Role, "
                "Chars, Tokens of steerlens.encode"
            )
    found = list(_matches(pattern, text))
    if not found:
        raise Missing(f"{shown} is not in the prompt; {_nearest(needle, text)}")
    own = selector.occurrence if isinstance(selector, Substring | Regex) else None
    return _pick(found, occurrence if own is None else own, shown)


def _matches(pattern: re.Pattern[str], text: Text) -> Iterator[Range]:
    group: str | int = "span" if "span" in pattern.groupindex else min(pattern.groups, 1)
    for _, start, stop in text.contents:
        for match in pattern.finditer(text.text[start:stop]):
            a, b = match.span(group)
            if a < b:
                yield start + a, start + b


def _pick(found: list[Range], occurrence: Any, shown: str) -> list[Range]:
    match occurrence:
        case "all":
            return found
        case "only" if len(found) > 1:
            raise SpanError(
                f"{shown} occurs {len(found)} times, at characters {[a for a, _ in found]}: say which with "
                'occurrence="all", "first", "last" or an index'
            )
        case "first" | "only":
            return found[:1]
        case "last":
            return found[-1:]
        case int() if not isinstance(occurrence, bool):
            if -len(found) <= occurrence < len(found):
                return [found[occurrence]]
            raise Missing(f"{shown} occurs {len(found)} times: there is no occurrence={occurrence}")
    raise SpanError(f'occurrence={occurrence!r}; allowed: "all", "first", "last", "only" or an integer')


def _role(selector: Role, text: Text) -> list[Range]:
    if not text.chat:
        raise Missing(f"{selector}: the row {_beginning(text)} is plain text; give messages, or chat=True")
    found = []
    for role, start, stop in text.contents:
        content = text.text[start:stop]
        # White space here may be part of a token of the template, which must not be selected with it.
        a, b = start + len(content) - len(content.lstrip()), start + len(content.rstrip())
        if role == selector.name and a < b:
            found.append((a, b))
    if not found:
        roles = list(dict.fromkeys(role for role, _, _ in text.contents))
        hint = nearest(selector.name, roles)
        raise Missing(f"no text of role {selector.name!r} in the chat{hint}; it has {roles}")
    if selector.index is None:
        return found
    if not -len(found) <= selector.index < len(found):
        raise Missing(f"{selector}: the chat has {len(found)} messages of that role")
    return [found[selector.index]]


def _nearest(needle: str, text: Text) -> str:
    """The most similar piece of the contents, as words for an error message."""
    needle = needle[:80]
    # Windows begin at words (in scripts without spaces at each character) and end with a whole word.
    window = rf"(?s)(?=((?:\b\w|[^\x00-\x7f]).{{0,{max(len(needle) - 1, 0)}}}(?:(?<=\w)[a-zA-Z0-9]*)?))"
    windows = {w: None for _, start, stop in text.contents for w in re.findall(window, text.text[start:stop])}
    # difflib alone would take minutes for a book: it sees the windows that share most pairs of letters.
    pairs = set(pairwise(needle))
    near = heapq.nlargest(100, windows, key=lambda w: len(pairs & set(pairwise(w))))
    close = difflib.get_close_matches(needle, near, n=1, cutoff=0.35) if needle else []
    return f"the nearest text is {close[0]!r}" if close else f"the text is {_beginning(text)}"


def _beginning(text: Text) -> str:
    return repr(text.text if len(text.text) <= 80 else text.text[:79] + "…")
