"""What every measure shares: the scores it returns, and the batches it runs on."""

from __future__ import annotations

import datetime
import inspect
import io
import json
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from steerlens import __version__, files
from steerlens.errors import HeadError, SpanError, SteerlensError
from steerlens.examples import Example, ExampleError
from steerlens.heads import rank

if TYPE_CHECKING:
    import torch
    from transformers import BatchEncoding

    from steerlens.spans import Spans

_ROW = re.compile(r"row (\d+)")
Head = tuple[int, int]
Scores = Mapping[Head, Sequence[float]]


class MeasureError(SteerlensError, RuntimeError):
    """A measurement that came to nothing."""


@dataclass(frozen=True)
class HeadScores:
    """Scores of attention heads; the higher the mean, the higher the rank.

    Attributes:
        measure: its name.
        model: "id", "layers" and "heads" (query heads per layer, the most where layers differ).
        scores: values per (layer, query head), one per trial or a single one; kept to six significant digits.
        other: further scores of the same heads under their names, which do not rank.
        settings: what shaped the measurement.
        summary: what it came to besides the scores, as plain JSON.
    """

    measure: str
    model: Mapping[str, Any]
    scores: Scores
    other: Mapping[str, Scores] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scores:
            raise MeasureError(f"{self.measure}: there is no head to score")
        object.__setattr__(self, "scores", self._kept("scores", self.scores))
        object.__setattr__(self, "other", {name: self._kept(name, scores) for name, scores in self.other.items()})

    def _kept(self, name: str, scores: Scores) -> dict[Head, tuple[float, ...]]:
        kept = {}
        for (layer, head), values in sorted(scores.items()):
            kept[layer, head] = tuple(float(f"{float(value):.6g}") for value in values)
            if not kept[layer, head] or not all(map(math.isfinite, kept[layer, head])):
                raise MeasureError(
                    f"{self.measure}: {name} of head {layer}-{head} are {kept[layer, head]}, not numbers"
                )
        return kept

    def means(self) -> dict[Head, float]:
        """The mean score of each head."""
        return _means(self.scores)

    def ranked(self) -> list[Head]:
        """The heads by descending mean score, ties by index, as `heads="file.json:top20"` takes them."""
        return rank(_named(self.scores), self.measure)

    def top(self, count: int) -> dict[int, list[int]]:
        """The best heads as `{layer: [heads]}`."""
        if not 1 <= count <= len(self.scores):
            raise HeadError(f"heads: the top {count} were asked for; {self.measure} scores {len(self.scores)} heads")
        found: dict[int, list[int]] = {}
        for layer, head in sorted(self.ranked()[:count]):
            found.setdefault(layer, []).append(head)
        return found

    def table(self, count: int) -> tuple[list[str], list[list[str]]]:
        """Column names, and a row for each of the best `count` heads."""
        means, other = self.means(), {name: _means(scores) for name, scores in self.other.items()}
        rows = [
            [str(layer), str(head), *(f"{column[layer, head]:.4g}" for column in (means, *other.values()))]
            for layer, head in self.ranked()[:count]
        ]
        return ["layer", "head", self.measure, *other], rows

    def to_dict(self) -> dict[str, Any]:
        """As in the file: the fields, heads written "layer-head", the date and the versions."""
        from importlib.metadata import version

        return {
            "measure": self.measure,
            "model": dict(self.model),
            "settings": dict(self.settings),
            "summary": dict(self.summary),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {"steerlens": __version__, "python": platform.python_version()}
            | {name: version(name) for name in ("torch", "transformers")},
            "scores": _named(self.scores),
            "other": {name: _named(scores) for name, scores in self.other.items()},
        }

    def save(self, file: str | Path) -> None:
        """Write a JSON file that every head specification takes as `file.json:top20`."""
        files.write(Path(file), json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            HeadError: naming the file.
        """
        try:
            data = json.loads(Path(file).read_text(encoding="utf-8"))
            other = {name: _parsed(scores) for name, scores in data["other"].items()}
            return cls(
                data["measure"], data["model"], _parsed(data["scores"]), other, data["settings"], data["summary"]
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MeasureError) as error:
            raise HeadError(f"heads: {file} holds no head scores of steerlens: {error!r:.200}") from None

    def heat_map(self, file: str | Path) -> None:
        """Draw the mean scores, layer by head, as a PNG file."""
        # Figure alone: pyplot would keep the figure and set the backend of the whole process.
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        layers, heads = int(self.model["layers"]), max(head for _, head in self.scores) + 1
        cells = [[math.nan] * heads for _ in range(layers)]
        for (layer, head), mean in self.means().items():
            cells[layer][head] = mean
        figure = Figure(figsize=(2 + 0.28 * min(heads, 64), 1.6 + 0.28 * min(layers, 64)), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor("lightgrey")
        # gains may be losses: white is 0 then
        most = max(map(abs, self.means().values()))
        signed: dict[str, Any] = (
            {"cmap": "RdBu_r", "vmin": -most, "vmax": most} if min(self.means().values()) < 0 else {}
        )
        image = axes.imshow(cells, aspect="auto", interpolation="nearest", **signed)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="head", ylabel="layer", title=f"{self.measure}, {self.model['id']}")
        figure.colorbar(image, ax=axes)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150)
        files.write(Path(file), stream.getvalue())


def describe(model: Any) -> dict[str, Any]:
    """`HeadScores.model` of a model."""
    from steerlens import decoder

    facts, _ = decoder.read(decoder.find(model))
    return {"id": facts.name, "layers": facts.layers, "heads": max(facts.heads)}


def require(measure: str, examples: Sequence[Example], *, answer: bool = False, groups: Sequence[str] = ()) -> None:
    """Check that examples hold what a measure needs.

    Raises:
        ExampleError: naming the first example that does not, and what to add.
    """
    if not examples:
        raise ExampleError(f"{measure} needs examples: give at least one prompt")
    for number, example in enumerate(examples, 1):
        missing = [
            f"a group {name!r} (what texts of the prompt it is)" for name in groups if not example.groups.get(name)
        ]
        if answer and example.answer is None:
            missing.insert(0, "an 'answer'")
        if missing:
            raise ExampleError(
                f"{measure} needs {' and '.join(missing)} in every example; example {number} "
                f"({example.prompt!r:.60}) has none: add it, or leave the example out"
            )


def batches(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    size: int,
    *,
    groups: Sequence[str] = (),
    room: int = 0,
    most: int | None = None,
) -> Iterator[tuple[Sequence[Example], BatchEncoding, Spans]]:
    """Examples in batches, encoded for `model`: the examples, their left-padded inputs and their spans.

    Args:
        model: where the inputs go.
        tokenizer: of the model.
        examples: in the order in which they come back.
        size: examples per batch.
        groups: span groups to look up; an example without one gets no range there.
        room: tokens that must fit behind each prompt.
        most: tokens that are read of each prompt, where not all are.

    Raises:
        ExampleError: for a prompt that is too long for the model, or a span that is not found.
    """
    from steerlens.encoding import encode

    limit = context(model)
    for first in range(0, len(examples), size):
        rows = examples[first : first + size]
        prompts = [row.prompt for row in rows]
        wanted = {name: [list(row.groups.get(name, ())) for row in rows] for name in groups}
        try:
            inputs, spans = encode(tokenizer, prompts, groups=wanted, device=model.device)
        except SpanError as error:
            text = str(error).replace(', or on_missing="ignore"', "")
            row = _ROW.match(text)
            raise ExampleError(f"example {first + int(row[1]) + 1}{text[row.end() :]}" if row else text) from error
        lengths = inputs["attention_mask"].sum(-1).tolist()
        for number, length in enumerate(lengths, first + 1):
            length = length if most is None else min(length, most)
            if limit is not None and length + room > limit:
                answer = f" and {room} for the answer" if room else ""
                raise ExampleError(
                    f"example {number} has {length} tokens{answer}; the model has room for {limit}: "
                    f"give shorter prompts{'' if most is None else ', or have fewer of their tokens read'}"
                )
        yield rows, inputs, spans


def context(model: Any) -> int | None:
    """Tokens that the model has room for, where its config says so."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def forward(model: Any, ids: torch.Tensor, mask: torch.Tensor, keep: int | None = None) -> Any:
    """The model's output for left-padded ids [B, T], no cache made, each row's positions counted from its first token.

    Args:
        model: a transformers model.
        ids: token ids.
        mask: 1 for tokens, 0 for pads.
        keep: rows at the end whose logits are needed, where the model can leave out the others.
    """
    from steerlens.wrapping import unwrap

    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    takes = inspect.signature(unwrap(model).forward).parameters
    if "position_ids" in takes:  # a model may count the pads otherwise
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if keep is not None and "logits_to_keep" in takes:
        given["logits_to_keep"] = keep
    return model(**given)


def greedy(model: Any, tokenizer: Any, inputs: BatchEncoding, most: int, **options: Any) -> list[list[int]]:
    """The model's greedy responses of at most `most` tokens, or what it has room for, up to the end-of-text token.

    `options` go to `generate`.
    """
    width, limit = inputs["input_ids"].shape[1], context(model)
    ends = model.generation_config.eos_token_id
    known = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
    sequences = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        max_new_tokens=most if limit is None else min(most, limit - width),
        pad_token_id=pad,
        **options,
    )
    rows = sequences[:, width:].tolist()
    return [row[: next((at for at, token in enumerate(row) if token in known), len(row))] for row in rows]


def _means(scores: Scores) -> dict[Head, float]:
    return {head: sum(values) / len(values) for head, values in scores.items()}


def _named(scores: Scores) -> dict[str, list[float]]:
    return {f"{layer}-{head}": list(values) for (layer, head), values in scores.items()}


def _parsed(scores: Mapping[str, list[float]]) -> dict[Head, list[float]]:
    found = {}
    for name, values in scores.items():
        layer, head = name.split("-")
        found[int(layer), int(head)] = values
    return found
