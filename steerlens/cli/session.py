"""A loaded model with methods: prompts in, texts out, unsteered and steered."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steerlens.errors import SpanError
from steerlens.heads import Heads

if TYPE_CHECKING:
    from steerlens.methods.base import Method
    from steerlens.recipe import Recipe

_PYTHON_ONLY = ', or on_missing="ignore"'
LISTED = ("documents", "demos")
"""Span groups whose texts are parts of a prompt in their order; a repeated text is each time another part."""
PLACEHOLDERS = (*LISTED, "query")
_BETWEEN = "\n\n"
_OPTIONS = {
    "emphasis": "--emphasize TEXT",
    "documents": "--documents F.jsonl",
    "demos": "--demos F.jsonl",
    "query": "--query TEXT",
}
_ROW = re.compile(r"^row \d+(?:, |: )")


def option(group: str) -> str:
    """The option that gives the texts of a span group."""
    return _OPTIONS.get(group, f"--span {group}=TEXT")


@dataclass(frozen=True)
class Row:
    """One prompt: a text or a chat, what to emphasise in it, and why it cannot be run, if it cannot.

    Attributes:
        groups: texts of further span groups, looked up in the prompt.
    """

    index: int
    prompt: Any
    emphasize: tuple[str, ...] = ()
    error: str | None = None
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, index: int, prompt: Any, emphasize: Sequence[str], groups: Mapping[str, Sequence[str]]) -> Row:
        """A row whose prompt is built from its groups where it says `{documents}`, `{demos}` or `{query}`."""
        texts = {name: tuple(mine) for name, mine in groups.items() if mine}
        return cls(index, _filled(prompt, texts), tuple(emphasize), groups=texts)

    def selectors(self, group: str) -> list[Any]:
        """What `steerlens.encode` looks for."""
        from steerlens.encoding import Substring

        seen: Counter[str] = Counter()
        found: list[Any] = []
        for text in self.groups.get(group, ()):
            occurrence: Any = seen[text] if group in LISTED else "last" if group == "query" else None
            found.append(Substring(text, occurrence))
            seen[text] += 1
        return found


def _filled(prompt: Any, groups: Mapping[str, Sequence[str]]) -> Any:
    """A text or chat with the texts of its groups in place of their placeholders, parts with a blank line between."""
    if isinstance(prompt, str):
        parts = {name: _BETWEEN.join(groups[name]) for name in PLACEHOLDERS if name in groups}
        return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], found[0]), prompt)
    if not isinstance(prompt, list):
        return prompt
    return [{**message, "content": _filled(message["content"], groups)} for message in prompt]


@dataclass(frozen=True)
class Sampling:
    """How to generate; temperature 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What a row came to: the texts, or an error."""

    row: Row
    steered: str | None = None
    baseline: str | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As in `run --json`: prompt, baseline where compared, steered; or prompt and error."""
        if self.error is not None:
            return {"prompt": self.row.prompt, "error": self.error}
        sides = {"baseline": self.baseline} if self.baseline is not None else {}
        return {"prompt": self.row.prompt, **sides, "steered": self.steered}


class Session:
    """Runs prompts on one model.

    Args:
        model, tokenizer: as loaded.
        methods: in order of composition.
        recipe: checked against the model, if given.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        methods: Sequence[Method],
        *,
        recipe: Recipe | None = None,
        backend: str = "auto",
        chat: bool = False,
        system: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        from steerlens import decoder

        self.model, self.tokenizer, self.methods, self.backend = model, tokenizer, list(methods), backend
        self.chat, self.system = chat or system is not None, system
        self.sampling = sampling or Sampling()
        known, _ = decoder.read(decoder.find(model))
        if recipe is not None:
            recipe.model_copy(update={"methods": self.methods[: len(recipe.methods)]}).check(known)
        for method in self.methods:
            if isinstance(heads := getattr(method, "heads", None), Heads):
                heads.resolve(known)
        self.limit = getattr(model.config, "max_position_embeddings", None)

    def answer(self, rows: Sequence[Row], *, compare: bool = False, seed_offset: int = 0) -> list[Answer]:
        """The answers of a batch, in its order; a row that cannot be encoded gets an error."""
        errors = {row.index: row.error for row in rows if row.error is not None}
        good = []
        for row in rows:
            if row.index not in errors:
                try:
                    self.encode([row])
                    good.append(row)
                except SpanError as error:
                    errors[row.index] = str(error)
        answers = {}
        if good:
            sides = self.sides(good, compare=compare, seed_offset=seed_offset)
            baseline = sides.get("baseline", [None] * len(good))
            for row, before, after in zip(good, baseline, sides["steered"], strict=True):
                answers[row.index] = Answer(row, after, before)
        return [answers.get(row.index) or Answer(row, error=errors[row.index]) for row in rows]

    def sides(
        self,
        rows: Sequence[Row],
        *,
        compare: bool = False,
        seed_offset: int = 0,
        streamer: Any = None,
        before: Any = None,
    ) -> dict[str, list[str]]:
        """Texts per side, unsteered first where compared; the seed starts anew on each side.

        Args:
            rows: prompts that `encode` takes.
            compare: run unsteered too.
            seed_offset: added to the seed, so that batches differ.
            streamer: receives the tokens as they come (one row).
            before: called with the name of each side before it starts.
        """
        from steerlens import steer

        inputs, spans = self.encode(rows)
        found: dict[str, list[str]] = {}
        for side in ("baseline", "steered") if compare else ("steered",):
            if before is not None:
                before(side)
            if side == "baseline":
                found[side] = self._generate(inputs, seed_offset, streamer)
                continue
            with steer(self.model, self.methods, spans, backend=self.backend):
                found[side] = self._generate(inputs, seed_offset, streamer)
        return found

    def encode(self, rows: Sequence[Row]) -> tuple[Any, Any]:
        """Inputs and spans of some rows.

        Raises:
            SpanError: for a row without a span that a method needs, or with too many tokens for the model.
        """
        from steerlens import encode

        for method in self.methods:
            for group in method.needs:
                if not all(row.emphasize if group == "emphasis" else row.groups.get(group) for row in rows):
                    what = "something to emphasise" if group == "emphasis" else f"the span group {group!r}"
                    key = "emphasize" if group == "emphasis" else group
                    held = repr(key) if group in _OPTIONS else f"'groups': {{{group!r}: […]}}"
                    others = sorted({repr(name) for row in rows for name in row.groups if name != group})
                    given = f"; given: {', '.join(others)}" if others else ""
                    raise SpanError(f"{method.name} needs {what}: give {option(group)}, or {held} in the row{given}")
        names = sorted({name for row in rows for name in row.groups})
        emphasize = [list(row.emphasize) for row in rows] if any(row.emphasize for row in rows) else None
        try:
            inputs, spans = encode(
                self.tokenizer,
                [row.prompt for row in rows],
                emphasize,
                groups={name: [row.selectors(name) for row in rows] for name in names},
                chat=self.chat,
                device=self.model.device,
                system=self.system,
            )
        except SpanError as error:
            text = str(error).replace(_PYTHON_ONLY, "")
            raise SpanError(_ROW.sub("", text) if len(rows) == 1 else text) from error
        width = int(inputs["attention_mask"].sum(-1).max())
        if self.limit is not None and width >= self.limit:
            raise SpanError(
                f"the prompt has {width} tokens, the model has room for {self.limit}, the answer included; shorten it"
            )
        return inputs, spans

    def _generate(self, inputs: Any, seed_offset: int, streamer: Any) -> list[str]:
        import torch

        width = inputs["input_ids"].shape[1]
        room = (
            self.sampling.max_new_tokens
            if self.limit is None
            else self.limit - int(inputs["attention_mask"].sum(-1).max())
        )
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.sampling.temperature > 0:
            options = {"do_sample": True, "temperature": self.sampling.temperature}
        torch.manual_seed(self.sampling.seed + seed_offset)
        sequences = self.model.generate(
            **inputs,
            **options,
            num_beams=1,
            max_new_tokens=min(self.sampling.max_new_tokens, room),
            streamer=streamer,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return [str(text) for text in self.tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)]
