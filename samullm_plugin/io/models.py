"""Figures of well-known checkpoints, shipped with the project, and of HF configurations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from samullm_plugin.core.application import EngineOptions, ModelSpec
from samullm_plugin.core.architecture import ModelArchitecture
from samullm_plugin.errors import InputError, suggest


def short_name(model: str) -> str:
    """Return a model's name without organisation and in lower case, for comparing names."""
    return model.rstrip("/").rsplit("/", 1)[-1].lower()


def find_name(model: str, known: Iterable[str]) -> str | None:
    """Return the known name that means the same model, with or without its organisation."""
    names = list(known)
    if model in names:
        return model
    return next((name for name in names if short_name(name) == short_name(model)), None)


@cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    text = (files("samullm_plugin") / "data" / "models.json").read_text(encoding="utf-8")
    table: Mapping[str, Mapping[str, Any]] = json.loads(text)["models"]
    return table


def bundled_models() -> tuple[str, ...]:
    """Return the names of the models whose figures are bundled."""
    return tuple(_table())


def bundled_architecture(model: str) -> tuple[ModelArchitecture, int] | None:
    """Return a bundled model's figures and ``max_model_len``, or None if it is not bundled."""
    name = find_name(model, _table())
    if name is None:
        return None
    figures = dict(_table()[name])
    max_model_len = int(figures.pop("max_model_len"))
    return ModelArchitecture(**figures), max_model_len


def bundled_model(
    model: str, *, max_model_len: int | None = None, engine: EngineOptions | None = None
) -> ModelSpec:
    """Return a bundled model.

    Args:
        model: its name, with or without organisation.
        max_model_len: another length than the bundled one.
        engine: engine settings; vLLM's defaults if None.

    Raises:
        InputError: naming close matches.
    """
    found = bundled_architecture(model)
    if found is None:
        shorts = {short_name(name): name for name in _table()}
        hint = suggest(short_name(model), shorts)
        raise InputError(f"model {model}: its figures are not bundled{hint}")
    architecture, bundled_len = found
    return ModelSpec(
        find_name(model, _table()) or model,
        max_model_len or bundled_len,
        architecture,
        engine=engine or EngineOptions(),
    )


_PLAIN_MLP = ("gptj", "gpt_neox", "mpt", "gpt2", "opt", "bloom", "falcon", "phi", "starcoder2")
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


def read_hf_config(path: Path) -> tuple[ModelArchitecture, int | None]:
    """Return figures and longest length of a Hugging Face ``config.json`` (or its folder).

    Raises:
        InputError: naming file and field.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{file}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: must hold a JSON object")
    if isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}

    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return int(value)
        if default is None:
            raise InputError(
                f"{file}: none of {', '.join(names)} is there; write the figures under "
                "architecture instead"
            )
        return default

    hidden = number("hidden_size", "n_embd", "d_model")
    heads = number("num_attention_heads", "n_head", "n_heads")
    experts = number("num_local_experts", "num_experts", "n_routed_experts", default=0)
    plain = any(config.get("model_type", "").startswith(kind) for kind in _PLAIN_MLP)
    kv_default = number("multi_query_group_num", default=heads)
    wide = number("intermediate_size", "ffn_hidden_size", "n_inner", default=4 * hidden)
    architecture = ModelArchitecture(
        num_layers=number("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", default=kv_default),
        head_dim=number("head_dim", default=hidden // heads),
        intermediate_size=number("moe_intermediate_size", default=wide) if experts else wide,
        vocab_size=number("vocab_size", "padded_vocab_size"),
        mlp="plain" if plain else "gated",
        num_experts=experts,
        num_active_experts=number("num_experts_per_tok", default=0) if experts else 0,
        dtype_bytes=_BYTES.get(str(config.get("torch_dtype", config.get("dtype"))), 2.0),
    )
    length = number(
        "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", default=0
    )
    return architecture, length or None
