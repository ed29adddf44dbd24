"""MAPS: what a head does to a token by its weights alone, without a forward pass (Elhelo and Geva, arXiv 2412.11965).

A head maps a source token s to the vocabulary by M[s] = E'[s] W_V W_O U. As in the paper, norms, biases and positions
are left out; E' is the embedding in the first layer and the first MLP's output for it in later ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from steerlens.errors import MethodError, UnsupportedError
from steerlens.examples import ExampleError, objects
from steerlens.measures.base import Head, HeadScores, describe
from steerlens.projections import Projections
from steerlens.wrapping import unwrap

Pairs = Mapping[str, Sequence[tuple[int, int]]]
COPYING = "copying"
BLOCK = 2**24
"""Most numbers of M at a time."""


def ranks(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How many tokens come before the target in its row of M [P, V], of equal ones those with a lower index; [P]."""
    value = rows.gather(1, targets[:, None])
    lower = torch.arange(rows.shape[1], device=rows.device) < targets[:, None]
    return (rows > value).sum(-1) + ((rows == value) & lower).sum(-1)


def hits(rows: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
    """Whether each target is in the top k of its row of M, [P, V] -> bool [P]."""
    return ranks(rows, targets) < k


def salience(source: torch.Tensor, mapped: torch.Tensor) -> torch.Tensor:
    """|E' W_V W_O| / |E'| per token, [N, hidden] each -> [N]."""
    return mapped.norm(dim=-1) / source.norm(dim=-1)


def read(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Pairs of texts per relation, from a JSONL file of {"relation", "source", "target"}.

    Raises:
        ExampleError: naming the file, the line and the value.
    """
    wanted = ("relation", "source", "target")
    found: dict[str, list[tuple[str, str]]] = {}
    for where, row in objects(path):
        if set(row) != set(wanted) or not all(row[k] and type(row[k]) is str for k in row):
            raise ExampleError(f"{where}: {json.dumps(row)!r:.80} is not an object of three texts: {wanted}")
        found.setdefault(row["relation"], []).append((row["source"], row["target"]))
    if not found:
        raise ExampleError(f"{path} holds no pair; it needs a JSON object per line with {', '.join(wanted)}")
    return found


def single_tokens(tokenizer: Any, pairs: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, list[tuple[int, int]]]:
    """The pairs of which both texts are one token with a leading space; the others are skipped.

    Raises:
        ExampleError: if none is left.
    """
    found = {}
    for relation, texts in pairs.items():
        ids = [tuple(_token(tokenizer, text) for text in pair) for pair in texts]
        kept = [(source, target) for source, target in ids if source is not None and target is not None]
        if kept:
            found[relation] = kept
    if not found:
        raise ExampleError(
            f"maps: none of the {sum(map(len, pairs.values()))} pairs has a source and a target that are each one "
            "token with a leading space: give shorter words of this tokenizer's vocabulary"
        )
    return found


def copying(tokenizer: Any, count: int, seed: int) -> dict[str, list[tuple[int, int]]]:
    """The relation of tokens with themselves, over a sample of the vocabulary without its special tokens."""
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    return {COPYING: [(token, token) for token in random.Random(seed).sample(ids, min(count, len(ids)))]}


@torch.no_grad()
def measure(
    model: Any,
    pairs: Pairs,
    *,
    k: int = 10,
    embedding: Literal["mlp", "raw"] = "mlp",
    relation: str | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> HeadScores:
    """Score heads by the share of token pairs whose target is in the top k of what the head makes of the source.

    Args:
        model: a model of a family in `steerlens.projections.FORMS`.
        pairs: (source, target) token ids per relation.
        k: 10 in the paper; 1 for copying.
        embedding: E' in layers behind the first: the first MLP's output ("mlp"), or the embedding ("raw").
        relation: whose scores rank the heads; the mean over relations unless given.
        advance: told how many layers are done.

    Returns:
        Scores, and as others the same share on -M ("suppression") and the mean salience of the sources.

    Raises:
        UnsupportedError: for a family that is not covered, quantised or offloaded weights.
    """
    if embedding not in ("mlp", "raw"):
        raise MethodError(f"maps: embedding={embedding!r} is unknown; allowed: mlp, raw")
    if relation is not None and relation not in pairs:
        raise MethodError(f"maps: there is no relation {relation!r}; the pairs have: {', '.join(pairs)}")
    projections = Projections(model)
    first = projections.facts.attention_layers[0]
    projections.value(first, 0), projections.output(first, 0)  # what cannot be read says so before the embeddings do
    unembedding = _unembedding(model, projections)
    if not 1 <= k < unembedding.shape[1]:
        raise MethodError(
            f"maps: k={k}; allowed: 1 to {unembedding.shape[1] - 1}, fewer than the vocabulary has tokens"
        )
    flat = [pair for found in pairs.values() for pair in found]
    sources = torch.tensor([source for source, _ in flat], device=unembedding.device)
    targets = torch.tensor([target for _, target in flat], device=unembedding.device)
    raw = unwrap(model).get_input_embeddings()
    embedded = raw(sources.to(raw.weight.device))
    if embedded.shape[-1] != unembedding.shape[0]:
        raise UnsupportedError(
            f"{projections.facts.name} has embeddings of width {embedded.shape[-1]} and an unembedding of "
            f"{unembedding.shape[0]}: tokens are projected in between, which maps does not follow"
        )
    later = embedded if embedding == "raw" else projections.mlp()(embedded)
    found: dict[str, dict[Head, torch.Tensor]] = {"score": {}, "suppression": {}, "salience": {}}
    for layer in projections.facts.attention_layers:
        source = embedded if layer == 0 else later
        for head in range(projections.facts.heads[layer]):
            value, output = projections.value(layer, head), projections.output(layer, head)
            x = source.to(value.device).float()
            mapped = x @ value.float() @ output.float()
            found["salience"][layer, head] = salience(x, mapped)
            mapped = mapped.to(unembedding.device)
            step = max(1, BLOCK // unembedding.shape[1])
            for name, sign in (("score", 1), ("suppression", -1)):
                parts = [
                    hits(sign * (block @ unembedding), some, k)
                    for block, some in zip(mapped.split(step), targets.split(step), strict=True)
                ]
                found[name][layer, head] = torch.cat(parts).float()
        advance(1)
    sizes = [len(ids) for ids in pairs.values()]

    def shares(hit: Mapping[Head, torch.Tensor]) -> dict[str, dict[Head, float]]:
        split = {head: [float(part.mean()) for part in values.split(sizes)] for head, values in hit.items()}
        return {name: {head: means[at] for head, means in split.items()} for at, name in enumerate(pairs)}

    scores, suppression = shares(found["score"]), shares(found["suppression"])
    return HeadScores(
        "maps",
        describe(model),
        _chosen(scores, relation),
        other={
            "suppression": _chosen(suppression, relation),
            "salience": {head: [float(values.mean())] for head, values in found["salience"].items()},
        },
        settings={"k": k, "embedding": embedding, "relation": relation},
        summary={
            "pairs": {name: len(ids) for name, ids in pairs.items()},
            "best_heads": {name: _best(scores[name]) for name in pairs},
            "best_suppressing_heads": {name: _best(suppression[name]) for name in pairs},
        },
    )


def _chosen(shares: Mapping[str, Mapping[Head, float]], relation: str | None) -> dict[Head, list[float]]:
    """One value per relation, or the one of a relation."""
    used = shares.values() if relation is None else [shares[relation]]
    return {head: [share[head] for share in used] for head in next(iter(shares.values()))}


def _best(share: Mapping[Head, float], count: int = 5) -> dict[str, float]:
    ranked = sorted(share, key=lambda head: (-share[head], head))[:count]
    return {f"{layer}-{head}": round(share[layer, head], 4) for layer, head in ranked if share[layer, head] > 0}


def _unembedding(model: Any, projections: Projections) -> torch.Tensor:
    """U, fp32 [hidden, V]."""
    module: Any = unwrap(model).get_output_embeddings()
    name = projections.facts.name
    if module is None:
        raise UnsupportedError(f"{name} has no unembedding (a model without its language head): load it with the head")
    if type(module) is not torch.nn.Linear or module.weight.is_meta or not module.weight.is_floating_point():
        raise UnsupportedError(
            f"the unembedding of {name} is no plain matrix in memory: load the model unquantised, whole, without "
            "--device-map"
        )
    return module.weight.detach().float().T


def _token(tokenizer: Any, text: str) -> int | None:
    """The token that is a text with a leading space, if there is one."""
    ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        # SentencePiece puts a space in front by itself
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids if len(ids) == 1 and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁") else []
    return int(ids[0]) if ids and ids[0] != tokenizer.unk_token_id else None
