"""The random models that are measured, and copies of them that share their weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from steerlens.bench.settings import Settings

VOCABULARY = 1024


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama.

    Attributes:
        model_type: of its transformers config, where that is not the family's name.
        native: the attention that it runs unsteered.
        windowed: whether layers have a sliding window.
        grouped: whether query heads share key/value heads.
        extra: further entries of its config.
    """

    model_type: str | None = None
    native: str = "sdpa"
    windowed: bool = False
    grouped: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(),
        "qwen2": Family(),
        "qwen3": Family(),
        "mistral": Family(windowed=True),
        # transformers' SDPA leaves the soft cap out, and has no place for learned sinks.
        "gemma2": Family(native="eager", windowed=True),
        "gemma3": Family("gemma3_text", windowed=True),
        "gpt2": Family(grouped=False),
        "gpt_oss": Family(
            native="eager",
            windowed=True,
            extra={
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
            },
        ),
        "deepseek_v3": Family(grouped=False, extra={"n_group": 1, "topk_group": 1, "q_lora_rank": None}),
    }
)


def build(
    settings: Settings,
    head_dim: int,
    device: str,
    *,
    layers: int,
    positions: int,
    mlp: float,
    dtype: str,
    family: str = "llama",
    window: int | None = None,
    sharpen: float = 1.0,
) -> Any:
    """A model of this family and shape with random weights, on the attention that it runs natively.

    Args:
        settings: has the heads, the window and the seed.
        head_dim: channels per head.
        device: where the weights live.
        layers: number of layers.
        positions: longest sequence.
        mlp: width of the feed-forward part over the hidden size.
        dtype: of the weights.
        family: among `FAMILIES`.
        window: keys that a windowed layer sees; by default the settings'.
        sharpen: factor on the query and key projections; above 1 attention is far from uniform.
    """
    config = _config(settings, family, head_dim, layers, positions, mlp, window or settings.window)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=FAMILIES[family].native)
        model = model.eval().to(getattr(torch, dtype))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_norm", "k_norm")):
                weight.add_(sharpen - 1)  # a norm undoes a factor before it, and may count its weights from 0 or 1
            elif name.endswith("weight") and any(part in name for part in ("q_proj", "k_proj", "kv_b_proj", "c_attn")):
                weight.mul_(sharpen)
    return model.requires_grad_(False)


def _config(
    settings: Settings, family: str, head_dim: int, layers: int, positions: int, mlp: float, window: int
) -> Any:
    kind, hidden = FAMILIES[family], settings.heads * head_dim
    if family == "gpt2":
        shape: dict[str, Any] = {
            "n_embd": hidden,
            "n_inner": round(mlp * hidden),
            "n_layer": layers,
            "n_head": settings.heads,
            "n_positions": positions,
        }
    else:
        shape = {
            "hidden_size": hidden,
            "intermediate_size": round(mlp * hidden),
            "head_dim": head_dim,
            "num_hidden_layers": layers,
            "num_attention_heads": settings.heads,
            "num_key_value_heads": settings.kv_heads if kind.grouped else settings.heads,
            "max_position_embeddings": positions,
        }
    if kind.windowed:
        shape["sliding_window"] = window
    if family == "gemma3":
        # Its own pattern, one full layer in six, would leave a small model none.
        shape["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    if family.startswith("gemma"):
        shape["query_pre_attn_scalar"] = head_dim
    if family == "deepseek_v3":
        # As in the model itself: a third of q and k is rotated, and v is as wide as the rest. All layers dense.
        del shape["head_dim"]
        shape |= {
            "qk_nope_head_dim": head_dim,
            "qk_rope_head_dim": head_dim // 2,
            "v_head_dim": head_dim,
            "kv_lora_rank": 4 * head_dim,
            "first_k_dense_replace": layers,
        }
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    entries = {"vocab_size": VOCABULARY, **tokens, **shape, **kind.extra}
    return AutoConfig.for_model(kind.model_type or family, **entries)


def share(model: Any, attention: str | None = None) -> Any:
    """A second model on the same weights, so that one can be steered while the other stays as it is."""
    memo = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, memo)
    twin.set_attn_implementation(attention or model.config._attn_implementation)
    return twin


def tokens(batch: int, length: int, seed: int, device: str) -> torch.Tensor:
    """Random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator).to(device)


def mask(pads: list[int], length: int, device: str) -> torch.Tensor | None:
    """The attention mask of a left-padded batch, int64 [batch, length]; `None` without pads."""
    if not any(pads):
        return None
    return (torch.arange(length, device=device) >= torch.tensor(pads, device=device)[:, None]).long()
