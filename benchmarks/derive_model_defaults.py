"""Derive ``data/model_defaults.json``: what transformers' configuration classes say by default.

A ``config.json`` leaves out what its class has by default, and each class names its fields its own
way. Run with the transformers version to take the defaults from; the file names it::

    python benchmarks/derive_model_defaults.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

OUTPUT = Path(__file__).parents[1] / "samullm_plugin" / "data" / "model_defaults.json"

READ = re.compile(
    r"^(vocab_size.*|padded_vocab_size|hidden_size.*|n_embe?d|d_model|num_hidden_layers|n_layers?|"
    r"num_layers|num_attention_heads|n_heads?|num_key_value_heads|num_kv_heads|n_head_kv|kv_n_heads|"
    r"head_dim|attention_head_dim|kv_channels|.*intermediate_size.*|n_inner|ffn_dim|ffn_hidden_size|"
    r"expert_ffn_hidden_size|dense_intermediate_size|block_.*|expansion_ratio|mlp_ratio|depth|"
    r"embed_dim|.*lora_rank|qk_.*head_dim|v_head_dim|index_.*|.*experts?|.*experts_per_tok.*|"
    r"moe_.*|first_k_dense_replace|num_dense_layers|decoder_sparse_step|interleave_moe_layer_step|"
    r"expert_layer_.*|attn_layer_.*|mlp_only_layers|sliding_window.*|use_sliding_window|"
    r"max_window_layers|attention_chunk_size|no_rope_layer.*|max_position_embeddings|n_positions|"
    r"n_ctx|max_seq_len|seq_length|max_seq_length|model_max_length|max_target_positions|"
    r"tie_word_embeddings|multi_query|new_decoder_architecture|word_embed_proj_dim|"
    r"learned_pos_emb|mamba_.*|ssm_state_size|state_size|conv_kernel|expand|n_groups|num_heads|"
    r"time_step_rank|conv_L_cache|linear_.*|global_attn_every_n_layers|gating|patch_size|"
    r"num_channels|in_channels|image_size|temporal_patch_size|spatial_merge_size|out_hidden_size|"
    r"num_kv_shared_layers|global_head_dim|num_global_key_value_heads|attention_k_eq_v|"
    r"hidden_size_per_layer_input|vocab_size_per_layer_input|laurel_rank|altup_num_inputs|"
    r"enable_moe_block|use_double_wide_mlp|adapter_rank|num_mem_blocks|"
    r"use_shared_attention_adapter|use_mem_rope|n_mamba_heads|use_post_norm|layer_types|"
    r"full_attention_interval|shared_expert.*|share_expert_dim|n_shared_experts|zero_expert_num|"
    r"use_bias|use_qkv_bias|bias|attention_bias|mlp_bias|use_conv_bias|is_moe|"
    r"add_swa_attention_sink_bias|swa_.*|projector_.*|text_hidden_size|downsample_.*|scale_factor|"
    r"depths|deepstack_visual_indexes|num_global_layers|vision_output_dim|projection_dim)$"
)
SECTIONS = ("text_config", "vision_config", "attn_config", "ffn_config", "llm_config")


def main() -> None:
    """Write the file."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kinds = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    found: dict[str, dict[str, Any]] = {}
    for kind in sorted(kinds):
        cls = CONFIG_MAPPING[kind]
        try:
            config = json.loads(cls().to_json_string(use_diff=False))
        except Exception as error:  # classes without a default
            print(f"{kind}: {type(error).__name__}: {error}")
            continue
        _drop_computed(cls, config)
        _add(found, kind, config, dict(getattr(cls, "attribute_map", {})))
    text = json.dumps(
        {
            "source": f"configuration classes of transformers {transformers.__version__}",
            "families": found,
        },
        sort_keys=True,
    )
    text = text.replace('}, "', '},\n"')
    OUTPUT.write_text(text + "\n", encoding="utf-8")
    print(f"{len(found)} families, {OUTPUT.stat().st_size:,} bytes")


def _drop_computed(cls: type, config: dict[str, Any]) -> None:
    """Drop, in place, what a class computes from its other fields: the reader does so itself."""
    for canonical in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        name = getattr(cls, "attribute_map", {}).get(canonical, canonical)
        if not isinstance(config.get(name), int):
            continue
        try:
            changed = json.loads(cls(**{name: 2 * config[name]}).to_json_string(use_diff=False))
        except Exception as error:  # not every size is allowed
            print(f"{cls.__name__}: {name} doubled: {type(error).__name__}")
            continue
        for key, value in changed.items():
            if key != name and key in config and value != config[key]:
                del config[key]


def _add(
    found: dict[str, dict[str, Any]], kind: str, config: Mapping[str, Any], aliases: dict[str, str]
) -> None:
    """Keep what is read of one class, and of the classes of its sections."""
    entry: dict[str, Any] = {
        k: v
        for k, v in config.items()
        if READ.match(k) and _plain(v) and not (isinstance(v, list) and len(v) > 8)
    }
    entry.pop("layer_types", None)
    for section in SECTIONS:
        part = config.get(section)
        if isinstance(part, dict):
            name = part.get("model_type") or f"{kind}.{section}"
            entry[section] = {"model_type": name}
            if name not in found:
                own_class = next((c for n, c in CONFIG_MAPPING.items() if n == name), None)
                whole = part
                if own_class is not None:
                    try:
                        whole = json.loads(own_class().to_json_string(use_diff=False))
                        _drop_computed(own_class, whole)
                    except Exception as error:  # some classes have no default
                        print(f"{name}: {type(error).__name__}")
                _add(found, name, whole, {})
            if name in found:
                own = {k: v for k, v in part.items() if k in found[name] and _plain(v)}
                entry[section] |= {k: v for k, v in own.items() if found[name][k] != v}
    if aliases:
        entry["aliases"] = aliases
    found[kind] = entry


def _plain(value: object) -> bool:
    """Return whether a value is a number, a flag, nothing or a short list of numbers."""
    if isinstance(value, list):
        return all(isinstance(v, int) for v in value)
    return value is None or isinstance(value, bool | int | float)


if __name__ == "__main__":
    main()
