"""Ask a model the generated world's questions, steered or not."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from steerlens.evals.world.tasks import Sample, follows, sample
from transformers import PreTrainedTokenizerBase

import steerlens

Range = tuple[int, int]


def rows(task: str, first_seed: int, count: int, length: int) -> list[Sample]:
    """`count` held-out samples with seeds first_seed, first_seed + 1, …"""
    return [sample(task, seed, length) for seed in range(first_seed, first_seed + count)]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], ranges: Sequence[Iterable[Range]]
) -> tuple[dict[str, torch.Tensor], list[list[Range]]]:
    """Left-padded inputs, and each row's character ranges as half-open ranges of padded token columns."""
    encoded = tokenizer(
        list(prompts), return_tensors="pt", padding=True, padding_side="left", return_offsets_mapping=True
    )
    offsets = encoded["offset_mapping"].tolist()
    spans: list[list[Range]] = []
    for row, characters in zip(offsets, ranges, strict=True):
        spans.append([])
        for start, stop in characters:
            inside = [j for j, (a, b) in enumerate(row) if a < stop and b > start and b > a]
            spans[-1].append((inside[0], inside[-1] + 1))
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}, spans


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    methods: Any = None,
    *,
    sections: int = 1,
    batch_size: int = 50,
    new_tokens: int = 14,
) -> list[str]:
    """Greedy answers; `methods` steer with the first `sections` spans of each sample as the emphasis."""
    texts: list[str] = []
    for at in range(0, len(samples), batch_size):
        part = samples[at : at + batch_size]
        inputs, spans = encode(tokenizer, [s.prompt for s in part], [s.spans[:sections] for s in part])
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if methods is not None:
            context = steerlens.steer(model, methods, spans=spans if all(spans) else None)
        with context:
            out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def hits(outputs: Sequence[str], samples: Sequence[Sample]) -> list[bool]:
    """Per sample, whether the output is its answer."""
    return [follows(text, row.answer) for text, row in zip(outputs, samples, strict=True)]


def share(flags: Sequence[bool]) -> float:
    """Share of true flags, in [0, 1], to four digits."""
    return round(sum(flags) / len(flags), 4)


def others(outputs: Sequence[str], samples: Sequence[Sample]) -> float:
    """Share of outputs that are one of their sample's alternatives."""
    return share(
        [any(follows(text, other) for other in row.alternatives) for text, row in zip(outputs, samples, strict=True)]
    )


def gain_interval(before: Sequence[bool], after: Sequence[bool], seed: int = 0) -> list[float]:
    """95 % percentile bootstrap interval of the paired mean difference after - before (2,000 resamples)."""
    rng = random.Random(seed)
    gains = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    means = sorted(sum(rng.choices(gains, k=len(gains))) / len(gains) for _ in range(2000))
    return [round(means[49], 4), round(means[1949], 4)]
