"""Examples of the generated world's tasks, for measuring heads and tuning methods."""

from __future__ import annotations

import random

from steerlens.evals.world.facts import entity_facts
from steerlens.evals.world.tasks import INSTRUCTIONS, TASKS, Sample, sample
from steerlens.evals.world.vocabulary import filler

from steerlens.errors import nearest
from steerlens.examples import Example, ExampleError
from steerlens.measures.needles import Needle
from steerlens.selectors import Chars


def generate(task: str, count: int, *, first_seed: int = 0, length: int = 128) -> list[Example]:
    """`count` held-out examples of a world task, from the seeds first_seed, first_seed + 1, …

    Groups: "emphasis" (what to emphasise for the answer), "gold" (the statements that hold it) and "context" (all
    that stands before the question).

    Args:
        task: a name that `steerlens list tasks` shows.
        count: how many; prompts are distinct.
        first_seed: of the first prompt.
        length: longest prompt in tokens of `tiny`, 32 to 512.
    """
    if task not in TASKS:
        raise ExampleError(f"unknown task {task!r}; known: {', '.join(TASKS)}{nearest(task, TASKS)}")
    found: dict[str, Example] = {}
    seed = first_seed
    while len(found) < count:
        example = of(sample(task, seed, length))
        found.setdefault(str(example.prompt), example)
        seed += 1
        if seed - first_seed > 20 * count + 1000:
            raise ExampleError(
                f"task {task!r} has fewer than {count} distinct prompts of {length} tokens; ask for fewer"
            )
    return list(found.values())


def needles(count: int, seed: int) -> list[Needle]:
    """`count` held-out statements with their questions, each about something else."""
    facts = entity_facts(random.Random(f"needles|{seed}"), "eval", count)
    return [Needle(fact.statement, fact.question, fact.value) for (fact,) in facts]


def haystack(count: int, seed: int) -> list[str]:
    """`count` sentences that answer no question, each with a space behind it."""
    rng = random.Random(f"haystack|{seed}")
    return [f"{filler(rng)} " for _ in range(count)]


def of(row: Sample) -> Example:
    """A sample of the world as an example."""
    spans = tuple(Chars(start, stop) for start, stop in row.spans)
    instructed = row.task in INSTRUCTIONS
    gold = spans[1:] if instructed else spans if row.task == "classify" else spans[:1]
    groups: dict[str, tuple[Chars, ...]] = {"context": (Chars(0, row.prompt.rindex("Question:")),)}
    if spans:
        groups["emphasis"] = spans[:1]
        groups["gold"] = gold
    return Example(row.prompt, row.answer, row.alternatives, groups, row.prompt)
