"""SEKA's projections: what keys gain from a relevant question before them, and what an irrelevant one leaves.

Each example gives the context alone, behind its own question and behind another example's; the keys of the gold span
are compared, before any position encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from steerlens import decoder, inlets
from steerlens.encoding import encode
from steerlens.examples import Example, ExampleError
from steerlens.measures.base import context, describe, forward, require
from steerlens.selectors import Chars
from steerlens.vectors import VectorFile
from steerlens.wrapping import unwrap


def projections(plain: torch.Tensor, other: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Projections [G, D, D] onto the leading and onto the trailing left singular vectors of HᵀH'/n.

    Args:
        plain: H, keys [n, G, D].
        other: H', the same tokens' keys [n, G, D].
        share: the leading ones are the fewest whose singular values add up to this share.
    """
    product = torch.einsum("nga,ngb->gab", plain.double(), other.double()) / len(plain)
    left, values, _ = torch.linalg.svd(product)
    before = values.cumsum(-1) - values
    leading = (before < share * values.sum(-1, keepdim=True)).double()
    return tuple(  # type: ignore[return-value]
        ((left * chosen[:, None]) @ left.transpose(-1, -2)).float() for chosen in (leading, 1 - leading)
    )


def basis(plain: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """σ_k·u_k of the leading left singular vectors of HᵀH'/n as `projections` picks them, [G, D, D], zeros behind."""
    product = torch.einsum("nga,ngb->gab", plain.double(), other.double()) / len(plain)
    left, values, _ = torch.linalg.svd(product)
    leading = values.cumsum(-1) - values < share * values.sum(-1, keepdim=True)
    return (left * (values * leading)[:, None]).transpose(-1, -2).float()


def texts(examples: Sequence[Example]) -> list[tuple[tuple[str, str, str], tuple[int, int]]]:
    """Per example the context alone, behind its question and behind another one, and the gold span in the context.

    Raises:
        ExampleError: for an example whose prompt, context or gold is not one text.
    """
    require("seka", examples, groups=("context", "gold"))
    parts = []
    for example in examples:
        if not isinstance(example.prompt, str):
            raise ExampleError(f"seka's fit takes prompts that are texts; {example} is a chat")
        start, stop = _place(example, "context", example.prompt)
        gold, end = _place(example, "gold", example.prompt)
        question = f"{example.prompt[:start]} {example.prompt[stop:]}".strip()
        if not start <= gold < end <= stop or not question:
            raise ExampleError(f"{example}: 'gold' must lie inside 'context', and a question outside it")
        body = example.prompt[start:stop].rstrip()
        parts.append((question, body, (gold - start, min(end - start, len(body)))))
    found = []
    for number, (question, body, gold_range) in enumerate(parts):
        others = (parts[(number + step) % len(parts)][0] for step in range(1, len(parts)))
        other = next((text for text in others if text != question), None)
        if other is None:
            raise ExampleError(
                "seka's fit needs examples with different questions: the others' are the irrelevant ones"
            )
        found.append(((body, f"{question} {body}", f"{other} {body}"), gold_range))
    return found


def _place(example: Example, group: str, prompt: str) -> tuple[int, int]:
    selector = example.groups[group][0]
    if isinstance(selector, Chars):
        return slice(selector.start, selector.stop).indices(len(prompt))[:2]
    start = prompt.find(selector) if isinstance(selector, str) else -1
    if start < 0:
        raise ExampleError(f"{example}: {group!r} {selector!r:.60} is no text of the prompt")
    return start, start + len(selector)


def collect(
    model: Any, tokenizer: Any, examples: Sequence[Example], advance: Callable[[int], None] = lambda done: None
) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]], int]:
    """Per layer H, H⁺ and H⁻, fp32 [n, G, D] each, and how many examples they are of.

    They are the keys of the gold tokens in the context alone, behind the relevant and behind an irrelevant question.
    """
    facts, modules = decoder.read(decoder.find(unwrap(model)))
    layers = [layer for layer in facts.attention_layers if layer not in facts.keys_of]
    limit, seen = context(model), dict[int, torch.Tensor]()

    def see(layer: int) -> Callable[[torch.Tensor], None]:
        return lambda keys: seen.__setitem__(layer, keys.detach().float().cpu())

    kept: dict[int, tuple[list[torch.Tensor], ...]] = {layer: ([], [], []) for layer in layers}
    hooks: list[RemovableHandle] = []
    used = 0
    try:
        for layer in layers:
            hooks.append(inlets.watch(modules[layer], facts, layer, see(layer)))
        for example, (versions, (start, stop)) in zip(examples, texts(examples), strict=True):
            shift = [len(version) - len(versions[0]) for version in versions]
            spans = [[Chars(start + by, stop + by)] for by in shift]
            inputs, found = encode(tokenizer, list(versions), groups={"gold": spans}, device=model.device)
            ids, width = inputs["input_ids"], inputs["input_ids"].shape[1]
            if limit is not None and width > limit:
                raise ExampleError(f"{example} has {width} tokens behind a question; the model has room for {limit}")
            columns = [[c for a, b in row for c in range(a, b)] for row in found.groups["gold"]]
            tokens = [ids[row, chosen].tolist() for row, chosen in enumerate(columns)]
            advance(1)
            if tokens[0] != tokens[1] or tokens[0] != tokens[2]:
                continue  # the tokenizer cuts the span otherwise behind a question
            used += 1
            with torch.no_grad():
                forward(model, ids, inputs["attention_mask"], 1)
            for layer, rows in kept.items():
                for row in range(3):
                    rows[row].append(seen[layer][row, columns[row]])
    finally:
        for hook in hooks:
            hook.remove()
    if not used:
        raise ExampleError("seka: the tokenizer cuts every gold span otherwise behind a question: give other spans")
    joined = {layer: tuple(torch.cat(parts) for parts in rows) for layer, rows in kept.items()}
    return joined, used  # type: ignore[return-value]


def seka(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    share: float = 0.9,
    advance: Callable[[int], None] = lambda done: None,
) -> VectorFile:
    """Learn SEKA's projections from examples with the groups "context" and "gold"; what is no context is the question.

    Published: 200 examples.

    Args:
        model: a transformers model of a family whose keys are within reach (`steerlens.inlets.INLETS`).
        tokenizer: of the model.
        examples: prompts that are texts, at least two with different questions.
        share: of the singular values that the leading directions hold, in (0, 1).
        advance: told how many examples are done.

    Returns:
        Per layer `positive.<layer>`, the projection onto the leading left singular vectors of HᵀH⁺/n, and
        `negative.<layer>`, that onto the trailing ones of HᵀH⁻/n, [G, D, D]; `shift.<layer>` [G], the mean over tokens
        of ‖h⁺ - h⁻‖, and `shift_frobenius.<layer>` [G], ‖H⁺ - H⁻‖/n (see `collect`).

    Raises:
        ExampleError: for examples that do not give that, or are too long. UnsupportedError: for a family that is not
            known.
    """
    found, used = collect(model, tokenizer, examples, advance)
    tensors: dict[str, torch.Tensor] = {}
    for layer, (plain, relevant, irrelevant) in found.items():
        apart = (relevant - irrelevant).norm(dim=-1)
        tensors |= {
            f"positive.{layer}": projections(plain, relevant, share)[0],
            f"negative.{layer}": projections(plain, irrelevant, share)[1],
            f"shift.{layer}": apart.mean(0),
            f"shift_frobenius.{layer}": apart.square().sum(0).sqrt() / len(apart),
        }
    metadata = {"method": "seka", "model": describe(model)["id"], "examples": used, "share": share}
    return VectorFile("seka", tensors, {key: str(value) for key, value in metadata.items()})


def adaseka(
    model: Any,
    tokenizer: Any,
    experts: Mapping[str, Sequence[Example]],
    *,
    share: float = 0.9,
    advance: Callable[[int], None] = lambda done: None,
) -> VectorFile:
    """Learn AdaSEKA's experts, one from each set of examples; the arguments are those of `seka`, by expert.

    Args:
        model: as for `seka`.
        tokenizer: of the model.
        experts: by name, examples as for `seka`.
        share: of the singular values that an expert's directions hold, in (0, 1).
        advance: told how many examples are done.

    Returns:
        `experts.<layer>` [G, M, D, D], rows σ_k·u_k of the leading left singular vectors of HᵀH⁺/n, zeros behind them;
        `shift.<layer>` [G], the mean over all experts' tokens of ‖h⁺ - h⁻‖. The metadata name the experts in order.
    """
    if not experts:
        raise ExampleError("adaseka needs at least one expert: a set of examples")
    parts = [collect(model, tokenizer, examples, advance) for examples in experts.values()]
    tensors: dict[str, torch.Tensor] = {}
    for layer in parts[0][0]:
        rows = [found[layer] for found, _ in parts]
        tensors[f"experts.{layer}"] = torch.stack([basis(plain, relevant, share) for plain, relevant, _ in rows], 1)
        apart = torch.cat([(relevant - irrelevant).norm(dim=-1) for _, relevant, irrelevant in rows])
        tensors[f"shift.{layer}"] = apart.mean(0)
    metadata = {"method": "adaseka", "model": describe(model)["id"], "experts": ", ".join(experts), "share": str(share)}
    return VectorFile("adaseka", tensors, metadata)
