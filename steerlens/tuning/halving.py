"""Successive halving: many candidates on few examples, the better ones on more (Jamieson & Talwalkar 2016)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ETA = 3
"""Of so many candidates one goes on."""
LEAST = 4
"""Fewest examples that a candidate is judged by."""


@dataclass(frozen=True)
class Rung:
    """`alive` candidates are judged by the first `examples` examples."""

    alive: int
    examples: int


def schedule(candidates: int, examples: int, budget: int, keep: int) -> list[Rung]:
    """The rungs that a budget of forwards pays for; empty if it does not pay for the first.

    Each rung gets an equal share, and pays only for the examples that its candidates have not seen. What a rung leaves
    goes to the next one.

    Args:
        candidates: how many there are.
        examples: how many there are to judge by.
        budget: forwards, one candidate on one example each.
        keep: candidates that are judged in the last rung, at least.
    """
    keep = max(1, min(keep, candidates))
    counts = [candidates]
    while counts[-1] > keep:
        counts.append(max(keep, math.ceil(counts[-1] / ETA)))
    rungs: list[Rung] = []
    seen, left = 0, budget
    for number, alive in enumerate(counts):
        share = left // (len(counts) - number)
        upto = min(examples, seen + share // alive)
        if upto < min(LEAST, examples):
            return []
        left -= (upto - seen) * alive
        rungs.append(Rung(alive, upto))
        seen = upto
    return rungs


def cost(rungs: Sequence[Rung]) -> int:
    """Forwards of a schedule."""
    before = [0, *(rung.examples for rung in rungs)]
    return sum(rung.alive * (rung.examples - seen) for rung, seen in zip(rungs, before, strict=False))


def least(candidates: int, examples: int, keep: int) -> int:
    """The smallest budget that `schedule` finds rungs for."""
    rungs = 1
    alive = candidates
    while alive > max(1, min(keep, candidates)):
        alive = max(keep, math.ceil(alive / ETA))
        rungs += 1
    return candidates * min(LEAST, examples) * rungs
