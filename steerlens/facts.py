"""What steering needs to know of a model: its attention layers and their heads. The only reader of model configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steerlens.errors import UnsupportedError

FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "gpt2")
"""`model_type`s that the invariants are tested on; every other one is refused. The one place to open the rest."""


@dataclass(frozen=True)
class ModelFacts:
    """Plain facts that `plan` may use.

    Attributes:
        name: what error messages call the model.
        family: the config's `model_type`.
        layers: number of decoder layers.
        heads: query heads per layer.
        kv_heads: key/value heads per layer.
    """

    name: str
    family: str
    layers: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]


def read(config: Any, name: str | None = None) -> ModelFacts:
    """Facts of a transformers config.

    Raises:
        UnsupportedError: for a family that steerlens does not steer yet.
    """
    family = getattr(config, "model_type", type(config).__name__)
    if family not in FAMILIES:
        raise UnsupportedError(
            f"model family {family!r} is not supported yet; supported: {', '.join(FAMILIES)}. "
            "Steering it unchecked could silently do nothing, so it is refused"
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedError(f"{family} with cross-attention cannot be steered; only decoder-only models can")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    label = name or getattr(config, "_name_or_path", "") or family
    return ModelFacts(label, family, layers, (heads,) * layers, (kv_heads,) * layers)
