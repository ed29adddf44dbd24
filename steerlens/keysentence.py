"""What to emphasise, asked of the model itself: the sentence of a context that answers a question (AutoPASTA)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steerlens.encoding import encode
from steerlens.errors import SpanError

ASK = (
    "{context}\n\nQuestion: {question}\n\nWhich one sentence of the text above is needed most to answer the question? "
    "Copy it word for word and write nothing else.\n\nSentence:"
)
"""The request by default; `{context}` and `{question}` are filled in."""

Embed = Callable[[list[str]], Any]
"""Vectors [n, D] of n texts, for example a sentence encoder's `encode`."""

_END = re.compile(r"(?<=[.!?。！？])[\"'”’)\]]*(?=\s)|(?<=[。！？])[」』）〕】”’]*|\n+")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class KeySentence:
    """A sentence of a context.

    Attributes:
        text: the sentence as it stands there, without the white space around it.
        start, stop: where, in characters of the context.
        said: what the model said when it was asked.
        similarity: of `said` and `text`, at most 1.
    """

    text: str
    start: int
    stop: int
    said: str
    similarity: float


def key_sentences(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[str],
    questions: Sequence[str],
    *,
    ask: str = ASK,
    chat: bool = False,
    system: str | None = None,
    embed: Embed | None = None,
    split: Callable[[str], list[tuple[int, int]]] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
) -> list[KeySentence | None]:
    r"""The sentence of each context that the model names as the one that matters, to be emphasised for the answer.

        [found] = key_sentences(model, tokenizer, [context], [question])
        inputs, spans = steerlens.encode(tokenizer, f"{context}\n\n{question}", emphasize=[found.text])
        with steerlens.steer(model, PASTA(0.01, heads), spans): ...

    This is the first step of AutoPASTA (arXiv 2409.10790): the model is asked, greedily, what it says is mapped to the
    nearest sentence of the context, and the answer is generated with that sentence emphasised, from the plain prompt.
    The second step is a method of its own; published, PASTA with a bias of log 100. The paper compares sentences by a
    sentence encoder, which `embed` takes; by default they are compared by their words, which suits a model that copies.
    The wording of the request is ours.

    Args:
        model: a transformers model. Steering that is in force applies to it as ever.
        tokenizer: its tokenizer.
        contexts: one for each question.
        questions: one for each context.
        ask: the request, with `{context}` and `{question}`.
        chat: put the request into a chat, as one user message.
        system: a system message for it.
        embed: vectors of texts; the sentence whose vector has the largest cosine is taken. `None`: F1 of the words,
            without case.
        split: `(start, stop)` of the sentences of a context; `None`: they end at ., ! or ? before white space, and at
            line breaks.
        max_new_tokens: of what the model may say.
        batch_size: requests per batch.

    Returns:
        One for each context; the first of equal ones; `None` if no sentence has anything in common with what was said.

    Raises:
        SpanError: unequal numbers of contexts and questions, a context without sentences, or no `{context}` in `ask`.
    """
    if len(contexts) != len(questions):
        raise SpanError(f"{len(contexts)} contexts and {len(questions)} questions: give one question for each context")
    if "{context}" not in ask:
        raise SpanError(f"ask={ask!r:.200} has no {{context}}: say where it stands")
    places = [(split or sentences)(context) for context in contexts]
    for row, found in enumerate(places):
        if not found:
            raise SpanError(f"context {row} has no sentence: {contexts[row]!r:.200}")
    filled = [_fill(ask, context, question) for context, question in zip(contexts, questions, strict=True)]
    answers: list[str] = []
    for start in range(0, len(filled), batch_size):
        inputs, _ = encode(
            tokenizer, filled[start : start + batch_size], chat=chat or system is not None, system=system
        )
        inputs = inputs.to(model.device)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        sequences = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad)
        width = inputs["input_ids"].shape[1]
        answers += [str(text) for text in tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)]
    nearest = _by_words if embed is None else _by(embed)
    return [
        _choose(context, found, said.strip(), nearest)
        for context, found, said in zip(contexts, places, answers, strict=True)
    ]


def sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text stand, in characters, without the white space around them."""
    found, start = [], 0
    for end in [*(hit.end() for hit in _END.finditer(text)), len(text)]:
        piece = text[start:end]
        inner = piece.strip()
        if _WORD.search(inner):
            first = start + piece.index(inner)
            found.append((first, first + len(inner)))
        start = end
    return found


def _fill(ask: str, context: str, question: str) -> str:
    """The request; braces in the texts stay as they are."""
    return re.sub(r"\{(context|question)\}", lambda hit: context if hit[1] == "context" else question, ask)


def _choose(
    context: str, places: Sequence[tuple[int, int]], said: str, nearest: Callable[[str, list[str]], list[float]]
) -> KeySentence | None:
    if not said:
        return None
    likeness = nearest(said, [context[start:stop] for start, stop in places])
    best = max(range(len(places)), key=likeness.__getitem__)
    if not likeness[best] > 0:
        return None
    start, stop = places[best]
    return KeySentence(context[start:stop], start, stop, said, likeness[best])


def _by_words(said: str, texts: list[str]) -> list[float]:
    """F1 of the words of each text and what was said."""
    mine = Counter(_WORD.findall(said.casefold()))
    found = []
    for text in texts:
        theirs = Counter(_WORD.findall(text.casefold()))
        found.append(2 * (mine & theirs).total() / max(mine.total() + theirs.total(), 1))
    return found


def _by(embed: Embed) -> Callable[[str, list[str]], list[float]]:
    def cosine(said: str, texts: list[str]) -> list[float]:
        vectors = torch.as_tensor(embed([said, *texts])).float()
        return [float(v) for v in torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:])]

    return cosine
