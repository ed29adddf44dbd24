"""Statements of the generated world and the rule that keeps training and evaluation apart.

A statement is a (relation, subject, value) triple. A fifth of all triples is held out by a hash: training text
never contains a held-out triple, evaluation prompts contain no other. So no evaluation prompt with a statement
in it can occur in training, whatever the seeds. Prompts without statements are held out by their own keys.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

from steerlens.evals.world.vocabulary import (
    ATTRIBUTES,
    COUNTRIES,
    KINDS,
    MEMORY,
    PLACES,
    RELATIONS,
    WORLD_SEED,
    filler,
    size,
)

Split = Literal["train", "eval"]
Names = Literal["pairs", "crowded", "short"]


def split_of(key: str) -> Split:
    """The side `key` belongs to: about one key in five is "eval". Independent of any random state."""
    digest = hashlib.sha256(f"{WORLD_SEED}|{key}".encode()).digest()
    return "eval" if digest[0] % 5 == 0 else "train"


@dataclass(frozen=True)
class Fact:
    """One statement: "The {relation} of {subject} is {value}."."""

    relation: str
    subject: str
    value: str

    @property
    def key(self) -> str:
        """What the split is decided on."""
        return f"{self.relation}|{self.subject}|{self.value}"

    @property
    def statement(self) -> str:
        """The sentence that states the fact."""
        return f"The {self.relation} of {self.subject} is {self.value}."

    @property
    def question(self) -> str:
        """The question this fact answers."""
        return f"What is the {self.relation} of {self.subject}?"


def _draw_value(rng: random.Random, pool: tuple[str, ...] | None) -> str:
    return f"{rng.randrange(10_000):04d}" if pool is None else rng.choice(pool)


def entity_facts(
    rng: random.Random,
    split: Split,
    count: int,
    *,
    values: int = 1,
    relations: tuple[str, ...] = (),
    names: Names = "pairs",
) -> list[tuple[Fact, ...]]:
    """`count` different (attribute, entity) slots, each with `values` different values, all triples from `split`.

    `names`: "pairs" draws from all 496 two-word entities, "crowded" from 36 that share their words, "short" from 40
    entities of one word ("the harbor").
    """
    places, kinds = PLACES, KINDS
    if names == "crowded":
        places, kinds = tuple(rng.sample(PLACES, 6)), tuple(rng.sample(KINDS, 6))
    relations = relations or tuple(ATTRIBUTES)
    slots: dict[tuple[str, str], tuple[Fact, ...]] = {}
    while len(slots) < count:
        relation, place, kind = rng.choice(relations), rng.choice(places), rng.choice(kinds)
        subject = f"the {place} {kind}"
        if names == "short":
            # The other places are adjectives.
            subject = f"the {rng.choice((rng.choice(PLACES[:24]), kind))}"
        if (relation, subject) in slots:
            continue
        if chosen := _held(rng, split, relation, subject, values):
            slots[relation, subject] = chosen
    return list(slots.values())


def _held(rng: random.Random, split: Split, relation: str, subject: str, values: int) -> tuple[Fact, ...]:
    """`values` different facts of one slot from `split`; none if the draw finds too few."""
    chosen: dict[str, Fact] = {}
    for _ in range(60):
        fact = Fact(relation, subject, _draw_value(rng, ATTRIBUTES[relation]))
        if split_of(fact.key) == split:
            chosen[fact.value] = fact
        if len(chosen) == values:
            return tuple(chosen.values())
    return ()


def false_memory(rng: random.Random, split: Split) -> Fact:
    """A statement from `split` that contradicts a memorised fact."""
    while True:
        relation, country = rng.choice(tuple(RELATIONS)), rng.choice(COUNTRIES)
        fact = Fact(relation, country, rng.choice(RELATIONS[relation]))
        if fact.value != MEMORY[relation, country] and split_of(fact.key) == split:
            return fact


_PHRASES = {
    "capital": ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}."),
    "river": ("What is the river of {}?", "Which river flows through {}?", "Name the river of {}."),
}


def memory_question(rng: random.Random, split: Split) -> tuple[str, Fact]:
    """A question about a memorised fact, and the fact. The pair (wording, fact) is from `split`."""
    while True:
        relation, country = rng.choice(tuple(RELATIONS)), rng.choice(COUNTRIES)
        question = rng.choice(_PHRASES[relation]).format(country)
        if split_of(question) == split:
            return question, Fact(relation, country, MEMORY[relation, country])


def profiles(rng: random.Random, split: Split, count: int) -> list[tuple[Fact, ...]]:
    """Everything about `count` different entities: a fact for each attribute, all triples from `split`."""
    found: dict[str, tuple[Fact, ...]] = {}
    while len(found) < count:
        subject = f"the {rng.choice(PLACES)} {rng.choice(KINDS)}"
        held = {relation: _held(rng, split, relation, subject, 1) for relation in ATTRIBUTES}
        if subject not in found and all(held.values()):
            found[subject] = tuple(facts[0] for facts in held.values())
    return list(found.values())


def fillers(rng: random.Random, budget: int) -> list[str]:
    """Sentences that state nothing anyone asks for, of at most `budget` tokens with the spaces between them."""
    sentences, used = [], 0
    while used < budget:
        text = filler(rng)
        used += size(" " + text)
        if used <= budget:
            sentences.append(text)
    return sentences


def arrange(
    rng: random.Random, facts: list[Fact], budget: int, extra: list[Fact] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """A context of at most about `budget` tokens: `facts`, then as many of `extra` as fit, then filler, shuffled.

    Returns the text and the character range [start, stop) of each of `facts` in it. `facts` are always kept.
    """
    sentences: list[tuple[str, int]] = [(fact.statement, index) for index, fact in enumerate(facts)]
    used = sum(size(" " + text) for text, _ in sentences)
    for fact in extra or []:
        if (cost := size(" " + fact.statement)) + used <= budget:
            sentences.append((fact.statement, -1))
            used += cost
    sentences += [(text, -1) for text in fillers(rng, budget - used)]
    rng.shuffle(sentences)
    spans, at = [(0, 0)] * len(facts), 0
    for text, index in sentences:
        if index >= 0:
            spans[index] = (at, at + len(text))
        at += len(text) + 1
    return " ".join(text for text, _ in sentences), spans
