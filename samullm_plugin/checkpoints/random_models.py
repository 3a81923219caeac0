"""Model folders without weights: engines that fill them with random numbers run at full cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from samullm_plugin.checkpoints.models import short_name, sizes_of
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.architecture import ModelArchitecture


def random_model(model: ModelSpec, folder: Path) -> ModelSpec:
    """Write a ``config.json`` of a model's sizes; return the model to be loaded from there.

    The stand-in is of the most common kind of these sizes (Llama, Mixtral with experts, OPT without
    gated MLPs); engines fill its weights with random numbers (vLLM's ``load_format: dummy``).

    Args:
        model: the model; its own weights are not looked for.
        folder: a folder named after the model is made in it.

    Raises:
        InputError: if its sizes are not known, or no such kind has them.
    """
    architecture = sizes_of(model)
    path = folder / short_name(model.name)
    path.mkdir(parents=True, exist_ok=True)
    config = _config(model, architecture)
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    engine = model.engine
    extra = tuple((k, v) for k, v in engine.extra if k != "load_format")
    engine = replace(engine, extra=(*extra, ("load_format", "dummy")))
    return replace(model, architecture=architecture, path=str(path), engine=engine)


def _config(model: ModelSpec, sizes: ModelArchitecture) -> Mapping[str, Any]:
    """Return what Hugging Face's library reads."""
    common = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": sizes.hidden_size,
        "max_position_embeddings": model.max_model_len,
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16" if model.engine.dtype == "auto" else model.engine.dtype,
        "vocab_size": sizes.vocab_size,
    }
    if sizes.mlp == "plain":
        if sizes.num_experts or sizes.num_kv_heads != sizes.num_heads:
            raise InputError(
                f"model {model.name}: there is no stand-in with plain MLPs and "
                f"{'experts' if sizes.num_experts else 'fewer key-value than query heads'}"
            )
        return common | {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "do_layer_norm_before": True,
            "ffn_dim": sizes.intermediate_size,
            "word_embed_proj_dim": sizes.hidden_size,
        }
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if sizes.num_experts:
        kind = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        common |= {
            "num_experts_per_tok": sizes.num_active_experts,
            "num_local_experts": sizes.num_experts,
        }
    return common | kind | {
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.intermediate_size,
        "num_key_value_heads": sizes.num_kv_heads,
        "rms_norm_eps": 1e-6,
    }  # fmt: skip
