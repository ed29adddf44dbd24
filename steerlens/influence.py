"""AttentionInfluence scores of documents: the relative loss of prediction without some heads (arXiv 2505.07293)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import steerlens
from steerlens.encoding import encode
from steerlens.errors import MethodError
from steerlens.examples import ExampleError
from steerlens.measures.base import context, forward
from steerlens.methods.attention_influence import AttentionInfluence

_BLOCK = 1 << 24


@dataclass(frozen=True)
class Influence:
    """What a document came to.

    Attributes:
        loss: mean cross-entropy of its tokens but the first under the unsteered model, nats.
        masked_loss: the same without the heads.
        tokens: how many tokens that is.
    """

    loss: float
    masked_loss: float
    tokens: int

    @property
    def score(self) -> float:
        """(L_ref - L_base) / L_base."""
        return (self.masked_loss - self.loss) / self.loss


def score(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    heads: Any,
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    backend: str = "auto",
) -> list[Influence]:
    """Score documents; both losses of a document come from the same batch, as they differ by little.

    Args:
        model: a transformers model.
        tokenizer: of the model.
        documents: texts.
        heads: the heads to take out, or an `AttentionInfluence`.
        batch_size: documents per forward.
        max_tokens: tokens that are read of each document; `None` for all of them.
        backend: as of `steer`.

    Returns:
        One score per document, in order.

    Raises:
        ExampleError: for a document of fewer than two tokens, or more than the model has room for.
        MethodError: if no head is named.
    """
    method = heads if isinstance(heads, AttentionInfluence) else AttentionInfluence(heads)
    if method.heads.empty:  # type: ignore[union-attr]
        raise MethodError("attention_influence: no head is named, so nothing is taken out; give heads=")
    if max_tokens is not None and max_tokens < 2:
        raise MethodError(f"attention_influence: max_tokens={max_tokens} is out of range; allowed: a number >= 2")
    found = []
    for first in range(0, len(documents), batch_size):
        ids, mask = _encode(model, tokenizer, documents[first : first + batch_size], max_tokens)
        with torch.no_grad():
            base = losses(forward(model, ids, mask).logits, ids, mask)
            with steerlens.steer(model, method, backend=backend):
                masked = losses(forward(model, ids, mask).logits, ids, mask)
        counts = (mask.sum(1) - 1).tolist()
        found += [Influence(*row) for row in zip(base, masked, counts, strict=True)]
    return found


def check(model: Any, tokenizer: Any, document: str, max_tokens: int | None = None) -> None:
    """Raise `ExampleError` for a document that `score` cannot score."""
    _encode(model, tokenizer, [document], max_tokens)


def _encode(
    model: Any, tokenizer: Any, documents: Sequence[str], most: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, _ = encode(tokenizer, list(documents), device=model.device)
    ids, mask = _cut(inputs["input_ids"], inputs["attention_mask"], most)
    limit = context(model)
    for document, length in zip(documents, mask.sum(1).tolist(), strict=True):
        if length < 2 or (limit is not None and length > limit):
            why = "it takes two to predict one" if length < 2 else f"the model has room for {limit}; give max_tokens"
            raise ExampleError(f"document {document!r:.60} has {length} tokens: {why}")
    return ids, mask


def losses(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Mean cross-entropy per row of left-padded tokens [B, T] but the first real one, computed in fp32, in nats."""
    found = []
    for row, (tokens, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        start, length = int(real.long().argmax()), ids.shape[1]
        step, total = max(1, _BLOCK // logits.shape[-1]), 0.0
        for at in range(start, length - 1, step):
            stop = min(at + step, length - 1)
            total += float(
                torch.nn.functional.cross_entropy(
                    logits[row, at:stop].float(), tokens[at + 1 : stop + 1].to(logits.device), reduction="sum"
                )
            )
        found.append(total / (length - 1 - start))
    return found


def _cut(ids: torch.Tensor, mask: torch.Tensor, most: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `most` tokens of each row, left-padded again."""
    if most is None or ids.shape[1] <= most:
        return ids, mask
    rows = [tokens[real][:most] for tokens, real in zip(ids, mask.bool(), strict=True)]
    width = max(map(len, rows))
    pad = torch.nn.functional.pad
    return (
        torch.stack([pad(row, (width - len(row), 0)) for row in rows]),
        torch.stack([pad(torch.ones_like(row), (width - len(row), 0)) for row in rows]),
    )
