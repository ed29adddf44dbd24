"""Found in the Middle: share attention among documents by what they are, not where they stand (arXiv 2406.16008)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from steerlens.edits import MassLaw, Plan, Redistribute, SpanKeys
from steerlens.errors import MethodError
from steerlens.facts import ModelFacts
from steerlens.heads import Heads
from steerlens.methods.prompted import PromptedMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from steerlens.prompted import Prompts, Sections, Setting

GROUP = "documents"
FLOOR = 1e-6
"""A document's mass counts for at least this, so that none is raised without bound."""


@dataclass(frozen=True)
class Shares(MassLaw):
    """What the documents hold together is shared in proportion to exp(`logs[row][document]`)."""

    logs: tuple[tuple[float, ...], ...]

    def log_weights(self, mass: Tensor, row: Tensor, real: Tensor) -> Tensor:
        import torch

        logs = _tensor(self.logs, mass.device)[row][:, None, None]
        seen = mass > 0
        held = mass.masked_fill(~seen, 1)  # what is not used must be finite, for gradients
        found = (logs - held.clamp(min=FLOOR).log()).masked_fill(~seen, -1e30)
        total = mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).log()
        found = found + total - (found + held.log()).logsumexp(-1, keepdim=True)
        return found.where(seen.sum(-1, keepdim=True) > 1, 0)


@lru_cache(maxsize=64)
def _tensor(logs: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    import torch

    with torch.inference_mode(False):  # it outlives the forward, and a later one may need gradients
        return torch.tensor(logs, dtype=torch.float32).to(device)


@dataclass(frozen=True)
class FoundInTheMiddle(PromptedMethod):
    """Share what the documents get of the attention by their relevance, measured without their place (§4 of the paper).

    Attn(k), the mean attention that the last prompt row pays to a token of document k, averaged over the layers and all
    their query heads, is taken for relevance plus a bias of the place. The bias is what a dummy gets in that place:
    rel(k) = Attn(doc_k) - Attn(dummy at k), one forward for each document and one for the prompt. With α = softmax of
    rel/t over the documents, each head and row that predicts then weighs document k by α_k/Attn_head(k)·C. C leaves the
    documents' total as it was, so that their means come to be as α. The last prompt row and all later ones are steered
    by the same α. A document out of sight (a sliding window) gets nothing, and the others share.

    The source leaves open, and here is: one rel for all heads and layers; the dummy has each document's length, which
    keeps the others in their places; a mass below 1e-6 counts as 1e-6, so that not all of α may be reached there.

    Args:
        temperature: t, in units of attention per token; small values give all to one document. Published: 5e-5, for
            prompts of thousands of tokens. There is no neutral value: large ones make the documents alike.
        normalise: `mean`: the mean attention of documents' tokens comes to be as α, as published; `sum`: their mass.
        last_layers: so many layers at the end are measured and steered; `None`: half of them. Published: 16 of 32.
        dummy: token ids of the dummy, repeated to each document's length; `None`: the tokens of the prompt's own
            documents, mixed.
        heads: which query heads are steered. Published: all.
    """

    temperature: float = 5e-5
    normalise: Literal["mean", "sum"] = "mean"
    last_layers: int | None = None
    dummy: tuple[int, ...] | None = None
    heads: Heads | str | dict[int, list[int]] = "all"

    name: ClassVar[str] = "found_in_the_middle"
    source: ClassVar[str] = "Hsieh et al. 2024, Found in the Middle, arXiv 2406.16008v2, §4"
    summary: ClassVar[str] = "share attention among documents by relevance, calibrated for their place"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)
    cache_exact: ClassVar[bool] = True
    chunk_exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._number("temperature", 0, open_low=True)
        self._choice("normalise", ("mean", "sum"))
        if self.last_layers is not None:
            self._count("last_layers")
        if self.dummy is not None:
            given: Any = self.dummy
            listed = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
            if not listed or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in given):
                raise MethodError(f"{self.name}: dummy={given!r:.80} is no list of token ids; for example [198]")
            object.__setattr__(self, "dummy", tuple(given))
        self._parse_heads()

    def to_dict(self) -> dict[str, Any]:
        """As of every method."""
        return super().to_dict() | {"dummy": None if self.dummy is None else list(self.dummy)}

    def layers(self, facts: ModelFacts) -> tuple[int, ...]:
        """Layers that are measured and steered.

        Raises:
            MethodError: if the model has fewer than `last_layers`.
        """
        count = math.ceil(facts.layers / 2) if self.last_layers is None else self.last_layers
        if count > facts.layers:
            raise MethodError(
                f"{self.name}: last_layers={count} is out of range; {facts.name} has {facts.layers} layers"
            )
        return tuple(n for n in facts.attention_layers if n >= facts.layers - count)

    def relevance(self, model: Any, prompts: Prompts, documents: Sections, layers: Sequence[int]) -> list[list[float]]:
        """rel(k) of each row's documents, in units of attention per token."""
        import torch

        from steerlens.prompted import attention_on

        def means(ids: Tensor) -> list[list[float]]:
            found = attention_on(model, ids, prompts.mask, documents, layers)
            return [
                [mass / (b - a) for mass, (a, b) in zip(*row, strict=True)]
                for row in zip(found, documents, strict=True)
            ]

        scores = means(prompts.ids)
        fillers = [self._filler(prompts.ids[row].tolist(), ranges) for row, ranges in enumerate(documents)]
        for k in range(max(map(len, documents))):
            ids = prompts.ids.clone()
            for row, ranges in enumerate(documents):
                for a, b in ranges[k : k + 1]:
                    ids[row, a:b] = torch.tensor(fillers[row][: b - a], device=ids.device)
            for row, bias in enumerate(means(ids)):
                if k < len(bias):
                    scores[row][k] -= bias[k]
        return scores

    def _filler(self, ids: list[int], documents: Sequence[tuple[int, int]]) -> list[int]:
        """The dummy, at least as long as the longest document."""
        if self.dummy is not None:
            longest = max(b - a for a, b in documents)
            return list(self.dummy) * math.ceil(longest / len(self.dummy))
        mixed = [token for a, b in documents for token in ids[a:b]]
        random.Random(0).shuffle(mixed)
        return mixed

    def law(self, relevance: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> Shares:
        """The law for rows of rel(k) and of numbers of tokens."""
        import torch

        rows = []
        for rel, counts in zip(relevance, lengths, strict=True):
            logs = (torch.tensor(rel, dtype=torch.float64) / self.temperature).log_softmax(0)
            if self.normalise == "mean":
                logs = logs + torch.tensor(counts, dtype=torch.float64).log()
            rows.append(tuple(logs.tolist()))
        most = max(map(len, rows))
        return Shares(tuple(row + (0.0,) * (most - len(row)) for row in rows))

    def find(self, model: Any, prompts: Prompts) -> Setting | None:
        """The documents' shares in each row of the prompts, one number for all heads; one document needs none."""
        from steerlens import decoder
        from steerlens.prompted import Setting
        from steerlens.wrapping import unwrap

        facts, _ = decoder.read(decoder.find(unwrap(model)))
        layers, documents = self.layers(facts), prompts.sections(self.name, GROUP)
        heads = {n: mine for n, mine in self.heads.resolve(facts).items() if n in layers}  # type: ignore[union-attr]
        most = max(map(len, documents))
        if most < 2 or not heads:
            return None
        relevance = self.relevance(model, prompts, documents, layers)
        law = self.law(relevance, [[b - a for a, b in row] for row in documents])
        groups = tuple(SpanKeys(GROUP, k) for k in range(most))
        plan: Plan = {n: (Redistribute(mine, groups, law, "decode"),) for n, mine in heads.items()}
        return Setting(self.name, plan, {GROUP: documents})
