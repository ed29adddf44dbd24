"""A loaded model with methods: prompts in, texts out, unsteered and steered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steerlens.errors import SpanError
from steerlens.heads import Heads

if TYPE_CHECKING:
    from steerlens.methods.base import Method
    from steerlens.recipe import Recipe

_PYTHON_ONLY = ', or on_missing="ignore"'
_ROW = re.compile(r"^(?:row \d+(?:, group '[^']*')?: )+")


@dataclass(frozen=True)
class Row:
    """One prompt: a text or a chat, what to emphasise in it, and why it cannot be run, if it cannot."""

    index: int
    prompt: Any
    emphasize: tuple[str, ...] = ()
    error: str | None = None


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

        needed = {group: m.name for m in self.methods for group in m.needs}
        for row in rows:
            if "emphasis" in needed and not row.emphasize:
                raise SpanError(
                    f"{needed['emphasis']} needs something to emphasise: give --emphasize TEXT, "
                    "or 'emphasize' in the row"
                )
        emphasize = [list(row.emphasize) for row in rows] if any(row.emphasize for row in rows) else None
        try:
            inputs, spans = encode(
                self.tokenizer,
                [row.prompt for row in rows],
                emphasize,
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
