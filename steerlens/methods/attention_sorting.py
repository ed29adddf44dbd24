"""Attention Sorting: put the documents that attract attention next to the question (arXiv 2310.01427)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from steerlens.errors import MethodError
from steerlens.methods.base import PromptMethod
from steerlens.spans import Range, Spans, digests

GROUP = "documents"


@dataclass(frozen=True)
class AttentionSorting(PromptMethod):
    """Sort the documents of a prompt by the attention that they get from its last row, and ask again (§3 of the paper).

    Each iteration is a forward of the whole prompt: a document's score is the sum of the attention that the last prompt
    row pays to its tokens, averaged over all layers and query heads. The documents, sections of the span group
    "documents", then change places; what stands between them stays, and every other span moves with its tokens (one
    that is torn apart becomes several). Documents of equal score end up in reversed order, as in the published code.
    The sum favours long documents. These forwards are unsteered, whatever else steers the answer.

    The published code tokenises each document alone; here its tokens move as they are. Its option to keep only the
    best documents is not offered.

    Args:
        iterations: how often to sort; 0 is neutral. The published code's default is 3, its documented commands take 5.
            An order that comes out as it went in ends it earlier.
        best: the best document comes `last`, next to the question, or `first`.
    """

    iterations: int = 3
    best: Literal["last", "first"] = "last"

    name: ClassVar[str] = "attention_sorting"
    source: ClassVar[str] = "Peysakhovich and Lerer 2023, Attention Sorting, arXiv 2310.01427, §3"
    summary: ClassVar[str] = "sort documents by the attention they get, the best next to the question"
    needs: ClassVar[tuple[str, ...]] = (GROUP,)

    def __post_init__(self) -> None:
        self._count("iterations", 0)
        self._choice("best", ("last", "first"))

    def order(self, scores: Sequence[float]) -> list[int]:
        """The documents, numbered as they stand, in their new order."""
        falling = sorted(range(len(scores)), key=lambda document: -scores[document])
        return falling if self.best == "first" else falling[::-1]

    def prepare(self, inputs: Mapping[str, Any], spans: Spans | None) -> tuple[Mapping[str, Any], Spans | None]:
        """Refused: it takes a model to sort by, as `prepare_on` gets it."""
        if not self.iterations:
            return inputs, spans
        raise MethodError(
            f"{self.name} reads the model's attention: call prepare_on(model, inputs, spans), or generate in steer"
        )

    def prepare_on(
        self, model: Any, inputs: Mapping[str, Any], spans: Spans | None
    ) -> tuple[Mapping[str, Any], Spans | None]:
        """The inputs with their documents sorted, and the spans where their tokens are now.

        Args:
            model: a transformers model; its attention is read unsteered.
            inputs: `input_ids` [B, T], left-padded, with `attention_mask`; other entries are handed on.
            spans: with the group "documents", ranges that do not overlap, at least one per row. Section k stays the
                same document wherever it goes.

        Raises:
            SpanError: for a row without documents, overlapping ones, or right padding.
            UnsupportedError: for embeddings instead of ids, or a cache that holds part of the prompt.
        """
        import torch

        from steerlens import prompted

        if not self.iterations:
            return inputs, spans
        name, ids, mask = prompted.tokens(self.name, inputs)
        if spans is not None:
            spans.check(ids, mask)
        documents = prompted.sections(self.name, GROUP, spans, ids, mask)
        assert spans is not None
        # columns[row][new place] = the column that the token came from
        columns = [list(range(ids.shape[1])) for _ in documents]
        now = ids
        for _ in range(self.iterations):
            scores = prompted.attention_on(model, now, mask, documents)
            orders = [self.order(row) for row in scores]
            if all(order == sorted(order) for order in orders):
                break
            for row, order in enumerate(orders):
                columns[row], documents[row] = _rearranged(columns[row], documents[row], order)
            now = ids.gather(1, torch.tensor(columns, device=ids.device))
        moved = {
            group: tuple(_moved(ranges, taken) for ranges, taken in zip(rows, columns, strict=True))
            for group, rows in spans.groups.items()
        }
        fingerprint = None if spans.fingerprint is None else digests(now, mask)
        return {**inputs, name: now}, Spans(moved, fingerprint)


def _rearranged(
    columns: Sequence[int], documents: Sequence[Range], order: Sequence[int]
) -> tuple[list[int], list[Range]]:
    """The columns with the documents in this order, and where these are then."""
    taken, places, end = list(columns[: documents[0][0]]), [], documents[0][0]
    for (start, stop), document in zip(documents, order, strict=True):
        taken += columns[end:start]
        text = columns[slice(*documents[document])]
        places.append((len(taken), len(taken) + len(text)))
        taken += text
        end = stop
    return [*taken, *columns[end:]], places


def _moved(ranges: Sequence[Range], columns: Sequence[int]) -> tuple[Range, ...]:
    """Where the tokens of ranges are now: each range in one piece or, torn apart, in several."""
    place = {column: at for at, column in enumerate(columns)}
    found: list[Range] = []
    for start, stop in ranges:
        at = sorted(place[column] for column in range(start, min(stop, len(columns))))
        edges = [i for i in range(1, len(at)) if at[i] != at[i - 1] + 1]
        found += [(at[a], at[b - 1] + 1) for a, b in zip([0, *edges], [*edges, len(at)], strict=True)]
    return tuple(found)
