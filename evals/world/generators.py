"""What evaluation tasks draw from the generated world: one generator a kind of prompt, its fields the parameters.

Every prompt is of held-out statements alone (`facts`), so none occurs in training, whatever the seeds.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from steerlens.evals.examples import of
from steerlens.evals.world.facts import Fact, arrange, entity_facts, false_memory, fillers, profiles
from steerlens.evals.world.tasks import INSTRUCTIONS, TASKS, WORDED, Sample, ask, formatted, sample
from steerlens.evals.world.vocabulary import ATTRIBUTES, MEMORY, RELATIONS, size

from steerlens.examples import Example
from steerlens.recipe_schema import Part
from steerlens.selectors import Role, Selector, Substring

LONGEST = 512
"""Tokens that `tiny` was trained for."""
ALL = 500
"""Documents of a task whose number nobody limits."""
_SPEAKING = 4
"""Tokens that the chat template puts around a message."""

Cell = Mapping[str, Any]
Range = tuple[int, int]


@dataclass(frozen=True)
class Item:
    """What a generator draws: an example, and what a document has besides."""

    example: Example
    choices: tuple[str, ...] = ()
    target: int | None = None
    turns: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{list(values)!r:.80}: a value is there twice")
    return values


Length = Annotated[int, Field(ge=32, le=LONGEST)]
Position = Annotated[float, Field(ge=0, le=1)]
Instruction = Literal["capitals", "json", "maybe_capitals", "maybe_json"]
_GRID = (BeforeValidator(_listed), AfterValidator(_distinct), Field(min_length=1, max_length=1000))
Lengths = Annotated[tuple[Length, ...], *_GRID]
Positions = Annotated[tuple[Position, ...], *_GRID]
Numbers = Annotated[tuple[Annotated[int, Field(ge=1, le=100)], ...], *_GRID]


class Generator(Part):
    """Parameters of a kind of prompt. A parameter with several values is an axis of the task's grid.

    Attributes:
        rows: documents that the task has where nobody limits them.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    groups: ClassVar[frozenset[str]] = frozenset({"emphasis", "gold", "context", "query"})
    axes: ClassVar[tuple[str, ...]] = ()
    chat: ClassVar[bool] = False
    choices: ClassVar[bool] = False

    rows: Annotated[int, Field(ge=1, le=500_000)] = ALL

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The places of the grid; one empty place without a grid."""
        values = [getattr(self, axis) for axis in self.axes]
        return [dict(zip(self.axes, place, strict=True)) for place in product(*values)]

    @property
    def tokens(self) -> int:
        """Tokens of a typical prompt, of `tiny`."""
        return int(getattr(self, "length", 128))

    def draw(self, seed: int, cell: Cell) -> Item:
        """The item of a seed at a place of the grid; equal arguments give equal items."""
        raise NotImplementedError

    def _rng(self, seed: int, cell: Cell) -> random.Random:
        settings = self.model_dump(exclude={"rows", *self.axes})
        return random.Random(f"{self.name}|{seed}|{json.dumps([settings, dict(cell)], sort_keys=True)}")


class _Sampled(Generator):
    length: Length = 128

    def draw(self, seed: int, cell: Cell) -> Item:
        row = sample(self.name, seed, self.length)
        groups = _ranges(row)
        if self.name == "classify":
            groups["demos"] = [match.span() for match in re.finditer(r"\w+ belongs to \w+\.", row.prompt)]
        return Item(_example(row.prompt, row.answer, groups, row.alternatives))


def _sampled(task: str) -> type[Generator]:
    class Sampled(_Sampled):
        name: ClassVar[str] = task
        groups: ClassVar[frozenset[str]] = (
            frozenset({"context", "query"})
            if task == "memory"
            else Generator.groups | ({"demos"} if task == "classify" else set())
        )

    return Sampled


class Needle(Generator):
    """One fact at a depth of filler."""

    name: ClassVar[str] = "needle"
    axes: ClassVar[tuple[str, ...]] = ("length", "depth")

    length: Lengths = (64, 128, 256, 512)
    depth: Positions = (0.0, 0.25, 0.5, 0.75, 1.0)

    @property
    def tokens(self) -> int:
        """The mean over the grid."""
        return round(sum(self.length) / len(self.length))

    def draw(self, seed: int, cell: Cell) -> Item:
        rng = self._rng(seed, cell)
        (fact,) = entity_facts(rng, "eval", 1)[0]
        room = cell["length"] - 1 - size(ask("", fact.question)) - size(f" {fact.statement}")
        sentences = fillers(rng, room)
        at = round(cell["depth"] * len(sentences))
        return _asked([*sentences[:at], fact.statement, *sentences[at:]], at, fact)


class Pairs(Generator):
    """One code of many, each with its key: key-value retrieval."""

    name: ClassVar[str] = "kv_retrieval"
    axes: ClassVar[tuple[str, ...]] = ("pairs", "position")

    pairs: Annotated[tuple[Annotated[int, Field(ge=1, le=49)], ...], *_GRID] = (4, 8, 16, 32)
    position: Positions = (0.0, 0.25, 0.5, 0.75, 1.0)

    @property
    def tokens(self) -> int:
        """The mean over the grid."""
        return round(13 + 10 * sum(self.pairs) / len(self.pairs))

    def draw(self, seed: int, cell: Cell) -> Item:
        rng = self._rng(seed, cell)
        facts = [slot[0] for slot in entity_facts(rng, "eval", cell["pairs"], relations=("code",))]
        at = round(cell["position"] * (len(facts) - 1))
        return _asked([fact.statement for fact in facts], at, facts[at])


class Documents(Generator):
    """One of several documents holds the answer: multi-document question answering.

    Attributes:
        tokens_each: room of a document; what its statements leave is filler.
        statements: in each document.
    """

    name: ClassVar[str] = "multidoc"
    axes: ClassVar[tuple[str, ...]] = ("documents", "position")
    groups: ClassVar[frozenset[str]] = Generator.groups | {"documents"}

    documents: Numbers = (5, 10, 15)
    position: Positions = (0.0, 0.25, 0.5, 0.75, 1.0)
    statements: Annotated[int, Field(ge=1, le=8)] = 2
    tokens_each: Annotated[int, Field(ge=10, le=LONGEST)] = 32

    @model_validator(mode="after")
    def _fits(self) -> Self:
        need = max(self.documents) * max(self.tokens_each, 10 * self.statements) + 16
        if need > LONGEST:
            raise ValueError(
                f"{max(self.documents)} documents of {self.tokens_each} tokens and a question need {need} tokens, at "
                f"most {LONGEST} are allowed; ask for fewer or shorter documents"
            )
        return self

    @property
    def tokens(self) -> int:
        """The mean over the grid."""
        return round(13 + self.tokens_each * sum(self.documents) / len(self.documents))

    def draw(self, seed: int, cell: Cell) -> Item:
        rng = self._rng(seed, cell)
        count = cell["documents"]
        facts = iter([slot[0] for slot in entity_facts(rng, "eval", count * self.statements)])
        at = round(cell["position"] * (count - 1))
        texts, ranges, start, asked, emphasis = [], [], 0, None, (0, 0)
        for number in range(count):
            held = [next(facts) for _ in range(self.statements)]
            text, spans = arrange(rng, held, self.tokens_each)
            if number == at:
                asked, emphasis = held[0], (start + spans[0][0], start + spans[0][1])
            texts.append(text)
            ranges.append((start, start + len(text)))
            start += len(text) + 1
        assert asked is not None
        prompt = ask(" ".join(texts), asked.question)
        groups = {"emphasis": [emphasis], "gold": [ranges[at]], "documents": ranges}
        return Item(_example(prompt, asked.value, groups))


class Extraction(Generator):
    """One attribute of one entity, where all attributes of several are told, each entity in one piece."""

    name: ClassVar[str] = "extraction"
    groups: ClassVar[frozenset[str]] = Generator.groups | {"documents"}

    length: Annotated[int, Field(ge=96, le=LONGEST)] = 192

    def draw(self, seed: int, cell: Cell) -> Item:
        rng = self._rng(seed, cell)
        found = profiles(rng, "eval", max(2, (self.length - 16) // 40))
        told = [rng.sample(facts, len(facts)) for facts in found]
        asked = rng.choice(rng.choice(told))
        texts = [" ".join(fact.statement for fact in facts) for facts in told]
        context = " ".join(texts)
        start = context.index(asked.statement)
        holding = next(i for i, facts in enumerate(told) if asked in facts)
        ranges = [(context.index(text), context.index(text) + len(text)) for text in texts]
        emphasis = (start, start + len(asked.statement))
        groups = {"emphasis": [emphasis], "gold": [ranges[holding]], "documents": ranges}
        return Item(_example(ask(context, asked.question), asked.value, groups))


class Choices(Generator):
    """A question with four answers of one kind to choose from; wrong ones stand in the prompt where they can.

    Attributes:
        question: the task of the world that it comes from.
    """

    name: ClassVar[str] = "multiple_choice"
    choices: ClassVar[bool] = True

    question: Literal["lookup", "dense", "conflict", "contradiction"] = "lookup"
    length: Length = 128

    def draw(self, seed: int, cell: Cell) -> Item:
        rng = self._rng(seed, cell)
        row = sample(self.question, seed, self.length)
        relation = row.key.split("|")[0]
        pool = RELATIONS.get(relation) or ATTRIBUTES[relation]
        if pool is None:
            told = re.findall(r"\d{4}", row.prompt)
            pool = (*dict.fromkeys(told), *(f"{rng.randrange(10_000):04d}" for _ in range(8)))
        else:
            told = re.findall(r"\w+", row.prompt)
        others = [value for value in dict.fromkeys(pool) if value not in (row.answer, *row.alternatives)]
        rng.shuffle(others)
        others.sort(key=lambda value: value not in told)
        options = [row.answer, *row.alternatives, *others][:4]
        rng.shuffle(options)
        example = _example(row.prompt, row.answer, _ranges(row), row.alternatives)
        return Item(example, tuple(options), options.index(row.answer))


class MemoTrap(Generator):
    """A question about a memorised fact, behind others that are answered as the context has it: MemoTrap's setting.

    The stated answer and the memorised one are the choices.

    Attributes:
        answered: questions with their answers before the one that is asked; all statements are against memory.
    """

    name: ClassVar[str] = "memo_trap"
    choices: ClassVar[bool] = True
    groups: ClassVar[frozenset[str]] = Generator.groups | {"demos"}

    answered: Annotated[int, Field(ge=1, le=15)] = 3
    length: Annotated[int, Field(ge=96, le=LONGEST)] = 128

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (need := 24 * (self.answered + 1)) > self.length:
            raise ValueError(f"{self.answered} answered questions need a length of {need}, not {self.length}")
        return self

    def draw(self, seed: int, cell: Cell) -> Item:
        rng = self._rng(seed, cell)
        found: dict[tuple[str, str], Fact] = {}
        while len(found) <= self.answered:
            fact = false_memory(rng, "eval")
            found.setdefault((fact.relation, fact.subject), fact)
        asked, *others = found.values()
        shown = [f"{ask('', fact.question)} {fact.value}" for fact in others]
        after = " ".join([*shown, ask("", asked.question)])
        context, spans = arrange(rng, [asked, *others], self.length - 1 - size(f" {after}"))
        prompt = f"{context} {after}"
        demos, at = [], len(context) + 1
        for text in shown:
            demos.append((at, at + len(text)))
            at += len(text) + 1
        groups = {"emphasis": spans[:1], "gold": spans[:1], "context": [(0, len(context))], "demos": demos}
        memorised = MEMORY[asked.relation, asked.subject]
        options = [asked.value, memorised]
        rng.shuffle(options)
        return Item(_example(prompt, asked.value, groups, (memorised,)), tuple(options), options.index(asked.value))


class Constraint(Generator):
    """A chat whose system message says how to answer, over several turns, each with a context of its own.

    The answer is the last turn's; `data` has every turn's, and the form that they must have.

    Attributes:
        instruction: the system message.
        distraction: what the second user turn says instead, if anything.
        turns: questions of the user.
        length: tokens of the whole chat.
    """

    name: ClassVar[str] = "system_constraint"
    chat: ClassVar[bool] = True
    groups: ClassVar[frozenset[str]] = frozenset({"emphasis"})

    instruction: Instruction = "json"
    distraction: Instruction | None = "maybe_capitals"
    turns: Annotated[int, Field(ge=1, le=12)] = 4
    length: Annotated[int, Field(ge=96, le=LONGEST)] = 256

    def draw(self, seed: int, cell: Cell) -> Item:
        rng = self._rng(seed, cell)
        style = self.instruction.removeprefix("maybe_")
        facts = [slot[0] for slot in entity_facts(rng, "eval", self.turns, relations=WORDED)]
        answers = [formatted(fact, style) for fact in facts]
        said = sum(size(f" {f.question} {a}") + 2 * _SPEAKING for f, a in zip(facts, answers, strict=True))
        rest = self.length - said - size(INSTRUCTIONS[self.instruction]) - _SPEAKING - 8
        contexts = [arrange(rng, [fact], rest // self.turns)[0] for fact in facts]
        users = [f"{context} {fact.question}" for context, fact in zip(contexts, facts, strict=True)]
        if self.distraction is not None and len(users) > 1:
            users[1] = f"{INSTRUCTIONS[self.distraction]} {users[1]}"
        messages = (_message("system", INSTRUCTIONS[self.instruction]), _message("user", users[0]))
        example = Example(messages, answers[-1], (facts[-1].value,), {"emphasis": (Role("system"),)})
        data = {"form": style, "answers": answers}
        return Item(example, turns=tuple(users[1:]), data=data)


class Drift(Generator):
    """A chat in which the assistant has not obeyed the system message since its first turn: does it at turn k?

    Attributes:
        instruction: the system message.
        turn: k; the turns before it are part of the prompt.
        length: tokens of the prompt.
    """

    name: ClassVar[str] = "drift"
    chat: ClassVar[bool] = True
    axes: ClassVar[tuple[str, ...]] = ("turn",)

    instruction: Instruction = "capitals"
    turn: Annotated[tuple[Annotated[int, Field(ge=1, le=12)], ...], *_GRID] = (1, 2, 3, 5)
    length: Length = 192

    def draw(self, seed: int, cell: Cell) -> Item:
        rng = self._rng(seed, cell)
        style = self.instruction.removeprefix("maybe_")
        facts = [slot[0] for slot in entity_facts(rng, "eval", cell["turn"], relations=WORDED)]
        used = sum(size(f" {fact.question} {fact.value}") + 2 * _SPEAKING for fact in facts)
        context, _ = arrange(rng, facts, self.length - used - size(INSTRUCTIONS[self.instruction]) - _SPEAKING)
        messages = [_message("system", INSTRUCTIONS[self.instruction])]
        for number, fact in enumerate(facts):
            if number:
                messages.append(_message("assistant", facts[number - 1].value))
            messages.append(_message("user", fact.question if number else f"{context} {fact.question}"))
        asked, answer = facts[-1], formatted(facts[-1], style)
        groups: dict[str, tuple[Selector, ...]] = {
            "emphasis": (Role("system"),),
            "gold": (asked.statement,),
            "context": (context,),
            "query": (asked.question,),
        }
        example = Example(tuple(messages), answer, (asked.value,), groups)
        return Item(example, data={"form": style, "answers": [answer]})


GENERATORS: dict[str, type[Generator]] = {
    "needle": Needle,
    **{task: _sampled(task) for task in TASKS if task != "needle"},
    **{cls.name: cls for cls in (Pairs, Documents, Extraction, Choices, MemoTrap, Constraint, Drift)},
}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _asked(sentences: list[str], at: int, fact: Fact) -> Item:
    """The item whose context is these sentences; the one at place `at` is what is asked for."""
    start = sum(len(text) + 1 for text in sentences[:at])
    span = [(start, start + len(fact.statement))]
    return Item(_example(ask(" ".join(sentences), fact.question), fact.value, {"emphasis": span, "gold": span}))


def _ranges(row: Sample) -> dict[str, list[Range]]:
    """What `evals.examples` names in a sample, as characters, but for what every prompt has."""
    groups = {name: found for name, found in of(row).groups.items() if name != "context"}
    return {name: [(c.start, c.stop) for c in found] for name, found in groups.items()}


def _example(
    prompt: str, answer: str, groups: Mapping[str, list[Range]], alternatives: tuple[str, ...] = ()
) -> Example:
    """An example of a prompt that ends in "Question: … Answer:"."""
    asking = prompt.rindex("Question:")
    there = {"context": [(0, asking - 1)], "query": [(asking, len(prompt) - len(" Answer:"))], **groups}
    return Example(prompt, answer, alternatives, _selectors(prompt, there), prompt)


def _selectors(prompt: str, groups: Mapping[str, list[Range]]) -> dict[str, tuple[Selector, ...]]:
    """The ranges as texts, which are found wherever a chat template puts the prompt."""
    return {
        name: tuple(Substring(prompt[start:stop], prompt.count(prompt[start:stop], 0, start)) for start, stop in ranges)
        for name, ranges in groups.items()
    }
