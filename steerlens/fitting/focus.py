"""Focus directions: what to add to a head's queries so that it attends to what holds the answer (arXiv 2503.23306).

Each layer is fitted by itself: the queries and keys of the unsteered model are kept, and only the directions learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from steerlens import decoder
from steerlens.backends import reference
from steerlens.backends.call import Call
from steerlens.examples import Example
from steerlens.measures.base import describe
from steerlens.measures.responses import MAX_NEW_TOKENS, forced
from steerlens.observing import Observer
from steerlens.passes import Pass
from steerlens.vectors import VectorFile
from steerlens.wrapping import unwrap


@dataclass(frozen=True)
class Rows:
    """The query rows of a batch that produce its responses, in one layer.

    Attributes:
        call: the attention call, with those rows alone and no edits.
        gold: bool [B, Tk].
        counted: rows that produce a response, bool [B, R].
    """

    call: Call
    gold: torch.Tensor
    counted: torch.Tensor

    def mass(self, directions: torch.Tensor | None = None) -> torch.Tensor:
        """Attention mass on gold keys, [B, H, R], with `directions` [H, D] added to the queries; differentiable."""
        call = self.call
        if directions is not None:
            call = replace(call, query=call.query + directions[None, :, None])
        found = reference.weights(call, [], slice(0, call.query.shape[2]))
        return (found * self.gold[:, None, None]).sum(-1)

    def per_example(self) -> torch.Tensor:
        """The contextual score of each example and head, [B, H]: mean mass over its response rows."""
        counted = self.counted[:, None]
        return (self.mass() * counted).sum(-1) / counted.sum(-1)


class Calls(Observer):
    """Keeps the attention calls of some layers, cut to their last `most` query rows."""

    name = "steerlens.fitting.focus_directions"

    def __init__(self, model: Any, layers: Sequence[int], most: int) -> None:
        super().__init__(model)
        self._layers, self._most = tuple(layers), most
        self.found: dict[int, Call] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose calls are kept."""
        return self._layers

    def observe(self, layer: int, call: Call, now: Pass) -> None:
        """Keep a call."""
        before = call.query.shape[2] - self._most
        mask = call.mask if call.mask is None else call.mask[:, :, before:].clone()
        self.found[layer] = Call(
            call.query[:, :, before:].float().clone(),
            call.key.float(),
            call.value[..., :1],
            mask,
            call.scaling,
            call.softcap,
            call.offset + before,
            call.real,
            False,
            sinks=call.sinks,
            window=call.window if call.mask is None else None,
        )


def train(
    rows: Sequence[Rows], *, epochs: int, learning_rate: float, weight_decay: float, seed: int
) -> tuple[torch.Tensor, list[float]]:
    """Directions of a layer [H, D] that maximise the mean gold mass, and that mean in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    query = rows[0].call.query
    start = torch.randn(query.shape[1], query.shape[-1], generator=generator) * 0.01
    directions = start.to(query.device).requires_grad_()
    optimizer = torch.optim.AdamW([directions], lr=learning_rate, weight_decay=weight_decay)
    means = []
    for _ in range(epochs):
        total = 0.0
        for number in torch.randperm(len(rows), generator=generator).tolist():
            batch = rows[number]
            counted = batch.counted[:, None]
            mean = (batch.mass(directions) * counted).sum() / (counted.sum() * directions.shape[0])
            optimizer.zero_grad()
            (-mean).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(mean.detach())
        means.append(total / len(rows))
    return directions.detach(), means


def focus_directions(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    layers: Iterable[int] | None = None,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    teacher_forced: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 1,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> VectorFile:
    """Fit directions, and score heads, on examples with the group "gold".

    Minimises -mean over heads and response rows of the attention mass on gold keys, per layer, with AdamW; published
    settings are the defaults. They are for thousands of examples: a step moves a number by at most the learning rate,
    so few examples need a higher one. All examples' queries and keys of `layers` are held in memory at once.

    Args:
        model: a transformers model.
        tokenizer: of the model.
        examples: prompts with the group "gold", and with answers where these are forced.
        layers: decoder layers to fit; `None` for all that have attention.
        epochs: passes over the examples.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        teacher_forced: rows that produce the examples' answers, not the model's own greedy ones. (Published: answers
            that the model gives to the gold document alone.)
        max_new_tokens: longest response of the model.
        batch_size: examples per forward and step.
        seed: of the start and of the order.
        advance: told how many examples are done.

    Returns:
        `query.<layer>` [H, D] and `score.<layer>` [H], the contextual score: the mean over examples of the mean gold
        mass over response rows, unsteered.

    Raises:
        ExampleError, MeasureError: for examples that lack something, or come to nothing.
    """
    facts, _ = decoder.read(decoder.find(unwrap(model)))
    chosen = facts.attention_layers if layers is None else tuple(sorted(set(layers)))
    kept: dict[int, list[Rows]] = {layer: [] for layer in chosen}
    count = 0
    for batch in forced(
        "focus_directions",
        model,
        tokenizer,
        examples,
        groups=("gold",),
        teacher_forced=teacher_forced,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        advance=advance,
    ):
        with torch.no_grad(), Calls(model, chosen, batch.most) as calls:
            batch.run(model, None if facts.keys_of else 1)
        count += len(batch.responses)
        gold = torch.zeros(batch.ids.shape, dtype=torch.bool)
        counted = torch.zeros(len(batch.responses), batch.most, dtype=torch.bool)
        for row, response in enumerate(batch.responses):
            counted[row, batch.most - len(response) :] = True
            for start, stop in batch.groups["gold"][row]:
                gold[row, start:stop] = True
        for layer, call in calls.found.items():
            device = call.query.device
            first = gold.shape[1] - call.key.shape[2]
            kept[layer].append(Rows(call, gold[:, first:].to(device), counted.to(device)))
    tensors, reached = {}, []
    for layer, rows in kept.items():
        with torch.no_grad():
            tensors[f"score.{layer}"] = torch.cat([batch.per_example() for batch in rows]).mean(0)
        with torch.inference_mode(False), torch.enable_grad():
            directions, means = train(
                rows, epochs=epochs, learning_rate=learning_rate, weight_decay=weight_decay, seed=seed
            )
        tensors[f"query.{layer}"] = directions
        reached.append(f"{layer}: {means[0]:.4f} -> {means[-1]:.4f}")
    settings = {"epochs": epochs, "learning_rate": learning_rate, "weight_decay": weight_decay, "seed": seed}
    metadata = {"method": "focus_directions", "model": describe(model)["id"], "examples": count, **settings}
    return VectorFile(
        "focus_directions",
        tensors,
        {key: str(value) for key, value in metadata.items()} | {"gold_mass": "; ".join(reached)},
    )
