"""Head dropout for training: a dropped head puts out the running mean of V, as head ablation does later.

It teaches the model to get along without any one head of a layer, so that ablating random heads costs little,
while the layer that is spared keeps the look-up to itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

if TYPE_CHECKING:
    from steerlens.evals.world.train import Settings

_NAME = "steerlens_headdrop"


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    dropped = getattr(module, "dropped_heads", None)
    if dropped is None:
        return out, None
    # out [B, T, H, D]; value [B, G, T, D]; dropped [B, 1, H, 1].
    count = torch.arange(1, value.shape[2] + 1, device=value.device, dtype=value.dtype)
    mean = value.cumsum(2) / count[:, None]
    mean = mean.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)
    return torch.where(dropped, mean, out), None


def install(model: LlamaForCausalLM) -> None:
    """Route the model's attention through the function that can drop heads."""
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(_NAME)


def draw(model: LlamaForCausalLM, settings: Settings, step: int, rows: int) -> None:
    """Choose the heads that each of `rows` documents loses; a function of (seed, step).

    A third of the documents loses none; layer `settings.drop_spare` (-1: no layer) never loses any.
    """
    if not settings.drop:
        return
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    shape = (settings.layers, rows, 1, settings.heads, 1)
    dropped = torch.rand(shape, generator=generator) < settings.drop
    dropped &= torch.rand((1, rows, 1, 1, 1), generator=generator) > 1 / 3
    for index, layer in enumerate(model.model.layers):
        spared = index == settings.drop_spare
        layer.self_attn.dropped_heads = None if spared else dropped[index].to(model.device)


def clear(model: LlamaForCausalLM) -> None:
    """Drop nothing from now on."""
    for layer in model.model.layers:
        layer.self_attn.dropped_heads = None
