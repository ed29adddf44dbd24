"""What stands behind a steered model: routed attention modules, the current forward, state per cache.

Only steered layers are routed, by giving their attention module a copy of its config that names our attention function;
every other layer stays native, and masks arrive as the model makes them. All state lives on the modules and the cache,
so a `generate` that a streamer runs in another thread is steered too.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steerlens import around, backends, caches, decoder, inlets, masks, rescaling, selfcheck, stream
from steerlens.backends.call import Call, Lowered
from steerlens.edits import Reweight, Sinks
from steerlens.errors import NotReachedError, SteeringStateError, UnsupportedError
from steerlens.follow import follow, release
from steerlens.generation import Scope, Wrapper
from steerlens.lower import Placed, lower
from steerlens.passes import Pass, Prompt, fit
from steerlens.wrapping import EagerForward, outside_graphs

if TYPE_CHECKING:
    from steerlens.attach import Steering
    from steerlens.observing import Observer

NAME = "steerlens"
_UNDERSTOOD = {
    "sliding_window",
    "s_aux",
    "softcap",
    "position_ids",
    "use_cache",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "cache_position",
    "logits_to_keep",
    "return_dict",
    "num_items_in_batch",
}


class Guarded:
    """Sits on a steered module; refuses what would copy or ship a model that is still steered."""

    engine: Engine

    def _refuse(self, what: str) -> SteeringStateError:
        return SteeringStateError(
            f"{what} a steered model would carry the steering along or lose it: leave {self.engine.describe()} first"
        )

    def __deepcopy__(self, memo: Any) -> Any:
        raise self._refuse("deepcopy of")

    def __copy__(self) -> Any:
        raise self._refuse("copy of")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._refuse("pickling")


class Site(Guarded):
    """A routed attention module.

    Attributes:
        config: the module's own config, put back on release; `implementation`: its attention.
        placed: the layer's edits of attention, over all contexts.
        around: its edits before and after the attention call.
        calls: attention calls so far; `rows`: query rows of all batch rows; `reached`: called since the last start.
    """

    def __init__(self, engine: Engine, layer: int, module: Any) -> None:
        self.engine, self.layer, self.module = engine, layer, module
        self.config: Any = module.config
        self.implementation = self.config._attn_implementation  # a config takes its time to answer
        self.placed: list[Placed] = []
        self.around: list[around.Placed] = []
        self.outlet = around.Outlet(module, layer, engine.facts)
        self.inlet = inlets.Inlet(engine, layer, module)
        self.rescaled = rescaling.Rescaled(self)
        self.stream = stream.Stream(engine, layer)
        self.calls = self.rows = 0
        self.reached = True

    def route(self) -> None:
        """Have the module call our attention function, until `release`."""
        routed = copy.copy(self.config)
        routed._attn_implementation_internal = NAME
        self.module.config = routed
        self.module.__dict__["_steerlens"] = self

    def release(self) -> None:
        """Give the module its own config back."""
        self.module.config = self.config
        self.module.__dict__.pop("_steerlens", None)
        self.outlet.release()
        self.inlet.place([])
        self.rescaled.place([])
        self.stream.place([], [])

    def native(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention that this module would have run unsteered."""
        # FSDP puts a class of its own before the model's.
        files = [sys.modules[kind.__module__] for kind in type(self.module).__mro__]
        eager: Any = next((f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward")), None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager)
        module: Any = self.module
        routed, module.config = module.config, self.config
        try:
            return function(self.module, *args, **kwargs)
        finally:
            module.config = routed


class Engine(Guarded):
    """All steering on one model."""

    def __init__(self, base: torch.nn.Module) -> None:
        self.engine = self
        self.base = base
        self.facts, self.modules = decoder.read(base)
        self.sites: dict[int, Site] = {}
        self.contexts: list[Steering] = []
        self.records: list[Observer] = []
        self.observers: list[Steering | Observer] = []
        self.backend = "auto"
        self.witness: selfcheck.Witness | None = None
        self.prompts: weakref.WeakKeyDictionary[Cache, tuple[Any, Prompt]] = weakref.WeakKeyDictionary()
        self.current: Pass | None = None
        self.scope: Scope | None = None
        self.branches = 1  # rows of a forward that each of the callers' rows becomes (see `branching`)
        self.tokens: torch.Tensor | None = None  # the mask of its tokens, where a branch hides some of them
        self.wrappers: dict[int, Wrapper] = {}
        self.thread = threading.get_ident()
        self._running: int | None = None
        self._asked_for_weights = False
        self._arguments = list(inspect.signature(type(base).forward).parameters)[1:]
        self._forward: EagerForward | None = None

    @classmethod
    def of(cls, base: torch.nn.Module) -> Engine:
        """The engine of a decoder, made on first use."""
        engine = base.__dict__.get("_steerlens_engine")
        return engine if engine is not None else cls(base)

    def describe(self) -> str:
        """The contexts in force, for messages."""
        names = [c.describe() for c in self.contexts] + list(dict.fromkeys(r.name for r in self.records))
        return ", ".join(names) or "steerlens"

    def claim(self) -> None:
        """The thread that attaches first; another one must wait until all contexts are left."""
        if self.users and self.thread != threading.get_ident():
            raise SteeringStateError(
                f"{self.describe()} was attached by another thread; attach to one model from one thread"
            )
        self.thread = threading.get_ident()

    def update(self) -> None:
        """Route the layers that the contexts in force need, release the others."""
        if self.users and self._forward is None and self.witness is None:
            selfcheck.verify(self)
        try:
            self._route()
        except BaseException:  # Ctrl-C: what it left half done is known, and can be done again
            self._route()
            raise

    def _route(self) -> None:
        wanted = {layer for context in self.contexts for layer in context.plan}
        wanted |= {layer for record in self.records for layer in record.layers}
        for layer in set(self.sites) - wanted:
            self.sites[layer].release()
            del self.sites[layer]
        for layer in sorted(wanted - set(self.sites)):
            self.sites[layer] = Site(self, layer, self.modules[layer])
            self.sites[layer].route()
        for layer, site in self.sites.items():
            site.placed = [item for context in self.contexts for item in context.placed.get(layer, ())]
            site.around = [item for context in self.contexts for item in context.around.get(layer, ())]
            site.inlet.place(site.around)
            site.rescaled.place(site.around)
            site.stream.place(site.placed, site.around)
        self.backend = next((c.backend for c in self.contexts if c.backend != "auto"), "auto")
        self.observers = [c for c in self.contexts if c.observes] + self.records
        models = {id(user.model): user.model for user in self.users}
        for known in set(self.wrappers) - set(models):
            self.wrappers[known].release()
            del self.wrappers[known]
        for known in set(models) - set(self.wrappers):
            self.wrappers[known] = Wrapper(models[known], self)
            self.wrappers[known].install()
        active = bool(models)
        if active and self._forward is None:
            self._forward = EagerForward(self.base, self.describe(), self._run)
            self._forward.install()
            self.base.__dict__["_steerlens_engine"] = self
        elif not active:
            if self._forward is not None:
                self._forward.release()
            self._forward = None
            release(self.prompts)
            self.base.__dict__.pop("_steerlens_engine", None)

    def note_compiled(self) -> None:
        """Say once that compiled code is asked for but not what runs."""
        if self._forward is not None:
            self._forward.note()

    @property
    def users(self) -> list[Steering | Observer]:
        """Every context in force."""
        return [*self.contexts, *self.records]

    @property
    def prompt_lengths(self) -> tuple[int, ...] | None:
        """The lengths that a context was given; two contexts must agree."""
        given = {c.prompt_lengths for c in self.contexts if c.prompt_lengths is not None}
        if len(given) > 1:
            raise SteeringStateError(f"contexts in force name different prompt_lengths: {sorted(given)}")
        return next(iter(given), None)

    # --- one forward -------------------------------------------------------------------------------------------------

    def _run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The decoder's forward. Not by hooks: a graph compiled before them would go on without them."""
        self._begin(args, kwargs)
        output = None
        try:
            output = forward(*args, **kwargs)
            return output
        finally:
            self._end(output)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.scope is not None and self.scope.native:
            return
        if self._running not in (None, threading.get_ident()) and self._busy():
            raise SteeringStateError(
                f"two threads run the steered model at once ({self.describe()}): a model holds one forward at a time"
            )
        for context in self.contexts:
            context.allow_forward()
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs} if args else kwargs
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if tokens is None:
            return
        cache = caches.find(given)
        caches.refuse_foreign(cache)
        seen = 0 if cache is None else int(cache.get_seq_length())
        batch, length = tokens.shape[:2]
        masks.refuse_packed(given, cache)
        mask, plain = masks.token_mask(given.get("attention_mask"), seen + length)
        # What a branch hides are tokens of its prompt all the same.
        prompt = self._prompt(cache, seen, batch, length, mask if self.tokens is None else self.tokens, tokens)
        total = seen + length
        real = None
        if mask is not None:
            real = fit(mask.to(tokens.device, torch.bool), total)
        elif prompt.real is not None and seen:
            known = prompt.real
            real = torch.nn.functional.pad(known, (0, max(total - known.shape[1], 0)), value=True)[:, :total]
        if real is not None and bool(real.all()):
            real = None
        sources = {layer: self.facts.keys_of.get(layer, layer) for layer in self.sites}
        keys = {n: (length, 0) if cache is None else cache.get_mask_sizes(length, m) for n, m in sources.items()}
        now = Pass(prompt, seen, length, real, plain, keys)
        for record in self.records:
            record.expect(now)
        self.current = now
        self._asked_for_weights = bool(given.get("output_attentions"))  # gpt2 and opt do not hand it on
        self._running = threading.get_ident()
        if self.scope is None:
            self.await_layers()

    def _busy(self) -> bool:
        """Whether the thread that began the last forward is still in it; Ctrl-C may leave one that never ended."""
        frame = None if self._running is None else sys._current_frames().get(self._running)
        while frame is not None:
            if frame.f_locals.get("self") is self.base:
                return True
            frame = frame.f_back
        return False

    def _prompt(
        self, cache: Cache | None, seen: int, batch: int, length: int, mask: torch.Tensor | None, tokens: torch.Tensor
    ) -> Prompt:
        scope = self.scope
        lengths = self.prompt_lengths
        found = self.prompts.get(cache) if cache is not None and seen else None
        # A cache that was cropped into its prompt begins another one, as does another generate on an old cache.
        if found and (found[0] is scope if scope else lengths is not None or seen >= found[1].width):
            if found[1].batch == batch:
                return found[1]
            raise UnsupportedError(f"the cache holds a prompt of {found[1].batch} rows, this forward has {batch}")
        ids, given = (tokens, mask) if scope is None else (scope.ids, scope.mask)
        expand = self.branches * (1 if scope is None else scope.expand)
        self._check_rows(batch, expand, None if seen and scope is None else ids, given)
        width = seen + length if scope is None else scope.width
        if scope is not None:
            scope.check(tokens, seen)
        real = None if mask is None else mask.bool()
        if given is not None and given.shape[1] >= width:
            real = given.bool().repeat_interleave(batch // given.shape[0], 0)
        elif mask is not None and mask.shape[1] < width:
            # The first chunk of a prompt that comes in several: what follows left padding is tokens.
            real = torch.nn.functional.pad(mask.bool(), (0, width - mask.shape[1]), value=True)
        if lengths is not None:
            if batch % len(lengths):
                raise SteeringStateError(f"prompt_lengths has {len(lengths)} entries, the batch {batch} rows")
            lengths = tuple(n for n in lengths for _ in range(batch // len(lengths)))
        prompt = Prompt.start(width, real, batch, tokens.device, lengths)
        prompt.beams = scope is not None and scope.beams
        if cache is not None:
            follow(self.prompts, cache, (scope, prompt))
        return prompt

    def widen(self, cache: Cache, times: int) -> None:
        """Repeat each row of a cache; the repeated rows are from now on what spans and `PerRow` count."""
        cache.batch_repeat_interleave(times)
        if (found := self.prompts.get(cache)) is not None:
            prompt = replace(found[1], origin=None, started=found[1].batch, _columns={}, _elsewhere={})
            self.prompts[cache] = (found[0], prompt)

    def _check_rows(self, batch: int, expand: int, ids: torch.Tensor | None, mask: torch.Tensor | None) -> None:
        for user in self.users:
            user.check_rows(batch, expand)
            if user.spans is not None and ids is not None and not ids.is_floating_point():
                user.spans.check(ids, mask, longer=self.prompt_lengths is not None)

    def _end(self, output: Any) -> None:
        if self._running != threading.get_ident():
            return  # a forward that is left native, or has no tokens, began no pass
        now, self.current, self._running = self.current, None, None
        if now is None or output is None:  # no output: the forward raised
            return
        cache = caches.find(output) if isinstance(output, Mapping) else None
        if cache is not None and cache not in self.prompts:
            follow(self.prompts, cache, (self.scope, now.prompt))
        if self.scope is None:
            self.judge()

    def await_layers(self) -> None:
        """From here on, `judge` wants every routed layer to be called."""
        for site in self.sites.values():
            site.reached = False

    def judge(self) -> None:
        """Raise `NotReachedError` for a steered layer that the last call never came to."""
        missed = [layer for layer, site in self.sites.items() if not site.reached]
        if missed:
            raise NotReachedError(
                f"{self.describe()}: layers {missed} of {self.facts.name} were routed but never called, so nothing was "
                "steered there: the model skipped them or does not use transformers' attention interface"
            )

    # --- one attention call ------------------------------------------------------------------------------------------

    def attend(
        self,
        site: Site,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        scaling: float | None,
        extra: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Steered attention of one module: output [B, Tq, H, Dv], and the weights if the reference was asked."""
        if self.scope is not None and self.scope.native:
            return site.native(query, key, value, mask, dropout=dropout, scaling=scaling, **extra)
        now = self.current
        if now is None:
            raise SteeringStateError(
                f"layer {site.layer} of {self.facts.name} was called outside a forward of its decoder "
                "(gradient checkpointing, or the layer alone): call the whole model, and turn checkpointing off"
            )
        now = now.on(query.device)
        if site.layer in self.facts.keys_of:
            # Layers that share keys may be given only the rows whose logits are kept.
            now = now.last(query.shape[2])
        heads, placed, first = query.shape[1], site.placed, 0
        if heads != self.facts.heads[site.layer]:
            from steerlens import shards

            total, where = self.facts.heads[site.layer], f"layer {site.layer} of {self.facts.name}"
            first = shards.first_head(site.module, where, total, self.facts.kv_heads[site.layer], query, key)
            placed = shards.local(placed, first, heads)
        if dropout:
            raise UnsupportedError(f"attention dropout {dropout} is on: steering is exact only in model.eval()")
        unknown = [k for k, v in extra.items() if v is not None and k not in _UNDERSTOOD]
        if unknown or extra.get("is_causal") is False:
            raise UnsupportedError(
                f"layer {site.layer} of {self.facts.name} passes arguments that steerlens does not know: "
                f"{', '.join(unknown) or 'is_causal=False'} (sparse, packed or bidirectional attention)"
            )
        site.calls += 1
        site.rows += query.shape[0] * query.shape[2]
        site.reached = True
        if site.around:
            site.inlet.check(self.current)
            query = around.shift(query, site.around, now, first, f"layer {site.layer} of {self.facts.name}")
        call = self._call(site, now, query, key, value, mask, scaling, extra)
        call.first = first
        # diffllama attends twice in a layer, to each half of its values by the same weights.
        called: Hashable = ("called", site.layer)
        again, now.memo[called] = called in now.memo, True
        call.edits = lower(placed, now, site.layer, heads, again)
        want_weights = self._asked_for_weights or bool(extra.get("output_attentions"))
        lifted = any(map(around.one_by_one, site.around))
        if lifted and (want_weights or any(map(_looks, self.observers))):
            raise UnsupportedError(
                f"{self.describe()}: logits of layer {site.layer} are lifted one by one or dropped, which no "
                "statistic or weight of its attention shows: leave out capture, report='mass' and "
                "output_attentions=True"
            )
        if lifted and any(isinstance(p.edit, Reweight) and isinstance(p.edit.keys, Sinks) for p in placed):
            raise UnsupportedError(
                f"{self.describe()}: logits of layer {site.layer} are lifted one by one or dropped, but sinks "
                "are found in the attention of whole prompts: give the two methods different layers, or steer with one "
                "of them"
            )
        if not placed and not lifted:
            output, matrix = site.native(query, key, value, mask, dropout=dropout, scaling=scaling, **extra)
        elif want_weights and self.backend != "reference":
            raise UnsupportedError(
                "output_attentions=True needs every weight of the steered layers: use backend='reference', or "
                "steerlens.capture for their summaries"
            )
        else:

            def lowered(some: Pass) -> list[Lowered]:
                return lower(placed, some, site.layer, heads, True)

            output = around.attention(self.backend, call, site.around, now, site.layer, lowered)
            matrix = None
            if want_weights:
                from steerlens.backends import reference

                matrix = reference.weights(call, reference.resolve(call), slice(0, query.shape[2])).to(query.dtype)
            output = output.transpose(1, 2).contiguous()
        if site.around:
            output = around.add(output, site.around, now, first, site.outlet)
        if self.witness is not None:
            native = site.native(query, key, value, mask, dropout=dropout, scaling=scaling, **extra)
            self.witness(site, output, native[0], now.real_rows())
            return native
        for observer in () if again else self.observers:
            with torch.no_grad():
                observer.observe(site.layer, call, now)
        for record in self.records:
            record.output(site.layer, output, now)
        return output, matrix

    def _call(
        self,
        site: Site,
        now: Pass,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        extra: dict[str, Any],
    ) -> Call:
        announced: Any = now.memo.setdefault(("announced", site.layer), now.keys[site.layer])
        length, start = announced
        if key.shape[2] != length or query.shape[2] != now.q_len:
            raise UnsupportedError(
                f"layer {site.layer}: {key.shape[2]} keys and {query.shape[2]} rows, but the cache announced {length} "
                f"keys and the forward {now.q_len} rows: this cache or mode cannot be steered exactly yet"
            )
        # A static cache has slots that were never written; they are no keys.
        written = min(now.columns - start, length)
        now.keys[site.layer] = (written, start)
        if written < length:
            key, value = key[:, :, :written], value[:, :, :written]
        real = None if now.real is None else fit(now.real, written, start)
        window = extra.get("sliding_window")
        if window is not None and now.columns <= window:
            window = None
        plain = now.plain and window is None
        # The kernels know windows by their width.
        shaped = plain or (now.plain and backends.takes_kernels(self.backend, query))
        offset = now.q_offset - start
        if mask is not None and mask.ndim == 4:
            # Layers on a further device are each given a copy of their own: the last one is kept, and known by itself,
            # as both its address and its id are used again.
            memo: Hashable = ("mask", self.facts.kinds[site.layer] if self.facts.kinds else window, written)
            known: Any = now.memo.get(memo)
            if known is None or known[0] is not mask:
                native = masks.canonical(mask[..., :written])
                shaped = shaped and masks.is_causal_padding(native, offset, real, window)
                known = now.memo[memo] = (mask, native, shaped)
            _, mask, shaped = known
            plain = plain and shaped
        elif plain and offset == 0 and query.shape[2] == written > 1:
            mask = None  # the native kernel is told the padding in two dimensions; `real` has it
        elif shaped and window is not None:
            mask = None
        elif mask is not None or (window is not None and written > window):
            memo = ("mask", written, offset, window)
            if memo not in now.memo:
                now.memo[memo] = masks.from_columns(query, written, offset, real, window)
            mask = now.memo[memo]  # type: ignore[assignment]
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        softcap, sinks = extra.get("softcap"), extra.get("s_aux")
        if site.implementation == "sdpa":
            softcap = sinks = None  # older transformers let gemma2 run on a native sdpa that knows neither
        call = Call(query, key, value, mask, float(scaling), softcap, offset, real, plain, sinks=sinks, memo=now.memo)
        call.window = window if shaped and not plain else None
        return call


def _looks(observer: Steering | Observer) -> bool:
    """Whether it looks at attention calls."""
    from steerlens.observing import Observer

    return type(observer).observe is not Observer.observe


@outside_graphs
def steered_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that routed modules call; for one that is not routed it is plain SDPA."""
    site: Site | None = module.__dict__.get("_steerlens")
    if site is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return site.engine.attend(site, query, key, value, attention_mask, dropout, scaling, kwargs)


AttentionInterface.register(NAME, steered_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
