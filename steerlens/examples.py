"""Examples: prompts with their answers and named spans, the data that heads are measured and methods tuned on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steerlens.errors import SteerlensError, nearest

KEYS = ("prompt", "messages", "answer", "alternatives", "emphasize", "groups", "key")


class ExampleError(SteerlensError, ValueError):
    """A data file with a line that is no example, or too few examples for what is asked."""

    exit_code = 2


@dataclass(frozen=True)
class Example:
    """One prompt and what is known about it.

    Attributes:
        prompt: a text, or a chat (a tuple of messages).
        answer: the right continuation, without a leading space; None where nothing needs it.
        alternatives: wrong answers that the prompt or the model's memory supports.
        groups: selectors per span group ("emphasis": what to emphasise; "gold": what holds the answer; "context":
            what the answer should rest on), looked up as by `steerlens.encode`.
        key: examples of equal key never lie in two splits; the prompt itself unless given.
        source: where it stands, "file:line", for messages.
    """

    prompt: str | tuple[Mapping[str, str], ...]
    answer: str | None = None
    alternatives: tuple[str, ...] = ()
    groups: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    key: str = ""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", json.dumps(self.prompt, sort_keys=True))

    def __str__(self) -> str:
        """Where it stands, or how it begins, for messages."""
        text = self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]
        return self.source or f"the example {text[:60]!r}"


def read(path: Path) -> list[Example]:
    """The examples of a JSONL file.

    Each line is an object with `prompt` or `messages`, and as needed `answer`, `alternatives` (texts), `emphasize`
    (a text or texts), `groups` ({name: texts}) and `key`.

    Raises:
        ExampleError: naming the file, the line and the value.
    """
    found = []
    for where, data in objects(path):
        try:
            found.append(replace(_example(data), source=where))
        except ValueError as error:
            raise ExampleError(f"{where}: {error}") from None
    if not found:
        raise ExampleError(f"{path} holds no example; it needs a JSON object per line with 'prompt' or 'messages'")
    return found


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each behind the "file:line" where it stands.

    Raises:
        ExampleError: for a file that cannot be read, or a line that is no JSON object or holds half of a character.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines would part lines at what texts may hold
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ExampleError(f"{path}:{number}: holds half of a surrogate pair, which is no character") from None
        except (ValueError, RecursionError) as error:
            raise ExampleError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(data, dict):
            raise ExampleError(f"{path}:{number}: {line[:60]!r} is not a JSON object")
        yield f"{path}:{number}", data


def read_text(path: Path) -> str:
    """What a UTF-8 file holds, without a byte order mark.

    Raises:
        ExampleError: naming the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ExampleError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def digest(examples: Sequence[Example]) -> str:
    """A fingerprint of examples in their order."""
    content = repr([(e.prompt, e.answer, e.alternatives, sorted(e.groups.items()), e.key) for e in examples])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def splits(examples: Sequence[Example], sizes: Mapping[str, int], seed: int) -> dict[str, list[Example]]:
    """Disjoint splits of the given sizes, drawn by `seed`; examples of equal key fall into one split.

    Raises:
        ExampleError: if there are not enough examples.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.key, []).append(example)
    order = sorted(groups, key=lambda key: hashlib.sha256(key.encode()).digest())
    random.Random(seed).shuffle(order)
    found: dict[str, list[Example]] = {name: [] for name in sizes}
    for name, size in sizes.items():
        while len(found[name]) < size:
            if not order:
                raise ExampleError(
                    f"{sum(sizes.values())} examples are needed ({', '.join(f'{n} {s}' for n, s in sizes.items())}), "
                    f"there are {len(examples)} of {len(groups)} distinct keys: give more, or ask for smaller splits"
                )
            found[name] += groups[order.pop()]
        del found[name][size:]
    return found


def _example(data: dict[str, Any]) -> Example:
    for key in data:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}; allowed: {', '.join(KEYS)}{nearest(key, KEYS)}")
    given = [key for key in ("prompt", "messages") if key in data]
    if len(given) != 1:
        raise ValueError(f"either 'prompt' or 'messages' is needed, not {'both' if given else 'neither'}")
    prompt = data[given[0]]
    if given == ["prompt"]:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"'prompt' is {prompt!r:.80}; it must be a text, not empty")
    else:
        valid = isinstance(prompt, list) and prompt
        if not valid or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
        ):
            raise ValueError(
                f"'messages' is {prompt!r:.80}; it must be a list of {{'role': …, 'content': …}}, not empty"
            )
        prompt = tuple(prompt)
    answer = data.get("answer")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise ValueError(f"'answer' is {answer!r:.80}; it must be a text, not empty")
    groups = data.get("groups", {})
    if not isinstance(groups, dict):
        raise ValueError(f"'groups' is {groups!r:.80}; it must be {{name: texts}}")
    named = {name: _texts(f"groups.{name}", value) for name, value in groups.items()}
    if "emphasize" in data and "emphasis" in named:
        raise ValueError("'emphasize' and 'groups.emphasis' are the same group; give one of them")
    if "emphasize" in data:
        named["emphasis"] = _texts("emphasize", data["emphasize"])
    key = data.get("key", "")
    if not isinstance(key, str):
        raise ValueError(f"'key' is {key!r:.80}; it must be a text")
    return Example(prompt, answer, _texts("alternatives", data.get("alternatives", [])), named, key)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{name!r} is {value!r:.80}; it must be a text or a list of texts, not empty")
    return tuple(texts)
