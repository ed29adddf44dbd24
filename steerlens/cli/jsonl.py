"""Prompt files in, result files out: a finished batch is on the disk, and a stopped run can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from steerlens import files
from steerlens.cli.guard import UsageError
from steerlens.cli.session import PLACEHOLDERS, Answer, Row
from steerlens.errors import nearest

_KEYS = ("prompt", "messages", "emphasize", *PLACEHOLDERS, "groups")


def read_texts(path: Path, option: str) -> list[str]:
    """The texts of a JSONL file: per line a JSON text, or an object with the text `text`.

    Raises:
        UsageError: naming the option, the file and the line.
    """
    try:
        lines = files.here_or_shipped(str(path)).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{option} {path} cannot be read: {why}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise UsageError(f"{option} {path}:{number}: not JSON: {problem}") from None
        text = data.get("text") if isinstance(data, dict) else data
        if not isinstance(text, str) or not text.strip() or _halves(text):
            raise UsageError(
                f"{option} {path}:{number}: {line[:60]!r} holds no text; each line is a JSON text, or an object with "
                "'text'"
            )
        found.append(text)
    if not found:
        raise UsageError(f"{option} {path} is empty; it needs one JSON text per line")
    return found


def read_rows(path: Path, emphasize: Sequence[str], groups: Mapping[str, Sequence[str]]) -> tuple[list[Row], str]:
    """The rows of a JSONL file and its digest; what is wrong with a line is kept as its row's error.

    Args:
        path: one JSON object per line.
        emphasize: for rows that say nothing themselves.
        groups: texts per span group, the same.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--prompt-file {path} cannot be read: {error.strerror or error}") from None
    lines = [line for line in content.splitlines() if line.strip()]
    if not lines:
        raise UsageError(
            f"--prompt-file {path} is empty; it needs one JSON object per line with 'prompt' or 'messages'"
        )
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return [_row(index, line, tuple(emphasize), groups) for index, line in enumerate(lines)], digest


def _row(index: int, line: bytes, emphasize: tuple[str, ...], groups: Mapping[str, Sequence[str]]) -> Row:
    try:
        data = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as problem:
        return Row(index, None, error=f"not JSON: {problem}")
    if not isinstance(data, dict):
        shown = line[:60].decode(errors="replace")
        return Row(index, None, error=f"a JSON object with 'prompt' or 'messages' is needed, not {shown}")
    given = [key for key in ("prompt", "messages") if key in data]
    if len(given) != 1:
        seen = "both" if given else f"the keys {', '.join(map(repr, data)) or 'none'}"
        hint = "" if given else next(filter(None, (nearest(key, _KEYS) for key in data)), "")
        error = f"either 'prompt' or 'messages' is needed, not {seen}{hint}"
        return Row(index, data.get("prompt"), error=error)
    prompt = data[given[0]]
    if _halves(data):
        return Row(index, prompt, error="the text holds half of a surrogate pair, which is no character")
    wrong = _wrong_chat(prompt) if given == ["messages"] else _wrong_text(prompt)
    own = data.get("groups", {})
    if not isinstance(own, dict):
        return Row(index, prompt, error=f"'groups' is {own!r:.80}; it must be an object of texts per span group")
    named = {("emphasis" if key == "emphasize" else key): data[key] for key in _KEYS[2:-1] if data.get(key) is not None}
    texts: dict[str, Sequence[str]] = {"emphasis": emphasize, **groups}
    for name, value in {**own, **named}.items():
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(text, str) and text for text in listed):
            error = f"{_key(name, data)!r} is {value!r:.80}; it must be a text or a list of texts, not empty"
            return Row(index, prompt, error=error)
        texts[name] = listed
    if wrong is not None:
        return Row(index, prompt, error=wrong)
    return Row.of(index, prompt, texts.pop("emphasis"), texts)


def _key(group: str, data: Mapping[str, Any]) -> str:
    """What a row calls a span group."""
    return "emphasize" if group == "emphasis" and "emphasize" in data else group


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _halves(data: Any) -> bool:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _wrong_text(prompt: Any) -> str | None:
    return (
        None
        if isinstance(prompt, str) and prompt.strip()
        else f"'prompt' is {prompt!r:.80}; it must be a text, not empty"
    )


def _wrong_chat(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"'messages' is {messages!r:.80}; it must be a list of messages, not empty"
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            return f"{message!r:.80} is not a message; it must be an object with the texts 'role' and 'content'"
    return None


class Results:
    """The output file, and beside it what made it, so that `--resume` never mixes two runs.

    Args:
        path: the JSONL file; `PATH.run.json` beside it holds the settings.
        settings: everything that shapes the results, as plain JSON types.
        resume: go on with a file that the same settings made.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.beside = path.with_name(f"{path.name}.run.json")
        self.done: dict[int, bool] = {}
        self._file: BinaryIO | None = None
        self._settings = settings = json.loads(json.dumps(settings))
        if not path.parent.is_dir():
            raise UsageError(f"--output {path}: there is no folder {path.parent}")
        if path.exists() and not resume:
            raise UsageError(f"--output {path} exists; go on with it by --resume, or name another file")
        self._continues = path.exists()
        if self._continues:
            self._check(settings)
            self._read()

    def _check(self, settings: dict[str, Any]) -> None:
        try:
            before = json.loads(self.beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UsageError(
                f"--resume: {self.beside} is missing or broken, so nothing says what made {self.path}; "
                "name another --output"
            ) from None
        changed = [key for key in settings if not isinstance(before, dict) or before.get(key) != settings[key]]
        if changed:
            detail = "; ".join(f"{key} was {before.get(key)!r:.80}, is {settings[key]!r:.80}" for key in changed)
            raise UsageError(
                f"--resume: {self.path} was made with other settings: {detail}; use the same, or another --output"
            )

    def _read(self) -> None:
        content = self.path.read_bytes()
        # what follows the last line end is a line that a killed run did not finish
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        size = 0
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self.done[int(record["index"])] = "error" in record
            except (ValueError, TypeError, KeyError):
                if number < len(lines):
                    raise UsageError(
                        f"--resume: line {number} of {self.path} is no result of a run; start anew"
                    ) from None
                break
            size += len(line)
        if size < len(content):
            os.truncate(self.path, size)

    def add(self, answers: Sequence[Answer]) -> None:
        """Append answers that are not there yet and see them onto the disk."""
        if self._file is None:
            self._file = self._open()
        new = [answer for answer in answers if answer.row.index not in self.done]
        self._file.write("".join(f"{record(answer)}\n" for answer in new).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done |= {answer.row.index: answer.error is not None for answer in new}

    def records(self) -> list[dict[str, Any]]:
        """All results by index, without it."""
        found = [json.loads(line) for line in self.path.read_bytes().splitlines()]
        return [{k: v for k, v in r.items() if k != "index"} for r in sorted(found, key=lambda r: int(r["index"]))]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> BinaryIO:
        # only now, with a first result to write: a run that failed before leaves nothing behind
        if self._continues:
            return self.path.open("ab")
        files.write(self.beside, json.dumps(self._settings, indent=1) + "\n")
        return self.path.open("xb")


def record(answer: Answer) -> str:
    """One line of a result file, without its end."""
    return to_json({"index": answer.row.index, **answer.to_dict()})


def to_json(data: Any) -> str:
    """JSON with readable letters, or escaped where text holds half a character that UTF-8 cannot hold."""
    return json.dumps(data, ensure_ascii=_halves(data))
