"""What steering needs to know of a model: its attention layers and their heads. The only reader of model configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    "deepseek_v4": "attends to compressed keys that stand for several tokens each, so that spans name no keys",
    "hrm_text": "runs each attention layer several times per forward, for other purposes each",
    "blt": "attends over bytes and patches, not along one axis of tokens",
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
        keys_of: the layer whose keys each layer attends to, where some layers share those of an earlier one.
    """

    name: str
    family: str
    layers: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    kinds: tuple[str, ...] = ()
    keys_of: Mapping[int, int] = field(default_factory=dict)

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


def read(config: Any, attention: Mapping[int, int | None] | None = None) -> ModelFacts:
    """Facts of a transformers config, or of its text part.

    Args:
        config: of the model.
        attention: layers that have attention, with their query heads where these are known; `None` for all layers.

    Raises:
        UnsupportedError: for a family that cannot be steered.
    """
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise refuse(f"{config.model_type} with cross-attention", "cannot be steered; only decoder-only models can")
    text = config.get_text_config(decoder=True)
    family = text.model_type
    if family in REFUSED:
        raise refuse(f"model family {family!r}", REFUSED[family])
    # "vision": image tokens alone see later ones, as their mask says.
    if getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise refuse(f"{family} with bidirectional attention", "cannot be steered; only causal models can")
    layers, heads = getattr(text, "num_hidden_layers", None), getattr(text, "num_attention_heads", None)
    if not isinstance(layers, int) or not isinstance(heads, int):
        raise refuse(f"model family {family!r}", f"has num_hidden_layers={layers}, num_attention_heads={heads}")
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    own = getattr(text, "num_attention_heads_per_layer", None) or [heads] * layers
    given = dict.fromkeys(range(layers)) if attention is None else attention
    kinds = tuple(getattr(text, "layer_types", None) or ())
    return ModelFacts(
        getattr(config, "_name_or_path", "") or family,
        family,
        layers,
        tuple(given[layer] or own[layer] if layer in given else 0 for layer in range(layers)),
        tuple(kv_heads if layer in given else 0 for layer in range(layers)),
        kinds,
        _shared(kinds, layers - (getattr(text, "num_kv_shared_layers", None) or 0)),
    )


def _shared(kinds: tuple[str, ...], first: int) -> dict[int, int]:
    """From layer `first` on, each layer attends to the keys of the last earlier layer of its kind."""
    sources = {kind: layer for layer, kind in enumerate(kinds[:first])}
    return {layer: sources[kind] for layer, kind in enumerate(kinds) if layer >= first and kind in sources}
