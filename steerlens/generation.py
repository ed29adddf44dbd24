"""The wrapped `generate` of a steered model: it says what the prompt is, whatever forwards run inside."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from steerlens.errors import SteeringStateError, UnsupportedError
from steerlens.methods.base import DecodingMethod, PromptMethod
from steerlens.wrapping import refuse_virtual_tokens

if TYPE_CHECKING:
    from steerlens.engine import Engine


class Scope:
    """One `generate`: the inputs that are its prompt.

    Attributes:
        width: columns of the prompt.
        ids: token ids [B, T] before any expansion, or `None` for embeddings.
        mask: [B, T] or `None`.
        expand: rows that each prompt row becomes (beams, return sequences).
        beams: whether rows are reordered between forwards.
        chunked: whether the prompt comes in several forwards.
    """

    def __init__(self, model: Any, arguments: dict[str, Any]) -> None:
        config = arguments.get("generation_config") or model.generation_config

        def option(name: str) -> Any:
            value = arguments.get(name)
            return getattr(config, name, None) if value is None else value

        if option("guidance_scale") not in (None, 1, 1.0):
            raise UnsupportedError(
                f"guidance_scale={option('guidance_scale')} runs a second prompt inside generate, which steering would "
                "take for the first: not supported yet, leave it out or generate unsteered"
            )
        names = ("inputs_embeds", "inputs", "input_ids")
        tokens = next((arguments[name] for name in names if isinstance(arguments.get(name), torch.Tensor)), None)
        mask = arguments.get("attention_mask")
        self.width = 1 if tokens is None else tokens.shape[1]
        self.ids = None if tokens is None or tokens.is_floating_point() else tokens
        self.mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        self.beams = (option("num_beams") or 1) > 1
        self.expand = max(option("num_beams") or 1, option("num_return_sequences") or 1)
        self.chunked = option("prefill_chunk_size") is not None


class Wrapper:
    """What one model instance calls to generate, compile and switch attention, replaced until `release`."""

    REPLACED = ("generate", "set_attn_implementation", "get_compiled_call")

    def __init__(self, model: Any, engine: Engine) -> None:
        self.model = model
        self.before = {name: model.__dict__.get(name) for name in self.REPLACED}
        if hasattr(model, "generate"):
            model.__dict__["generate"] = _generate(weakref.ref(model), self.before["generate"], engine)

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
        if engine.scope is not None:
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
                    rewritten, changed = prompt.prepare(arguments, context.spans)
                    arguments = dict(rewritten)
                    context.respan(changed)
            engine.scope = Scope(model, arguments)
            engine.await_layers()
            output = original(**arguments)
            engine.judge()
            return output
        finally:
            engine.scope = None
            for context, known in spans:
                context.respan(known)

    return generate
