"""Attention Sorting: put the documents that attract attention next to the question (arXiv 2310.01427)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from steerlens.errors import MethodError, SpanError, UnsupportedError
from steerlens.methods.base import PromptMethod
from steerlens.spans import Range, Spans, digests

if TYPE_CHECKING:
    import torch

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

        if not self.iterations:
            return inputs, spans
        name, ids, mask = _tokens(inputs)
        if spans is None or GROUP not in spans.groups:
            raise SpanError(
                f"{self.name} needs the span group {GROUP!r}: pass spans= from steerlens.encode(…, "
                'groups={"documents": [texts]}), or {"documents": per row a list of (start, stop)}'
            )
        spans.check(ids, mask)
        documents = _documents(spans, ids, mask)
        # columns[row][new place] = the column that the token came from
        columns = [list(range(ids.shape[1])) for _ in documents]
        now = ids
        for _ in range(self.iterations):
            scores = attention_on(model, now, mask, documents)
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


def attention_on(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None, documents: Sequence[Sequence[Range]]
) -> list[list[float]]:
    """Per row and document, the attention mass from the last row, a mean over layers and query heads.

    Args:
        model: a transformers model, read unsteered.
        ids: [B, T], left-padded.
        mask: [B, T] or None.
        documents: per row, disjoint column ranges.
    """
    import torch

    from steerlens.measures.base import forward
    from steerlens.observing import alone
    from steerlens.recording import Record

    most = max(map(len, documents))
    groups = {str(k): tuple((tuple(row[k : k + 1])) for row in documents) for k in range(most)}
    record = Record(model, Spans(groups), ("mass",), "last", "all")
    with torch.no_grad(), alone(record):
        forward(model, ids, torch.ones_like(ids) if mask is None else mask, keep=1)
    heads, total = 0, torch.zeros(len(documents), most, dtype=torch.float64)
    for layer in record.layers:
        mass = record[layer].mass
        assert mass is not None
        total += mass[:, :, -1].double().sum(1).cpu()
        heads += mass.shape[1]
    return [row[: len(mine)] for row, mine in zip((total / heads).tolist(), documents, strict=True)]


def _tokens(inputs: Mapping[str, Any]) -> tuple[str, torch.Tensor, torch.Tensor | None]:
    """The entry that holds the prompts' ids, the ids, and their mask."""
    import torch

    from steerlens import caches

    cache = caches.find(inputs)
    if cache is not None and cache.get_seq_length():
        raise UnsupportedError(
            f"attention_sorting moves documents, and the cache holds {cache.get_seq_length()} columns of the prompt "
            "where they are: give the whole prompt without a cache"
        )
    name = next((n for n in ("input_ids", "inputs") if isinstance(inputs.get(n), torch.Tensor)), None)
    if name is None or inputs.get("inputs_embeds") is not None or inputs[name].is_floating_point():
        raise UnsupportedError("attention_sorting sorts token ids: give input_ids, not embeddings")
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        raise UnsupportedError("attention_sorting needs attention_mask as [B, T], or none")
    return name, inputs[name], mask


def _documents(spans: Spans, ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[Range]]:
    """Per row the documents in the order in which they stand, without the pads that a range may cover."""
    if spans.rows != len(ids):
        raise SpanError(f"spans describe {spans.rows} prompt rows, the batch has {len(ids)}")
    found = []
    for row, ranges in enumerate(spans.groups[GROUP]):
        first = 0 if mask is None else int(mask[row].argmax())
        if mask is not None and not mask[row, -1]:
            raise SpanError(f"attention_sorting: row {row} is padded on the right; pad on the left")
        kept = sorted((max(start, first), stop) for start, stop in set(ranges) if stop > first)
        if not kept:
            raise SpanError(
                f"attention_sorting: row {row} has no documents (span group {GROUP!r}): name them in every row, or "
                "leave the row out"
            )
        if kept[-1][1] > ids.shape[1]:
            raise SpanError(f"attention_sorting: row {row}: document {kept[-1]} ends after the {ids.shape[1]} columns")
        for one, other in pairwise(kept):
            if one[1] > other[0]:
                raise SpanError(f"attention_sorting: row {row}: the documents {one} and {other} overlap")
        found.append(kept)
    return found


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
