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
