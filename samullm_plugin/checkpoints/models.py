"""Figures of well-known checkpoints, shipped with the project, and of HF configurations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from samullm_plugin.checkpoints.description import ModelDescription, describe, dtype_bytes
from samullm_plugin.checkpoints.families import FAMILIES
from samullm_plugin.checkpoints.hf_config import ConfigFile, read_config_file
from samullm_plugin.checkpoints.hub import snapshot
from samullm_plugin.checkpoints.parts import Matrix, Part
from samullm_plugin.checkpoints.quantization import online
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.model.application import EngineOptions, ModelSpec
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.kv_cache import KvCacheLayers


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


def bundled_architecture(
    model: str, engine: EngineOptions | None = None
) -> tuple[ModelArchitecture, int] | None:
    """Return a bundled model's figures and ``max_model_len``, or None if it is not bundled.

    Args:
        model: its name, with or without organisation.
        engine: settings of its engines; vLLM's defaults if None.

    Raises:
        InputError: for a type nobody knows, or a quantisation that engines cannot make themselves.
    """
    name = find_name(model, _table())
    if name is None:
        return None
    figures = dict(_table()[name])
    max_model_len = int(figures.pop("max_model_len"))
    sizes = ModelArchitecture(**figures)
    return (sizes if engine is None else _as_loaded(sizes, engine, Path(name))), max_model_len


def sizes_of(model: ModelSpec) -> ModelArchitecture:
    """Return the sizes of a model.

    Raises:
        InputError: if they are neither given nor bundled.
    """
    if model.architecture is not None:
        return model.architecture
    bundled = bundled_architecture(model.name)
    if bundled is None:
        raise InputError(
            f"model {model.name}: its sizes are not known; give the folder of its files as path, "
            "or a config.json as architecture"
        )
    return bundled[0]


def _as_loaded(sizes: ModelArchitecture, engine: EngineOptions, name: Path) -> ModelArchitecture:
    """Return figures of 16 bits as an engine holds them with these settings."""
    method, cache = engine.given("quantization"), str(engine.given("kv_cache_dtype") or "auto")
    size = sizes.dtype_bytes if engine.dtype == "auto" else dtype_bytes(engine.dtype, name)
    entry = size if cache == "auto" else dtype_bytes(cache, name)
    if not method and size == entry == sizes.dtype_bytes:
        return sizes
    outside = 2 * sizes.vocab_size * sizes.hidden_size
    experts = sizes.num_layers * sizes.num_experts * sizes.expert_params
    others = sizes.num_layers * sizes.matmul_params_per_layer - experts
    stored = (others + experts + outside) * size
    found = online(method, name) if isinstance(method, str) else None
    if found is not None:
        parts = (
            Part("layers", (Matrix("layers", others, 1),)),
            Part("experts", (Matrix("experts", experts, 1),), experts=True),
            Part("embedding and head", others=outside),
        )
        stored = sum(found.stored_bytes(part, size) for part in parts)
    heads = KvCacheLayers("full", sizes.num_layers, sizes.num_kv_heads, 2 * sizes.head_dim * entry)
    return replace(
        sizes,
        dtype_bytes=stored / (others + experts + outside),
        stored_bytes=stored,
        kv_cache=(heads,),
    )


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
    found = bundled_architecture(model, engine)
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


def read_checkpoint(
    path: Path, engine: EngineOptions | None = None
) -> tuple[ModelArchitecture, int]:
    """Return figures and longest length of a checkpoint, for an engine's settings.

    Args:
        path: its folder, or a ``config.json``.
        engine: settings of its engines; vLLM's defaults if None.

    Raises:
        InputError: naming file and field, or the feature that is not modelled.
    """
    description = described(path)
    return description.architecture(engine), description.max_model_len


def described(path: Path, *, ask: bool = False) -> ModelDescription:
    """Return what is known of a checkpoint, read once as long as its files stay as they are.

    Args:
        path: its folder, or a ``config.json``.
        ask: let transformers count the parameters of a checkpoint without weights here.

    Raises:
        InputError: as :func:`~samullm_plugin.checkpoints.description.describe`.
    """
    folder = path if path.is_dir() else path.parent
    stamps = []
    for name in (path.name, "config.json", "hf_quant_config.json", "tokenizer_config.json",
                 "model.safetensors.index.json", "model.safetensors"):  # fmt: skip
        try:
            status = (folder / name).stat()
        except OSError:
            continue
        stamps.append((name, status.st_mtime_ns, status.st_size))
    return _described(path, tuple(stamps), ask)


@lru_cache(maxsize=256)
def _described(path: Path, stamps: tuple[object, ...], ask: bool) -> ModelDescription:
    return describe(path, ask=ask)


def config_of(model: ModelSpec) -> ConfigFile | None:
    """Return a model's ``config.json``, read once as long as it stays as it is.

    Args:
        model: whose name means a model of the hub; a folder is meant by its path only.

    Returns:
        None if there is none on this machine, as for a folder that holds only a tokenizer.

    Raises:
        InputError: if it cannot be read.
    """
    revision = revision_of(model.engine)
    if model.path:
        place = find_checkpoint(model.path, revision=revision)
    else:
        place = snapshot(model.name, revision)
    if place is None:
        return None
    try:
        status = (place / "config.json" if place.is_dir() else place).stat()
    except OSError:
        return None
    return _config(place, (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=256)
def _config(place: Path, stamp: tuple[int, int]) -> ConfigFile:
    return read_config_file(place)


def reads_text_only(file: ConfigFile) -> bool:
    """Return whether a model is a language model that takes no images, audio or video."""
    marks = ("vision", "image", "video", "audio", "visual", "mm_", "img_")
    return file.text.kind in FAMILIES and not any(k.startswith(marks) for k in file.raw)


def find_checkpoint(
    reference: str, base: Path | None = None, revision: str = "main"
) -> Path | None:
    """Return where a checkpoint's files are on this machine; None: nowhere.

    Args:
        reference: a folder, a ``config.json``, or a hub id whose files were downloaded before.
        base: folder that relative paths start from; the working directory if None.
        revision: branch, tag or commit of a hub id.
    """
    path = (base or Path()) / Path(reference).expanduser()
    if path.is_dir() or path.is_file():
        return path
    return snapshot(reference, revision)


def checkpoint_of(model: ModelSpec) -> Path | None:
    """Return where the files are that a model's engines load, if they are on this machine."""
    return find_checkpoint(model.path or model.name, revision=revision_of(model.engine))


def revision_of(engine: EngineOptions) -> str:
    """Return the revision of a hub id that engines load."""
    return str(engine.given("revision") or "main")
