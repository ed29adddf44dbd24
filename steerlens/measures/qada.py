"""QAdA's gate: does a head look far back right now, told from moments of its keys (arXiv 2502.09647).

Near keys are the first few and the most recent ones; the rest is far. The mass of the far keys is estimated as if their
logits were normal: n·exp(μ + σ²/2), μ = q·m/√d and σ² = qᵀCq/d, m and C the mean and the population covariance of the
far keys. A head is local where the near keys hold a share τ of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from steerlens.backends import reference
from steerlens.errors import UnsupportedError
from steerlens.examples import Example
from steerlens.measures.base import Head, HeadScores, MeasureError, batches, describe, forward
from steerlens.observing import Observer

if TYPE_CHECKING:
    from steerlens.backends.call import Call
    from steerlens.passes import Pass

SINK, LOCAL, THRESHOLD = 16, 1024, 0.6
"""Published: first keys, most recent keys, τ."""


def moments(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [..., D] and population covariance [..., D, D] of keys [..., n, D]."""
    mean = keys.mean(-2)
    apart = keys - mean[..., None, :]
    return mean, apart.transpose(-1, -2) @ apart / keys.shape[-2]


def log_far_mass(
    query: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor, count: int, scaling: float
) -> torch.Tensor:
    """Logarithm of the estimated Σ exp(logit) over the far keys, [...].

    Args:
        query: [..., D].
        mean: of the far keys, [..., D].
        covariance: of the far keys, [..., D, D].
        count: how many they are.
        scaling: factor on q·k.
    """
    center = scaling * (query * mean).sum(-1)
    spread = scaling**2 * torch.einsum("...i,...ij,...j->...", query, covariance, query)
    return math.log(count) + center + spread / 2


class Gate(Observer):
    """Reads the last row of each forward: per layer and batch row the near share, estimated and true, each [H]."""

    name = "steerlens heads qada"

    def __init__(self, model: Any, sink: int, local: int) -> None:
        super().__init__(model)
        self.sink, self.local = sink, local
        self.found: dict[int, list[tuple[torch.Tensor, torch.Tensor] | None]] = {}

    def observe(self, layer: int, call: Call, now: Pass) -> None:
        """See one attention call."""
        H, last = call.query.shape[1], call.query.shape[2] - 1
        if call.softcap is not None or self._engine.facts.heads[layer] != H:
            raise UnsupportedError(
                f"qada: layer {layer} of {self._engine.facts.name} caps its logits, or is spread over processes: "
                "moments of keys say nothing of its weights here"
            )
        logits = reference.logits(call, slice(last, last + 1), list(range(H)))[:, :, 0]
        query, key = call.query[:, :, last].float(), call.key.float()
        rows: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        for row in range(len(query)):
            seen = (logits[row, 0] > -torch.inf).nonzero()[:, 0]
            # half of a short prompt at most is near by being recent
            recent = min(self.local, len(seen) // 2)
            far = seen[self.sink : len(seen) - recent]
            if len(far) < 2:
                rows.append(None)
                continue
            near = torch.cat([seen[: self.sink], seen[len(seen) - recent :]])
            mean, covariance = (t.repeat_interleave(call.groups, 0) for t in moments(key[row][:, far]))
            estimate = log_far_mass(query[row], mean, covariance, len(far), call.scaling)
            held = logits[row][:, near].logsumexp(-1)
            true = logits[row][:, far].logsumexp(-1)
            rows.append(((held - estimate).sigmoid().cpu(), (held - true).sigmoid().cpu()))
        self.found[layer] = rows


def measure(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    sink: int = SINK,
    local: int = LOCAL,
    threshold: float = THRESHOLD,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda done: None,
) -> HeadScores:
    """Score heads by the share of far keys in the row behind the prompt, as the gate estimates it; one per example.

    Beside it the true share (`true`), and how often the gate calls the head local (`local`). Layers whose window leaves
    no far keys are not scored.

    Args:
        model: a transformers model.
        tokenizer: of the model.
        examples: prompts.
        sink: first keys that are near.
        local: most recent keys that are near; at most half of the keys that the row sees.
        threshold: τ, in (0, 1).
        batch_size: examples per forward.
        advance: told how many examples are done.

    Raises:
        MeasureError: if no prompt has far keys.
        UnsupportedError: for a model that caps its logits.
    """
    if not 0 < threshold < 1:
        raise MeasureError(f"qada: threshold={threshold!r} is out of range; allowed: a number > 0 and < 1")
    far: dict[Head, list[float]] = {}
    true: dict[Head, list[float]] = {}
    gates: dict[Head, list[float]] = {}
    agree = missed = total = 0
    for rows, inputs, _ in batches(model, tokenizer, examples, batch_size):
        gate = Gate(model, sink, local)
        with torch.no_grad(), gate:
            forward(model, inputs["input_ids"], inputs["attention_mask"], keep=1)
        for layer, found in gate.found.items():
            for one in filter(None, found):
                for head, (near, held) in enumerate(zip(*(share.tolist() for share in one), strict=True)):
                    far.setdefault((layer, head), []).append(1 - near)
                    true.setdefault((layer, head), []).append(1 - held)
                    gates.setdefault((layer, head), []).append(float(near >= threshold))
                    agree += (near >= threshold) == (held >= threshold)
                    missed += near >= threshold > held
                    total += 1
        advance(len(rows))
    if not total:
        raise MeasureError(
            f"qada: no prompt has two keys between its first {sink} and its recent half: give longer prompts, or a "
            "smaller sink"
        )
    return HeadScores(
        "qada",
        describe(model),
        far,
        {"true": true, "local": gates},
        settings={"examples": len(examples), "sink": sink, "local": local, "threshold": threshold},
        summary={
            "local_share": round(sum(map(sum, gates.values())) / total, 6),
            "gate_agrees_with_the_true_share": round(agree / total, 6),
            "called_local_though_far": round(missed / total, 6),
        },
    )
