"""Branches of one text inside transformers' own `generate`, and in a forward that scores.

The model's `forward` is what is replaced: one call of it runs every branch and returns their mixed logits, so that all
of `generate` but the forwards is transformers' own. Branches of the steered model are rows of one batch, the branches
of a row next to each other; another model's branch has a cache of its own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils.generic import ModelOutput

from steerlens import caches, decoder, masks
from steerlens.attach import Steering
from steerlens.engine import Engine
from steerlens.errors import MethodError, SpanError, SteeringStateError, UnsupportedError
from steerlens.methods.base import EditMethod, PerRow
from steerlens.methods.branched import NEUTRAL, Branch, BranchedMethod
from steerlens.spans import Spans
from steerlens.wrapping import unwrap

Given = dict[str, Any]
"""Arguments of a forward, by name."""
_BY_COLUMN = ("input_ids", "inputs_embeds", "position_ids")
_WHOLE = ("attention_mask", caches.OLD, caches.NAME, "use_cache", "logits_to_keep", "return_dict")
_REFUSED = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "force_words_ids": None,
    "constraints": None,
    "dola_layers": None,
    "assistant_model": None,
    "assistant_early_exit": None,
    "prompt_lookup_num_tokens": None,
    "custom_generate": None,
}


def generate(method: BranchedMethod, model: Any, inputs: Mapping[str, Any], spans: Spans | None, options: Given) -> Any:
    """`BranchedMethod.generate`."""
    engine = Engine.of(decoder.find(unwrap(model)))
    if not any(method in context.methods for context in engine.contexts):
        with Steering(model, method, spans, backend="auto", report=None, prompt_lengths=None):
            return model.generate(**inputs, **options)
    branches = method.branches(model)
    if branches == NEUTRAL:
        return model.generate(**inputs, **options)
    _refuse(method, model, options)
    given = caches.find(options)
    if given is not None and not _copies(given):
        raise UnsupportedError(
            f"{method.name} repeats the rows of the cache that it is given, which a {type(given).__name__} of such "
            "layers cannot do: pass a DynamicCache without offloading, or none"
        )
    with Branches(method, model, branches, engine) as running:
        return running.trimmed(model.generate(**inputs, **options), given)


@torch.no_grad()
def score(method: BranchedMethod, model: Any, inputs: Mapping[str, Any], spans: Spans | None) -> torch.Tensor:
    """`BranchedMethod.score`."""
    ids = inputs["input_ids"]
    given: Given = {"input_ids": ids, "attention_mask": inputs.get("attention_mask"), "use_cache": False}
    given["position_ids"] = inputs.get("position_ids")
    if given["position_ids"] is None:
        mask = torch.ones_like(ids) if given["attention_mask"] is None else given["attention_mask"]
        given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    engine = Engine.of(decoder.find(unwrap(model)))
    branches = method.branches(model)
    running = Branches(method, model, branches, engine, None if spans is None else Spans.of(spans))
    with running.scoring():
        logits = running.run(given)[1]
    found = []
    for row, tokens in enumerate(ids[:, 1:]):
        # row by row: the mix is fp32 over the whole vocabulary
        parts = torch.stack([part[row, :-1].to(ids.device, torch.float32) for part in logits])
        mixed = parts[0] if branches == NEUTRAL else method.mix(parts)
        found.append(mixed.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    return torch.stack(found)


def _refuse(method: BranchedMethod, model: Any, options: Given) -> None:
    config = options.get("generation_config") or model.generation_config
    for name, neutral in _REFUSED.items():
        value = options.get(name)
        value = getattr(config, name, None) if value is None else value
        if value not in (None, neutral):
            shown = type(value).__name__ if isinstance(value, torch.nn.Module) or callable(value) else repr(value)
            raise UnsupportedError(
                f"{method.name} runs several branches of each text, which {name}={shown} cannot follow: generate "
                "greedily or by sampling without it"
            )


class Branches:
    """Runs every branch at each forward of one `generate` or `score`.

    Args:
        method: whose branches they are.
        spans: of the prompt; `None` takes those of the method's context when the first forward comes.
    """

    def __init__(
        self, method: BranchedMethod, model: Any, branches: tuple[Branch, ...], engine: Engine, spans: Any = None
    ) -> None:
        self.method, self.model, self.engine, self.branches = method, unwrap(model), engine, branches
        self.rows = [branch for branch in branches if branch.model is None]
        self.others = [Other(method, branch, engine) for branch in branches if branch.model is not None]
        self.spans: Spans | None = spans
        self.cache: Cache | None = None
        self.started = self.split = self.shared = self.checked = False
        self.hidden: torch.Tensor | None = None
        self._batch = 0
        self._rotaries: list[tuple[Any, list[torch.nn.Module]]] = []
        self.original: Any = self.model
        self._exit = contextlib.ExitStack()

    # --- on and off --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Branches:
        self.original = self.model.forward
        self._exit.callback(_restore, self.model, self.model.__dict__.get("forward"))

        @functools.wraps(self.original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        self.model.__dict__["forward"] = forward
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Let bare forwards through that a decoding method's context refuses."""
        before = {context: context.inside for context in self.engine.contexts}
        for context in before:
            context.inside = True
        try:
            with self._exit:
                yield
        finally:
            for context, inside in before.items():
                context.inside = inside

    def trimmed(self, output: Any, given: Cache | None) -> Any:
        """What `generate` returned, with the first branch's rows alone in the cache that it returns or was given."""
        count, cache, whole = len(self.rows), self.cache, isinstance(output, ModelOutput)
        if cache is None or count == 1 or not (whole or given is not None):
            return output
        if _copies(cache):
            cache.batch_select_indices(torch.arange(0, self._batch * count, count, device=self.model.device))
            return output
        return type(output)(**{name: value for name, value in output.items() if name != caches.NAME})

    # --- one forward -------------------------------------------------------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's `forward` is meanwhile."""
        scope = self.engine.scope
        if scope is None or scope.native:
            return self.original(*args, **kwargs)
        given = kwargs
        if args:
            names = list(inspect.signature(type(self.model).forward).parameters)[1:]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
        output, logits = self.run(given)
        if logits:
            output.logits = self.method.mix(torch.stack([part[:, -1:].to(logits[0].device).float() for part in logits]))
        return output

    def run(self, given: Given) -> tuple[Any, list[torch.Tensor]]:
        """The first branch's output and the logits [B, T, V] of every branch; none in the middle of a prompt."""
        cache, tokens = caches.find(given), _tokens(given)
        batch, length = tokens.shape[:2]
        seen = 0 if cache is None else int(cache.get_seq_length())
        if not self.started:
            self._start(given, cache, batch, seen)
        elif cache is not self.cache:
            raise UnsupportedError(
                f"{self.method.name}: generate runs a forward on another cache than its prompt's (several prompts "
                "inside one generate): one generate at a time"
            )
        apart = [other.run(given, batch, seen) for other in self.others]
        if self.shared and not self.split:
            scope = self.engine.scope
            if scope is not None and seen + length < scope.width:
                return self.original(**given), []
            if length > 1:
                if scope is not None:
                    scope.chunked = True
                self.original(**_columns(given, slice(None, -1)))
                given = _columns(given, slice(-1, None))
        if not self.split:
            self._split(cache, batch)
        count = len(self.rows)
        with self._rotated():
            output = self.original(**self._repeated(given, batch, seen))
        logits = output.logits
        if count > 1:
            for name in ("hidden_states", "attentions"):
                if (tensors := getattr(output, name, None)) is not None:
                    setattr(output, name, tuple(None if t is None else t[::count] for t in tensors))
        own, further = iter(range(count)), iter(apart)
        return output, [logits[next(own) :: count] if b.model is None else next(further) for b in self.branches]

    def _start(self, given: Given, cache: Cache | None, batch: int, seen: int) -> None:
        method, engine = self.method, self.engine
        self.started, self.cache, self._batch = True, cache, batch
        if self.spans is None:
            self.spans = next((c.spans for c in engine.contexts if method in c.methods), None)
        needed = {group for b in self.branches for m in b.methods for group in m.needs}
        needed |= {b.hidden for b in self.branches if b.hidden is not None}
        missing = sorted(needed - set(() if self.spans is None else self.spans.groups))
        if missing:
            raise SpanError(f"{method.name} needs spans for {', '.join(missing)}: pass spans= from steerlens.encode")
        edits = [edit for branch in self.rows for m in branch.methods for edit in self._plan(m)]
        phases = {edit.phase for edit in edits}
        phases |= {phase for other in self.others for phase in other.phases()}
        if engine.scope is None and phases - {"all"} and engine.prompt_lengths is None:
            raise SteeringStateError(
                f"{method.name} acts on the rows that produce generated tokens, and nothing says where each prompt "
                "ends: score under steer(…, prompt_lengths=[tokens of each prompt]), or choose phase='all'"
            )
        for other in self.others:
            self._exit.callback(other.start(given, batch, seen).detach)
        outer = [m for c in engine.contexts for m in c.methods if isinstance(m, EditMethod)]
        self.shared = (
            engine.scope is not None
            and len(self.rows) > 1
            and all(branch.theta == 1 and branch.hidden is None for branch in self.rows)
            and {edit.phase for edit in edits} <= {"decode"}
            and all(m.chunk_exact for m in outer)
            and not engine.records
            and _copies(cache)
            and _divides(given)
        )

    def _plan(self, method: EditMethod) -> list[Any]:
        plan = method.plan(self.engine.facts, self.spans)
        return [edit for edits in plan.values() for edit in edits]

    def _split(self, cache: Cache | None, batch: int) -> None:
        """From here on each row is as many rows as there are branches."""
        self.split, count, spans = True, len(self.rows), self.spans
        if cache is not None and cache.get_seq_length():
            self.engine.widen(cache, count)
        for name in ("branches", "tokens"):
            self._exit.callback(setattr, self.engine, name, getattr(self.engine, name))
        self.engine.branches = count
        if spans is not None and spans.rows:
            repeats = batch * count // spans.rows
            # the context that the spans are of checks its inputs
            spans = Spans({g: tuple(r for r in rows for _ in range(repeats)) for g, rows in spans.groups.items()})
            if any(branch.hidden for branch in self.rows):
                self.hidden = self._columns_of(spans)
        most = max(len(branch.methods) for branch in self.rows)
        methods = [
            PerRow(tuple(b.methods[place] if place < len(b.methods) else None for b in self.rows) * batch)
            for place in range(most)
        ]
        if methods:
            steering = Steering(self.model, methods, spans, backend="auto", report=None, prompt_lengths=None)
            self._exit.callback(steering.detach)
            steering.join()
            self.engine.await_layers()

    def _columns_of(self, spans: Spans) -> torch.Tensor:
        """Hidden columns of every row, bool [B·branches, columns]."""
        rows = [
            [] if branch.hidden is None else spans.groups[branch.hidden][row]
            for row, branch in enumerate(self.rows * (spans.rows // len(self.rows)))
        ]
        width = max((stop for sections in rows for _, stop in sections), default=0)
        table = torch.zeros(len(rows), width, dtype=torch.bool)
        for row, sections in enumerate(rows):
            for start, stop in sections:
                table[row, start:stop] = True
        return table

    def _repeated(self, given: Given, batch: int, seen: int) -> Given:
        """The arguments with each row repeated, and what a branch hides out of the mask."""
        count = len(self.rows)
        found = {name: _repeat(value, batch, count, name) for name, value in given.items()}
        if self.hidden is not None:
            tokens = _tokens(found)
            columns = seen + tokens.shape[1]
            mask = found.get("attention_mask")
            if mask is None:
                mask = torch.ones(len(tokens), columns, dtype=torch.long, device=tokens.device)
            self.engine.tokens = masks.token_mask(mask, columns)[0]
            self._leaves_some(columns)
            found["attention_mask"] = _hide(mask, self.hidden.to(tokens.device))
        return found

    def _leaves_some(self, columns: int) -> None:
        """Raise `SpanError` if nothing is left of a prompt, once it has come whole."""
        if self.checked or (self.engine.scope is not None and columns < self.engine.scope.width):
            return
        self.checked, hidden, lengths = True, self.hidden, self.engine.prompt_lengths
        assert hidden is not None
        width = columns if self.engine.scope is None else self.engine.scope.width
        real = torch.ones(len(hidden), width, dtype=torch.bool)
        if self.engine.tokens is not None:
            real = self.engine.tokens[:, :width].cpu().bool()
        if lengths is not None:
            counts = torch.tensor(lengths).repeat_interleave(len(hidden) // len(lengths))
            real &= real.cumsum(1) <= counts[:, None]
        left = real.clone()
        left[:, : hidden.shape[1]] &= ~hidden[:, :width]
        if bool((empty := ~left.any(1)).any()):
            row = int(empty.nonzero()[0, 0]) // len(self.rows)
            raise SpanError(
                f"{self.method.name}: row {row}: the emphasised text is the whole prompt, of which nothing is left "
                "without it: emphasise a part of it"
            )

    @contextlib.contextmanager
    def _rotated(self) -> Iterator[None]:
        """Every branch's rows are given cosines and sines of its own RoPE base."""
        thetas = [branch.theta for branch in self.rows]
        if all(theta == 1 for theta in thetas):
            yield
            return
        if not self._rotaries:
            self._rotaries = rotaries(self.engine.base, thetas, self.method.name)
        with contextlib.ExitStack() as stack:
            for module, parts in self._rotaries:
                own = module.__dict__.get("forward")
                module.__dict__["forward"] = functools.partial(_rotate, parts)
                stack.callback(_restore, module, own)
            yield


class Other:
    """A branch of another model, which has a cache of its own and reads token ids alone."""

    def __init__(self, method: BranchedMethod, branch: Branch, engine: Engine) -> None:
        self.method, self.methods, self.engine = method, branch.methods, engine
        self.model = unwrap(branch.model)
        configs: list[Any] = [self.model.config, engine.base.config]
        theirs, ours = (config.get_text_config(decoder=True).vocab_size for config in configs)
        if theirs != ours:
            raise MethodError(
                f"{method.name}: {type(self.model).__name__} has a vocabulary of {theirs} tokens, "
                f"{engine.facts.name} of {ours}: their logits can be mixed only where both have one tokenizer"
            )
        self.cache: Cache | None = None

    def phases(self) -> set[str]:
        """The phases of its edits."""
        facts = Engine.of(decoder.find(self.model)).facts
        plans = [method.plan(facts, None) for method in self.methods]
        return {edit.phase for plan in plans for edits in plan.values() for edit in edits}

    def start(self, given: Given, batch: int, seen: int) -> Steering:
        """Begin at the first forward; what steers it is still to be detached."""
        ids = given.get("input_ids")
        if ids is None or seen:
            raise UnsupportedError(
                f"{self.method.name} runs another model beside this one, which cannot read "
                f"{'embeddings' if ids is None else 'a cache that this one filled'}: give the whole text as input_ids"
            )
        if caches.find(given) is not None:
            self.cache = DynamicCache(config=self.model.config)
        scope, lengths = self.engine.scope, self.engine.prompt_lengths
        if scope is not None:
            lengths = (scope.width,) * batch if scope.mask is None else tuple(scope.mask.sum(1).tolist())
        steering = Steering(self.model, list(self.methods), None, backend="auto", report=None, prompt_lengths=lengths)
        return steering.join()

    def run(self, given: Given, batch: int, seen: int) -> torch.Tensor:
        """Logits [B, T, V] of the forward's tokens."""
        ids, scope, mask = given["input_ids"], self.engine.scope, given.get("attention_mask")
        if scope is not None and (mask := scope.mask) is not None:  # the forward's own may be made for its cache
            mask = mask.repeat_interleave(batch // len(mask), 0)[:, : seen + ids.shape[1]]
            mask = torch.nn.functional.pad(mask, (0, seen + ids.shape[1] - mask.shape[1]), value=1)
        arguments: Given = {"input_ids": ids, "attention_mask": mask, "position_ids": given.get("position_ids")}
        device = self.model.device
        arguments = {name: None if value is None else value.to(device) for name, value in arguments.items()}
        arguments |= {"use_cache": False} if self.cache is None else {"use_cache": True, caches.NAME: self.cache}
        return self.model(**arguments).logits  # type: ignore[no-any-return]


def rotaries(base: torch.nn.Module, thetas: list[float], who: str) -> list[tuple[Any, list[torch.nn.Module]]]:
    """A decoder's rotary modules, each with modules like it of other RoPE bases.

    Raises:
        UnsupportedError: if it has none.
    """
    found = []
    for module in base.modules():
        config: Any = getattr(module, "config", None)
        if not type(module).__name__.endswith("RotaryEmbedding") or not hasattr(config, "rope_parameters"):
            continue
        parts = []
        for theta in thetas:
            scaled = copy.deepcopy(config)
            kinds = scaled.rope_parameters
            for parameters in [kinds] if "rope_theta" in kinds else [k for k in kinds.values() if isinstance(k, dict)]:
                parameters["rope_theta"] *= theta
            kind: Any = type(module)
            parts.append(kind(scaled))
        found.append((module, parts))
    if not found:
        raise UnsupportedError(
            f"{who} changes the base of rotary position embeddings, and {type(base).__name__} has no module of them "
            "that is made from its config's rope_parameters"
        )
    return found


def _rotate(parts: list[Any], x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if position_ids.ndim != 2:
        raise UnsupportedError(
            f"position_ids of {position_ids.ndim} dimensions (text, image, video) cannot be rotated by several bases"
        )
    count = len(parts)
    position_ids = position_ids.expand(x.shape[0], -1)
    found = [p.to(x.device)(x[n::count], position_ids[n::count], *args, **kwargs) for n, p in enumerate(parts)]
    if isinstance(found[0], torch.Tensor):
        return torch.stack(found, 1).flatten(0, 1)
    return tuple(torch.stack(tensors, 1).flatten(0, 1) for tensors in zip(*found, strict=True))


def _restore(module: torch.nn.Module, own: Any) -> None:
    module.__dict__.pop("forward", None)
    if own is not None:
        module.__dict__["forward"] = own


def _tokens(given: Given) -> torch.Tensor:
    tokens = given.get("input_ids")
    return given["inputs_embeds"] if tokens is None else tokens  # type: ignore[no-any-return]


def _copies(cache: Cache | None) -> bool:
    """Whether the rows of a cache can be repeated and selected."""
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and not cache.offloading and all(type(x) in known for x in cache.layers)


def _divides(given: Given) -> bool:
    """Whether a forward of several columns can be two."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2 and bool(mask[:, -1].all())):
        return False
    further = {name for name, value in given.items() if value is not None} - {*_BY_COLUMN, *_WHOLE}
    return not further and (positions is None or positions.ndim == 2)


def _columns(given: Given, part: slice) -> Given:
    """The forward of some columns: the first ones (which need no logits), or those at the end."""
    found = {name: v[:, part] if name in _BY_COLUMN and v is not None else v for name, v in given.items()}
    if part.start is None:
        if found.get("attention_mask") is not None:
            found["attention_mask"] = found["attention_mask"][:, part]
        if "logits_to_keep" in found:
            found["logits_to_keep"] = 1
    return found


def _repeat(value: Any, batch: int, count: int, name: str = "") -> Any:
    if isinstance(value, Mapping) and not isinstance(value, Cache):
        return {key: _repeat(inner, batch, count) for key, inner in value.items()}
    if not isinstance(value, torch.Tensor) or value.ndim < 2 or count == 1:
        return value
    rows = 1 if name == "position_ids" and value.ndim == 3 else 0
    return value.repeat_interleave(count, rows) if value.shape[rows] == batch else value


def _hide(mask: Any, hidden: torch.Tensor) -> Any:
    """A mask of tokens [B, C] or of pairs [B, 1, T, C] without some columns of each row, bool [B, up to C]."""
    if isinstance(mask, Mapping):
        return {kind: _hide(inner, hidden) for kind, inner in mask.items()}
    hidden = torch.nn.functional.pad(hidden[:, : mask.shape[-1]], (0, max(mask.shape[-1] - hidden.shape[1], 0)))
    hidden = hidden if mask.ndim == 2 else hidden[:, None, None]
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min if mask.is_floating_point() and mask.ndim == 4 else 0)
