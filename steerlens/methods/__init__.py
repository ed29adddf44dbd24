"""Steering methods, one file a paper. A new method is one file here, one recipe and one test.

Outside packages register theirs through the entry-point group `steerlens.methods`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from steerlens.errors import MethodError, nearest
from steerlens.methods.base import DecodingMethod, EditMethod, Method, PerRow, PromptMethod

if TYPE_CHECKING:
    from steerlens.methods.act import ACT
    from steerlens.methods.adaseka import AdaSEKA
    from steerlens.methods.anchor_reweighting import AnchorReweighting
    from steerlens.methods.attention_buckets import AttentionBuckets
    from steerlens.methods.attention_influence import AttentionInfluence
    from steerlens.methods.attention_sorting import AttentionSorting
    from steerlens.methods.context_awareness import ContextAwareness
    from steerlens.methods.decore import DeCoRe
    from steerlens.methods.focus_directions import FocusDirections
    from steerlens.methods.focusicl import FocusICL
    from steerlens.methods.found_in_the_middle import FoundInTheMiddle
    from steerlens.methods.guide import GUIDE
    from steerlens.methods.headmask import HeadMask
    from steerlens.methods.instaboost import InstABoost
    from steerlens.methods.iti import ITI
    from steerlens.methods.knockout import Knockout
    from steerlens.methods.lookback_lens import LookbackLens
    from steerlens.methods.massive_activations import MassiveActivations
    from steerlens.methods.nl_iti import NLITI
    from steerlens.methods.pai import PAI
    from steerlens.methods.pasta import PASTA
    from steerlens.methods.plausibility_gate import PlausibilityGate
    from steerlens.methods.positional_scaling import PositionalScaling
    from steerlens.methods.seka import SEKA
    from steerlens.methods.selective_context import SelectiveContext
    from steerlens.methods.spa import SPA
    from steerlens.methods.spotlight import SpotLight
    from steerlens.methods.var import VAR
    from steerlens.methods.zerotuning import ZeroTuning

__all__ = [
    "ACT",
    "GUIDE",
    "ITI",
    "NLITI",
    "PAI",
    "PASTA",
    "SEKA",
    "SPA",
    "VAR",
    "AdaSEKA",
    "AnchorReweighting",
    "AttentionBuckets",
    "AttentionInfluence",
    "AttentionSorting",
    "ContextAwareness",
    "DeCoRe",
    "DecodingMethod",
    "EditMethod",
    "FocusDirections",
    "FocusICL",
    "FoundInTheMiddle",
    "HeadMask",
    "InstABoost",
    "Knockout",
    "LookbackLens",
    "MassiveActivations",
    "Method",
    "PerRow",
    "PlausibilityGate",
    "PositionalScaling",
    "PromptMethod",
    "SelectiveContext",
    "SpotLight",
    "ZeroTuning",
    "from_dict",
    "get",
    "names",
]


@cache
def _registry() -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    candidates = [value for module in modules for value in vars(module).values()]
    candidates += [entry.load() for entry in entry_points(group="steerlens.methods")]
    for value in candidates:
        if not (isinstance(value, type) and issubclass(value, Method)) or value is PerRow or "name" not in vars(value):
            continue
        if found.setdefault(value.name, value) is not value:
            raise MethodError(
                f"two methods are called {value.name!r}: {found[value.name].__module__}, {value.__module__}"
            )
    return dict(sorted(found.items()))


def names() -> list[str]:
    """The names of all methods."""
    return list(_registry())


def get(name: str) -> type[Method]:
    """The method class of that name; raises `MethodError` with the nearest names."""
    try:
        return _registry()[name]
    except KeyError:
        raise MethodError(f"unknown method {name!r}; known: {', '.join(names())}{nearest(name, names())}") from None


def from_dict(description: Mapping[str, Any]) -> Method:
    """The method that `to_dict` described: `{"method": name, parameter: value, …}`."""
    parameters = dict(description)
    name = parameters.pop("method", None)
    if not isinstance(name, str):
        raise MethodError(f"{dict(description)!r} has no 'method': name it, one of {', '.join(names())}")
    if name == PerRow.name:
        rows = parameters.get("methods", ())
        return PerRow(tuple(row and from_dict(row) for row in rows))  # type: ignore[misc]
    return get(name).from_parameters(parameters)


def __getattr__(name: str) -> Any:
    for cls in _registry().values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
