"""Tiny random models of the supported families, built from configs: no network."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    "llama-gqa": ("llama", {"num_key_value_heads": 2}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 12, "head_dim": 8}),
    "gemma2": (
        "gemma2",
        {
            "num_key_value_heads": 4,
            "sliding_window": 12,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 256}),
}


def build(family: str, native: str = "sdpa", dtype: torch.dtype = torch.float32, **overrides):
    """A model whose attention is far from uniform: large query weights."""
    model_type, extra = FAMILIES[family]
    base = {k: v for k, v in SMALL.items() if model_type != "gpt2" or "token" in k or k == "vocab_size"}
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **(base | extra | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=native, dtype=dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "c_attn")):
                weight.mul_(6 if "c_attn" not in name else 4)
            elif weight.ndim > 1:
                weight.mul_(3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
