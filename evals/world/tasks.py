"""Evaluation tasks on the generated world: `sample(task, seed, length)` gives one prompt with its facts.

    needle           one fact in filler                       lookup        one of some facts (256 tokens: 3 to 13)
    dense            one of many facts (256 tokens: 8 to 25)  memory        a fact from the weights
    conflict         two statements that disagree             contradiction a statement against a memorised fact
    capitals, json   an instruction to follow                 maybe_capitals, maybe_json   an optional one
    classify         arbitrary labels, from examples

Training draws from the same parts with split "train"; see `facts` for why evaluation prompts are new.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from steerlens.evals.world.facts import (
    Fact,
    Split,
    arrange,
    entity_facts,
    false_memory,
    memory_question,
    split_of,
)
from steerlens.evals.world.vocabulary import CATEGORIES, LABELS, MEMORY, size

INSTRUCTIONS: Final = {
    "capitals": "Answer in capital letters.",
    "json": "Answer as JSON.",
    "maybe_capitals": "You may answer in capital letters.",
    "maybe_json": "You may answer as JSON.",
}
WORDED: Final = ("color", "keeper", "mascot")
"""Attributes whose values are words, so that capital letters show."""


@dataclass(frozen=True)
class Sample:
    """One prompt and what is known about it."""

    task: str
    prompt: str
    """Plain text without BOS; ends in "Answer:"."""
    answer: str
    """The answer that the emphasised statement, or the only one, gives; no leading space."""
    alternatives: tuple[str, ...]
    """Other answers that the prompt or the memorised facts support."""
    spans: tuple[tuple[int, int], ...]
    """Character ranges [start, stop) of `prompt`. First: what to emphasise for `answer`; then other statements."""
    messages: tuple[dict[str, str], ...]
    """The same question for the chat template."""
    key: str
    """The held-out key: `split_of(key)` is the split it was drawn from."""


def formatted(fact: Fact, style: str) -> str:
    """The value of `fact` as the instruction `style` ("", "capitals", "json") wants it."""
    if style == "json":
        return json.dumps({fact.relation: fact.value})
    return fact.value.upper() if style == "capitals" else fact.value


def ask(context: str, question: str, instruction: str = "") -> str:
    """The plain prompt: instruction, context, question, "Answer:"."""
    return " ".join(part for part in (instruction, context, f"Question: {question}", "Answer:") if part)


def _sample(
    task: str,
    context: str,
    question: str,
    answer: str,
    key: str,
    spans: list[tuple[int, int]],
    alternatives: tuple[str, ...] = (),
    instruction: str = "",
) -> Sample:
    shift = len(instruction) + 1 if instruction else 0
    moved = [(start + shift, stop + shift) for start, stop in spans]
    if instruction:
        moved.insert(0, (0, len(instruction)))
    user = {"role": "user", "content": f"{context} {question}".strip()}
    messages = ({"role": "system", "content": instruction}, user) if instruction else (user,)
    return Sample(task, ask(context, question, instruction), answer, alternatives, tuple(moved), messages, key)


def _room(length: int, question: str, instruction: str = "") -> int:
    # One for BOS.
    return length - 1 - size(ask("", question, instruction))


def _needle(rng: random.Random, length: int, split: Split) -> Sample:
    (fact,) = entity_facts(rng, split, 1)[0]
    context, spans = arrange(rng, [fact], _room(length, fact.question))
    return _sample("needle", context, fact.question, fact.value, fact.key, spans)


def _lookup(least: float, most: float) -> Callable[[random.Random, int, Split], Sample]:
    # Facts per ten tokens of length; a fact takes nine or ten tokens, the rest is filler.
    def build(rng: random.Random, length: int, split: Split) -> Sample:
        count = max(2, round(length / 10 * rng.uniform(least, most)))
        facts = [slot[0] for slot in entity_facts(rng, split, count)]
        asked, others = facts[0], facts[1:]
        context, spans = arrange(rng, [asked], _room(length, asked.question), others)
        name = "dense" if most == 1 else "lookup"
        return _sample(name, context, asked.question, asked.value, asked.key, spans)

    return build


def _conflict(rng: random.Random, length: int, split: Split) -> Sample:
    one, other = entity_facts(rng, split, 1, values=2)[0]
    others = [slot[0] for slot in entity_facts(rng, split, round(length / 10 * rng.uniform(0, 0.7)))]
    others = [fact for fact in others if fact.question != one.question]
    context, spans = arrange(rng, [one, other], _room(length, one.question), others)
    return _sample("conflict", context, one.question, one.value, one.key, spans, (other.value,))


def _memory(rng: random.Random, length: int, split: Split) -> Sample:
    question, fact = memory_question(rng, split)
    others = [slot[0] for slot in entity_facts(rng, split, round(length / 10 * rng.uniform(0, 0.7)))]
    context, _ = arrange(rng, [], _room(length, question), others)
    return _sample("memory", context, question, fact.value, question, [])


def _contradiction(rng: random.Random, length: int, split: Split) -> Sample:
    fact = false_memory(rng, split)
    others = [slot[0] for slot in entity_facts(rng, split, round(length / 10 * rng.uniform(0, 0.7)))]
    context, spans = arrange(rng, [fact], _room(length, fact.question), others)
    memorised = MEMORY[fact.relation, fact.subject]
    return _sample("contradiction", context, fact.question, fact.value, fact.key, spans, (memorised,))


def _classify(rng: random.Random, length: int, split: Split) -> Sample:
    while True:
        classes = rng.sample(tuple(CATEGORIES), rng.choice((2, 2, 3)))
        labels = dict(zip(classes, rng.sample(LABELS, len(classes)), strict=True))
        target = rng.choice(classes)
        query = rng.choice(CATEGORIES[target])
        key = "|".join([query, *sorted(f"{name}={label}" for name, label in labels.items())])
        if split_of(key) == split:
            break
    # Every class is shown at least twice; a demonstration is five tokens.
    shown = [name for name in classes for _ in range(2)]
    shown += rng.choices(classes, k=min(rng.randint(0, 8), max(0, (length - 9) // 5 - len(shown))))
    rng.shuffle(shown)
    parts, spans, at = [], [], 0
    for name in shown:
        word = rng.choice([word for word in CATEGORIES[name] if word != query])
        part = demonstration(word, labels[name])
        if name == target:
            spans.append((at, at + len(part)))
        parts.append(part)
        at += len(part) + 1
    others = tuple(label for name, label in labels.items() if name != target)
    return _sample("classify", " ".join(parts), f"What does {query} belong to?", labels[target], key, spans, others)


def demonstration(word: str, label: str) -> str:
    """One labelled example of the classification task."""
    return f"{word} belongs to {label}."


def _instructed(name: str) -> Callable[[random.Random, int, Split], Sample]:
    def build(rng: random.Random, length: int, split: Split) -> Sample:
        facts = [
            slot[0]
            for slot in entity_facts(rng, split, max(1, round(length / 10 * rng.uniform(0, 0.8))), relations=WORDED)
        ]
        asked, others, instruction = facts[0], facts[1:], INSTRUCTIONS[name]
        context, spans = arrange(rng, [asked], _room(length, asked.question, instruction), others)
        answer = formatted(asked, name.removeprefix("maybe_"))
        return _sample(name, context, asked.question, answer, asked.key, spans, (asked.value,), instruction)

    return build


TASKS: Final[dict[str, Callable[[random.Random, int, Split], Sample]]] = {
    "needle": _needle,
    "lookup": _lookup(0.1, 0.5),
    "dense": _lookup(0.3, 1),
    "conflict": _conflict,
    "memory": _memory,
    "contradiction": _contradiction,
    "classify": _classify,
    **{name: _instructed(name) for name in INSTRUCTIONS},
}


def sample(task: str, seed: int, length: int = 128, *, split: Split = "eval") -> Sample:
    """One sample of `task`; equal arguments give equal samples.

    `length` is the longest prompt in `tiny` tokens, BOS included (32 to 512; statements that a task needs are
    kept even when they do not fit).
    """
    return TASKS[task](random.Random(f"{task}|{seed}|{length}|{split}"), length, split)


def follows(output: str, answer: str) -> bool:
    """Whether generated text is `answer`: surrounding white space and one final period are ignored."""
    return output.strip().removesuffix(".").strip() == answer
