"""The three kinds of method and what each declares of itself."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from steerlens.edits import Around, Edit, Plan
from steerlens.errors import MethodError, nearest
from steerlens.heads import Heads

if TYPE_CHECKING:
    from steerlens.facts import ModelFacts
    from steerlens.spans import Spans
    from steerlens.vectors import VectorFile


@dataclass(frozen=True)
class Search:
    """Values of a strength that tuning tries.

    Attributes:
        grid: values to try, on one or both sides of `neutral`.
        neutral: the value that changes nothing, if there is one; settings profiled on one side of it are tuned on that
            side, and of two alike choices the one nearer to it is preferred.
        log: draw on a logarithmic scale where values are drawn from the range of the grid.
    """

    grid: tuple[float, ...]
    neutral: float | None = 1.0
    log: bool = True


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass whose fields are the parameters.

    Class attributes:
        name: what recipes and the command line call it.
        source: paper and section.
        summary: one line for `steerlens list methods`.
        needs: span groups without which it cannot act.
        fit: the call that finds what it steers by, where there is one.
        causal: a later token never influences an earlier row.
        cache_exact: cached decoding equals recomputing the whole sequence.
        chunk_exact: prefill in chunks equals prefill at once.
        search: strengths that `steerlens tune` chooses, per parameter.
        profile: settings in which single heads are tried, by name; parameters that are not named have their defaults.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    fit: ClassVar[str] = ""
    causal: ClassVar[bool] = False
    cache_exact: ClassVar[bool] = False
    chunk_exact: ClassVar[bool] = False
    search: ClassVar[Mapping[str, Search]] = {}
    profile: ClassVar[Mapping[str, Mapping[str, float]]] = {"default": {}}

    def to_dict(self) -> dict[str, Any]:
        """`{"method": name, parameter: value, …}` of plain JSON types; `from_dict` reads it back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"method": self.name} | {k: v.to_json() if isinstance(v, Heads) else v for k, v in values.items()}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The method with these parameters; raises `MethodError` naming an unknown or missing one."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in parameters:
            if key not in known:
                raise MethodError(
                    f"{cls.name} has no parameter {key!r}; it has {', '.join(known)}{nearest(str(key), known)}"
                )
        missing = [
            k
            for k, f in known.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and k not in parameters
        ]
        if missing:
            how = f", from {cls.fit}" if cls.fit else ""
            how += ", such as '3:17,7;8:*' or 'scores.json:top20'" if "heads" in missing else ""
            raise MethodError(
                f"{cls.name} needs {', '.join(missing)}{how}; `steerlens list methods {cls.name}` shows an example"
            )
        return cls(**parameters)

    def _parse_heads(self) -> None:
        object.__setattr__(self, "heads", Heads.parse(self.heads))  # type: ignore[attr-defined]

    def _number(self, field: str, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
        """Check `low <= field <= high` (or `low < field`), store it as a float."""
        value = getattr(self, field)
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        if not fits or value > high or value < low or (open_low and value == low):
            bounds = [f"{'>' if open_low else '>='} {low:g}"] if low > -math.inf else []
            bounds += [f"<= {high:g}"] if high < math.inf else []
            allowed = " ".join(["a number", " and ".join(bounds)]).strip()
            raise MethodError(f"{self.name}: {field}={value!r} is out of range; allowed: {allowed}")
        object.__setattr__(self, field, float(value))

    def _count(self, field: str, low: int = 1) -> None:
        value = getattr(self, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise MethodError(f"{self.name}: {field}={value!r} is out of range; allowed: a whole number >= {low}")

    def _file(self, field: str) -> None:
        value = getattr(self, field)
        if isinstance(value, os.PathLike):
            object.__setattr__(self, field, value := os.fspath(value))
        if not isinstance(value, str) or not value.endswith(".safetensors"):
            how = f", as {self.fit} writes it" if self.fit else ""
            raise MethodError(
                f"{self.name}: {field}={value!r} is no file; allowed: the path of a .safetensors file{how}"
            )

    def load_vectors(self, kind: str) -> VectorFile:
        """The file that its parameter `vectors` names.

        Args:
            kind: of the tensors that it must hold.

        Raises:
            MethodError: naming the file and the fit, if it cannot be read, holds none, or is another method's.
        """
        from steerlens import vectors

        how = f"; {self.fit} writes such a file" if self.fit else ""
        try:
            file = vectors.load(self.vectors)  # type: ignore[attr-defined]
        except MethodError as error:
            raise MethodError(f"{self.name}: {error}{how}") from error
        made_for = file.metadata.get("method", self.name)
        if made_for != self.name:
            raise MethodError(f"{self.name}: vectors: {file.name} was fitted for {made_for}{how}")
        if not file.layers(kind):
            raise MethodError(f"{self.name}: vectors: {file.name} has no {kind!r} vectors; it holds {file.kinds}{how}")
        return file

    def _choice(self, field: str, allowed: Sequence[str]) -> None:
        value = getattr(self, field)
        if value not in allowed:
            raise MethodError(
                f"{self.name}: {field}={value!r} is unknown; "
                f"allowed: {', '.join(allowed)}{nearest(str(value), allowed)}"
            )


@dataclass(frozen=True)
class EditMethod(Method):
    """A method that rewrites attention inside the model's own forward."""

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        """The edits per layer. Pure: needs no model. Neutral parameters give an empty plan."""
        raise NotImplementedError

    def _everywhere(self, facts: ModelFacts, edits: Any) -> Plan:
        """`{layer: edits(heads)}` over this method's heads; `edits` maps a tuple of query heads to edits."""
        plan: dict[int, tuple[Edit | Around, ...]] = {}
        for layer, heads in self.heads.resolve(facts).items():  # type: ignore[attr-defined]
            if found := tuple(edits(heads)):
                plan[layer] = found
        return plan


@dataclass(frozen=True)
class DecodingMethod(Method):
    """A method that owns extra forwards and caches inside a wrapped `generate`, and scores log-likelihoods itself.

    Class attributes:
        scores: a text has a probability under it; where not, `score` refuses.
    """

    scores: ClassVar[bool] = True

    def generate(self, model: Any, inputs: Mapping[str, Any], spans: Spans | None, **kwargs: Any) -> Any:
        """Generate with the method; same return value as the model's own `generate`."""
        raise NotImplementedError

    def score(self, model: Any, inputs: Mapping[str, Any], spans: Spans | None) -> Any:
        """Log-probabilities [B, T-1] of `inputs`' tokens under the method."""
        raise NotImplementedError


@dataclass(frozen=True)
class PromptMethod(Method):
    """A method that rewrites the prompt before the model sees it."""

    def prepare(self, inputs: Mapping[str, Any], spans: Spans | None) -> tuple[Mapping[str, Any], Spans | None]:
        """The rewritten inputs and their spans."""
        raise NotImplementedError

    def prepare_on(
        self, model: Any, inputs: Mapping[str, Any], spans: Spans | None
    ) -> tuple[Mapping[str, Any], Spans | None]:
        """The same for a method that asks the model; a wrapped `generate` calls it. By default `prepare`."""
        return self.prepare(inputs, spans)


@dataclass(frozen=True)
class PerRow(EditMethod):
    """Steer each batch row its own way in one forward: `PerRow([method_or_None, …])`, one entry per prompt row."""

    methods: tuple[EditMethod | None, ...] = ()
    name: ClassVar[str] = "per_row"
    source: ClassVar[str] = "steerlens"
    summary: ClassVar[str] = "each batch row its own method"

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        for row, method in enumerate(self.methods):
            if method is not None and (not isinstance(method, EditMethod) or isinstance(method, PerRow)):
                raise MethodError(f"PerRow: row {row}: {method!r} is not an EditMethod or None")

    def to_dict(self) -> dict[str, Any]:
        """`{"method": "per_row", "methods": [dict or None, …]}`."""
        return {"method": self.name, "methods": [m and m.to_dict() for m in self.methods]}

    def plan(self, facts: ModelFacts, spans: Spans | None) -> Plan:
        """Each row's plan, restricted to that row; rows with equal edits share one."""
        rows: dict[EditMethod, list[int]] = {}
        for row, method in enumerate(self.methods):
            if method is not None:
                rows.setdefault(method, []).append(row)
        plan: dict[int, tuple[Edit | Around, ...]] = {}
        for method, members in rows.items():
            for layer, edits in method.plan(facts, spans).items():
                limited = tuple(dataclasses.replace(edit, batch=tuple(members)) for edit in edits)
                plan[layer] = plan.get(layer, ()) + limited
        return plan
