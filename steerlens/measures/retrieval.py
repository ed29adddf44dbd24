"""Retrieval heads: they copy the answer's tokens from where it stands in the prompt (Wu et al. 2024, arXiv 2404.15574).

The needle's place is known from the example's group "gold", never searched for by shared tokens, and every tokenizer
will do. The published code counts tokens (and repeats again), the paper's formula takes the set of copied tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import steerlens
from steerlens.encoding import Chars, Regex, Substring
from steerlens.examples import Example
from steerlens.measures.base import Head, HeadScores, MeasureError, batches, context, describe, greedy, require

ACCEPTED = 0.5
STRONG = 0.1
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese: no spaces between words, so that each character counts as one."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_LETTER = rf"[^\W{_UNSPACED}]"


def copy_scores(
    keys: torch.Tensor, produced: Sequence[int], ids: Sequence[int], needle: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count and set scores of some heads in one trial.

    A row copies if its most attended key lies in the needle and holds the token that the row produced.

    Args:
        keys: most attended key of each row that produced a token, [H, R].
        produced: the R tokens.
        ids: tokens of the prompt, by key.
        needle: keys of the needle.

    Returns:
        [H] copying rows per needle token (above 1 where the needle is copied twice), and [H] the share of the
        needle's distinct tokens that are copied.
    """
    inside = torch.zeros(max(len(ids), int(keys.max()) + 1), dtype=torch.bool)
    inside[list(needle)] = True
    held = torch.full((len(inside),), -1)
    held[: len(ids)] = torch.as_tensor(ids)
    copied = inside[keys] & (held[keys] == torch.as_tensor(produced))
    distinct = {ids[key] for key in needle}
    found = torch.stack([copied[:, [token == t for t in produced]].any(-1) for token in distinct])
    return copied.sum(-1) / len(needle), found.sum(0) / len(distinct)


def recall(reference: str, response: str) -> float:
    """ROUGE-1 recall: the share of the reference's words, with repeats, in the response.

    Words are lower-cased runs of letters and digits, as in rouge_score without its stemmer, and the single characters
    of scripts without spaces.
    """
    wanted, given = (Counter(_WORD.findall(text.lower())) for text in (reference, response))
    if not wanted:
        return float(reference.strip() in response)
    return (wanted & given).total() / wanted.total()


def measure(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    count: bool = False,
    batch_size: int = 8,
    max_new_tokens: int = 50,
    advance: Callable[[int], None] = lambda done: None,
) -> HeadScores:
    """Score heads by how much of the needle they copy, one value per accepted trial.

    Each example is a trial: the model answers greedily, up to an end-of-text token or a newline. A trial is
    accepted if more than half of the words of the answer (of the needle where no answer is known) are in the response.

    Args:
        model: a transformers decoder model.
        tokenizer: its tokenizer.
        examples: with the needle as the group "gold"; where the answer stands in it, the answer is the needle.
        count: rank by the published code's count instead of the paper's set. Both are returned.
        batch_size: prompts per forward.
        max_new_tokens: longest response; shorter where the model has no room.
        advance: called with the number of finished prompts.

    Raises:
        ExampleError: for an example without "gold", or too long. MeasureError: if no trial is accepted.
    """
    require("retrieval", examples, groups=("gold",))
    names = ("count", "set") if count else ("set", "count")
    scores: dict[str, dict[Head, list[float]]] = {name: {} for name in names}
    accepted, response = 0, ""
    narrowed = [replace(example, groups={"gold": _narrow(example)}) for example in examples]
    for rows, inputs, spans in batches(model, tokenizer, narrowed, batch_size, groups=("gold",), room=1):
        with torch.no_grad(), steerlens.capture(model, stats=("argmax",), rows="last") as record:
            responses = greedy(model, tokenizer, inputs, max_new_tokens, stopping_criteria=[_Newline(tokenizer)])
        keys = {layer: record[layer].argmax.cpu() for layer in record.layers}  # type: ignore[union-attr]
        for place, row in enumerate(rows):
            produced = _line(responses[place], tokenizer)
            ids = inputs["input_ids"][place].tolist()
            needle = sorted({key for a, b in spans.groups["gold"][place] for key in range(a, b)})
            response = tokenizer.decode(produced, skip_special_tokens=True)
            reference = row.answer or tokenizer.decode([ids[key] for key in needle])
            if recall(reference, response) <= ACCEPTED:
                continue
            accepted += 1
            for layer, columns in keys.items():
                counts, sets = copy_scores(columns[place, :, : len(produced)], produced, ids, needle)
                for name, values in (("count", counts), ("set", sets)):
                    for head, value in zip(record[layer].heads, values.tolist(), strict=True):
                        scores[name].setdefault((layer, head), []).append(value)
        advance(len(rows))
    if not accepted:
        raise MeasureError(
            f"retrieval: none of {len(examples)} trials was accepted: no response held more than half of its answer "
            f"(the last was {response[:80]!r}); give prompts that the model answers, shorter ones, or another model"
        )
    found = HeadScores(
        "retrieval",
        describe(model),
        scores[names[0]],
        {names[1]: scores[names[1]]},
        {"rank": names[0], "max_new_tokens": max_new_tokens, "accept": f"ROUGE-1 recall > {ACCEPTED}"},
        {"attempted": len(examples), "accepted": accepted},
    )
    strong = sum(mean > STRONG for mean in found.means().values())
    return replace(found, summary={**found.summary, f"heads_above_{STRONG}": strong})


def lengths(model: Any, most: int = 4096) -> list[int]:
    """Four prompt lengths up to `most` tokens, or up to half of what the model has room for."""
    limit = context(model)
    top = most if limit is None else min(most, limit // 2)
    return [top * part // 4 for part in range(1, 5)]


class _Newline:
    """Stop a row at a token with a newline, as the published code does."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor(["\n" in self.tokenizer.decode([i]) for i in ids[:, -1].tolist()], device=ids.device)


def _line(produced: list[int], tokenizer: Any) -> list[int]:
    """The tokens up to the first with a newline; a batch goes on until every row has ended."""
    stop = next((place for place, token in enumerate(produced) if "\n" in tokenizer.decode([token])), len(produced))
    return produced[: stop + 1]


def _narrow(example: Example) -> tuple[Any, ...]:
    """The gold selectors, each narrowed to the answer where that stands in it."""
    answer = example.answer and re.compile(rf"(?<!{_LETTER}){re.escape(example.answer)}(?!{_LETTER})")
    found = []
    for selector in example.groups["gold"]:
        chars = isinstance(selector, Chars) and isinstance(example.prompt, str)
        text = selector.text if isinstance(selector, Substring) else selector
        if chars:
            start, stop, _ = slice(selector.start, selector.stop).indices(len(example.prompt))
            text = example.prompt[start:stop]
        last = list(answer.finditer(text))[-1:] if answer and isinstance(text, str) else []
        if not last:
            found.append(selector)
        elif chars:
            found.append(Chars(start + last[0].start(), start + last[0].end()))
        else:
            before, inside, behind = text[: last[0].start()], last[0][0], text[last[0].end() :]
            occurrence = selector.occurrence if isinstance(selector, Substring) else None
            expression = f"{re.escape(before)}({re.escape(inside)}){re.escape(behind)}"
            found.append(Regex(expression, occurrence))
    return tuple(found)
