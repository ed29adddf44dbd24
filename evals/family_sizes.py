"""What makes the config of a family small: attribute names with small values, and the families that need their own."""

from __future__ import annotations

from typing import Any

_D = 64
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # width
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim"), _D),
    **dict.fromkeys(("lru_width", "word_embed_proj_dim", "out_hidden_size", "hidden_size_global"), _D),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dff", "dim_ff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "feed_forward_size", "mlp_dim"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 96),
    # depth
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_decoder_layers",), 3),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 3),  # what some decoders name num_hidden_layers
    **dict.fromkeys(("depth", "num_global_layers"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "mtp_num_hidden_layers"), 0),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "attention_heads", "n_heads"), 8),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 8),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "d_kv"), 8),
    "swa_num_attention_heads": 4,
    "swa_head_dim": 16,
    **dict.fromkeys(("attention_head_size", "rotary_dim", "query_pre_attn_scalar"), 8),
    # latent attention
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim",), 4),
    **dict.fromkeys(("qk_nope_head_dim",), 8),
    **dict.fromkeys(("qk_head_dim",), 12),
    **dict.fromkeys(("v_head_dim",), 6),
    **dict.fromkeys(("index_head_dim",), 8),
    **dict.fromkeys(("index_n_heads", "index_topk", "index_block_size"), 4),
    "index_topk_blocks": 2,
    # windows
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 12),
    **dict.fromkeys(("local_attention_window_len", "attention_chunk_size", "local_attention"), 12),
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 32),
    "zero_expert_num": 2,
    # recurrent layers
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    "mamba_d_ssm": 128,
    # positions
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 256),
    # per-layer and auxiliary embeddings
    **dict.fromkeys(("vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), 97),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8),
    "backbone_hidden_size": _D,
    # vision and audio towers
    **dict.fromkeys(("num_channels", "in_channels"), 3),
    "image_size": 28,
    "patch_size": 14,
    "num_blocks": 1,
}
LISTS = {"layers_block_type", "layer_types", "mlp_layer_types"}  # per layer
INDICES = {"moe_layers", "full_attn_idxs"}  # layer numbers
WHEN_NONE = {"num_key_value_heads", "head_dim", "num_experts_per_tok"}
_HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
_SHARED = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}
_BOTH = ["sliding_attention", "sliding_attention", "full_attention"]
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_DOTS3 = {
    "num_key_value_heads": 8,
    "head_dim": 12,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 10,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_HALF_MROPE = {
    "rope_parameters": _MROPE["rope_parameters"] | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
}
SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 97},
    "cohere_compass_text": {
        "layer_types": _MIXED,
        "rope_parameters": {"sliding_attention": _HALF_ROPE, "full_attention": _HALF_ROPE},
    },
    "bamba": {"attn_layer_indices": [1]},
    "dbrx/attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": 96,
    },
    "dots3_note_text": _DOTS3,
    "dots3_note/text_config": _DOTS3,
    "dots3_note/vision_config": {"adapter_in_dim": _D, "adapter_out_dim": _D, "per_layer_config": {}},
    "dots3_note/audio_config": {"adapter_input_size": _D, "adapter_out_dim": _D, "downsample_hidden_size": 16},
    "gemma4_assistant": {"default": {"text_config": _SHARED}, "backbone_hidden_size": _D},
    "gemma4_assistant/text_config": _SHARED | {"num_kv_shared_layers": 3, "global_head_dim": 16, "layer_types": _BOTH},
    "gemma4_unified_assistant/text_config": {"global_head_dim": 16, "num_kv_shared_layers": 3, "layer_types": _BOTH},
    "got_ocr2/vision_config": {"output_channels": 16},
    "gemma4_text": {
        "global_head_dim": 16,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "gemma4/text_config": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_unified/text_config": {"global_head_dim": 16},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    **dict.fromkeys(("qwen2_vl/text_config", "qwen2_5_vl/text_config", "paddleocr_vl/text_config"), _MROPE),
    **dict.fromkeys(("glm4v/text_config", "glm46v/text_config", "glm_ocr/text_config"), _MROPE),
    "glm4v_moe/text_config": _HALF_MROPE,
    "qwen2_vl/vision_config": {"embed_dim": 32, "hidden_size": _D, "num_heads": 4},
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "lfm2_vl": {"projector_hidden_size": 64},
    "qwen4_exp_text": _INDEXER | {"indexer_compress_ratio": 2},
    "qwen4_exp/text_config": _INDEXER | {"indexer_compress_ratio": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 48]},
    "roc_bert": {
        "shape_vocab_size": 97,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": 97,
        "pronunciation_embed_dim": 8,
    },
    "xlstm": {"num_heads": 4, "chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "use_mamba_kernels": False,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "dbrx/ffn_config": {"ffn_hidden_size": _D},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "gpt_bigcode": {"num_key_value_heads": None},
    "hrm_text": {"num_hidden_layers": 2},
    "jetmoe": {"num_attention_heads": 4, "kv_channels": 8},
    "laguna": {"num_attention_heads_per_layer": [8, 4, 8]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4/text_config": {"moe_layers": [1]},
    "llama4_text": {"moe_layers": [1]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "index_n_heads": 2,
    },
    "mllama/text_config": {"cross_attention_layers": [1]},
    "phi3": {"sliding_window": 12},
    "phimoe": {"sliding_window": 12},
    "starcoder2": {"sliding_window": 12},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
UNBUILT = {
    "dory": "no small config of it was found that runs with a cache, unsteered",
    "gemma3n": "its vision tower needs pillow and timm; its text model is gemma3n_text",
    "gemma4_assistant": "a draft model: every layer reads the keys of its target",
    "gemma4_unified_assistant": "a draft model: every layer reads the keys of its target",
    "musicgen": "its class takes the config of its decoder alone, which AutoModelForCausalLM does not",
    "musicgen_melody": "its class takes the config of its decoder alone, which AutoModelForCausalLM does not",
}
VISION = (
    "aria", "aya_vision", "cohere2_vision", "deepseek_vl", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "granite_docling",
    "idefics2", "idefics3", "internvl", "kimi_k25", "lfm2_vl", "lighton_ocr", "llava", "llava_next", "llava_next_video",
    "llava_onevision", "mistral3", "ovis2", "paddleocr_vl", "paligemma", "qianfan_ocr", "qwen2_5_vl", "qwen2_vl",
    "qwen3_vl", "qwen3_vl_moe", "smolvlm", "video_llama_3", "video_llava", "vipllava",
)  # fmt: skip
