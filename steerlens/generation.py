"""The wrapped `generate` of a steered model: it says what the prompt is, whatever forwards run inside."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

from steerlens import caches
from steerlens.errors import SteeringStateError, UnsupportedError
from steerlens.methods.base import DecodingMethod, PromptMethod
from steerlens.wrapping import refuse_virtual_tokens

if TYPE_CHECKING:
    from steerlens.engine import Engine


CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class Scope:
    """One `generate`: the inputs that are its prompt, and which of its forwards are another's.

    Attributes:
        width: columns of the prompt, those that a given cache holds included.
        ids: token ids [B, T] before any expansion, or `None` for embeddings.
        mask: [B, T] or `None`.
        expand: rows that each prompt row becomes (beams, return sequences).
        beams: whether rows are reordered between forwards.
        chunked: whether the prompt comes in several forwards.
        drafts: whether a `generate` inside this one drafts tokens for it with the same decoder.
        native: whether what runs now is left unsteered: a draft, or the unconditional branch of guidance.
        started: whether a forward of the prompt has come.
    """

    def __init__(self, engine: Engine, model: Any, arguments: dict[str, Any]) -> None:
        config = arguments.get("generation_config") or model.generation_config

        def option(name: str) -> Any:
            value = arguments.get(name)
            return getattr(config, name, None) if value is None else value

        if option("cache_implementation") == "paged":
            raise _continuous(engine, "generate(cache_implementation='paged')")
        if option("token_healing"):
            raise UnsupportedError(
                "token_healing=True rewrites the end of the prompt inside generate, so that spans and prompt rows no "
                "longer fit it: heal the tokens first (model.heal_tokens) and generate without it"
            )
        names = ("inputs_embeds", "inputs", "input_ids")
        tokens = next((arguments[name] for name in names if isinstance(arguments.get(name), torch.Tensor)), None)
        mask, cache = arguments.get("attention_mask"), caches.find(arguments)
        self.width = 1 if tokens is None else tokens.shape[1]
        self.ids = None if tokens is None or tokens.is_floating_point() else tokens
        self.mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        if self.mask is not None and cache is not None and cache.get_seq_length():
            self.width = max(self.width, self.mask.shape[1])  # ids may be those alone that the cache lacks
        self.beams = (option("num_beams") or 1) > 1
        self.expand = max(option("num_beams") or 1, option("num_return_sequences") or 1)
        self.chunked = option("prefill_chunk_size") is not None
        self.drafts = option("assistant_early_exit") is not None or _shares(engine, arguments.get("assistant_model"))
        if self.drafts and arguments.get("custom_generate") is not None:
            raise UnsupportedError(
                "custom_generate with an assistant that is the steered model: its drafts cannot be told from its "
                "own forwards; leave the assistant out or pass a model of its own"
            )
        self.native = self.started = False
        self._borrowed: list[tuple[Any, Any]] = []

    def check(self, tokens: torch.Tensor, seen: int) -> None:
        """Check a forward that would begin the prompt.

        Args:
            tokens: ids [B, T] or embeddings [B, T, d].
            seen: columns that its cache holds.

        Raises:
            UnsupportedError: if it holds another prompt than this one.
        """
        total = seen + tokens.shape[1]
        known = not (seen and self.started) and (self.chunked or total >= self.width)
        if known and not seen and self.ids is not None and not tokens.is_floating_point():
            length = min(total, self.width)
            ids = self.ids[:, :length].to(tokens.device)
            repeats = len(tokens) // len(ids)
            known = repeats > 0 and torch.equal(tokens[:, :length], ids.repeat_interleave(repeats, 0))
        if not known:
            raise UnsupportedError(
                f"generate runs a forward of {tokens.shape[1]} columns on a cache of {seen} that is not its prompt of "
                f"{self.width}: which keys and rows are meant there cannot be told (several prompts inside one "
                "generate, or a second thread): one generate at a time, or generate unsteered"
            )
        self.started = True

    @contextlib.contextmanager
    def unsteered(self) -> Iterator[None]:
        """What runs inside is left native."""
        before, self.native = self.native, True
        try:
            yield
        finally:
            self.native = before

    def leave_guidance(self, processors: Any) -> Any:
        """Have classifier-free guidance run its unconditional branch unsteered, until `release`."""
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                self._borrowed.append((processor, processor.model))
                processor.model = self._native(processor.model)
        return processors

    def _native(self, model: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.unsteered():
                return model(*args, **kwargs)

        return call

    def release(self) -> None:
        """Give the processors their model back: they may be the caller's."""
        for processor, model in reversed(self._borrowed):
            processor.model = model


def _shares(engine: Engine, assistant: Any) -> bool:
    """Whether an assistant drafts with the steered decoder; refused where its `generate` is not the wrapped one."""
    if assistant is None or id(assistant) in engine.wrappers:
        return assistant is not None
    steered = {id(module) for module in engine.modules.values()}
    if any(id(module) in steered for module in assistant.modules()):
        raise UnsupportedError(
            f"assistant_model {type(assistant).__name__} shares attention modules with the steered "
            f"{engine.facts.name}, so its drafts cannot be told from the model's own forwards: pass the steered model "
            "itself, assistant_early_exit, or an assistant with modules of its own"
        )
    return False


def _continuous(engine: Engine, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} packs the prompts of many requests into one row (continuous batching, paged attention), where "
        f"steering cannot tell them apart: leave {engine.describe()} first, or call generate on padded batches"
    )


class Wrapper:
    """What one model instance calls to generate, compile and switch attention, replaced until `release`."""

    REPLACED = ("generate", "set_attn_implementation", "get_compiled_call", "_get_logits_processor", *CONTINUOUS)

    def __init__(self, model: Any, engine: Engine) -> None:
        self.model, self.engine = model, engine
        self.before = {name: model.__dict__.get(name) for name in self.REPLACED}

    def install(self) -> None:
        """Put the replacements on."""
        model, engine = self.model, self.engine
        if hasattr(model, "generate"):
            model.__dict__["generate"] = _generate(weakref.ref(model), self.before["generate"], engine)
        if hasattr(model, "_get_logits_processor"):
            own = self.before["_get_logits_processor"]
            model.__dict__["_get_logits_processor"] = _processors(weakref.ref(model), own, engine)
        for name in CONTINUOUS:
            if hasattr(model, name):
                model.__dict__[name] = _refusal(engine, name)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise SteeringStateError(
                f"set_attn_implementation on a steered model would undo the routing: leave {engine.describe()} first"
            )

        model.__dict__["set_attn_implementation"] = refuse
        reference: Any = weakref.ref(model)

        def uncompiled(*args: Any, **kwargs: Any) -> Any:
            engine.note_compiled()
            return reference().__call__

        model.__dict__["get_compiled_call"] = uncompiled

    def release(self) -> None:
        """Give the model what it had."""
        for name, value in self.before.items():
            self.model.__dict__.pop(name, None)
            if value is not None:
                self.model.__dict__[name] = value


def _generate(model_ref: Any, own: Callable[..., Any] | None, engine: Engine) -> Callable[..., Any]:
    model_type = type(model_ref())
    signature = inspect.signature(model_type.generate)

    @functools.wraps(model_type.generate)
    def generate(*args: Any, **kwargs: Any) -> Any:
        model = model_ref()
        original = functools.partial(model_type.generate, model) if own is None else own
        if (scope := engine.scope) is not None:
            with scope.unsteered() if scope.drafts else contextlib.nullcontext():
                return original(*args, **kwargs)
        refuse_virtual_tokens(getattr(model.__dict__.get("prepare_inputs_for_generation"), "__self__", None))
        arguments = dict(signature.bind_partial(model, *args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        del arguments[next(iter(signature.parameters))]
        owners = [(c, m) for c in engine.contexts for m in c.methods if isinstance(m, DecodingMethod)]
        if owners and not owners[0][0].inside:
            context, method = owners[0]
            names = ("inputs", "input_ids", "attention_mask", "inputs_embeds")
            inputs = {name: arguments.pop(name) for name in names if name in arguments}
            context.inside = True
            try:
                return method.generate(model, inputs, context.spans, **arguments)
            finally:
                context.inside = False
        spans = [(context, context.spans) for context in engine.contexts]
        try:
            for context, _ in spans:
                for prompt in (m for m in context.methods if isinstance(m, PromptMethod)):
                    rewritten, changed = prompt.prepare_on(model, arguments, context.spans)
                    arguments = dict(rewritten)
                    context.respan(changed)
            engine.scope = Scope(engine, model, arguments)
            engine.await_layers()
            output = original(**arguments)
            engine.judge()
            return output
        finally:
            if engine.scope is not None:
                engine.scope.release()
            engine.scope = None
            for context, known in spans:
                context.respan(known)

    return generate


def _processors(model_ref: Any, own: Callable[..., Any] | None, engine: Engine) -> Callable[..., Any]:
    @functools.wraps(type(model_ref())._get_logits_processor)
    def processors(*args: Any, **kwargs: Any) -> Any:
        model = model_ref()
        found = (functools.partial(type(model)._get_logits_processor, model) if own is None else own)(*args, **kwargs)
        return found if engine.scope is None else engine.scope.leave_guidance(found)

    return processors


def _refusal(engine: Engine, name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise _continuous(engine, name)

    return refuse
