"""Sizes of published checkpoints, as their configurations give them, and what is known of each.

Parameters in billions and bytes of keys and values of one token over all layers at 16 bits: model
cards and the checkpoints' own files.
"""

from __future__ import annotations

from typing import Any

LLAMA = {"model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": False,
         "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
         "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
         "max_position_embeddings": 131072}  # fmt: skip
MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
FP8 = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
       "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float",
                                                 "strategy": "tensor"}}}}  # fmt: skip

PUBLISHED: dict[str, tuple[dict[str, Any], float, int]] = {
    "Llama-3.1-8B": (LLAMA, 8.03, 131072),
    "tied Llama-3.2-1B": (
        LLAMA | {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192,
                 "head_dim": 64, "tie_word_embeddings": True}, 1.236, 32768),
    "all defaults but sizes: gemma-3-27b with images": (
        {"model_type": "gemma3",
         "text_config": {"model_type": "gemma3_text", "head_dim": 128, "hidden_size": 5376,
                         "intermediate_size": 21504, "num_attention_heads": 32,
                         "num_hidden_layers": 62, "num_key_value_heads": 16,
                         "sliding_window": 1024},
         "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152,
                           "image_size": 896, "intermediate_size": 4304,
                           "num_attention_heads": 16, "num_hidden_layers": 27,
                           "patch_size": 14}}, 27.432, 507904),
    "experts and a shared one: Qwen1.5-MoE-A2.7B": (
        {"model_type": "qwen2_moe", "num_hidden_layers": 24, "hidden_size": 2048,
         "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408,
         "shared_expert_intermediate_size": 5632, "intermediate_size": 5632, "num_experts": 60,
         "num_experts_per_tok": 4, "vocab_size": 151936}, 14.316, 196608),
    "latent, dense first, null overrides a default: DeepSeek-V2-Lite": (
        {"model_type": "deepseek_v2", "num_hidden_layers": 27, "hidden_size": 2048,
         "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 10944,
         "vocab_size": 102400, "q_lora_rank": None, "n_routed_experts": 64, "n_shared_experts": 2,
         "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
         "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}} | MLA,
        15.706, 31104),
    "multi-query by a flag: Falcon-7B": (
        {"model_type": "falcon", "num_hidden_layers": 32, "hidden_size": 4544,
         "num_attention_heads": 71, "num_kv_heads": 71, "multi_query": True,
         "new_decoder_architecture": False, "vocab_size": 65024}, 6.922, 8192),
    "attention in 4 of 32 layers: Jamba": (
        {"model_type": "jamba", "num_hidden_layers": 32, "hidden_size": 4096,
         "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
         "vocab_size": 65536, "num_experts": 16, "num_experts_per_tok": 2,
         "attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2,
         "expert_layer_offset": 1, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
         "mamba_dt_rank": 256}, 51.57, 16384),
    "experts in every other layer: Llama-4-Maverick": (
        {"model_type": "llama4",
         "text_config": {"model_type": "llama4_text", "num_hidden_layers": 48,
                         "hidden_size": 5120, "num_attention_heads": 40,
                         "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192,
                         "intermediate_size_mlp": 16384, "vocab_size": 202048,
                         "num_local_experts": 128, "num_experts_per_tok": 1,
                         "interleave_moe_layer_step": 2, "attention_chunk_size": 8192}},
        400.71, 196608),
    "sizes nested in sections: DBRX": (
        {"model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40,
         "max_seq_len": 32768, "vocab_size": 100352,
         "attn_config": {"kv_n_heads": 8}, "tie_word_embeddings": False,
         "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}},
        131.6, 163840),
    "another spelling: BLOOM-7B1": (
        {"model_type": "bloom", "n_layer": 30, "n_embed": 4096, "num_attention_heads": 32,
         "vocab_size": 250880, "seq_length": 2048}, 7.069, 491520),
    "mamba, attention and MLPs apart: Nemotron-H-8B": (
        {"model_type": "nemotron_h", "hidden_size": 4096, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 21504,
         "vocab_size": 131072, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8,
         "ssm_state_size": 128, "conv_kernel": 4, "num_hidden_layers": 52,
         "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"},
        8.1, 16384),
}  # fmt: skip
