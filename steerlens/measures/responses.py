"""Responses: prompts with the answers behind them, as one forward that shows the rows which produce the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from steerlens import decoder
from steerlens.encoding import encode
from steerlens.examples import Example, ExampleError
from steerlens.measures.base import MeasureError, batches, context, forward, greedy, require
from steerlens.spans import Range
from steerlens.wrapping import unwrap

if TYPE_CHECKING:
    from steerlens.recording import Record

MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Forced:
    """A batch of prompts, each with its response but for the last token; left-padded, so that responses end together.

    Row `b` produces its response in its last `len(responses[b])` columns.

    Attributes:
        ids: token ids, int64 [B, T]; mask: 1 for tokens, 0 for pads, int64 [B, T].
        first: column of each row's first token.
        responses: token ids per row, never empty.
        groups: token ranges per span group and row, in padded columns.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    first: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    groups: Mapping[str, tuple[tuple[Range, ...], ...]]

    @property
    def most(self) -> int:
        """Tokens of the longest response."""
        return max(map(len, self.responses))

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        groups: Mapping[str, Sequence[Sequence[Range]]],
        *,
        pad: int = 0,
        device: torch.device | str | None = None,
    ) -> Forced:
        """From token ids without pads, and ranges of the prompts in tokens."""
        rows = [[*prompt, *response[:-1]] for prompt, response in zip(prompts, responses, strict=True)]
        width = max(map(len, rows))
        first = tuple(width - len(row) for row in rows)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = (torch.arange(width)[None] >= torch.tensor(first)[:, None]).long().to(ids.device)
        moved = {
            name: tuple(tuple((a + at, b + at) for a, b in mine) for at, mine in zip(first, ranges, strict=True))
            for name, ranges in groups.items()
        }
        return cls(ids, mask, first, tuple(tuple(response) for response in responses), moved)

    def run(self, model: Any, keep: int | None = None) -> Any:
        """The model's output for the batch, without a cache.

        Args:
            model: a transformers model.
            keep: rows at the end whose logits are needed, where the model can leave out the others.
        """
        return forward(model, self.ids, self.mask, keep)

    def mass(self, model: Any, groups: Mapping[str, Sequence[Sequence[Range]]]) -> Record:
        """A record of the attention mass on column ranges per row, of the last `most` query rows.

        A row with a shorter response has rows of its prompt before those that produce the response.
        """
        from steerlens.recording import capture
        from steerlens.spans import Spans

        spans = Spans({name: tuple(tuple(mine) for mine in rows) for name, rows in groups.items()})
        shared = decoder.read(decoder.find(unwrap(model)))[0].keys_of
        with torch.no_grad(), capture(model, spans, stats=("mass",), rows=self.most) as record:
            # Layers that share keys leave out the rows whose logits are left out.
            self.run(model, None if shared else 1)
        return record


def tokens(ranges: Sequence[Range]) -> set[int]:
    """The columns that ranges cover."""
    return {column for start, stop in ranges for column in range(start, stop)}


def ranges(columns: set[int]) -> tuple[Range, ...]:
    """Columns as ranges."""
    return tuple((column, column + 1) for column in sorted(columns))


def forced(
    measure: str,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    groups: Sequence[str],
    teacher_forced: bool,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> Iterator[Forced]:
    """Examples in batches, each with its response: the model's own greedy one, or its answer.

    A response ends before the end-of-sequence token. Prompts that the model answers with nothing are left out.

    Args:
        measure: what error messages call it.
        model: a transformers model.
        tokenizer: of the model.
        examples: prompts with the groups, and with answers where these are forced.
        groups: span groups that each example needs.
        teacher_forced: the examples' answers instead of the model's.
        max_new_tokens: longest response of the model; shorter where it has no room.
        batch_size: examples per forward.
        advance: told how many examples are done.

    Raises:
        ExampleError: for an example without a group or an answer, or one that is too long.
        MeasureError: if every response is empty.
    """
    require(measure, examples, answer=teacher_forced, groups=groups)
    any_response, number = False, 0
    for rows, inputs, spans in batches(model, tokenizer, examples, batch_size, groups=groups, room=1):
        pads = [int(n) for n in (inputs["attention_mask"] == 0).sum(-1)]
        prompts = [row[n:] for row, n in zip(inputs["input_ids"].tolist(), pads, strict=True)]
        if teacher_forced:
            responses = [answer_ids(tokenizer, row, ids) for row, ids in zip(rows, prompts, strict=True)]
        else:
            responses = greedy(model, tokenizer, inputs, max_new_tokens)
        check_room(model, prompts, responses, number)
        number += len(rows)
        kept = [i for i, response in enumerate(responses) if response]
        if kept:
            any_response = True
            found = {
                name: [[(a - pads[i], b - pads[i]) for a, b in spans.groups[name][i]] for i in kept] for name in groups
            }
            yield Forced.of(
                [prompts[i] for i in kept],
                [responses[i] for i in kept],
                found,
                pad=_pad(tokenizer),
                device=inputs["input_ids"].device,
            )
        advance(len(rows))
    if not any_response:
        raise MeasureError(
            f"{measure}: the model answered none of the {len(examples)} prompts with any text; give answers and "
            "--teacher-forced"
        )


def check_room(model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], before: int) -> None:
    """Raise `ExampleError` for a prompt that is too long with its response; `before` examples came earlier."""
    limit = context(model)
    for at, (prompt, response) in enumerate(zip(prompts, responses, strict=True), before + 1):
        if limit is not None and len(prompt) + len(response) > limit:
            raise ExampleError(
                f"example {at} has {len(prompt) + len(response)} tokens with its answer; the model has room for "
                f"{limit}: give shorter prompts (--length)"
            )


def answer_ids(tokenizer: Any, example: Example, prompt: Sequence[int]) -> list[int]:
    """The tokens of an example's answer behind its prompt's tokens; a text gets a space between the two."""
    answer = example.answer or ""
    if isinstance(example.prompt, str):
        space = "" if example.prompt[-1:].isspace() else " "
        whole = encode(tokenizer, f"{example.prompt}{space}{answer}")[0]["input_ids"][0].tolist()
        if whole[: len(prompt)] == list(prompt) and len(whole) > len(prompt):
            return whole[len(prompt) :]
        answer = space + answer
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"])


def _pad(tokenizer: Any) -> int:
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
