"""Prompts that a method looks at whole before it steers them: `PromptedMethod`, and how prompt methods read theirs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch

from steerlens import caches, decoder
from steerlens.attach import Steering
from steerlens.edits import Plan
from steerlens.engine import Engine
from steerlens.errors import SpanError, SteeringStateError, UnsupportedError
from steerlens.facts import ModelFacts
from steerlens.measures.base import forward
from steerlens.methods.base import EditMethod, PromptMethod
from steerlens.methods.prompted import PromptedMethod
from steerlens.observing import alone
from steerlens.recording import Record
from steerlens.spans import Range, Spans
from steerlens.wrapping import unwrap

Sections = list[list[Range]]
"""Per row the ranges of a span group."""


@dataclass
class Prompts:
    """Prompts without what follows them, left-padded.

    Attributes:
        ids: [B, T].
        mask: [B, T], or `None` where nothing is padded.
        spans: in their columns.
        shift: column of the caller's inputs less column here, per row.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    spans: Spans
    shift: tuple[int, ...]

    def sections(self, method: str, group: str) -> Sections:
        """Per row the ranges of a group in the order in which they stand, without the pads that a range may cover."""
        return sections(method, group, self.spans, self.ids, self.mask)

    def behind(self, method: str, group: str) -> Sections:
        """`sections` of a group behind which each row goes on; raises `SpanError` for a row that does not."""
        found = self.sections(method, group)
        for row, ranges in enumerate(found):
            if ranges[-1][1] == self.ids.shape[1]:
                raise SpanError(f"{method}: row {row} ends with its {group}: leave a question or a cue behind them")
        return found

    @property
    def first(self) -> list[int]:
        """Column of the first token, per row."""
        return [0] * len(self.ids) if self.mask is None else self.mask.argmax(1).tolist()


@dataclass(frozen=True, eq=False)
class Setting(EditMethod):
    """What was found for some prompts.

    Attributes:
        method: that found it, for messages.
        edits: per layer.
        groups: span groups that the edits name, in columns of the prompts.
        positions: position ids of the prompts, int64 [B, T], where they are not those of the text.
    """

    method: str
    edits: Plan
    groups: Mapping[str, Sequence[Sequence[Range]]]
    positions: torch.Tensor | None = None

    name: ClassVar[str] = "found edits"
    source: ClassVar[str] = "a method that looks at whole prompts"
    summary: ClassVar[str] = "edits found for some prompts"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.method)
        object.__setattr__(self, "needs", tuple(self.groups))

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        return self.edits


def tokens(method: str, inputs: Mapping[str, Any]) -> tuple[str, torch.Tensor, torch.Tensor | None]:
    """The entry that holds the prompts' ids, the ids [B, T], and their mask [B, T].

    Raises:
        UnsupportedError: naming the method, if there are no ids, another mask, or a cache that holds a part of them.
    """
    cache = caches.find(inputs)
    if cache is not None and cache.get_seq_length():
        raise UnsupportedError(
            f"{method} looks at the whole prompt, and the cache holds {cache.get_seq_length()} columns of it as they "
            "are: give the whole prompt without a cache"
        )
    name = next((n for n in ("input_ids", "inputs") if isinstance(inputs.get(n), torch.Tensor)), None)
    if name is None or inputs.get("inputs_embeds") is not None or inputs[name].is_floating_point():
        raise UnsupportedError(f"{method} reads token ids: give input_ids, not embeddings")
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        raise UnsupportedError(f"{method} needs attention_mask as [B, T], or none")
    return name, inputs[name], mask


def sections(method: str, group: str, spans: Spans | None, ids: torch.Tensor, mask: torch.Tensor | None) -> Sections:
    """Per row the ranges of a group in the order in which they stand, without the pads that a range may cover.

    Raises:
        SpanError: for right padding, a row without sections, or sections that overlap or end after the prompt.
    """
    if spans is None or group not in spans.groups:
        raise SpanError(
            f"{method} needs the span group {group!r}: pass spans= from steerlens.encode(…, "
            f'groups={{"{group}": [texts]}}), or {{"{group}": per row a list of (start, stop)}}'
        )
    if spans.rows != len(ids):
        raise SpanError(f"spans describe {spans.rows} prompt rows, the batch has {len(ids)}")
    found = []
    for row, ranges in enumerate(spans.groups[group]):
        first = 0 if mask is None else int(mask[row].argmax())
        if mask is not None and not mask[row, -1]:
            raise SpanError(f"{method}: row {row} is padded on the right; pad on the left")
        kept = sorted((max(start, first), stop) for start, stop in set(ranges) if stop > first)
        if not kept:
            raise SpanError(
                f"{method}: row {row} has no {group} (span group {group!r}): name them in every row, or leave the row "
                "out"
            )
        if kept[-1][1] > ids.shape[1]:
            raise SpanError(f"{method}: row {row}: {group}: {kept[-1]} ends after the {ids.shape[1]} columns")
        for one, other in pairwise(kept):
            if one[1] > other[0]:
                raise SpanError(f"{method}: row {row}: the {group} {one} and {other} overlap")
        found.append(kept)
    return found


def attention_on(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    ranges: Sequence[Sequence[Range]],
    layers: Sequence[int] | None = None,
) -> list[list[float]]:
    """Per row and range, the attention mass from the last row, a mean over query heads and layers.

    Args:
        model: a transformers model, read unsteered.
        ids: [B, T], left-padded.
        mask: [B, T] or None.
        ranges: per row, disjoint column ranges.
        layers: `None` for all.
    """
    most = max(map(len, ranges))
    groups = {str(k): tuple((tuple(row[k : k + 1])) for row in ranges) for k in range(most)}
    heads = "all" if layers is None else {layer: "*" for layer in layers}
    record = Record(model, Spans(groups), ("mass",), "last", heads)
    with torch.no_grad(), alone(record):
        forward(model, ids, torch.ones_like(ids) if mask is None else mask, keep=1)
    count, total = 0, torch.zeros(len(ranges), most, dtype=torch.float64)
    for layer in record.layers:
        mass = record[layer].mass
        assert mass is not None
        total += mass[:, :, -1].double().sum(1).cpu()
        count += mass.shape[1]
    return [row[: len(mine)] for row, mine in zip((total / count).tolist(), ranges, strict=True)]


def generate(method: PromptedMethod, model: Any, inputs: Mapping[str, Any], spans: Spans | None, options: Any) -> Any:
    """`PromptedMethod.generate`."""
    _, ids, mask = tokens(method.name, {**inputs, **options})
    engine = Engine.of(decoder.find(unwrap(model)))
    rewriting = [m.name for context in engine.contexts for m in context.methods if isinstance(m, PromptMethod)]
    if rewriting:
        raise UnsupportedError(
            f"{method.name} looks at the prompt that {rewriting[0]} rewrites afterwards: rewrite it first "
            "(prepare_on), then steer what it gives"
        )
    given = Spans({}) if spans is None else Spans.of(spans)
    given.check(ids, mask)
    setting = method.find(model, Prompts(ids, mask, given, (0,) * len(ids)))
    if setting is None:
        return model.generate(**inputs, **options)
    if setting.positions is not None:
        if options.get("position_ids") is not None:
            raise UnsupportedError(f"{method.name} gives the prompt positions of its own: leave out position_ids")
        if options.get("use_cache") is False and (mask is None or bool(mask.all())):
            raise UnsupportedError(
                f"{method.name} gives blocks positions of their own, which transformers takes for packed sequences "
                "where no row is padded and there is no cache: leave use_cache on"
            )
        options = {**options, "position_ids": setting.positions}
    with _joined(model, setting, setting.groups):
        return model.generate(**inputs, **options)


@torch.no_grad()
def score(method: PromptedMethod, model: Any, inputs: Mapping[str, Any], spans: Spans | None) -> torch.Tensor:
    """`PromptedMethod.score`."""
    _, ids, mask = tokens(method.name, inputs)
    engine = Engine.of(decoder.find(unwrap(model)))
    if engine.prompt_lengths is None:
        raise SteeringStateError(
            f"{method.name} looks at prompts, and nothing says where each of them ends: score under steer(…, "
            "prompt_lengths=[tokens of each prompt])"
        )
    given = Spans({}) if spans is None else Spans.of(spans)
    given.check(ids, mask, longer=True)
    prompts = _prompts(ids, mask, given, engine.prompt_lengths)
    setting = method.find(model, prompts)
    real = torch.ones_like(ids) if mask is None else mask
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    before = {context: context.inside for context in engine.contexts}
    with contextlib.ExitStack() as stack:
        for context in before:
            # bare forwards are refused under a decoding method's context
            stack.callback(setattr, context, "inside", before[context])
            context.inside = True
        if setting is not None:
            stack.enter_context(_joined(model, setting, _shifted(setting.groups, prompts.shift)))
            if setting.positions is not None:
                positions = _continued(setting.positions, prompts, positions)
        takes = inspect.signature(unwrap(model).forward).parameters
        further = {"position_ids": positions} if "position_ids" in takes else {}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **further).logits
    found = [
        part[:-1].float().log_softmax(-1).gather(1, row[1:, None])[:, 0] for part, row in zip(logits, ids, strict=True)
    ]
    return torch.stack(found)


def _prompts(ids: torch.Tensor, mask: torch.Tensor | None, spans: Spans, lengths: Sequence[int]) -> Prompts:
    """The prompts in front of what is scored; `lengths` are their real tokens."""
    lengths = [n for n in lengths for _ in range(len(ids) // len(lengths))]
    width = max(lengths)
    firsts = [0] * len(ids) if mask is None else mask.argmax(1).tolist()
    cut, real = ids.new_zeros(len(ids), width), torch.zeros(len(ids), width, dtype=torch.long, device=ids.device)
    for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        cut[row, width - length :] = ids[row, first : first + length]
        real[row, width - length :] = 1
    shift = tuple(first - (width - length) for first, length in zip(firsts, lengths, strict=True))
    # ranges may cover pads, which have other columns here
    groups = {
        group: tuple(
            tuple((max(a - by, 0), b - by) for a, b in row if b > by) for row, by in zip(rows, shift, strict=True)
        )
        for group, rows in spans.groups.items()
    }
    return Prompts(cut, real, Spans(groups), shift)


def _shifted(
    groups: Mapping[str, Sequence[Sequence[Range]]], shift: Sequence[int]
) -> Mapping[str, Sequence[Sequence[Range]]]:
    return {
        group: [[(a + by, b + by) for a, b in row] for row, by in zip(rows, shift, strict=True)]
        for group, rows in groups.items()
    }


def _continued(own: torch.Tensor, prompts: Prompts, plain: torch.Tensor) -> torch.Tensor:
    """Positions of the prompts, `own`, where the caller's inputs have them, and one more for each token behind."""
    found = plain.clone()
    for row, (shift, first) in enumerate(zip(prompts.shift, prompts.first, strict=True)):
        start, stop = first + shift, own.shape[1] + shift
        found[row, start:stop] = own[row, first:]
        found[row, stop:] = own[row, -1] + 1 + torch.arange(plain.shape[1] - stop, device=plain.device)
    return found


@contextlib.contextmanager
def _joined(model: Any, setting: Setting, groups: Mapping[str, Sequence[Sequence[Range]]]) -> Iterator[None]:
    """Inside, the setting steers too, from whatever thread runs the forwards."""
    steering = Steering(model, setting, groups, backend="auto", report=None, prompt_lengths=None)
    try:
        steering.join()
        yield
    finally:
        steering.detach()
