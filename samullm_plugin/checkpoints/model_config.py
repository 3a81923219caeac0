"""Sizes of a model from its Hugging Face ``config.json``, without any download or import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from samullm_plugin.errors import InputError
from samullm_plugin.model.architecture import ModelArchitecture

_GATED = frozenset(
    {
        "baichuan", "chatglm", "cohere", "deepseek", "exaone", "gemma", "gemma2", "gemma3_text",
        "glm", "glm4", "granite", "internlm2", "llama", "mistral", "mixtral", "olmo", "olmo2",
        "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "stablelm", "starcoder2_gated", "yi",
    }
)  # fmt: skip
_PLAIN = frozenset(
    {"bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "gpt_neo", "mpt",
     "opt", "phi", "starcoder2"}
)  # fmt: skip
_NAMES: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
}
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float8_e4m3fn": 1.0, "int8": 1.0}


def read_model_config(path: Path, *, trust_remote_code: bool = False) -> ModelArchitecture:
    """Return the sizes that a ``config.json`` (or the folder holding it) gives.

    Args:
        path: the file or its folder.
        trust_remote_code: accept a model whose code comes with its files, taking its sizes by
            their usual names.

    Raises:
        InputError: if the file cannot be read, is of an unknown kind, needs the consent above, or
            lacks a size.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: cannot be read as a model's config.json: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: a model's config.json must be a JSON object")
    config = {**config, **config.get("text_config", {})}
    kind = str(config.get("model_type", ""))
    known = kind in _GATED or kind in _PLAIN
    if config.get("auto_map") and not known and not trust_remote_code:
        raise InputError(
            f"{file}: model_type {kind!r} needs code that comes with the model (auto_map); if you "
            "trust it, pass trust_remote_code (--trust-remote-code)"
        )
    if not known and not trust_remote_code:
        raise InputError(
            f"{file}: model_type {kind!r} is not known; its sizes would be a guess. Known are "
            f"{', '.join(sorted(_GATED | _PLAIN))}. Pass trust_remote_code (--trust-remote-code) "
            "to take its fields by their usual names, or give its sizes with --architectures"
        )
    return _architecture(file, config, kind)


def _architecture(file: Path, config: Mapping[str, Any], kind: str) -> ModelArchitecture:
    """Return the sizes of a checked config."""

    def number(*names: str) -> int | None:
        for name in names:
            value = config.get(name)
            if isinstance(value, bool) or value is None:
                continue
            if not isinstance(value, int):
                raise InputError(f"{file}: {name} is {value!r}; it must be a whole number")
            return value
        return None

    sizes: dict[str, int] = {}
    for field, names in _NAMES.items():
        value = number(*names)
        if value is None:
            raise InputError(f"{file}: none of {', '.join(names)} is given")
        sizes[field] = value
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    kv = number("num_key_value_heads", "num_kv_heads", "n_head_kv")
    if kv is None and config.get("multi_query_attention"):
        kv = number("multi_query_group_num") or 1
    if kv is None and config.get("multi_query"):
        kv = 1
    head_dim = number("head_dim", "kv_channels") or hidden // max(heads, 1)
    experts = number("num_local_experts", "num_experts", "n_routed_experts") or 0
    active = number("num_experts_per_tok", "num_experts_per_token") or 0
    width = number("moe_intermediate_size") if experts else None
    width = width or number("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
    if width is None:
        expansion = config.get("expansion_ratio", 4)
        width = int(hidden * expansion)
    activation = str(config.get("hidden_act", config.get("hidden_activation", "")))
    gated = kind in _GATED or (kind not in _PLAIN and activation in {"silu", "swiglu"})
    mlp: Literal["gated", "plain"] = "gated" if gated else "plain"
    quantization = config.get("quantization_config") or {}
    dtype = str(config.get("torch_dtype", config.get("dtype", "bfloat16")))
    weight = _BYTES.get(dtype, 2.0)
    if quantization:
        bits = quantization.get("bits", quantization.get("num_bits"))
        method = str(quantization.get("quant_method", ""))
        if not isinstance(bits, int) and method != "fp8":
            raise InputError(
                f"{file}: quantization {method!r} without a number of bits is not supported; give "
                "the model's sizes with --architectures"
            )
        weight = float(bits) / 8 if isinstance(bits, int) else 1.0
    # vLLM loads 32-bit checkpoints as 16-bit by default.
    return ModelArchitecture(
        num_layers=sizes["num_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv or heads,
        head_dim=head_dim,
        intermediate_size=width,
        vocab_size=sizes["vocab_size"],
        mlp=mlp,
        num_experts=experts,
        num_active_experts=active,
        dtype_bytes=min(weight, 2.0),
    )
