"""Adapters (LoRA): several of a model on one engine, checked against the model beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from samullm_plugin.checkpoints.hf_config import load_json
from samullm_plugin.checkpoints.weight_files import tensor_shapes
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.architecture import MLP_MATRICES, ModelArchitecture

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``max_lora_rank`` (``vllm/config/lora.py``)."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter.

    Attributes:
        folder: where it is.
        rank: the largest of its modules'.
    """

    folder: Path
    rank: int


def read_adapter(folder: Path, model: ModelSpec, where: str) -> Adapter:
    """Return an adapter after checking that it is one of a model.

    Args:
        folder: with ``adapter_config.json`` and the weights.
        model: that it is to be used with.
        where: file and field, for messages.

    Raises:
        InputError: if it is none, is of another model, or is of a kind that vLLM does not serve.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise InputError(
            f"{where}: there is no adapter in {folder} (no adapter_config.json); give the folder "
            "that PEFT saved it to"
        )
    config = load_json(file, "an adapter's configuration")
    kind = str(config.get("peft_type", "LORA"))
    unserved = {
        "use_dora": bool(config.get("use_dora")),
        "modules_to_save": bool(config.get("modules_to_save")),
        "bias": config.get("bias", "none") != "none",
        "peft_type": kind != "LORA",
    }
    if wrong := [name for name, is_set in unserved.items() if is_set]:
        raise InputError(
            f"{where}: {file}: {wrong[0]} is {config[wrong[0]]!r}, and vLLM serves plain LoRA "
            "adapters only; merge the adapter into its model instead"
        )
    rank = config.get("r")
    ranks = [rank, *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(r, int) and r >= 1 for r in ranks):
        raise InputError(f"{where}: {file}: r is {rank!r}; it must be a whole number")
    if max(ranks) > RANKS[-1]:
        raise InputError(f"{where}: {file}: r is {max(ranks)}; vLLM serves up to {RANKS[-1]}")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file() and not (folder / "adapter_model.bin").is_file():
        raise InputError(f"{where}: {folder} holds no weights (adapter_model.safetensors)")
    if weights.is_file() and model.architecture is not None:
        _check_shapes(weights, model.architecture, model.name, where)
    return Adapter(folder, max(ranks))


def _check_shapes(weights: Path, sizes: ModelArchitecture, model: str, where: str) -> None:
    """Refuse an adapter whose matrices do not fit the model's."""
    expected = sizes.matrix_sizes
    for name, shape in tensor_shapes(weights).items():
        before, _, which = name.removesuffix(".weight").rpartition(".")
        if which not in ("lora_A", "lora_B") or len(shape) != 2:
            continue
        module = before.rpartition(".")[2]
        layer = before.partition("layers.")[2].partition(".")[0]
        place = f"{module} of layer {layer}"
        if layer.isdecimal() and int(layer) >= sizes.num_layers:
            raise InputError(
                f"{where}: {weights.parent} is an adapter of another model: it has {place}, and "
                f"{model} has {sizes.num_layers} layers"
            )
        if module not in expected or (sizes.num_experts and module in MLP_MATRICES):
            continue  # experts' matrices are kept in other shapes
        size, side = (shape[1], 0) if which == "lora_A" else (shape[0], 1)
        if size != expected[module][side]:
            what = "reads" if side == 0 else "writes"
            raise InputError(
                f"{where}: {weights.parent} is an adapter of another model: its {place} {what} "
                f"{size} numbers, that of {model} {expected[module][side]}"
            )


def adapted_model(
    model: ModelSpec, adapters: Sequence[Adapter], given: Mapping[str, Any], where: str
) -> ModelSpec:
    """Return a model whose engines hold all these adapters at once.

    So no request waits for another adapter's to end (vLLM's ``max_loras``), in plan and engine.

    Args:
        model: the model without.
        adapters: of all its nodes.
        given: engine arguments that the user wrote.
        where: file and model, for messages.

    Raises:
        InputError: if the user's arguments are too small for them.
    """
    count = len({a.folder for a in adapters})
    largest = max(adapters, key=lambda a: a.rank)
    rank = next(r for r in RANKS if r >= largest.rank)
    wanted: dict[str, object] = {"enable_lora": True, "max_loras": count, "max_lora_rank": rank}
    if given.get("enable_lora") is False:
        raise InputError(
            f"{where}.engine_args.enable_lora: false, but nodes have lora; leave it out"
        )
    for name, least, why in (
        ("max_loras", count, f"its nodes use {count} adapters, which stay on the engine together"),
        ("max_lora_rank", largest.rank, f"{largest.folder} has rank {largest.rank}"),
    ):
        value = given.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or value < least:
            raise InputError(
                f"{where}.engine_args.{name}: {value!r} is too small: {why}; raise it or leave it "
                "out"
            )
        wanted[name] = value
    extra = {**dict(model.engine.extra), **wanted}
    return replace(model, engine=replace(model.engine, extra=tuple(extra.items())))


def adapter_folder(written: str, path: Path) -> Path:
    """Return the folder that a node's ``lora`` means; relative ones start at its file."""
    return (path.parent / Path(written).expanduser()).resolve()
