"""Ask a model the generated world's questions, steered or not, and score its heads."""

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


@torch.no_grad()
def retrieval_scores(
    model: Any, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]
) -> dict[str, list[float]]:
    """Count-based copy score of every query head, one number per passed sample (Wu et al. 2024).

    The needle is the value inside the statement. A decode row scores 1 / (tokens of the needle) where the head's
    most attended key lies in the needle and holds the token that the row produced. Samples that the model answers
    wrongly are left out.
    """
    passed = [row for row, hit in zip(samples, hits(answers(model, tokenizer, samples), samples), strict=True) if hit]
    scores: dict[str, list[float]] = {}
    for row in passed:
        # The statement ends in "value."
        stop = row.spans[0][1] - 1
        inputs, spans = encode(tokenizer, [f"{row.prompt} {row.answer}"], [[(stop - len(row.answer), stop)]])
        start, end = spans[0][0]
        ids = inputs["input_ids"][0].tolist()
        count = end - start
        with steerlens.capture(model, stats=("argmax",)) as record:
            model(**{name: value.to(model.device) for name, value in inputs.items()})
        for layer in range(model.config.num_hidden_layers):
            found = record[layer].argmax
            assert found is not None
            keys = found[0, :, -count - 1 : -1].tolist()
            for head, columns in enumerate(keys):
                copied = sum(
                    start <= key < end and ids[key] == token for key, token in zip(columns, ids[-count:], strict=True)
                )
                scores.setdefault(f"{layer}-{head}", []).append(round(copied / count, 4))
    return scores


@torch.no_grad()
def sink_strength(model: Any, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> list[list[float]]:
    """[layers][heads]: mean attention that BOS receives from the rows that see it (0 to 1), over the samples."""
    total = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads)
    for row in samples:
        inputs, _ = encode(tokenizer, [row.prompt], [[]])
        with steerlens.capture(model, stats=("column_mean",)) as record:
            model(**{name: value.to(model.device) for name, value in inputs.items()})
        for layer in range(len(total)):
            found = record[layer].column_mean
            assert found is not None
            total[layer] += found[0, :, 0].cpu()
    return [[round(value, 3) for value in row] for row in (total / len(samples)).tolist()]
