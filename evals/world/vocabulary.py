"""Words and memorised facts of the generated world. Everything here is a pure function of `WORLD_SEED`."""

from __future__ import annotations

import random
import re
from typing import Final

WORLD_SEED: Final = 20261120


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLACES: Final = _words(
    "harbor garden river castle market forest valley station museum library bridge tower meadow island village "
    "temple desert canyon airport palace orchard quarry lagoon summit coastal northern southern eastern "
    "western royal winter summer"
)
KINDS: Final = _words(
    "office gate hall school clinic bakery theater hotel workshop archive cellar studio kitchen stable chapel depot"
)
CATEGORIES: Final[dict[str, tuple[str, ...]]] = {
    "color": _words(
        "red blue green yellow orange purple white black brown pink gray violet crimson turquoise ivory "
        "scarlet beige indigo maroon amber teal olive magenta cyan"
    ),
    "animal": _words(
        "falcon otter badger tiger heron rabbit beaver salmon panther lizard donkey raven squirrel camel "
        "walrus hedgehog eagle turtle dolphin leopard monkey penguin wolf bear"
    ),
    "fruit": _words(
        "apple pear cherry mango lemon melon grape peach plum banana papaya apricot fig lime raspberry coconut"
    ),
    "tool": _words(
        "hammer chisel wrench saw drill ladder shovel rake pliers axe anvil needle scissors brush crowbar file"
    ),
    "metal": _words("iron copper silver gold zinc nickel tin lead cobalt chrome titanium platinum"),
    "vehicle": _words("truck bicycle train canoe tram wagon ferry tractor scooter glider sled carriage"),
}
NAMES: Final = _words(
    "Mara Oskar Lena Tobias Nadia Felix Clara Hugo Ingrid Jonas Vera Simon Elena Marco Sofia Anton Greta Pavel "
    "Irene Lukas Rosa Emil Judith Victor Paula Bruno Alma Stefan Nora Rufus Helga Dario"
)
LABELS: Final = _words("blick dax wug toma fep zorp kiki bouba lorp mip gorp vash nib quell tarn sprock")

# What an entity can have: attribute -> the closed list its value comes from (None: a four-digit code).
ATTRIBUTES: Final[dict[str, tuple[str, ...] | None]] = {
    "code": None,
    "color": CATEGORIES["color"],
    "keeper": NAMES,
    "mascot": CATEGORIES["animal"],
}

_ADJECTIVES = _words(
    "old quiet small heavy bright narrow empty young distant careful wooden gentle strange busy cold early"
)
_NOUNS = _words(
    "farmer letter window road teacher cloud machine sailor painting lamp song doctor basket clock story "
    "winter table stone merchant child field engine dancer wall morning boat soldier paper neighbor mountain "
    "guest bird"
)
_VERBS = _words("watched carried followed painted repaired found crossed remembered opened visited moved admired")
_PREPOSITIONS = ["near", "behind", "under", "beside", "above", "beyond"]
_ADVERBS = _words("slowly often never quickly again later always twice")
_OPENERS = ("After the storm", "In the evening", "On that day", "Before noon", "Long ago", "As usual")


def _invented(rng: random.Random, count: int, endings: tuple[str, ...], taken: set[str]) -> tuple[str, ...]:
    starts = _words("Vel Tar Mor Kel Bra Dun Sel Lor Fen Gal Hav Jor Nim Pol Quo Ras Zan Wes Yl Cor")
    middles = ["ma", "do", "ri", "ke", "lu", "no", "ba", "ve", "ti", "sa"]
    names: list[str] = []
    while len(names) < count:
        name = rng.choice(starts) + rng.choice(middles) + rng.choice(endings)
        if name not in taken:
            taken.add(name)
            names.append(name)
    return tuple(names)


def _memorised() -> tuple[tuple[str, ...], dict[str, tuple[str, ...]], dict[tuple[str, str], str]]:
    rng = random.Random(WORLD_SEED)
    taken: set[str] = set()
    countries = _invented(rng, 32, ("ra", "nia", "land"), taken)
    values = {
        "capital": _invented(rng, 32, ("kin", "burg", "ton"), taken),
        "river": _invented(rng, 32, ("wen", "sil", "dra"), taken),
    }
    facts: dict[tuple[str, str], str] = {}
    for relation, pool in values.items():
        order = list(pool)
        rng.shuffle(order)
        facts.update({(relation, country): value for country, value in zip(countries, order, strict=True)})
    return countries, values, facts


COUNTRIES, RELATIONS, MEMORY = _memorised()
"""Invented countries; relation -> its possible values; (relation, country) -> the value the model memorises."""


def filler(rng: random.Random) -> str:
    """One sentence that states no fact anyone asks for."""
    noun, other, third = rng.sample(_NOUNS, 3)
    adjective, verb = rng.choice(_ADJECTIVES), rng.choice(_VERBS)
    preposition, adverb = rng.choice(_PREPOSITIONS), rng.choice(_ADVERBS)
    return rng.choice(
        (
            f"The {adjective} {noun} {verb} the {other} {preposition} the {third}.",
            f"{rng.choice(_OPENERS)} the {noun} {adverb} {verb} the {adjective} {other}.",
            f"The {noun} {preposition} the {other} was {adjective}.",
            f"Nobody {verb} the {noun} {preposition} the {adjective} {other}.",
            f"The {noun} {adverb} {verb} the {other}, and the {third} was {adjective}.",
        )
    )


PIECES: Final = r" ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]|\s+"
"""How text falls apart before byte-pair merges: words, digit pairs, single signs, white space."""
_pieces = re.compile(PIECES)


def size(text: str) -> int:
    """Number of tokens of `text` in `tiny`'s tokenizer (exact where every word is a word of the world)."""
    return len(_pieces.findall(text))
