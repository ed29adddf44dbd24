"""Training documents: token ids and a loss weight for each token.

About 1 is the weight of a token that can be predicted (answers, memorised values, repeated segments); every other
token gets the `background` weight, 0 while heads form and small later. All documents are from split "train".
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from steerlens.evals.world.facts import (
    Fact,
    Names,
    arrange,
    entity_facts,
    false_memory,
    memory_question,
    split_of,
)
from steerlens.evals.world.tasks import INSTRUCTIONS, WORDED, demonstration, formatted
from steerlens.evals.world.tokenizer import ASSISTANT, BOS, EOS, SPECIAL, SYSTEM, USER
from steerlens.evals.world.vocabulary import (
    ATTRIBUTES,
    CATEGORIES,
    COUNTRIES,
    KINDS,
    LABELS,
    MEMORY,
    NAMES,
    PLACES,
    RELATIONS,
    filler,
    size,
)
from tokenizers import Tokenizer


@dataclass
class Document:
    """Pieces of text with weights; special tokens are written as their text and never split."""

    pieces: list[tuple[str, float]] = field(default_factory=list)

    def add(self, text: str, weight: float) -> None:
        """Append text; every piece but the first brings its own leading space."""
        self.pieces.append((text, weight))


def _names(rng: random.Random) -> Names:
    # One word is easier to look up, and starts what two words then refine; shared words leave no short cut.
    names: Names = rng.choices(("short", "crowded", "pairs"), (0.2, 0.45, 0.35))[0]
    return names


def _questions(rng: random.Random, length: int, style: str) -> tuple[list[Fact], list[Fact], list[tuple[str, str]]]:
    """Facts that must be in the context, facts that may be, and (question, answer) pairs about them."""
    # One question, as in evaluation, or many, which teach faster.
    count = 1 if rng.random() < 0.3 else rng.randint(1, max(1, min(8, length // 24)))
    relations = WORDED if style.endswith("capitals") else tuple(ATTRIBUTES)
    # Few attributes a document: then only the entity tells its facts apart.
    relations = tuple(rng.sample(relations, rng.randint(1, len(relations))))
    names = _names(rng)
    wanted = max(count, min(round(length / 10 * rng.uniform(0, 1)), 60 if names == "pairs" else 25))
    slots = entity_facts(rng, "train", wanted, relations=relations, names=names)
    kept: list[Fact] = []
    pairs: list[tuple[str, str]] = []
    for index in range(count):
        kind = rng.random()
        if style or kind < 0.40:
            fact = slots[index][0]
            kept.append(fact)
            pairs.append((fact.question, formatted(fact, style)))
        elif kind < 0.60:
            fact = slots[index][0]
            rival = _rival(rng, fact)
            kept += [fact, rival]
            pairs.append((fact.question, rng.choice((fact, rival)).value))
        elif kind < 0.73:
            fact = false_memory(rng, "train")
            if any(fact.subject == other.subject for other in kept):
                continue
            kept.append(fact)
            pairs.append((fact.question, rng.choice((fact.value, MEMORY[fact.relation, fact.subject]))))
        elif kind < 0.86:
            question, fact = memory_question(rng, "train")
            if not any(fact.subject == other.subject for other in kept):
                pairs.append((question, fact.value))
        else:
            name = rng.choice(tuple(CATEGORIES))
            pairs.append((f"What kind of thing is {rng.choice(CATEGORIES[name])}?", name))
    if not pairs:
        kept, pairs = [slots[0][0]], [(slots[0][0].question, slots[0][0].value)]
    return kept, [slot[0] for slot in slots[count:]], pairs


def _rival(rng: random.Random, fact: Fact) -> Fact:
    """A statement about the same slot as `fact` with another value."""
    while True:
        pool = ATTRIBUTES[fact.relation]
        value = f"{rng.randrange(10_000):04d}" if pool is None else rng.choice(pool)
        rival = Fact(fact.relation, fact.subject, value)
        if value != fact.value and split_of(rival.key) == "train":
            return rival


def _add_answer(document: Document, answer: str) -> None:
    """Append an answer and EOS; in JSON the value, the hard part, weighs more than what surrounds it."""
    if answer.startswith("{"):
        head, value = answer.removesuffix('"}').rsplit('"', 1)
        # The brace decides between JSON and plain text.
        document.add(" {", 1)
        document.add(f'{head[1:]}"', 0.3)
        document.add(value, 2.0)
        document.add('"}', 0.3)
    else:
        document.add(f" {answer}", 1)
    document.add(EOS, 1)


def _scene(rng: random.Random, length: int, background: float) -> Document:
    name = rng.choice(tuple(INSTRUCTIONS)) if rng.random() < 0.3 else ""
    instruction = INSTRUCTIONS.get(name, "")
    optional_refused = name.startswith("maybe_") and rng.random() < 0.5
    style = name.removeprefix("maybe_")
    kept, extra, pairs = _questions(rng, length, style)
    if optional_refused:
        values = {formatted(fact, style): fact.value for fact in kept}
        pairs = [(question, values[answer]) for question, answer in pairs]
    chat = rng.random() < 0.25
    used = 2 + size(instruction) + sum(size(f" Question: {q} Answer: {a}") + 4 for q, a in pairs)
    context, _ = arrange(rng, kept, length - used, extra)
    document = Document()
    document.add(BOS, 0)
    if not chat:
        head = " ".join(part for part in (instruction, context) if part)
        if head:
            document.add(head, background)
        for index, (question, answer) in enumerate(pairs):
            lead = " " if head or index else ""
            document.add(f"{lead}Question: {question} Answer:", background)
            _add_answer(document, answer)
        return document
    if instruction and rng.random() < 0.8:
        document.add(SYSTEM, background)
        document.add(f" {instruction}", background)
        document.add(EOS, background)
    elif instruction:
        context = f"{instruction} {context}"
    marked = rng.random() < 0.5
    for index, (question, answer) in enumerate(pairs):
        text = f"Question: {question} Answer:" if marked else question
        document.add(USER, background)
        document.add(f" {context} {text}" if context and not index else f" {text}", background)
        document.add(EOS, background)
        document.add(ASSISTANT, background)
        _add_answer(document, answer)
    return document


def _classify(rng: random.Random, length: int, background: float) -> Document:
    while True:
        classes = rng.sample(tuple(CATEGORIES), rng.choice((2, 2, 3)))
        labels = dict(zip(classes, rng.sample(LABELS, len(classes)), strict=True))
        target = rng.choice(classes)
        query = rng.choice(CATEGORIES[target])
        if split_of("|".join([query, *sorted(f"{n}={label}" for n, label in labels.items())])) == "train":
            break
    document = Document()
    document.add(BOS, 0)
    most = max(4, min(40, (length - 12) // 5))
    shown = [*classes, *rng.choices(classes, k=rng.randint(max(1, len(classes)), most) - len(classes))]
    rng.shuffle(shown)
    if target not in shown:
        shown[0] = target
    # Words that come back can be looked up: from there to words of the same category.
    few = rng.choice((2, 4, 12))
    pools = {name: rng.sample([word for word in CATEGORIES[name] if word != query], min(few, 11)) for name in classes}
    seen: set[str] = set()
    for index, name in enumerate(shown):
        word = rng.choice(pools[name])
        text = demonstration(word, "")[:-2]
        document.add(text if not index else f" {text}", background)
        document.add(f" {labels[name]}", 1 if name in seen else background)
        document.add(".", background)
        seen.add(name)
    document.add(f" Question: What does {query} belong to? Answer:", background)
    document.add(f" {labels[target]}", 1)
    document.add(EOS, 1)
    return document


def _recalled(rng: random.Random, length: int, background: float) -> Document:
    """A list of statements, then the same statements in another order: the bridge from induction to look-up."""
    form = rng.random()
    if form < 0.25:
        words = rng.sample((*PLACES[:24], *KINDS, *NAMES), 48)
        pool = [word for name in CATEGORIES.values() for word in name]
        lines = [(f"{word} is", rng.choice(pool)) for word in words[: max(2, (length - 1) // 8)]]
    else:
        relations = tuple(rng.sample(tuple(ATTRIBUTES), rng.randint(1, len(ATTRIBUTES))))
        count = max(2, (length - 1) // 20)
        slots = entity_facts(rng, "train", min(count, 25), relations=relations, names=_names(rng))
        lines = [(slot[0].statement.removesuffix(f" {slot[0].value}."), slot[0].value) for slot in slots]
    document = Document()
    document.add(BOS, 0)
    for weight in (background, 1.0):
        for index, (head, value) in enumerate(lines):
            first = not index and weight == background
            document.add(head if first else f" {head}", background)
            document.add(f" {value}", weight)
            document.add(".", background)
        rng.shuffle(lines)
    return document


def _statements(rng: random.Random, length: int, background: float) -> Document:
    """Memorised facts as plain text between filler: the idle task of heads that look things up."""
    document = Document()
    document.add(BOS, 0)
    used = 1
    while used < length:
        lead = "" if used == 1 else " "
        kind = rng.random()
        if kind < 0.3:
            name = rng.choice(tuple(CATEGORIES))
            head = f"{rng.choice(CATEGORIES[name])} is a kind of"
            document.add(lead + head, background)
            document.add(f" {name}", 1)
            document.add(".", background)
            used += size(head) + 2
        elif kind < 0.7:
            relation, country = rng.choice(tuple(RELATIONS)), rng.choice(COUNTRIES)
            value = MEMORY[relation, country]
            head = Fact(relation, country, value).statement.removesuffix(f" {value}.")
            document.add(lead + head, background)
            document.add(f" {value}", 1)
            document.add(".", background)
            used += size(head) + 2
        else:
            text = filler(rng)
            document.add(lead + text, background)
            used += size(text)
    return document


def _repeated(rng: random.Random, length: int, words: int) -> tuple[list[int], list[float]]:
    """BOS, then one random segment over and over with short random gaps; from its second run on, weight 1."""
    segment = [rng.randrange(len(SPECIAL), words) for _ in range(rng.randint(4, max(5, length // 2 - 1)))]
    ids, weights = [SPECIAL.index(BOS)], [0.0]
    while len(ids) < length:
        first = len(ids) == 1
        ids += segment
        weights += [0.0] * len(segment) if first else [0.0] + [1.0] * (len(segment) - 1)
        gap = rng.randint(0, 6) if rng.random() < 0.5 else 0
        ids += [rng.randrange(len(SPECIAL), words) for _ in range(gap)]
        weights += [0.0] * gap
    return ids[:length], weights[:length]


def _pick(draw: float) -> Callable[[random.Random, int, float], Document]:
    for share, build in ((0.62, _scene), (0.10, _recalled), (0.21, _classify)):
        if draw < share:
            return build
        draw -= share
    return _statements


def batch(
    tokenizer: Tokenizer, rng: random.Random, rows: int, length: int, *, background: float, repeated: float
) -> tuple[list[list[int]], list[list[float]]]:
    """`rows` documents cut or padded (pad id, weight 0) to `length` tokens: ids and loss weights.

    `repeated` is the share of documents made of repeated random segments.
    """
    pad = SPECIAL.index("<pad>")
    all_ids: list[list[int]] = []
    all_weights: list[list[float]] = []
    for _ in range(rows):
        draw = rng.random()
        if draw < repeated:
            ids, weights = _repeated(rng, length, tokenizer.get_vocab_size())
        else:
            draw = (draw - repeated) / (1 - repeated)
            build = _pick(draw)
            document = build(rng, length, background)
            ids, weights = [], []
            encoded = tokenizer.encode_batch([text for text, _ in document.pieces], add_special_tokens=False)
            for piece, (_, weight) in zip(encoded, document.pieces, strict=True):
                ids += piece.ids
                weights += [weight] * len(piece.ids)
        ids, weights = ids[:length], weights[:length]
        all_ids.append(ids + [pad] * (length - len(ids)))
        all_weights.append(weights + [0.0] * (length - len(weights)))
    return all_ids, all_weights
