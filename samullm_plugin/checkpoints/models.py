"""Figures of well-known checkpoints, shipped with the project, and of HF configurations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from samullm_plugin.checkpoints.model_config import read_model_config
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.model.application import EngineOptions, ModelSpec
from samullm_plugin.model.architecture import ModelArchitecture


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


def read_hf_config(
    path: Path, *, trust_remote_code: bool = False
) -> tuple[ModelArchitecture, int | None]:
    """Return figures and longest length of a Hugging Face ``config.json`` (or its folder).

    Args:
        path: the file or its folder.
        trust_remote_code: accept kinds of models that are not known, by their fields' usual names.

    Raises:
        InputError: naming file and field.
    """
    architecture = read_model_config(path, trust_remote_code=trust_remote_code)
    file = path / "config.json" if path.is_dir() else path
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= config.get("text_config") or {}
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    longest = next((config[n] for n in names if isinstance(config.get(n), int)), None)
    return architecture, longest
