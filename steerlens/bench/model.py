"""The random Llama that is measured, and copies of it that share its weights."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steerlens.bench.settings import Settings

VOCABULARY = 1024


def build(
    settings: Settings,
    head_dim: int,
    device: str,
    *,
    layers: int,
    positions: int,
    mlp: float,
    dtype: str,
    sharpen: float = 1.0,
) -> Any:
    """A Llama of this shape with random weights, on PyTorch's SDPA.

    Args:
        settings: has the heads and the seed.
        head_dim: channels per head.
        device: where the weights live.
        layers: number of layers.
        positions: longest sequence.
        mlp: width of the feed-forward part over the hidden size.
        dtype: of the weights.
        sharpen: factor on the query and key projections; above 1 attention is far from uniform.
    """
    hidden = settings.heads * head_dim
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=round(mlp * hidden),
        head_dim=head_dim,
        num_hidden_layers=layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=positions,
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(config).eval().to(getattr(torch, dtype))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(sharpen)
    return model.requires_grad_(False)


def share(model: Any, attention: str = "sdpa") -> Any:
    """A second model on the same weights, so that one can be steered while the other stays as it is."""
    memo = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, memo)
    twin.set_attn_implementation(attention)
    return twin


def tokens(batch: int, length: int, seed: int, device: str) -> torch.Tensor:
    """Random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator).to(device)
