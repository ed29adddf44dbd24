"""Scores of many candidate steerings on the same examples, many candidates to a batch.

A candidate is a method or None; a forward is one prompt with its answer passed through the model once, for one
candidate. One pass over prompt and answer gives all scores: the answer is what greedy decoding would produce if and
only if each of its tokens is the most likely one behind those before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import steerlens
from steerlens import caches, decoder
from steerlens.edits import Redistribute, Reweight, Scale
from steerlens.errors import SpanError, SteerlensError
from steerlens.examples import Example, ExampleError
from steerlens.methods.base import EditMethod, PerRow
from steerlens.spans import Range, Spans
from steerlens.tuning.sharing import Sharing

Candidate = EditMethod | None
FEWEST = 3
"""So many candidates of an example share states; fewer ride with other examples."""


class ScoreError(SteerlensError, ValueError):
    """A model whose answers cannot be scored."""


@dataclass(frozen=True)
class Score:
    """What a candidate made of an example.

    Attributes:
        hit: whether greedy decoding gives the answer, 0 or 1; NaN without an answer.
        logprob: log-probability of the answer's tokens, their mean, in nats; NaN without an answer.
        entropy: of the distribution of the first generated token, in nats.
    """

    hit: float
    logprob: float
    entropy: float


@dataclass(frozen=True)
class Row:
    """An example as tokens, unpadded.

    Attributes:
        ids: prompt and answer.
        prompt: number of prompt tokens.
        groups: token ranges per span group.
    """

    ids: list[int]
    prompt: int
    groups: dict[str, tuple[Range, ...]] = field(default_factory=dict)


class Scorer:
    """Scores candidates on examples of one model.

    Args:
        model, tokenizer: as loaded.
        end: whether the EOS token is part of the answer, so that an answer that goes on is none.
        batch_size: rows of a forward.
        share: compute once what the candidates of an example have in common (see `sharing`).
        backend: as of `steerlens.steer`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        end: bool = False,
        batch_size: int = 32,
        share: bool = True,
        backend: str = "auto",
    ) -> None:
        self.model, self.tokenizer, self.batch_size, self.backend = model, tokenizer, batch_size, backend
        if end and tokenizer.eos_token_id is None:
            raise ScoreError("the tokenizer has no EOS token, so no answer ends: score how answers begin (--begins)")
        self.end = [tokenizer.eos_token_id] if end else []
        self.facts, _ = decoder.read(decoder.find(model))
        self.sharing = Sharing(model) if share else None
        self.limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
        self._rows: dict[int, tuple[Example, Row]] = {}

    def row(self, example: Example) -> Row:
        """The tokens of an example.

        Raises:
            ExampleError: if a span is missing or the example is too long for the model.
        """
        known = self._rows.get(id(example))
        if known is None:
            # the example is kept with its row, so that its id names nothing else
            known = self._rows[id(example)] = example, self._encode(example)
        return known[1]

    def _encode(self, example: Example) -> Row:
        prompt: Any = example.prompt if isinstance(example.prompt, str) else list(example.prompt)
        groups = {name: [list(found)] for name, found in example.groups.items()}
        try:
            inputs, spans = steerlens.encode(self.tokenizer, [prompt], groups=groups)
        except SpanError as error:
            raise ExampleError(f"{example}: {reason(error)}") from error
        ids = inputs["input_ids"][0].tolist()
        answer: list[int] = []
        if example.answer is not None:
            text = example.prompt if isinstance(example.prompt, str) else None
            answer = continuation(self.tokenizer, ids, text, example.answer) + self.end
        if self.limit is not None and len(ids) + len(answer) > self.limit:
            raise ExampleError(
                f"{example}: {len(ids) + len(answer)} tokens with its answer, the model has room for {self.limit}; "
                "leave it out"
            )
        return Row([*ids, *answer], len(ids), {name: rows[0] for name, rows in spans.groups.items()})

    def plan(self, pairs: Sequence[tuple[Candidate, Example]]) -> list[list[int]]:
        """Batches of indices into `pairs`: candidates of one example that share states, the rest by length."""
        groups: dict[Any, list[int]] = {}
        rest: dict[Any, list[int]] = {}
        for index, (candidate, example) in enumerate(pairs):
            begins, passes = self._begins(candidate, example), self._passes(candidate, example)
            if begins == (0, 0):
                rest.setdefault(passes, []).append(index)
            else:
                groups.setdefault((id(example), begins, passes), []).append(index)
        batches = []
        for (_, _, passes), indices in groups.items():
            if len(indices) < FEWEST:
                rest.setdefault(passes, []).extend(indices)
            else:
                batches += _cut(indices, self.batch_size)
        for indices in rest.values():
            batches += _cut(sorted(indices, key=lambda i: (len(self.row(pairs[i][1]).ids), i)), self.batch_size)
        return batches

    def _passes(self, candidate: Candidate, example: Example) -> frozenset[Any]:
        """The laws of a candidate that cost the whole batch a pass each; biases and ablations of all rows are one."""
        if candidate is None:
            return frozenset()
        row = self.row(example)
        self._check(candidate, row)
        plan = candidate.plan(self.facts, row_spans([row], [0]))
        edits = [e for found in plan.values() for e in found if isinstance(e, (Reweight, Redistribute))]
        return frozenset(
            (e.groups if isinstance(e, Redistribute) else e.keys, e.law, e.phase, e.queries)
            for e in edits
            if not isinstance(e.law, Scale)
        )

    def _begins(self, candidate: Candidate, example: Example) -> tuple[int, int]:
        """Where the candidate begins to differ from the unsteered model: layer and row."""
        if self.sharing is None or candidate is None:
            return 0, 0
        row = self.row(example)
        self._check(candidate, row)
        self.sharing.try_out(row.ids)
        return self.sharing.begins(candidate, row_spans([row], [0]), row.prompt)

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Candidate, Example]]) -> list[Score]:
        """Scores of one batch of `plan`, in its order."""
        rows = [self.row(example) for _, example in pairs]
        if self.sharing is not None and len(pairs) >= FEWEST and all(row is rows[0] for row in rows):
            begins = [self._begins(candidate, example) for candidate, example in pairs]
            first = min(layer for layer, _ in begins), min(row for _, row in begins)
            return self.sharing.run(
                rows[0].ids,
                first,
                len(pairs),
                lambda cache: self._forward(pairs, rows, cache, first[1] if cache is not None else 0),
            )
        return self._forward(pairs, rows)

    def _check(self, candidate: Candidate, row: Row) -> None:
        missing = [group for group in candidate.needs if not row.groups.get(group)] if candidate else []
        if missing:
            raise SpanError(
                f"{candidate and candidate.name} needs spans for {', '.join(missing)}; an example has none: "
                f"{self.tokenizer.decode(row.ids[: row.prompt])[:60]!r}…"
            )

    def _forward(
        self, pairs: Sequence[tuple[Candidate, Example]], rows: Sequence[Row], cache: Any = None, seen: int = 0
    ) -> list[Score]:
        """One batch; `cache` holds the first `seen` tokens of every row, where all are of one example."""
        width, device = max(len(row.ids) for row in rows), self.model.device
        pads = [width - len(row.ids) for row in rows]
        ids = torch.tensor([[self.pad] * n + row.ids for n, row in zip(pads, rows, strict=True)], device=device)
        candidates = tuple(candidate for candidate, _ in pairs)
        for candidate, row in zip(candidates, rows, strict=True):
            self._check(candidate, row)
        tail = max(len(row.ids) - row.prompt for row in rows) + 1
        arguments: dict[str, Any] = {"input_ids": ids[:, seen:], "logits_to_keep": tail, "use_cache": cache is not None}
        if cache is not None:
            arguments[caches.NAME] = cache
        if any(pads):
            mask = torch.tensor(
                [[0] * n + [1] * len(row.ids) for n, row in zip(pads, rows, strict=True)], device=device
            )
            arguments["attention_mask"] = mask
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        lengths = [row.prompt for row in rows]
        spans = row_spans(rows, pads)
        with steerlens.steer(self.model, PerRow(candidates), spans, backend=self.backend, prompt_lengths=lengths):
            logits = self.model(**arguments).logits[:, -tail:].float()
        found = []
        for row, given, (candidate, _) in zip(rows, logits, pairs, strict=True):
            given = given[len(given) - (len(row.ids) - row.prompt) - 1 :]
            if given.isnan().any():
                raise ScoreError(
                    f"{candidate or 'the unsteered model'} gives logits that are no numbers in {self.model.dtype}: "
                    "load the model with --dtype float32 or bfloat16"
                )
            found.append(self._score(row, given))
        return found

    def _score(self, row: Row, logits: torch.Tensor) -> Score:
        answer = row.ids[row.prompt :]
        logs = logits.log_softmax(-1)
        entropy = float(torch.special.entr(logs[0].exp()).sum())
        if not answer:
            return Score(float("nan"), float("nan"), entropy)
        target = torch.tensor(answer, device=logits.device)
        logprob = logs[:-1].gather(1, target[:, None]).mean()
        hit = bool((logits[:-1].argmax(-1) == target).all())
        return Score(float(hit), float(logprob), entropy)


def _cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def continuation(tokenizer: Any, ids: list[int], prompt: str | None, text: str) -> list[int]:
    """The tokens of a text behind a prompt, whose own tokens stay what they are.

    Args:
        tokenizer: of the model.
        ids: tokens of the prompt.
        prompt: the prompt where it is a plain text, which a space parts from what follows; None for a chat.
        text: what follows.
    """
    apart = prompt is not None and not prompt[-1:].isspace() and not text[:1].isspace()
    follows = f" {text}" if apart else text
    if prompt is not None:
        whole = tokenizer(prompt + follows)["input_ids"]
        if whole[: len(ids)] == ids:
            return list(whole[len(ids) :])
    return list(tokenizer(follows, add_special_tokens=False)["input_ids"])


def reason(error: SpanError) -> str:
    """What `steerlens.encode` says of its only prompt, without the row and the advice to callers in Python."""
    what = re.sub(r"^row 0(?:: |(, group ))", lambda found: "group " if found[1] else "", str(error))
    return what.partition("; give text")[0]


def row_spans(rows: Sequence[Row], pads: Sequence[int]) -> Spans:
    """The groups of rows, each moved behind its pads."""
    names = dict.fromkeys(name for row in rows for name in row.groups)
    return Spans(
        {
            name: tuple(
                tuple((start + n, stop + n) for start, stop in row.groups.get(name, ()))
                for n, row in zip(pads, rows, strict=True)
            )
            for name in names
        }
    )
