"""How many tokens FocusICL ignores and how many demonstrations make a batch, by perplexity (arXiv 2408.13987, §3)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from steerlens.attach import steer
from steerlens.encoding import Chars, encode
from steerlens.examples import Example, ExampleError
from steerlens.measures.base import context, require
from steerlens.measures.responses import answer_ids
from steerlens.methods.focusicl import GROUP, FocusICL

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4)


def choose(perplexities: Mapping[float, Sequence[float]]) -> tuple[float, int | None]:
    """The fraction of least perplexity, and the number of demonstrations where more of them cease to help.

    Each D(i) has D(i + 1) added, against noise; the batch is the first i whose sum is above that of i - 2, `None` where
    there is none.

    Args:
        perplexities: per fraction D(i) of a response behind i demonstrations, i = 0, 1, …
    """
    fraction = min(perplexities, key=lambda p: sum(perplexities[p]))
    found = perplexities[fraction]
    sums = [a + b for a, b in pairwise(found)]
    return fraction, next((i for i in range(2, len(sums)) if sums[i] > sums[i - 2]), None)


@torch.no_grad()
def focusicl(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 5,
    most: int | None = None,
    separator: str = "\n\n",
    seed: int = 0,
    advance: Callable[[float], None] = lambda perplexity: None,
) -> FocusICL:
    """The method with the parameters that `choose` finds, on demonstrations in random orders.

    In each draw the examples come in one order, the same for all fractions, and the answer of each is scored behind
    those before it: `most` + 1 forwards for each fraction and draw. The source filters in the rows of all answers, here
    it is the rows of the one that is scored, as `FocusICL` does.

    Args:
        model: a transformers model in eval mode.
        tokenizer: of the model, a fast one.
        examples: texts with answers; a demonstration is both.
        fractions: of tokens to ignore, each in [0, 1). Published: 0 to 0.4.
        draws: orders. Published: 5.
        most: demonstrations; `None`: all examples but one.
        separator: text between them.
        seed: of the orders.
        advance: called after each forward with its perplexity.

    Raises:
        ExampleError: for fewer than three examples, one without text or answer, or demonstrations that are too long.
        MethodError: for a fraction out of range.
    """
    require("focusicl", examples, answer=True)
    most = len(examples) - 1 if most is None else most
    if not 2 <= most < len(examples):
        raise ExampleError(f"focusicl: most={most} of {len(examples)} examples; allowed: 2 to {len(examples) - 1}")
    if chats := [example for example in examples if not isinstance(example.prompt, str)]:
        raise ExampleError(f"focusicl: {chats[0]} is a chat; demonstrations are texts")
    shuffle, table = random.Random(seed), {p: [0.0] * (most + 1) for p in fractions}
    for _ in range(draws):
        order = shuffle.sample(list(examples), most + 1)
        for i, target in enumerate(order):
            before, answer, inputs, spans = _encoded(model, tokenizer, order[:i], target, separator)
            for fraction, found in table.items():
                method = FocusICL(fraction, None)
                ids = inputs["input_ids"]
                if i:
                    with steer(model, method, spans, prompt_lengths=before):
                        logs = method.score(model, inputs, spans)[0]
                else:
                    logs = model(**inputs).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                perplexity = math.exp(-float(logs[-answer:].mean()))
                found[i] += perplexity / draws
                advance(perplexity)
    fraction, batch = choose(table)
    return FocusICL(fraction, batch)


def _encoded(
    model: Any, tokenizer: Any, demos: Sequence[Example], target: Example, separator: str
) -> tuple[int, int, dict[str, torch.Tensor], Any]:
    """Tokens of the prompt and of the answer, the inputs with both, and the spans."""
    text, ranges = "", []
    for demo in demos:
        prompt = str(demo.prompt)
        own = f"{prompt}{'' if prompt[-1:].isspace() else ' '}{demo.answer}"
        ranges.append(Chars(len(text), len(text) + len(own)))
        text += own + separator
    text += str(target.prompt)
    inputs, spans = encode(tokenizer, [text], groups={GROUP: [ranges]} if ranges else None, device=model.device)
    prompt_ids = inputs["input_ids"][0].tolist()
    answer = answer_ids(tokenizer, Example(text, target.answer), prompt_ids)
    limit = context(model)
    if not answer or (limit is not None and len(prompt_ids) + len(answer) > limit):
        raise ExampleError(
            f"focusicl: {target} behind {len(demos)} demonstrations has {len(prompt_ids)} tokens and {len(answer)} of "
            f"its answer, the model has room for {limit}: give fewer demonstrations (most=), and answers with text"
        )
    ids = torch.tensor([[*prompt_ids, *answer]], device=model.device)
    return len(prompt_ids), len(answer), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, spans
