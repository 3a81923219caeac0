"""``samullm model``: what a checkpoint is, and on which GPUs it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from samullm_plugin.cli.output import Json, console, print_table, write_json
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.model.application import ModelSpec


def model(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="PATH|CONFIG.json|NAME",
            help="Folder of a model, its config.json, or the name of one: of the hub, if its files "
            "were downloaded, or bundled.",
        ),
    ],
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="Kind of GPU to fit it on, such as H100-80GB; repeatable. All known."),
    ] = None,
    tp: Annotated[str, typer.Option(help="Tensor-parallel sizes, comma separated.")] = "1,2,4,8",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Another longest sequence than the model's own.")
    ] = None,
    json: Json = False,
) -> None:
    """Show a model's parameters, bytes, KV cache and longest sequence, and where it fits."""
    from samullm_plugin.checkpoints.gpus import bundled_gpu, known_gpus

    kinds = [part for text in gpu or known_gpus() for part in text.split(",") if part]
    gpus = [bundled_gpu(name) for name in kinds]
    try:
        sizes = [int(part) for part in tp.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise InputError(f"--tp {tp!r}: write whole numbers of at least 1, such as 1,2")
    found, spec = _described(reference, max_model_len)
    found["fits"] = [entry for g in gpus for entry in _fits(spec, g, sizes)]
    ordered = {k: found[k] for k in (
        "parameters", "weight_bytes", "kv_cache_bytes_per_token", "kv_cache_groups",
        "max_model_len", "fits", "source", "not_modelled",
    )}  # fmt: skip
    if json:
        write_json(ordered)
        return
    _show(reference, ordered)


def _described(reference: str, longest: int | None) -> tuple[dict[str, Any], ModelSpec]:
    """Return what is known of a model, and the model with vLLM's default settings.

    Raises:
        InputError: if it is neither files on this machine nor a bundled name.
    """
    from dataclasses import asdict

    from samullm_plugin.checkpoints.models import bundled_model, described, find_checkpoint
    from samullm_plugin.model.application import ModelSpec

    path = find_checkpoint(reference)
    if path is None:
        spec = bundled_model(reference, max_model_len=longest)
        sizes = spec.architecture
        assert sizes is not None
        parameters = round(sizes.weight_bytes / sizes.dtype_bytes)
        source = "bundled figures"
        notes: tuple[str, ...] = ()
        weights = sizes.weight_bytes
    else:
        description = described(path, ask=True)
        sizes = description.architecture()
        length = longest or description.max_model_len
        spec = ModelSpec(reference, length, sizes)
        parameters, source = description.parameters, description.source
        notes, weights = description.not_modelled, description.weight_bytes()
    groups = []
    for kind in sizes.kv_cache_layers:
        entry = {k: v for k, v in asdict(kind).items() if v}
        entry["bytes_per_token"] = kind.bytes_per_token
        groups.append(entry)
    return {
        "parameters": parameters,
        "weight_bytes": round(weights),
        "kv_cache_bytes_per_token": round(sizes.kv_bytes_per_token),
        "kv_cache_groups": groups,
        "max_model_len": spec.max_model_len,
        "source": source,
        "not_modelled": list(notes),
    }, spec


def _fits(spec: ModelSpec, gpu: Any, sizes: list[int]) -> list[dict[str, object]]:
    """Return the sizes at which a model fits on a kind of GPU."""
    from samullm_plugin.profiling.memory import assumed_pool_tokens, replica_groups, tokens_held

    assert spec.architecture is not None
    found: list[dict[str, object]] = []
    for size in sizes:
        pool = assumed_pool_tokens(spec, spec.architecture, gpu, size)
        if pool:
            groups = replica_groups(spec.architecture, spec.engine, size)
            found.append({"gpu": gpu.name, "tp": size,
                          "kv_cache_tokens": tokens_held(groups, spec, pool)})  # fmt: skip
    return found


def _show(reference: str, found: dict[str, Any]) -> None:
    """Print what is known as two tables."""
    out = console()
    out.print(f"{reference} (by {found['source']})", markup=False)
    out.print(
        f"  {found['parameters'] / 1e9:,.3f} billion parameters, "
        f"{found['weight_bytes'] / 1e9:,.2f} GB of weights, "
        f"{found['kv_cache_bytes_per_token']:,} bytes of KV cache a token, "
        f"sequences of up to {found['max_model_len']:,} tokens",
        markup=False,
    )
    print_table(
        ["Layers", "KV cache", "Window", "Bytes a token", "Bytes a sequence"],
        [
            (
                group["num_layers"],
                group["kind"],
                group.get("window_tokens"),
                f"{group['bytes_per_token']:,.0f}",
                f"{group['num_layers'] * group.get('state_bytes', 0):,.0f}",
            )
            for group in found["kv_cache_groups"]
        ],
        numbers=["Layers", "Window", "Bytes a token", "Bytes a sequence"],
    )
    print_table(
        ["GPU", "tp", "KV cache tokens"],
        [(f["gpu"], f["tp"], f"{f['kv_cache_tokens']:,}") for f in found["fits"]],
        title=None if found["fits"] else "it fits on none of these GPUs at these sizes",
        numbers=["tp", "KV cache tokens"],
    )
    out.print("Capacities are assumed: nobody has started this engine here", style="dim")
    for note in found["not_modelled"]:
        out.print(f"not modelled: {note}", markup=False)
