"""Small models of every causal-LM class of transformers, built without memory for their weights.

Run as a program, so that no class of transformers stays in the process of the tests: writes one
JSON object, by ``model_type``: the configuration and the parameters, or why it cannot be built.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

SMALL = {
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 2000, "head_dim": 128,
    "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2,
    "q_lora_rank": 256, "kv_lora_rank": 128, "n_shared_experts": 1, "pad_token_id": 0,
}  # fmt: skip
FULL_SIZE = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next",
    "gemma", "gemma2", "gemma3_text", "phi", "phi3", "phimoe", "falcon", "gpt2", "gpt_neox",
    "gpt_oss", "gptj", "bloom", "opt", "mpt", "cohere", "cohere2", "deepseek_v2", "deepseek_v3",
    "dbrx", "jamba", "bamba", "falcon_h1", "mamba2", "zamba2", "granite", "granitemoehybrid",
    "glm4", "glm4_moe", "olmo2", "olmoe", "starcoder2", "stablelm", "nemotron", "llama4_text",
    "minimax", "kimi_linear", "lfm2", "exaone4", "ernie4_5_moe", "smollm3", "seed_oss", "apertus",
)  # fmt: skip


def build(cls: Any, transformers: Any, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration and the parameters of one model."""
    import torch

    aliases = getattr(cls, "attribute_map", {})
    config = cls()
    kept = {}
    for field, value in changes.items():
        own = aliases.get(field, field)
        if getattr(config, own, None) is not None:
            kept[own] = value
    config = cls(**kept)
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    model.tie_weights()
    return {
        "config": json.loads(config.to_json_string(use_diff=False)),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    """Write what was built."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES="")
    warnings.filterwarnings("ignore")
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    found: dict[str, Any] = {}
    for kind, names in sorted(NAMES.items()):
        name = names if isinstance(names, str) else names[0]
        for size, changes in (("small", SMALL), ("full", {})):
            if size == "full" and kind not in FULL_SIZE:
                continue
            try:
                entry = build(CONFIG_MAPPING[kind], transformers, name, changes)
            except Exception as error:  # many classes refuse one size or another
                entry = {"error": f"{type(error).__name__}: {error}"[:200]}
            found[f"{kind} {size}"] = entry
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
