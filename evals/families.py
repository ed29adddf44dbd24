"""Tiny random models of every causal LM family that transformers has, built from configs: no network, a second each."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from steerlens.evals.family_sizes import INDICES, LISTS, SIZES, SPECIAL, UNBUILT, VISION, WHEN_NONE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

LAYERS = 3


def families() -> list[str]:
    """Every `model_type` that `AutoModelForCausalLM` builds in the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def vision() -> list[str]:
    """Vision-language `model_type`s that only `AutoModelForImageTextToText` builds; some, not all."""
    return [family for family in VISION if family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]


def tiny(family: str, native: str | None = None, **overrides: Any) -> PreTrainedModel:
    """A tiny model of a family, fp32, in eval mode, whose attention is far from uniform.

    Args:
        family: a `model_type` of `families()` or `vision()`.
        native: the attention implementation; None lets transformers choose.
        overrides: attributes of the (text) config that replace the small ones.

    Raises:
        ValueError: for a family that cannot be built alone.
    """
    if family in UNBUILT:
        raise ValueError(f"{family} cannot be built alone: {UNBUILT[family]}")
    torch.manual_seed(7)
    config = small_config(family, **overrides)
    auto = AutoModelForCausalLM if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    model = auto.from_config(config, attn_implementation=native, dtype=torch.float32).eval()
    sharpen(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def sharpen(model: torch.nn.Module) -> None:
    """Enlarge the query and key weights, so that attention is far from uniform, and the others somewhat."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith((".temp", ".sinks")):
                weight.normal_(2)
            if weight.ndim < 2 or "norm" in name:
                continue
            fused = ("c_attn", "qkv", "query_key_value", "Wqkv")
            if any(part in name for part in fused):
                weight.mul_(4)
            elif any(part in name for part in ("q_proj", "k_proj", "query", "key", "q_a_proj", "kv_a_proj")):
                weight.mul_(6)
            elif weight.ndim == 2 and "conv" not in name and "A_log" not in name:
                weight.mul_(2)


def small_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The family's config with everything that makes it big made small."""
    return AutoConfig.for_model(family, **_shrink(CONFIG_MAPPING[family], family, overrides))


def _shrink(kind: type[PreTrainedConfig], family: str, overrides: dict[str, Any]) -> dict[str, Any]:
    special = dict(SPECIAL.get(family, {}))
    known = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    default: Any = kind(**special.pop("default", {}))
    values = vars(default)
    parts = {name: part for name, part in values.items() if isinstance(part, PreTrainedConfig)}
    text = next((name for name in ("text_config", "decoder", "llm_config") if name in parts), None)
    small: dict[str, Any] = {}
    token = 3
    for name, value in values.items():
        if name.startswith("_") or name in parts:
            continue
        if name in SIZES and (value is not None or name in WHEN_NONE):
            small[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and name not in SIZES:
            small[name], token = token, token + 1
    if parts and text is None:
        small = {name: value for name, value in small.items() if name.endswith(("_token_id", "_token_index"))} | small
    if values.get("kv_lora_rank") and "num_key_value_heads" in small:  # latent attention has keys for every head
        small["num_key_value_heads"] = small["num_attention_heads"]
        small["head_dim"] = SIZES["qk_rope_head_dim"]
    if "is_decoder" in values and not parts:
        small["is_decoder"] = True
    small |= _layers(values, small, known)
    for name, part in parts.items():
        own = overrides if name == text else {}
        small[name] = _shrink(type(part), f"{family}/{name}", own)
    small |= special
    return small if text else small | overrides


def _layers(values: dict[str, Any], small: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """One layer of each kind, in order, of every attribute that lists something per layer."""
    count = next((values[n] for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if values.get(n)), None)
    if not isinstance(count, int):
        return {}
    lists = {
        name: list(value)
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == count and count > 4 and name in (known | LISTS) - INDICES
    }
    kinds = list(zip(*lists.values(), strict=True)) if lists else [()] * count
    first = sorted({kinds.index(kind) for kind in kinds})[:6]
    rest = [i for i in range(count) if i not in first]
    chosen = sorted(first + rest[: max(LAYERS - len(first), 0)])
    found: dict[str, Any] = {name: [value[i] for i in chosen] for name, value in lists.items()}
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    return found | {name: len(chosen) for name in names if name in small}
