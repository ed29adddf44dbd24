"""Head sets: `"all"`, `{3: [17, 7]}`, `"3:17,7;8:*"` or `"scores.json:top20"`."""

from __future__ import annotations

import json
import operator
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlens.errors import HeadError

if TYPE_CHECKING:
    from steerlens.facts import ModelFacts

_FILE = re.compile(r"^(?P<path>.+\.json)(?::top(?P<top>\d{1,9}))?$")
_GRAMMAR = (
    '"all", {layer: [heads]}, "3:17,7;8:*" (layer:heads, "*" for every one, "a-b" for a range) or "scores.json:top20"'
)
MOST = 9999
_MOST_NAMED = 1_000_000
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Heads:
    """A set of query heads, before it meets a model.

    Attributes:
        table: `None` for every head of every layer, else `(layer, heads)` pairs in layer order, where `heads` is a
            sorted tuple of query-head indices or `None` for every head of that layer; layer `-1` is every layer.
        made_for: name, layers and most query heads of the model whose scores they were chosen by, where a file says so.
    """

    table: tuple[tuple[int, tuple[int, ...] | None], ...] | None
    made_for: tuple[str, int, int] | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, spec: object) -> Heads:
        """Read a head specification.

        Args:
            spec: `Heads`, `"all"`, `{layer: [query heads] | "*"}`, `"3:17,7;8:*"`, or a file: `"lists.json"` holding
                `{layer: [heads]}`, `"scores.json:top20"` holding `{"layer-head": score or [scores]}`.

        Raises:
            HeadError: if it cannot be read.
        """
        if isinstance(spec, Heads):
            return spec
        if isinstance(spec, Mapping):
            return cls._from_mapping(spec)
        if isinstance(spec, str):
            if spec.strip().lower() in ("all", "*"):
                return cls(None)
            if found := _FILE.match(spec.strip()):
                return cls._from_file(Path(found["path"]), int(found["top"]) if found["top"] else None)
            return cls._from_text(spec)
        raise HeadError(f"heads: {spec!r} is not a head specification; allowed: {_GRAMMAR}")

    @classmethod
    def _from_mapping(cls, spec: Mapping[Any, Any]) -> Heads:
        table: dict[int, tuple[int, ...] | None] = {}
        for key, value in spec.items():
            if isinstance(key, bool) or not re.fullmatch(r"\d{1,9}", str(key)):
                raise HeadError(f"heads: layer {key!r:.80} is not an index >= 0; allowed: {_GRAMMAR}")
            if isinstance(value, str) and value in ("*", "all"):
                table[int(str(key))] = None
                continue
            if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
                raise HeadError(f"heads: layer {key}: {value!r:.80} is neither a list of query heads nor '*'")
            heads = [_index(head, key) for head in value]
            if heads:
                table[int(str(key))] = tuple(sorted(set(heads)))
        return cls(tuple(sorted(table.items(), key=lambda item: item[0])))

    @classmethod
    def _from_text(cls, spec: str) -> Heads:
        table: dict[int, set[int] | None] = {}
        count = 0
        for part in filter(None, (p.strip() for p in spec.split(";"))):
            layers, colon, heads = part.partition(":")
            if re.search(r":top\d*$", spec):
                raise HeadError(f"heads: {spec!r:.80} is no score file; these end in .json, as in 'scores.json:top20'")
            if not colon:
                raise HeadError(f"heads: {part!r:.80} in {spec!r:.80} has no ':'; allowed: {_GRAMMAR}")
            chosen = [-1] if layers.strip() == "*" else _indices(layers, spec)
            named = None if heads.strip() == "*" else _indices(heads, spec)
            count += len(chosen) * (1 if named is None else len(named))
            if count > _MOST_NAMED:
                raise HeadError(f"heads: {spec!r:.80} names over {_MOST_NAMED} heads; no model has that many")
            for layer in chosen:
                if named is None:
                    table[layer] = None
                elif (known := table.setdefault(layer, set())) is not None:
                    known.update(named)
        return cls(tuple((k, None if v is None else tuple(sorted(v))) for k, v in sorted(table.items())))

    @classmethod
    def _from_file(cls, path: Path, top: int | None) -> Heads:
        try:
            size = path.stat().st_size
            if not path.is_file() or size > _MOST_BYTES:
                raise HeadError(f"heads: {path} is no file of at most {_MOST_BYTES // 2**20} MiB")
            data = json.loads(path.read_text(encoding="utf-8"))
        except HeadError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise HeadError(f"heads: cannot read {path}: {error}") from error
        model = data.get("model") if isinstance(data, dict) and "scores" in data else None
        data = data.get("scores", data) if isinstance(data, dict) else data
        if not isinstance(data, dict):
            raise HeadError(f"heads: {path} holds a {type(data).__name__}; a JSON object is needed")
        if top is None:
            if any("-" in str(key) for key in data):
                raise HeadError(f"heads: {path} holds scores; say how many, for example '{path}:top20'")
            return cls._from_mapping(data)
        ranked = rank(data, str(path))
        if not top:
            raise HeadError(f"heads: {path}:top0 names no head; allowed: top1 .. top{len(ranked)}")
        if top > len(ranked):
            raise HeadError(f"heads: {path}:top{top} asks for more heads than the {len(ranked)} it scores")
        table: dict[int, list[int]] = {}
        for layer, head in ranked[:top]:
            table.setdefault(layer, []).append(head)
        return replace(cls._from_mapping(table), made_for=_made_for(model))

    def resolve(self, facts: ModelFacts) -> dict[int, tuple[int, ...]]:
        """`{layer: query heads}` on a model.

        Raises:
            HeadError: naming the limit, if a layer or head is out of range; or the model that the scores are of.
        """
        if self.made_for and self.made_for[1:] != (facts.layers, max(facts.heads)):
            name, layers, most = self.made_for
            raise HeadError(
                f"heads: these scores are of {name} with {layers} layers and {most} heads; {facts.name} has "
                f"{facts.layers} and {max(facts.heads)}: score this model with 'steerlens heads'"
            )
        table = self.table if self.table is not None else ((-1, None),)
        resolved: dict[int, set[int]] = {}
        for layer, heads in table:
            if layer >= facts.layers:
                raise HeadError(f"heads: layer {layer} is out of range; {facts.name} has layers 0..{facts.layers - 1}")
            if layer >= 0 and not facts.heads[layer]:
                kind = f" ({facts.kinds[layer]})" if facts.kinds else ""
                raise HeadError(
                    f"heads: layer {layer} of {facts.name} has no attention{kind}; layers that have: "
                    f"{', '.join(map(str, facts.attention_layers))}"
                )
            for index in facts.attention_layers if layer == -1 else (layer,):
                limit = facts.heads[index]
                if heads and heads[-1] >= limit:
                    raise HeadError(
                        f"heads: head {heads[-1]} of layer {index} is out of range; "
                        f"{facts.name} has query heads 0..{limit - 1} there"
                    )
                resolved.setdefault(index, set()).update(range(limit) if heads is None else heads)
        return {layer: tuple(sorted(found)) for layer, found in sorted(resolved.items()) if found}

    def to_json(self) -> str | dict[int, list[int] | str]:
        """The plainest form that `parse` reads back."""
        if self.table is None:
            return "all"
        if any(layer == -1 for layer, _ in self.table):
            return str(self)
        return {layer: "*" if heads is None else list(heads) for layer, heads in self.table}

    def __str__(self) -> str:
        if self.table is None:
            return "all"
        return ";".join(
            f"{'*' if layer == -1 else layer}:{'*' if heads is None else ','.join(map(str, heads))}"
            for layer, heads in self.table
        )

    @property
    def empty(self) -> bool:
        """Whether no head is named."""
        return self.table is not None and not any(heads is None or heads for _, heads in self.table)


def draw_others(chosen: Heads, facts: ModelFacts, sets: int, rng: random.Random) -> list[Heads]:
    """Random head sets as large as a chosen one, from the heads that are not in it: its controls.

    Args:
        chosen: the heads to stay clear of.
        facts: of the model.
        sets: how many.
        rng: of the draw.

    Returns:
        `sets` head sets, or none where fewer heads are left than are chosen.
    """
    taken = {(layer, head) for layer, found in chosen.resolve(facts).items() for head in found}
    rest = [(layer, head) for layer in facts.attention_layers for head in range(facts.heads[layer])]
    rest = [head for head in rest if head not in taken]
    if len(rest) < len(taken):
        return []
    drawn = []
    for _ in range(sets):
        table: dict[int, list[int]] = {}
        for layer, head in sorted(rng.sample(rest, len(taken))):
            table.setdefault(layer, []).append(head)
        drawn.append(Heads.parse(table))
    return drawn


def _made_for(model: Any) -> tuple[str, int, int] | None:
    if not isinstance(model, Mapping):
        return None
    layers, heads = model.get("layers"), model.get("heads")
    if not isinstance(layers, int) or not isinstance(heads, int):
        return None
    return f"{model.get('id', 'another model')!s:.200}", layers, heads


def rank(scores: Mapping[str, object], source: str = "scores") -> list[tuple[int, int]]:
    """(layer, head) pairs of `{"layer-head": score or [scores]}` by descending mean score, ties by index."""
    means: list[tuple[float, int, int]] = []
    for key, value in scores.items():
        found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", str(key))
        values = value if isinstance(value, list) else [value]
        if not found or not values or not all(isinstance(v, (int, float)) and abs(v) < 1e300 for v in values):
            raise HeadError(f"heads: {source}: {key!r:.80}: {value!r:.80} is not '\"layer-head\": score or [scores]'")
        means.append((-sum(values) / len(values), int(found[1]), int(found[2])))
    return [(layer, head) for _, layer, head in sorted(means)]


def _index(head: Any, layer: Any) -> int:
    try:
        index = -1 if isinstance(head, bool) else operator.index(head)
    except TypeError:
        index = -1
    if index < 0:
        raise HeadError(f"heads: layer {layer}: head {head!r:.80} is not an index >= 0")
    return index


def _indices(text: str, spec: str) -> list[int]:
    indices: list[int] = []
    for item in (i.strip() for i in text.split(",")):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", item)
        if not found:
            raise HeadError(f"heads: {item!r:.80} in {spec!r:.80} is not an index; allowed: {_GRAMMAR}")
        first, last = int(found[1]), int(found[2] or found[1])
        if last > MOST:
            raise HeadError(f"heads: {item!r} in {spec!r:.80} names index {last}; no model has more than {MOST}")
        indices.extend(range(first, last + 1))
        if len(indices) > _MOST_NAMED:
            raise HeadError(f"heads: {spec!r:.80} names over {_MOST_NAMED} indices; no model has that many")
    return indices
