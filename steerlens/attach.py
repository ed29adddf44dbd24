"""`steer`: put methods on a model, take them off again."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch

from steerlens import around, backends, decoder
from steerlens.backends import fused, reference, sdpa
from steerlens.backends.call import Bias, Call, Cut
from steerlens.edits import Around, Plan, Redistribute, Reweight
from steerlens.engine import Engine
from steerlens.errors import MethodError, SpanError, SteeringStateError
from steerlens.lower import Placed
from steerlens.methods.base import DecodingMethod, EditMethod, Method, PerRow, PromptMethod
from steerlens.passes import Pass
from steerlens.spans import Spans
from steerlens.wrapping import unwrap

TWO = "cannot both be in force: two decoding methods cannot own one generate; steer with one of them"


def steer(
    model: Any,
    methods: Any,
    spans: Any = None,
    *,
    backend: str = "auto",
    report: str | None = None,
    prompt_lengths: int | Sequence[int] | None = None,
) -> Steering:
    """Steer a model's attention; use as a context manager, or call `attach()` and `detach()`.

    The prompt is what `generate` is given. On a cache of an earlier turn it is the whole text, whose padded columns the
    spans count, while the cached keys stay as they were computed. With `guidance_scale` the conditional branch is
    steered; the unconditional one is another prompt and runs unsteered. With an assistant (`assistant_model`, the
    steered model too, or `assistant_early_exit`) the target alone is steered.
    A bare forward with an empty cache is all prompt. What follows on that cache counts as generated, unless
    `prompt_lengths` says otherwise; on a cache that was filled unsteered, the prompt is the prefix and this forward.

    Args:
        model: a transformers decoder model (with or without its head), also inside a PEFT, DDP, FSDP or `torch.compile`
            wrapper. It is changed in place and as it was on exit; meanwhile it runs uncompiled.
        methods: a method, a list of methods in order of composition, or a recipe.
        spans: `Spans` from `encode`, or per prompt row a list of (start, stop) token ranges in padded columns.
        backend: `auto`, `reference`, `sdpa` or `triton`; a named one never falls back.
        report: `"mass"` adds to `report()` the mean change of attention mass per head on the keys that were edited.
        prompt_lengths: real tokens of each row that are prompt, where a bare forward holds a continuation too.

    Raises:
        MethodError, HeadError, SpanError: if methods, heads or spans do not fit the model or each other.
        UnsupportedError: if this model cannot be steered exactly.
    """
    return Steering(model, methods, spans, backend=backend, report=report, prompt_lengths=prompt_lengths)


class Steering:
    """Methods on a model. `with steer(…) as steered:` attaches on entry and detaches on exit, by exception too."""

    def __init__(
        self,
        model: Any,
        methods: Any,
        spans: Any,
        *,
        backend: str,
        report: str | None,
        prompt_lengths: int | Sequence[int] | None,
    ) -> None:
        self.model = unwrap(model)
        self._engine = Engine.of(decoder.find(self.model))
        facts = self._engine.facts
        if hasattr(methods, "check") and hasattr(methods, "methods"):
            methods.check(facts)
        self.methods = _methods(methods)
        given = None if spans is None else Spans.of(spans)
        self.spans = given if any(map(_uses_spans, self.methods)) else None
        self.backend = backends.check(backend)
        if report not in (None, "mass"):
            raise ValueError(f"report={report!r} is unknown; allowed: None, 'mass'")
        lengths = [prompt_lengths] if isinstance(prompt_lengths, int) else prompt_lengths
        self.prompt_lengths = None if lengths is None else tuple(int(n) for n in lengths)
        if self.prompt_lengths is not None and min(self.prompt_lengths, default=0) < 1:
            raise ValueError(f"prompt_lengths={prompt_lengths!r}; allowed: one number of tokens >= 1 per prompt row")
        self.observes = report == "mass"
        self._mass: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._calls: dict[int, tuple[int, int]] = {}
        self._start: dict[int, tuple[int, int]] = {}
        self.inside = False
        self.prompt_rows = self._count_rows()
        self.plan: dict[int, Any] = {}
        self.placed: dict[int, list[Placed]] = {}
        self.around: dict[int, list[around.Placed]] = {}
        self._place(facts)

    def respan(self, spans: Spans | None) -> None:
        """Plan again for other spans, as a `PromptMethod` gives."""
        if spans is not self.spans:
            self.spans, self.placed, self.around = spans, {}, {}
            self._place(self._engine.facts)
            self._engine.update()

    def _place(self, facts: Any) -> None:
        same: dict[Any, tuple[int, int]] = {}
        planned: dict[int, tuple[Any, ...]] = {}
        for number, method in enumerate(self.methods):
            if self.spans is None and method.needs:
                raise SpanError(
                    f"{method.name} needs spans for {', '.join(method.needs)}: pass spans= from steerlens.encode"
                )
            if not isinstance(method, EditMethod):
                continue
            plan: Plan = method.plan(facts, self.spans)
            for layer, edits in plan.items():
                planned[layer] = planned.get(layer, ()) + tuple(edits)
                for place, edit in enumerate(edits):
                    if isinstance(edit, Around):
                        self.around.setdefault(layer, []).append(around.Placed(edit, self.spans, self.prompt_rows))
                        continue
                    key = (id(self), layer, number, place)
                    token = same.setdefault(edit, (id(self), len(same)))
                    self.placed.setdefault(layer, []).append(
                        Placed(edit, self.spans, key, self.prompt_rows, token, id(self))
                    )
        self.plan = dict(sorted(planned.items()))

    def _count_rows(self) -> int | None:
        counts = {len(m.methods) for m in self.methods if isinstance(m, PerRow)}
        if self.spans is not None and self.spans.groups:
            counts.add(self.spans.rows)
        if len(counts) > 1:
            raise SpanError(f"spans and PerRow disagree on the number of prompt rows: {sorted(counts)}")
        return next(iter(counts), None)

    # --- on and off --------------------------------------------------------------------------------------------------

    def attach(self) -> Self:
        """Start steering.

        Raises:
            SteeringStateError: if attached already, from a second thread, or with another backend than one in force.
        """
        engine = self._engine = Engine.of(self._engine.base)
        if self in engine.contexts:
            raise SteeringStateError(f"{self.describe()} is attached already")
        engine.claim()
        return self.join()

    def join(self) -> Self:
        """Start steering inside a forward or `generate` of contexts in force, in whatever thread that runs.

        Raises:
            SteeringStateError: if another backend than this one is in force.
            MethodError: if this and another context both have a decoding method.
        """
        engine = self._engine = Engine.of(self._engine.base)
        named = {c.backend for c in engine.contexts if c.backend != "auto"} | {self.backend} - {"auto"}
        if len(named) > 1:
            raise SteeringStateError(f"contexts on one model name different backends: {', '.join(sorted(named))}")
        owners = [
            m for m in [m for c in engine.contexts for m in c.methods] + self.methods if isinstance(m, DecodingMethod)
        ]
        if len(owners) > 1:
            raise MethodError(f"{owners[0].name} and {owners[1].name} {TWO}")
        if not self.plan and all(isinstance(m, EditMethod) for m in self.methods):
            return self
        engine.contexts.append(self)
        try:
            engine.update()
        except BaseException:
            self.detach()
            raise
        self._start = {layer: (site.calls, site.rows) for layer, site in engine.sites.items()}
        return self

    def detach(self) -> None:
        """Stop steering; harmless when not attached. Contexts may be left in any order."""
        engine = self._engine
        if self not in engine.contexts:
            return
        try:
            self._calls = self._counts()
        finally:
            engine.contexts.remove(self)
            engine.update()
        for prompt in [p for _, p in engine.prompts.values()]:
            for key in [k for k in prompt.sinks if isinstance(k, tuple) and k[0] == id(self)]:
                del prompt.sinks[key]

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def describe(self) -> str:
        """The context, for messages: `steer(llama, pasta)`."""
        return f"steer({self._engine.facts.name}, {' + '.join(m.name for m in self.methods) or 'nothing'})"

    # --- what happened -----------------------------------------------------------------------------------------------

    def report(self) -> dict[int, dict[str, Any]]:
        """Per steered layer the attention `calls` and query `rows` (summed over the batch).

        With `report="mass"` also `delta_mass`: fp32 [H], mean change of the attention mass on the edited keys, over
        the real query rows; 0 for heads that were not edited, or that another tensor-parallel process holds.
        """
        counts = self._counts() if self in self._engine.contexts else self._calls
        found: dict[int, dict[str, Any]] = {}
        for layer, (calls, rows) in sorted(counts.items()):
            found[layer] = {"calls": calls, "rows": rows}
            if layer in self._mass:
                total, count = self._mass[layer]
                found[layer]["delta_mass"] = (total / count.clamp(min=1)).cpu()
        return found

    def _counts(self) -> dict[int, tuple[int, int]]:
        sites = self._engine.sites
        start = {layer: self._start.get(layer, (0, 0)) for layer in self.plan}
        return {n: (sites[n].calls - start[n][0], sites[n].rows - start[n][1]) for n in self.plan if n in sites}

    def observe(self, layer: int, call: Call, now: Pass) -> None:
        """Accumulate the change of mass of one attention call, on the device and without synchronising."""
        if not any(isinstance(p.edit, (Reweight, Redistribute)) for p in self.placed.get(layer, ())):
            return
        budget = sdpa.budget(call)
        edits = reference.resolve(call, budget)
        H, Tk = call.query.shape[1], call.key.shape[2]
        edited = torch.zeros(call.query.shape[0], H, Tk, dtype=torch.bool, device=call.query.device)
        for edit in edits:
            if isinstance(edit, Bias):
                edited |= edit.keys[:, None] & (edit.weights != 0).any(-1)[..., None]
            elif isinstance(edit, reference.Kept):
                edited[:, edit.edit.heads] |= edit.keys
        total_heads, own = self._engine.facts.heads[layer], slice(call.first, call.first + H)
        nothing = torch.zeros(total_heads, device=call.query.device), torch.zeros((), device=call.query.device)
        total, count = self._mass.get(layer, nothing)
        here = torch.zeros_like(total)
        real = now.real_rows()
        cut = any(isinstance(edit, (Cut, reference.Gain)) for edit in edits)
        fast = None if cut else backends.by_kernels(self._engine.backend, call, lambda: fused.moved(call, edited))
        for rows in reference.blocks(call, budget):
            if fast is None:
                change = reference.weights(call, edits, rows) - reference.weights(call, [], rows)
                moved = (change * edited[:, :, None]).sum(-1)
            else:
                moved = fast[:, :, rows]
            counted = torch.ones_like(moved[:, 0]) if real is None else real[:, rows].float()
            here[own] += (moved * counted[:, None]).sum((0, 2))
            count = count + counted.sum()
        self._mass[layer] = (total + here, count)

    # --- what the engine asks ----------------------------------------------------------------------------------------

    def check_rows(self, batch: int, expand: int) -> None:
        """Raise `SpanError` if a batch of `batch` rows cannot be these prompts, each repeated 1 or `expand` times."""
        if self.prompt_rows is None or batch in (self.prompt_rows, self.prompt_rows * expand):
            return
        what = "spans" if self.spans is not None and self.spans.groups else "PerRow"
        raise SpanError(
            f"{what} describe {self.prompt_rows} prompt rows, the batch has {batch}: pass one entry per batch row"
        )

    def allow_forward(self) -> None:
        """Refuse a bare forward under a method that acts around the forward."""
        if self.inside or self._engine.scope is not None:
            return
        for method in self.methods:
            if isinstance(method, DecodingMethod):
                raise SteeringStateError(
                    f"{method.name} works across several forwards: call generate(…), or score(model, inputs, spans) "
                    "for log-likelihoods; a bare forward would not be steered"
                )
            if isinstance(method, PromptMethod):
                raise SteeringStateError(
                    f"{method.name} rewrites the prompt: call generate(…), or prepare(inputs, spans) yourself"
                )


def _methods(methods: Any) -> list[Method]:
    if isinstance(methods, Method):
        return [methods]
    listed = getattr(methods, "methods", methods)
    if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes)):
        raise MethodError(
            f"{methods!r} is not a method, a list of methods or a recipe; for example steerlens.methods.ZeroTuning(1.5)"
        )
    found: list[Method] = []
    for item in listed:
        found += _methods(item) if not isinstance(item, Method) else [item]
    if len(owners := [m.name for m in found if isinstance(m, DecodingMethod)]) > 1:
        raise MethodError(f"{owners[0]} and {owners[1]} {TWO}")
    return found


def _uses_spans(method: Method) -> bool:
    if isinstance(method, PerRow):
        return any(m is not None and m.needs for m in method.methods)
    return bool(method.needs) or not isinstance(method, EditMethod)
