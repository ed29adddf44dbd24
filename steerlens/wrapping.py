"""What models come wrapped in: PEFT, data parallelism, `torch.compile`; and how steering stays out of compiled graphs.

A compiled graph does not notice hooks that are registered after it was made (dynamo skips those guards), but it does
notice a `forward` that appears on a module. So a steered decoder gets a `forward` of its own that runs eagerly:
graphs made before no longer apply, graphs made meanwhile break around the decoder, and on exit the old ones are valid.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from steerlens.errors import UnsupportedError

log = logging.getLogger("steerlens")
_REASON = (
    "steerlens steers this model, and steering runs outside of compiled graphs: compile with fullgraph=False, "
    "or leave the steering first"
)


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a function out of compiled graphs, at no cost where nothing is being compiled."""
    disabled = torch.compiler.disable(function, reason=_REASON)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call


class EagerForward:
    """A module's `forward` inside `around(forward, args, kwargs)`, out of compiled graphs with all in it.

    Stays until `release`; if there is something compiled, one log line says that it is left out.
    """

    def __init__(self, module: torch.nn.Module, who: str, around: Callable[..., Any]) -> None:
        self.module = module
        self.own = module.__dict__.get("forward")
        original = module.forward
        # Layers compiled one by one, as in regional compilation.
        parts = any(map(_is_compiled, module.modules()))

        def eager(*args: Any, **kwargs: Any) -> Any:
            self.note()
            with torch.compiler.set_stance("force_eager") if parts else contextlib.nullcontext():
                return around(original, args, kwargs)

        disabled = torch.compiler.disable(eager, reason=_REASON)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            compiled = parts or torch.compiler.is_compiling()
            return disabled(*args, **kwargs) if compiled else around(original, args, kwargs)

        self._steered = forward
        self._who, self._noted = who, False

    def install(self) -> None:
        """Put it on."""
        self.module.__dict__["forward"] = self._steered

    def note(self) -> None:
        """Say once that compiled code is not what runs."""
        if not self._noted:
            self._noted = True
            log.warning("%s: the steered decoder runs eagerly, torch.compile is left out meanwhile", self._who)

    def release(self) -> None:
        """Give the module the `forward` that it had."""
        self.module.__dict__.pop("forward", None)
        if self.own is not None:
            self.module.__dict__["forward"] = self.own


def _is_compiled(module: torch.nn.Module) -> bool:
    parts, forward = module._modules, module.__dict__.get("forward")
    return "_orig_mod" in parts or hasattr(forward, "_torchdynamo_orig_callable") or bool(module._compiled_call_impl)


def unwrap(model: Any) -> Any:
    """The transformers model inside PEFT, DDP, FSDP, DataParallel and `torch.compile` wrappers.

    Raises:
        UnsupportedError: for a wrapper under which the steering would not be what it says.
    """
    name, parts = type(model).__name__, getattr(model, "_modules", {})
    if "_orig_mod" in parts:
        if getattr(model.dynamo_ctx, "fullgraph", False):
            raise UnsupportedError(
                f"{name} of {type(parts['_orig_mod']).__name__} was compiled with fullgraph=True, but {_REASON}"
            )
        return unwrap(parts["_orig_mod"])
    if "_fsdp_wrapped_module" in parts:
        return unwrap(parts["_fsdp_wrapped_module"])
    if isinstance(model, PreTrainedModel):
        return model
    if list(parts) == ["model"]:  # a PEFT tuner without its PeftModel
        return unwrap(parts["model"])
    if list(parts) == ["module"]:
        devices = getattr(model, "device_ids", None) or ()
        if isinstance(model, torch.nn.DataParallel) and len(devices) > 1:
            raise UnsupportedError(
                f"DataParallel runs copies of the model on devices {list(devices)} in threads, which steering cannot "
                "follow: use DistributedDataParallel, or steer and call its .module on one device"
            )
        return unwrap(parts["module"])
    if not hasattr(model, "get_base_model"):
        return model
    refuse_virtual_tokens(model)
    return unwrap(model.get_base_model())


def refuse_virtual_tokens(adapted: Any) -> None:
    """Raise `UnsupportedError` if a PEFT model's adapter is a learned prompt."""
    config: Any = getattr(adapted, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise UnsupportedError(
            f"{type(config).__name__} of {type(adapted).__name__} puts {config.num_virtual_tokens} virtual tokens "
            "before every prompt, so that no span and no first token is where the prompt has it: use an adapter that "
            "changes weights (LoRA), or steer and call get_base_model() without the adapter"
        )
