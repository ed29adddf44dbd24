"""A detector of answers that do not rest on their context: Lookback Lens (arXiv 2407.07071, §2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from steerlens.errors import UnsupportedError
from steerlens.examples import Example, ExampleError
from steerlens.measures import lookback
from steerlens.measures.base import MeasureError, describe, require
from steerlens.measures.responses import forced
from steerlens.vectors import VectorFile


def lookback_lens(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    window: int | None = None,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> VectorFile:
    """The detector of `LookbackLens`, from examples with the group "context", an answer that rests on it, and others.

    Answers count as factual, alternatives as not; both are put behind the prompt, with the end-of-text token behind
    them, whose row counts too, as in the published code. The paper has the model's own greedy answers judged span by
    span: for such labels call `lookback_ratios`, `spans` and `fit`.

    Args:
        model: a transformers model.
        tokenizer: of the model.
        examples: prompts with answers, alternatives and "context".
        window: a span is so many tokens, sliding by one (paper: 8); `None`: the whole answer ("predefined span").
        batch_size: texts per forward.
        advance: told how many texts are done.

    Raises:
        ExampleError: for an example without one of these. MeasureError: if an answer sees no key behind the context.
        UnsupportedError: without scikit-learn.
    """
    require("lookback_lens", examples, answer=True, groups=("context",))
    for number, example in enumerate(examples, 1):
        if not example.alternatives:
            raise ExampleError(
                f"lookback_lens needs 'alternatives', answers that do not rest on the context, in every example; "
                f"example {number} has none"
            )
    texts = [
        (replace(example, answer=f"{answer}{tokenizer.eos_token or ''}", alternatives=()), not place)
        for example in examples
        for place, answer in enumerate((example.answer, *example.alternatives))
    ]
    found, labels = [], []
    ratios = lookback_ratios(model, tokenizer, [text for text, _ in texts], batch_size=batch_size, advance=advance)
    layers: dict[int, int] = {}
    for (_, factual), one in zip(texts, ratios, strict=True):
        layers = {layer: len(values) for layer, values in one.items()}
        features = spans(one, window)
        found.append(features)
        labels += [factual] * len(features)
    metadata = {"model": describe(model)["id"], "examples": str(len(examples)), "window": str(window or "whole")}
    return fit(torch.cat(found), labels, layers, metadata)


def lookback_ratios(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> list[dict[int, torch.Tensor]]:
    """Per example and layer the lookback ratios of the rows that produce its answer, fp32 [H, R] on the CPU.

    Raises:
        MeasureError: if a row sees no key behind the context.
    """
    found: list[dict[int, torch.Tensor]] = []
    batches = forced(
        "lookback_lens",
        model,
        tokenizer,
        examples,
        groups=("context",),
        teacher_forced=True,
        batch_size=batch_size,
        advance=advance,
    )
    for batch in batches:
        ratios = lookback.ratios(model, batch)
        found += [{layer: ratios[layer][row].cpu() for layer in ratios} for row in range(len(batch.responses))]
    if len(found) != len(examples):
        raise ExampleError("lookback_lens: an answer has no tokens; leave its example out")
    if any(bool(values.isnan().any()) for one in found for values in one.values()):
        raise MeasureError(
            "lookback_lens: a row sees no key behind the context: have the group 'context' end earlier, before the "
            "question"
        )
    return found


def spans(ratios: Mapping[int, torch.Tensor], window: int | None = None) -> torch.Tensor:
    """Features of each span of a text: means over its tokens, layer by layer, [n, layers · H].

    Args:
        ratios: per layer [H, R].
        window: tokens of a span, sliding by one; `None`, and a text that is shorter, is one span.
    """
    values = torch.cat([ratios[layer] for layer in sorted(ratios)])
    if window is None or values.shape[1] <= window:
        return values.mean(1)[None]
    return values.unfold(1, window, 1).mean(-1).T


def fit(
    features: torch.Tensor, labels: Sequence[bool], layers: Mapping[int, int], metadata: Mapping[str, str]
) -> VectorFile:
    """A logistic regression as the paper's: scikit-learn's defaults, features unscaled, at most 1000 iterations.

    Args:
        features: of spans, [n, layers · H], as `spans` gives.
        labels: which of them are factual.
        layers: query heads of each layer.
        metadata: texts to keep with it.

    Returns:
        `weight.<layer>` [H] and `bias` [1], as `LookbackLens(vectors=…)` reads them.

    Raises:
        UnsupportedError: without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    except ImportError as error:
        raise UnsupportedError(
            "fitting lookback_lens needs scikit-learn, which is not installed: pip install 'steerlens[eval]'"
        ) from error
    if len(set(labels)) < 2:
        raise MeasureError("lookback_lens: all spans have the same label; give factual ones and others")
    found = LogisticRegression(max_iter=1000).fit(features.double().numpy(), list(labels))
    weight = torch.tensor(found.coef_[0], dtype=torch.float32).split([layers[layer] for layer in sorted(layers)])
    tensors = {f"weight.{layer}": part for layer, part in zip(sorted(layers), weight, strict=True)}
    tensors["bias"] = torch.tensor(found.intercept_, dtype=torch.float32)
    return VectorFile("lookback_lens", tensors, {"method": "lookback_lens", "spans": str(len(labels)), **metadata})
