"""The text decoder inside a model, and its attention modules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from steerlens import facts
from steerlens.errors import UnsupportedError
from steerlens.facts import ModelFacts


def find(model: Any) -> torch.nn.Module:
    """The module that steering hooks into: the decoder, of a vision-language model its text tower.

    Raises:
        UnsupportedError: if this is no transformers model, or one that cannot be steered.
    """
    base = getattr(model, "base_model", None)
    config = getattr(model, "config", None)
    if not isinstance(base, torch.nn.Module) or not hasattr(config, "get_text_config"):
        raise UnsupportedError(f"{type(model).__name__} is not a transformers model")
    facts.read(config)
    found = model.get_decoder() if hasattr(model, "get_decoder") else base
    return found if isinstance(found, PreTrainedModel) else base


def read(base: torch.nn.Module) -> tuple[ModelFacts, dict[int, torch.nn.Module]]:
    """Facts of a decoder and its attention module per layer; layers without attention are absent.

    Raises:
        UnsupportedError: if it cannot be steered: by name, or since its attention is out of reach.
    """
    known = facts.read(base.config)
    modules = _attention_modules(base, known)
    heads = {layer: getattr(module, "num_heads", None) for layer, module in modules.items()}
    return facts.read(base.config, heads), modules


def layers(base: torch.nn.Module, wanted: Iterable[int], fix: str) -> dict[int, torch.nn.Module]:
    """The decoder layer around the attention module of each wanted layer: an element of the decoder's `ModuleList`.

    Args:
        base: the decoder.
        wanted: layers with attention.
        fix: what the user can do where there is none.

    Raises:
        UnsupportedError: if there is none.
    """
    modules = read(base)[1]
    found: dict[int, torch.nn.Module] = {}
    for element in (part for stack in base.modules() if isinstance(stack, torch.nn.ModuleList) for part in stack):
        inside = {id(module) for module in element.modules()} - {id(element)}
        for layer in wanted:
            if id(modules[layer]) in inside:
                found.setdefault(layer, element)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise UnsupportedError(
            f"layers {missing} of {type(base).__name__} have their attention in no decoder layer of a ModuleList, so "
            f"that their hidden states are out of reach: {fix}"
        )
    return found


def _attention_modules(base: torch.nn.Module, known: ModelFacts) -> dict[int, torch.nn.Module]:
    found: dict[int, torch.nn.Module] = {}
    for module in base.modules():
        layer = getattr(module, "layer_idx", None)
        kind: Any = type(module)
        if not isinstance(layer, int) or not uses_interface(kind):
            continue
        if getattr(module, "is_causal", True) is False:
            raise facts.refuse(
                f"model family {known.family!r}",
                f"has attention that is not causal (layer {layer}: {kind.__name__}, is_causal=False)",
            )
        if found.setdefault(layer, module) is not module:
            raise UnsupportedError(
                f"layer {layer} of {known.name} has two attention modules, {type(found[layer]).__name__} and "
                f"{type(module).__name__}; which one to steer is not known"
            )
    if not found:
        raise facts.refuse(
            f"model family {known.family!r}",
            "has no attention module that calls transformers' attention interface: its weights are out of reach",
        )
    return found


@functools.cache
def uses_interface(module_type: Any) -> bool:
    """Whether a module class, by its source, calls transformers' attention interface."""
    for kind in module_type.__mro__:
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):
            continue
        if "ALL_ATTENTION_FUNCTIONS" in source:
            return True
    return False
