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
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 12}
FAMILIES = {
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    "llama-gqa": ("llama", {"num_key_value_heads": 2}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention", "full_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, "head_dim": 8} | WINDOW),
    "mixtral": ("mixtral", {"num_key_value_heads": 2} | MOE | WINDOW),
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
    "gemma3": (
        "gemma3_text",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
        | WINDOW,
    ),
    "phi3": ("phi3", {"num_key_value_heads": 2, "sliding_window": 12}),
    "olmo2": ("olmo2", {"num_key_value_heads": 4}),
    "granite": ("granite", {"num_key_value_heads": 2, "attention_multiplier": 0.2, "logits_scaling": 2.0}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 256}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
        | MOE
        | WINDOW,
    ),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 8,
            "kv_lora_rank": 32,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "cohere2": (
        "cohere2",
        {"num_key_value_heads": 4, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
        | WINDOW,
    ),
    "smollm3": ("smollm3", {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1]}),
    "llama4": (
        "llama4_text",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": 12,
            "no_rope_layers": [1, 0, 1],
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
        },
    ),
}

WINDOWED = {
    **{family: {"num_hidden_layers": 1} for family in ("mistral", "mixtral", "phi3")},
    **{
        family: {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
        for family in ("gemma2", "gemma3", "gpt_oss", "cohere2")
    },
    "llama4": {"num_hidden_layers": 1, "no_rope_layers": [1]},
}
"""What makes a model of one layer whose rows see 12 keys at most."""

NO_SDPA = ("gemma2", "gpt_oss")
"""transformers has no sdpa for soft-capped logits and learned sinks."""


def build(family: str, native: str = "sdpa", dtype: torch.dtype = torch.float32, **overrides):
    """A model whose attention is far from uniform: large query weights."""
    model_type, extra = FAMILIES[family]
    base = {k: v for k, v in SMALL.items() if model_type != "gpt2" or "token" in k or k == "vocab_size"}
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **(base | extra | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=native, dtype=dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "c_attn", "qkv_proj", "query_key_value", "q_b_proj")):
                weight.mul_(6 if name.count("c_attn") + name.count("q_b") == 0 else 4)
            elif name.endswith("sinks"):
                weight.normal_()
            elif weight.ndim > 1:
                weight.mul_(3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
