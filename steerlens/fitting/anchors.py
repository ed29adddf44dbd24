"""Factors on the attention to label words, by gradient descent through the steered model (arXiv 2305.14160, §4.1)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from steerlens import decoder
from steerlens.attach import steer
from steerlens.edits import Plan
from steerlens.examples import Example, ExampleError
from steerlens.facts import ModelFacts
from steerlens.measures.base import batches, describe, forward, require
from steerlens.measures.responses import answer_ids
from steerlens.methods.anchor_reweighting import GROUP, KIND, edits
from steerlens.methods.base import EditMethod
from steerlens.spans import Spans
from steerlens.vectors import VectorFile
from steerlens.wrapping import unwrap


@dataclass(frozen=True, eq=False)
class Candidate(EditMethod):
    """Anchor re-weighting by factors [H, n] per layer that are being fitted."""

    beta: dict[int, torch.Tensor]
    renormalise: bool

    name: ClassVar[str] = "anchor_reweighting"
    source: ClassVar[str] = "the factors of a fit"
    summary: ClassVar[str] = "the factors of a fit"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    causal: ClassVar[bool] = True

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        return {n: edits(tuple(range(len(beta))), beta, self.renormalise) for n, beta in self.beta.items()}


def anchor_reweighting(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    epochs: int = 10,
    learning_rate: float = 0.01,
    renormalise: bool = False,
    seed: int = 0,
    backend: str = "auto",
    advance: Callable[[float], None] = lambda loss: None,
) -> VectorFile:
    """Fit a factor per layer, head and anchor: `"beta.<layer>"` fp32 [H, n], for the method of the same name.

    Minimises the cross-entropy of the answer's first token among those of the answer and the alternatives, one example
    a step, in another order each epoch, with Adam; published: 10 epochs, 0.01. The model's weights do not change.

    Args:
        model: a transformers model in eval mode.
        tokenizer: of the model.
        examples: each a prompt with demonstrations, the `answer`, the other labels as `alternatives`, and the label
            words of the demonstrations as the group `emphasis`, one text per label in the same order everywhere.
        epochs: passes over the examples.
        learning_rate: of Adam.
        renormalise: fit the renormalised variant.
        seed: of the order of the examples.
        backend: `auto`, `reference` or `sdpa`; triton has no gradients.
        advance: called after each step with its loss in nats.

    Raises:
        ExampleError: for an example without these, whose labels begin alike, or with another number of anchors.
    """
    require("anchor re-weighting", examples, answer=True, groups=(GROUP,))
    rows = []
    for number, (chosen, inputs, spans) in enumerate(batches(model, tokenizer, examples, 1, groups=(GROUP,)), 1):
        example, prompt = chosen[0], inputs["input_ids"][0].tolist()
        labels = [
            answer_ids(tokenizer, Example(example.prompt, text), prompt)[0]
            for text in (example.answer, *example.alternatives)
        ]
        if len(labels) < 2 or labels[0] in labels[1:]:
            raise ExampleError(
                f"anchor re-weighting: example {number} needs 'alternatives', the other labels, whose first tokens are "
                f"not that of its answer {example.answer!r}"
            )
        rows.append((inputs, spans, torch.tensor(labels, device=model.device)))
    counts = {spans.most_sections(GROUP) for _, spans, _ in rows}
    if len(counts) > 1:
        raise ExampleError(
            f"anchor re-weighting: examples emphasise different numbers of label words, {sorted(counts)}: give one "
            "text per label in every example, each found once"
        )
    count, described = counts.pop(), describe(model)
    with torch.inference_mode(False), torch.enable_grad():
        facts, _ = decoder.read(decoder.find(unwrap(model)))
        beta = {n: torch.zeros(facts.heads[n], count, requires_grad=True) for n in facts.attention_layers}
        parameters = list(beta.values())
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        method, order, shuffle = Candidate(beta, renormalise), list(range(len(rows))), random.Random(seed)
        for _ in range(epochs):
            shuffle.shuffle(order)
            for place in order:
                inputs, spans, answers = rows[place]
                with steer(model, method, spans, backend=backend):
                    logits = forward(model, inputs["input_ids"], inputs["attention_mask"], keep=1).logits[0, -1]
                loss = -logits.float()[answers].log_softmax(0)[0]
                # of the factors alone: the weights keep the gradients that they have
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.grad = gradient
                optimizer.step()
                advance(loss.item())
    metadata = {"method": "anchor_reweighting", "model": str(described["id"]), "examples": str(len(rows))}
    tensors = {f"{KIND}.{layer}": table.detach() for layer, table in beta.items()}
    return VectorFile("the fit of anchor re-weighting", tensors, metadata | {"renormalise": str(renormalise).lower()})
