"""Documents as tokens: what is encoded of each, why one cannot be run, and rows padded to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from steerlens.evals.doc import Doc

import steerlens
from steerlens.errors import SpanError
from steerlens.passes import Prompt
from steerlens.spans import Spans
from steerlens.tuning.scoring import Row, continuation, reason, row_spans

if TYPE_CHECKING:
    from steerlens.evals.task import Task

CHARACTERS = 4
"""Characters of a token, where there is no tokenizer to ask."""

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Item:
    """A document as it is run.

    Attributes:
        doc: the document.
        rows: its prompt, or its prompt with each of its choices behind it; empty where there is an error.
        missing: why a span group is not there, per group.
        error: why it cannot be run at all.
    """

    doc: Doc
    rows: tuple[Row, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None

    def refused(self, groups: Sequence[str]) -> str | None:
        """Why it cannot be run by methods that need these groups, naming it; None if it can."""
        why = self.error or next((self.missing[group] for group in groups if group in self.missing), None)
        return None if why is None else f"{describe(self.doc)}: {why}"


def describe(doc: Doc) -> str:
    """What messages call a document."""
    return f"{doc.task}, document {doc.doc_id} of seed {doc.seed}"


class Encoder:
    """Encodes documents of a task for one model.

    Args:
        tokenizer: of the model.
        limit: tokens that the model has positions for; None for no limit.
    """

    def __init__(self, tokenizer: Any, limit: int | None) -> None:
        self.tokenizer, self.limit = tokenizer, limit

    def item(self, task: Task, doc: Doc, groups: Sequence[str]) -> Item:
        """The document's rows; what keeps it from being run is said in the item."""
        try:
            prompt, missing = self.prompt(task, doc, (), groups)
            rows = self._choices(task, doc, prompt) if task.output == "choices" else (prompt,)
            self._check_room(rows, 0 if task.output == "choices" else task.max_new_tokens)
        # templates and tokenizers run what the task's data holds; whatever they say is about this document
        except Exception as error:
            return Item(doc, error=why(error))
        return Item(doc, rows, missing)

    def turn(self, task: Task, doc: Doc, texts: Sequence[str], groups: Sequence[str]) -> Row:
        """The prompt that follows the model's answers, one per turn so far.

        Raises:
            SpanError: for a group that is not there, or too long a prompt.
        """
        row, missing = self.prompt(task, doc, texts, groups)
        if missing:
            raise SpanError(next(iter(missing.values())))
        self._check_room([row], task.max_new_tokens)
        return row

    def prompt(self, task: Task, doc: Doc, texts: Sequence[str], groups: Sequence[str]) -> tuple[Row, dict[str, str]]:
        """A prompt behind `texts` turns as a row, and why groups of it are missing."""
        found: dict[str, list[Any]] = {}
        missing = {}
        for group in groups:
            if selectors := doc.example.groups.get(group):
                found[group] = [list(selectors)]
            else:
                missing[group] = f"it has no span group {group!r}"
        given = messages(doc, texts)
        if isinstance(given, str) and not given.strip():
            raise SpanError("its prompt is empty")
        try:
            inputs, spans = steerlens.encode(self.tokenizer, [given], groups=found, chat=task.chat)
        except SpanError:
            # the document can be run wherever the group that is missing is not needed
            inputs, spans = steerlens.encode(self.tokenizer, [given], chat=task.chat)
            ranges = {}
            for group, selectors in found.items():
                try:
                    one = steerlens.encode(self.tokenizer, [given], groups={group: selectors}, chat=task.chat)[1]
                    ranges[group] = one.groups[group]
                except SpanError as error:
                    missing[group] = reason(error)
            spans = Spans(ranges)
        missing |= {group: f"span group {group!r} is empty" for group, rows in spans.groups.items() if not rows[0]}
        ids = inputs["input_ids"][0].tolist()
        return Row(ids, len(ids), {group: rows[0] for group, rows in spans.groups.items()}), missing

    def _choices(self, task: Task, doc: Doc, prompt: Row) -> tuple[Row, ...]:
        if not doc.choices:
            raise SpanError("it has no choices")
        text = doc.example.prompt if isinstance(doc.example.prompt, str) and not task.chat else None
        rows = []
        for choice in doc.choices:
            tokens = continuation(self.tokenizer, prompt.ids, text, choice)
            if not tokens:
                raise SpanError(f"choice {choice!r} has no tokens")
            rows.append(Row([*prompt.ids, *tokens], prompt.prompt, prompt.groups))
        return tuple(rows)

    def _check_room(self, rows: Sequence[Row], new: int) -> None:
        longest = max(len(row.ids) for row in rows)
        if self.limit is not None and longest + new > self.limit:
            what = f"{longest} tokens" + (f" and {new} to generate" if new else "")
            raise SpanError(f"{what}, the model has room for {self.limit}; leave it out or make it shorter")


def messages(doc: Doc, texts: Sequence[str]) -> str | Chat:
    """The prompt of a document behind the model's answers, one per turn so far."""
    prompt = doc.example.prompt
    if isinstance(prompt, str) and not doc.turns:
        return prompt
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    for text, turn in zip(texts, doc.turns, strict=False):
        chat += [{"role": "assistant", "content": text}, {"role": "user", "content": turn}]
    return chat


def length(tokenizer: Any, task: Task, doc: Doc) -> int:
    """Tokens of the longest prompt of a document, its longest choice included; for planning.

    Args:
        tokenizer: of the model; None gives an estimate from the number of characters.
        task: its task.
        doc: the document. The answers of earlier turns count as `max_new_tokens`.
    """
    if tokenizer is not None:
        room = Encoder(tokenizer, None)
        item = room.item(task, doc, ())
        if item.error is None:
            later = sum(len(tokenizer(turn, add_special_tokens=False)["input_ids"]) for turn in doc.turns)
            return max(len(row.ids) for row in item.rows) + later + len(doc.turns) * task.max_new_tokens
    prompt = doc.example.prompt
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    characters = sum(map(len, [*texts, *doc.turns])) + max(map(len, doc.choices), default=0)
    return -(-characters // CHARACTERS) + len(doc.turns) * task.max_new_tokens


def why(error: Exception) -> str:
    """What an error says, without the advice to callers in Python."""
    if isinstance(error, SpanError):
        return reason(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


class Batch:
    """Rows padded on the left.

    Args:
        rows: prompts, with what follows them.
        pad: token id of the pads.
        device: of the model.
        width: columns; the longest row's unless given.

    Attributes:
        inputs: `input_ids` and `attention_mask`, [B, T] int64.
        spans: token ranges per group and row, in padded columns.
        prompts: prompt tokens per row.
    """

    def __init__(self, rows: Sequence[Row], pad: int, device: Any, width: int | None = None) -> None:
        self.rows, self.pad, self.device = list(rows), pad, device
        self.width = width or max(len(row.ids) for row in rows)
        self.pads = [self.width - len(row.ids) for row in rows]
        padded = [[pad] * n + row.ids for n, row in zip(self.pads, rows, strict=True)]
        mask = [[0] * n + [1] * len(row.ids) for n, row in zip(self.pads, rows, strict=True)]
        self.inputs = {
            "input_ids": torch.tensor(padded, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }
        self.prompts = [row.prompt for row in rows]

    @cached_property
    def spans(self) -> Spans:
        """Token ranges per group and row."""
        return row_spans(self.rows, self.pads)

    @cached_property
    def place(self) -> Prompt:
        """Where its prompts lie."""
        real, cpu = self.inputs["attention_mask"].bool(), torch.device("cpu")
        return Prompt.start(self.width, real, len(self.rows), cpu, tuple(self.prompts))

    def select(self, indices: Sequence[int]) -> Batch:
        """Some of its rows in the same columns."""
        return Batch([self.rows[i] for i in indices], self.pad, self.device, self.width)
