"""What steering needs to know of a model: its attention layers and their heads. The only reader of model configs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from steerlens.errors import UnsupportedError

TESTED = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "mistral",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "opt",
    "deepseek_v3",
    "cohere2",
    "smollm3",
    "llama4_text",
)
"""`model_type`s that every invariant is tested on. Any other family passes a self-check when it is first steered."""
_OWN = "computes attention in its own code, not through transformers' attention interface: its weights are out of reach"
_NO_ATTENTION = "has no attention, so there is nothing to steer"
_SPARSE = "picks its keys with an index of its own (sparse attention), which would not follow the steering"
REFUSED = {
    **dict.fromkeys(("bloom", "mpt", "xglm", "falcon", "gptj", "gpt_neo", "codegen"), _OWN),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"), _NO_ATTENTION),
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text", "axk2", "hy_v4", "dots3_note", "dots3_note_text"), _SPARSE
    ),
}
"""`model_type`s that cannot be steered, and why."""


@dataclass(frozen=True)
class ModelFacts:
    """Plain facts that `plan` may use.

    Attributes:
        name: what error messages call the model.
        family: the `model_type` of the text decoder's config.
        layers: number of decoder layers.
        heads: query heads per layer; 0 where a layer has no attention.
        kv_heads: key/value heads per layer; 0 where a layer has no attention.
        kinds: what a layer is, such as `full_attention` or `linear_attention`; empty where the config says nothing.
    """

    name: str
    family: str
    layers: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    kinds: tuple[str, ...] = ()

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers that have attention."""
        return tuple(layer for layer, heads in enumerate(self.heads) if heads)


def refuse(what: str, why: str) -> UnsupportedError:
    """The error for a model that cannot be steered, with the way out."""
    return UnsupportedError(
        f"{what} {why}. Steer a model of another family: {', '.join(TESTED)} are tested, and every other family that "
        "uses transformers' attention interface is checked when it is first steered"
    )


def read(config: Any, attention: Collection[int] | None = None) -> ModelFacts:
    """Facts of a transformers config, or of its text part.

    Args:
        config: of the model.
        attention: layers that have attention; `None` for all.

    Raises:
        UnsupportedError: for a family that cannot be steered.
    """
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise refuse(f"{config.model_type} with cross-attention", "cannot be steered; only decoder-only models can")
    text = config.get_text_config(decoder=True)
    family = text.model_type
    if family in REFUSED:
        raise refuse(f"model family {family!r}", REFUSED[family])
    if getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", None):
        raise refuse(f"{family} with bidirectional attention", "cannot be steered; only causal models can")
    layers, heads = getattr(text, "num_hidden_layers", None), getattr(text, "num_attention_heads", None)
    if not isinstance(layers, int) or not isinstance(heads, int):
        raise refuse(f"model family {family!r}", f"has num_hidden_layers={layers}, num_attention_heads={heads}")
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    on = [attention is None or layer in attention for layer in range(layers)]
    label = getattr(config, "_name_or_path", "") or family
    return ModelFacts(
        label,
        family,
        layers,
        tuple(heads * here for here in on),
        tuple(kv_heads * here for here in on),
        tuple(getattr(text, "layer_types", None) or ()),
    )
