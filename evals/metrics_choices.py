"""Log-likelihoods of choices."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax
from steerlens.evals.doc import Doc, Output
from steerlens.evals.metrics import MetricError, field, metric


@metric("acc", output="choices", needs=("choices",))
def acc(doc: Doc, output: Output) -> float:
    """1 if the right choice has the highest log-likelihood; the first of equals counts."""
    return int(np.argmax(output.logprobs)) == doc.target


@metric("acc_norm", output="choices", needs=("choices",))
def acc_norm(doc: Doc, output: Output) -> float:
    """As `acc`, of log-likelihoods divided by the choices' lengths in characters, as lm-eval does."""
    lengths = [max(1, len(choice.strip())) for choice in doc.choices]
    return int(np.argmax(np.array(output.logprobs) / lengths)) == doc.target


@metric("logprob", output="choices", needs=("choices",))
def logprob(doc: Doc, output: Output) -> float:
    """Log-likelihood of the right choice, in nats."""
    assert doc.target is not None
    return output.logprobs[doc.target]


@metric("mc2", output="choices", needs=("choices",))
def mc2(doc: Doc, output: Output, *, labels: str | None = None) -> float:
    """Share of the right choices in the choices' probability, as TruthfulQA's MC2.

    Args:
        doc: the document.
        output: its log-likelihoods.
        labels: field with a 1 for each right choice and a 0 for each other; the target alone unless given.
    """
    right = [i == doc.target for i in range(len(doc.choices))] if labels is None else field(doc, labels, "mc2")
    if len(right) != len(doc.choices):
        raise MetricError(f"metric 'mc2': field {labels!r} has {len(right)} entries for {len(doc.choices)} choices")
    if not np.isfinite(max(output.logprobs)):
        return 0.0
    return float(softmax(output.logprobs) @ np.array(right, dtype=float))
