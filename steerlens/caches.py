"""What transformers calls a cache: the argument `past_key_values` until 5.23, `cache` from 5.24 on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput

from steerlens.errors import UnsupportedError

OLD = "past_key_values"
NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else OLD


def find(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments or the outputs of a forward, under either name.

    Raises:
        UnsupportedError: if it is no transformers `Cache`.
    """
    # an output warns when it is asked for the old name
    names = (NAME,) if isinstance(arguments, ModelOutput) else (NAME, OLD)
    cache = next((arguments[name] for name in names if arguments.get(name) is not None), None)
    if cache is not None and not isinstance(cache, Cache):
        raise UnsupportedError(f"{NAME} is a {type(cache).__name__}; steering needs a transformers Cache")
    return cache


def refuse_foreign(cache: Cache | None) -> None:
    """Raise `UnsupportedError` for a cache whose layers may not hold every token where the text has it.

    transformers' own layers hold all tokens, or the last ones of a window. One that drops others, or gives the rest new
    positions, announces as many keys as it has, and nothing else would tell that they are other tokens' keys.
    """
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    if (made := getattr(cache, "layer_class_to_replicate", None)) is not None:
        kinds.add(getattr(made, "func", made))
    for kind in kinds:
        if not kind.__module__.startswith("transformers."):
            raise UnsupportedError(
                f"{NAME} has layers of {kind.__module__}.{kind.__qualname__}: whether they hold every token where the "
                "text has it, as steering counts, is known of transformers' own alone; give one of these, or none"
            )
