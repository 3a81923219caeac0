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
    "per-layer embeddings, keys and values of 15 layers shared, fixed towers: gemma-3n-E4B": (
        {"model_type": "gemma3n",
         "text_config": {"model_type": "gemma3n_text", "hidden_size": 2048,
                         "intermediate_size": [16384] * 35, "num_hidden_layers": 35,
                         "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
                         "num_kv_shared_layers": 15, "vocab_size": 262400}}, 7.85, 40960),
    "values that are keys, wide heads in every sixth layer: gemma-4-31B without images": (
        {"model_type": "gemma4_text", "hidden_size": 5376, "num_hidden_layers": 60,
         "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4,
         "global_head_dim": 512, "attention_k_eq_v": True, "intermediate_size": 21504,
         "sliding_window": 1024, "hidden_size_per_layer_input": 0}, 30.70, 901120),
    "a dense MLP beside 128 experts: gemma-4-26B-A4B without images": (
        {"model_type": "gemma4_text", "hidden_size": 2816, "num_hidden_layers": 30,
         "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
         "attention_k_eq_v": True, "intermediate_size": 2112, "moe_intermediate_size": 704,
         "num_experts": 128, "top_k_experts": 8, "enable_moe_block": True,
         "hidden_size_per_layer_input": 0}, 25.23, 225280),
    "lightning attention in seven of eight layers: MiniMax-Text-01": (
        {"model_type": "minimax_text_01", "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
         "head_dim": 128, "hidden_size": 6144, "intermediate_size": 9216,
         "num_attention_heads": 64, "num_experts_per_tok": 2, "num_hidden_layers": 80,
         "num_key_value_heads": 8, "num_local_experts": 32, "tie_word_embeddings": False,
         "vocab_size": 200064, "max_position_embeddings": 10240000}, 456.1, 40960),
    "gated delta nets and 512 experts: Qwen3-Next-80B-A3B": (
        {"model_type": "qwen3_next", "full_attention_interval": 4, "head_dim": 256,
         "hidden_size": 2048, "intermediate_size": 5120, "linear_num_key_heads": 16,
         "linear_num_value_heads": 32, "moe_intermediate_size": 512, "num_attention_heads": 16,
         "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48,
         "num_key_value_heads": 2, "shared_expert_intermediate_size": 512,
         "tie_word_embeddings": False, "vocab_size": 151936}, 79.67, 24576),
    "delta attention beside a latent: Kimi-Linear-48B-A3B": (
        {"model_type": "kimi_linear", "first_k_dense_replace": 1, "hidden_size": 2304,
         "intermediate_size": 9216, "moe_intermediate_size": 1024, "num_attention_heads": 32,
         "num_experts": 256, "num_experts_per_token": 8, "num_hidden_layers": 27,
         "num_shared_experts": 1, "tie_word_embeddings": False, "vocab_size": 163840,
         "linear_attn_config": {"full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128,
                                "num_heads": 32, "short_conv_kernel_size": 4}} | MLA,
        49.12, 8064),
    "mamba in 36 of 40 layers, experts and a shared one: Granite-4.0-H-Small": (
        {"model_type": "granitemoehybrid", "hidden_size": 4096, "intermediate_size": 768,
         "layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4,
         "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
         "mamba_n_heads": 128, "num_attention_heads": 32, "num_experts_per_tok": 10,
         "num_hidden_layers": 40, "num_key_value_heads": 8, "num_local_experts": 72,
         "shared_intermediate_size": 1536, "tie_word_embeddings": True, "vocab_size": 100352},
        32.2, 16384),
    "attention and mamba in one layer: Falcon-H1-7B": (
        {"model_type": "falcon_h1", "head_dim": 128, "hidden_size": 3072,
         "intermediate_size": 12288, "mamba_d_head": 128, "mamba_d_ssm": 3072,
         "mamba_d_state": 256, "mamba_n_groups": 1, "mamba_n_heads": 24,
         "num_attention_heads": 12, "num_hidden_layers": 44, "num_key_value_heads": 2,
         "tie_word_embeddings": False, "vocab_size": 130048}, 7.586, 45056),
    "the language model inside of another's file: InternVL3-8B": (
        {"model_type": "internvl_chat",
         "llm_config": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
                        "num_attention_heads": 28, "num_hidden_layers": 28,
                        "num_key_value_heads": 4, "vocab_size": 151674,
                        "tie_word_embeddings": False},
         "vision_config": {"model_type": "intern_vit_6b", "hidden_size": 1024, "image_size": 448,
                           "intermediate_size": 4096, "num_attention_heads": 16,
                           "num_hidden_layers": 24, "patch_size": 14}}, 7.944, 57344),
    "experts without a first dense layer, remote code: MiniMax-M2": (
        {"model_type": "minimax_m2", "auto_map": {"AutoConfig": "x.Y"}, "head_dim": 128,
         "hidden_size": 3072, "intermediate_size": 1536, "num_attention_heads": 48,
         "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8,
         "num_local_experts": 256, "shared_intermediate_size": 0, "tie_word_embeddings": False,
         "vocab_size": 200064}, 228.7, 253952),
    "full attention in 9 of 48 layers, wider in the others: MiMo-V2-Flash": (
        {"model_type": "mimo_v2_flash", "auto_map": {"AutoConfig": "x.Y"}, "hidden_size": 4096,
         "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 4,
         "intermediate_size": 16384, "vocab_size": 152576, "head_dim": 192, "v_head_dim": 128,
         "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8, "sliding_window": 128,
         "hybrid_layer_pattern": [0, *[0 if (i + 1) % 6 == 0 else 1 for i in range(1, 48)]],
         "moe_layer_freq": [0] + [1] * 47, "moe_intermediate_size": 2048,
         "n_routed_experts": 256, "n_shared_experts": None, "num_experts_per_tok": 8,
         "tie_word_embeddings": False}, 309.0, 222720),
    "a gated MLP between images and text: aya-vision-8b": (
        {"model_type": "aya_vision", "alignment_intermediate_size": 28672, "downsample_factor": 2,
         "text_config": {"model_type": "cohere2", "hidden_size": 4096, "num_hidden_layers": 32,
                         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                         "intermediate_size": 14336, "vocab_size": 256000,
                         "sliding_window": 4096},
         "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152,
                           "image_size": 364, "intermediate_size": 4304,
                           "num_attention_heads": 16, "num_hidden_layers": 27,
                           "patch_size": 14}}, 8.631, 131072),
    "sixteen patches at a time: SmolVLM-256M": (
        {"model_type": "smolvlm", "scale_factor": 4, "tie_word_embeddings": False,
         "text_config": LLAMA | {"num_hidden_layers": 30, "hidden_size": 576, "head_dim": 64,
                                 "num_attention_heads": 9, "num_key_value_heads": 3,
                                 "intermediate_size": 1536, "vocab_size": 49280},
         "vision_config": {"model_type": "smolvlm_vision", "hidden_size": 768,
                           "image_size": 512, "intermediate_size": 3072,
                           "num_attention_heads": 12, "num_hidden_layers": 12,
                           "patch_size": 16}}, 0.2565, 23040),
    "a projector of its own width: LFM2-VL-450M": (
        {"model_type": "lfm2_vl", "projector_hidden_size": 2560, "downsample_factor": 2,
         "text_config": {"model_type": "lfm2", "block_ff_dim": 6656, "hidden_size": 1024,
                         "full_attn_idxs": [2, 5, 8, 10, 12, 14], "num_attention_heads": 16,
                         "num_hidden_layers": 16, "num_key_value_heads": 8,
                         "vocab_size": 65536},
         "vision_config": {"model_type": "siglip2_vision_model", "hidden_size": 768,
                           "intermediate_size": 3072, "num_attention_heads": 12,
                           "num_hidden_layers": 12, "patch_size": 16}}, 0.4508, 12288),
}  # fmt: skip

WITH_TOWERS: dict[str, tuple[dict[str, Any], float, int, str]] = {
    "Voxtral-Mini-3B, which hears": (
        {"model_type": "voxtral", "architectures": ["VoxtralForConditionalGeneration"],
         "audio_config": {"model_type": "voxtral_encoder", "hidden_size": 1280,
                          "intermediate_size": 5120, "num_attention_heads": 20,
                          "num_hidden_layers": 32, "num_mel_bins": 128},
         "text_config": LLAMA | {"hidden_size": 3072, "num_hidden_layers": 30, "head_dim": 128,
                                 "intermediate_size": 8192, "vocab_size": 131072}},
        4.676, 122880, "audio_config of voxtral"),
    "GLM-4.1V-9B": (
        {"model_type": "glm4v", "tie_word_embeddings": False,
         "text_config": {"model_type": "glm4v_text", "hidden_size": 4096,
                         "intermediate_size": 13696, "num_attention_heads": 32,
                         "num_hidden_layers": 40, "num_key_value_heads": 2,
                         "vocab_size": 151552, "attention_bias": True},
         "vision_config": {"model_type": "glm4v", "depth": 24, "hidden_size": 1536,
                           "image_size": 336, "intermediate_size": 13696, "num_heads": 12,
                           "out_hidden_size": 4096, "patch_size": 14}},
        10.29, 40960, "vision tower of GLM-4V"),
    "Qwen2.5-Omni-7B, which writes and does not speak": (
        {"model_type": "qwen2_5_omni", "talker_config": {}, "token2wav_config": {},
         "thinker_config": {
             "audio_config": {"model_type": "qwen2_5_omni_audio_encoder", "d_model": 1280,
                              "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
                              "encoder_layers": 32, "num_mel_bins": 128, "output_dim": 3584},
             "text_config": {"model_type": "qwen2_5_omni_text", "hidden_size": 3584,
                             "intermediate_size": 18944, "num_attention_heads": 28,
                             "num_hidden_layers": 28, "num_key_value_heads": 4,
                             "vocab_size": 152064},
             "vision_config": {"model_type": "qwen2_5_omni_vision_encoder", "depth": 32,
                               "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                               "out_hidden_size": 3584, "patch_size": 14}}},
        8.93, 57344, "audio tower of Qwen2.5-Omni"),
}  # fmt: skip
"""Models whose towers transformers counts; the last entry is what is refused without it."""
